"""Verbs that measure: `evaluate` scores models, `audit` attacks one, `compare` holds methods together."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palinode.cli.console import listener, out, print_json, secret, secret_workspace
from palinode.cli.options import (
    AllowPickle,
    Columns,
    Device,
    DryRun,
    Json,
    Prompts,
    Quiet,
    Seed,
    benchmark_names,
    completion,
    metric_names,
)

if TYPE_CHECKING:
    from palinode.compare import CompareRecipe
    from palinode.compare.comparison_recipe import ComparisonRecipe
    from palinode.report.content import Block

ANSWERS = "questions and answers"


def evaluate(
    model: Annotated[str, typer.Argument(help="The model: a folder, or a hub id[@revision].")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows of your own (JSONL, JSON, CSV, Parquet, text or hub data set); with --benchmark the "
            "folder of its files. [default: the benchmark's hub data set]"
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="tofu, restor, muse or own; see palinode list benchmarks.",
            autocompletion=completion(benchmark_names),
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Part of the benchmark, such as forget01. [default: its first]")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", help="An option of the benchmark, as in prompt=plain; repeatable."),
    ] = None,
    retain: Annotated[str | None, typer.Option(help="Rows of your own that must be kept.")] = None,
    holdout: Annotated[
        str | None, typer.Option(help="Rows of your own, like the forget rows, that no model has seen.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The retrained model to compare with, or an open-unlearning log.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Judge of the answers: overlap, offline:FOLDER or URL#MODEL.")
    ] = None,
    key_variable: Annotated[
        str | None,
        typer.Option(
            help="Environment variable with the key of a judge at a URL. [default: OPENAI_API_KEY for "
            "https://api.openai.com, none for any other]"
        ),
    ] = None,
    lm_eval: Annotated[str | None, typer.Option(help="General ability by lm-eval, as in mmlu,gsm8k.")] = None,
    lm_eval_include: Annotated[
        Path | None,
        typer.Option(help="Folder with lm-eval tasks of your own, or the YAML file of one."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Only these metrics, with commas between them; every is all of them.",
            autocompletion=completion(metric_names),
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write what the model did: with a benchmark a folder with scores.json, else one file."
        ),
    ] = None,
    open_unlearning: Annotated[
        Path | None, typer.Option(help="Write a log in open-unlearning's form to this file too.")
    ] = None,
    open_unlearning_prompts: Annotated[
        bool,
        typer.Option(
            "--open-unlearning-prompts",
            help="Score all that the chat template writes after an answer, as open-unlearning does, and not "
            "only the end of the turn.",
        ),
    ] = False,
    max_rows: Annotated[
        int | None, typer.Option(help="Rows of each set. [default: 400; all of a benchmark]")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit of answers. [default: 200, or the benchmark's]")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a row, prompt included. [default: 512, or the benchmark's]")
    ] = None,
    columns: Columns = None,
    allow_pickle: AllowPickle = False,
    prompts: Prompts = None,
    device: Device = "auto",
    seed: Annotated[
        int, typer.Option(help="Seeds sampling, intervals and the judge.", min=0, max=2**32 - 1)
    ] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score what a model does on rows, or a benchmark.

    On rows: answer probability, ROUGE-L recall, exact memorization and extraction
    strength. With --benchmark, --against, --holdout and the like all metrics that the data allows.
    """
    from palinode.data import parse_columns
    from palinode.evaluation.evaluate import EvaluationSettings, first_process
    from palinode.pipeline.recipe import checked_settings, prompt_style
    from palinode.pipeline.steps import evaluate_file

    limits = {"max_rows": max_rows, "max_new_tokens": max_new_tokens, "max_length": max_length}
    given = {
        "split": split,
        "options": _pairs(options or ()),
        "metrics": _names(metrics),
        "against": against,
        "judge": judge,
        "key_variable": key_variable,
        "general": _names(lm_eval),
        "general_include": lm_eval_include,
        "open_unlearning": open_unlearning,
    }
    settings = {
        **given,
        **{name: limit for name, limit in limits.items() if limit is not None},
        "style": prompt_style(prompts),
        "allow_pickle": allow_pickle,
        "open_unlearning_prompts": open_unlearning_prompts,
        "device": device,
        "seed": seed,
    }
    named = parse_columns(columns) if columns else None
    if not any((benchmark, retain, holdout, *given.values())):
        scores = evaluate_file(
            model,
            _data(data, None, "evaluate"),
            settings,
            output=output,
            columns=named,
            listener=listener(quiet=quiet),
        )
        if as_json:
            print_json({name: asdict(score) for name, score in scores.items()})
        else:
            from palinode.cli.console import score_table

            out().print(score_table(scores))
    else:
        from palinode.evaluation.benchmark import Places
        from palinode.evaluation.evaluate import evaluate_benchmark

        chosen = _benchmark(benchmark)
        places = Places(
            data=_data(data, chosen.hub, chosen.name),
            retain=_own_only(retain, "--retain", chosen.name),
            holdout=_own_only(holdout, "--holdout", chosen.name),
            columns=named,
        )
        checked = checked_settings(EvaluationSettings, {**settings, "output": output})
        found = evaluate_benchmark(model, chosen, places, checked, listener=listener(quiet=quiet))
        if not first_process():
            return
        if as_json:
            print_json(found.record)
        else:
            _show_scores(found, output)
    if output is not None:
        secret(output, ANSWERS, of=output, as_json=as_json)


def _show_scores(measurement: Any, output: Path | None) -> None:
    from palinode.cli.console import benchmark_notes, benchmark_table

    out().print(benchmark_table(measurement.scores, title=_title(measurement.record)))
    for note in benchmark_notes(measurement.scores):
        out().print(note, soft_wrap=True)
    if output is not None:
        out().print(f"{output}: scores.json and the outcomes of each set", soft_wrap=True)


def _benchmark(name: str | None) -> Any:
    """Return the benchmark of that name; rows of one's own where none is named."""
    from palinode.benchmarks import BENCHMARKS
    from palinode.errors import RecipeError, meant

    key = name or "own"
    if key not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise RecipeError(f"there is no benchmark {key!r}; there are {known}{meant(key, BENCHMARKS)}")
    return BENCHMARKS[key]


def _data(data: str | None, hub: str | None, what: str) -> str:
    from palinode.errors import RecipeError

    if data is None and hub is None:
        raise RecipeError(f"{what} needs --data: a file of rows, or the folder of the benchmark's files")
    return data or hub or ""


def _own_only(value: str | None, option: str, benchmark: str) -> str | None:
    from palinode.errors import RecipeError

    if value is not None and benchmark != "own":
        raise RecipeError(f"{option} is for rows of your own; {benchmark} has its own sets")
    return value


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    from palinode.errors import RecipeError

    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise RecipeError(f"option {text!r} is not NAME=VALUE")
        pairs[name.strip()] = value.strip()
    return pairs


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _title(record: Any) -> str:
    split = "" if record["benchmark"] == "own" else f" {record['split']}"
    return f"{record['benchmark']}{split} on {record['model']['location']}"


def audit(
    model: Annotated[str, typer.Argument(help="The model to be audited: a folder, or a hub id[@revision].")],
    against: Annotated[
        str,
        typer.Option(help="The reference model: retrained without the forget set, or the base checkpoint."),
    ],
    forget: Annotated[
        str, typer.Option(help="The forget set: JSONL, JSON, CSV, Parquet or text; file or hub data set.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for report.html, audit.md, audit.json and the results so far.")
    ],
    reference: Annotated[
        str, typer.Option("--reference", "--yardstick", help="What --against is: retrained or base.")
    ] = "retrained",
    target: Annotated[
        str | None, typer.Option(help="The model before unlearning, to show what the attacks find in it.")
    ] = None,
    retain: Annotated[str | None, typer.Option(help="Retain rows, for relearning from them alone.")] = None,
    holdout: Annotated[
        str | None, typer.Option(help="Rows that no model has seen, for the membership attacks.")
    ] = None,
    paraphrases: Annotated[
        str | None,
        typer.Option(
            help="Column of the forget rows, or file with a row for each. [default: paraphrased_question]"
        ),
    ] = None,
    lookalikes: Annotated[
        str | None,
        typer.Option(
            help="Rows like the forget set. [default: made of perturbed_answer or paraphrased_answer]"
        ),
    ] = None,
    attacks: Annotated[
        str | None, typer.Option(help="Only these attacks, with commas between them. [default: all]")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="quick, standard or full. [default: standard]")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="A TOML policy: margins, budget, what must be run.")
    ] = None,
    columns: Columns = None,
    allow_pickle: AllowPickle = False,
    prompts: Prompts = None,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Attack a model and a reference model, and compare.

    Looks for evidence that a model knows more, or less, of a forget set than the reference model does.
    """
    from palinode.data import parse_columns
    from palinode.errors import RecipeError, meant
    from palinode.jobs import AuditSettings
    from palinode.jobs import audit as run_audit
    from palinode.pipeline.recipe import prompt_style

    if reference not in ("retrained", "base"):
        raise RecipeError(
            f"--reference is {reference!r}; say retrained or base{meant(reference, ('retrained', 'base'))}"
        )
    found = run_audit(
        model,
        against=against,
        forget=forget,
        output=output,
        kind="base" if reference == "base" else "retrained",
        target=target,
        retain=retain,
        holdout=holdout,
        settings=AuditSettings(
            attacks=[name.strip() for name in attacks.split(",")] if attacks else (),
            budget=budget,
            policy=policy,
            paraphrases=paraphrases,
            lookalikes=lookalikes,
            columns=parse_columns(columns) if columns else None,
            style=prompt_style(prompts),
            allow_pickle=allow_pickle,
            device=device,
            seed=seed,
        ),
        command=shlex.join(["palinode", *sys.argv[1:]]),
        listener=listener(quiet=quiet),
    )
    if as_json:
        print_json(found.record)
    else:
        _show_audit(found.record, output)
    secret(output / "results", "row by row", of=output, as_json=as_json)
    if not found.passed:
        raise typer.Exit(1)


def _show_audit(record: Mapping[str, Any], output: Path) -> None:
    from palinode.report.audit_report import audit_brief
    from palinode.report.content import show

    show(audit_brief(record), out())
    out().print(f"{output}: report.html, audit.md and audit.json", soft_wrap=True)


def compare(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe of a comparison.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one key of the recipe, as in budget.steps=200; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the tables. [default: the recipe's]")
    ] = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare methods: one budget, one search, one rule.

    With a section axis in the recipe: one comparison at each value of a key. With a section requests: erasure
    requests carried out one after another and undone in another order.
    """
    from palinode.compare import load_comparison
    from palinode.jobs import compare as run_comparison
    from palinode.report.content import show

    given = [*(changes or []), *([f"output.folder={_quoted(output)}"] if output else [])]
    loaded = load_comparison(recipe, given)
    kind = _kind_of(loaded.comparison)
    if dry_run:
        planned = kind.plan(loaded)
        if as_json:
            print_json(planned)
            return
        _tell(kind.describe(planned))
        return
    command = shlex.join(["palinode", *sys.argv[1:]])
    result = run_comparison(loaded, command=command, listener=listener(quiet=quiet))
    if as_json:
        print_json(result.table)
    else:
        show(kind.brief(result.table), out())
        _tell([f"{result.output}: {', '.join(kind.files)}"])
    secret_workspace(loaded.workspace, result.output, "rows, vectors", as_json=as_json)


def _quoted(path: Path) -> str:
    """Return a path as a TOML text."""
    import json

    return json.dumps(str(path), ensure_ascii=False)


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        out().print(line, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a recipe asks for: how it is planned and told."""

    plan: Callable[[CompareRecipe], dict[str, Any]]
    describe: Callable[[dict[str, Any]], Iterable[str]]
    brief: Callable[[Mapping[str, Any]], Iterable[Block]]
    files: Sequence[str]


def _kind_of(comparison: ComparisonRecipe) -> _Kind:
    """Return what the recipe asks for; imported when it is known."""
    if comparison.requests:
        from palinode.compare import requests
        from palinode.report.comparison_report import requests_brief

        return _Kind(
            requests.plan_requests,
            requests.describe_requests,
            requests_brief,
            requests.FILES,
        )
    if comparison.axis:
        from palinode.compare import axis
        from palinode.report.comparison_report import axis_brief

        return _Kind(
            axis.plan_axis,
            axis.describe_axis,
            axis_brief,
            axis.FILES,
        )
    from palinode.compare import comparing
    from palinode.report.comparison_report import comparison_brief

    return _Kind(
        comparing.plan_comparison,
        comparing.describe_plan,
        comparison_brief,
        comparing.FILES,
    )
