"""`palinode evaluate`: rows of your own, or a benchmark, on a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from palinode.cli.console import listener, out, print_json, secret
from palinode.cli.options import (
    AllowPickle,
    Columns,
    Device,
    Json,
    Prompts,
    Quiet,
    benchmark_names,
    completion,
    metric_names,
)

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
            from palinode.cli.tables import score_table

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
            _show(found, output)
    if output is not None:
        secret(output, ANSWERS, of=output, as_json=as_json)


def _show(measurement: Any, output: Path | None) -> None:
    from palinode.cli.tables import benchmark_notes, benchmark_table

    out().print(benchmark_table(measurement.scores, title=_title(measurement.record)))
    for note in benchmark_notes(measurement.scores):
        out().print(note, soft_wrap=True)
    if output is not None:
        out().print(f"{output}: scores.json and the outcomes of each set", soft_wrap=True)


def _benchmark(name: str | None) -> Any:
    """Return the benchmark of that name; rows of one's own where none is named."""
    from palinode.benchmarks import BENCHMARKS
    from palinode.errors import RecipeError

    key = name or "own"
    if key not in BENCHMARKS:
        raise RecipeError(f"there is no benchmark {key!r}; there are {', '.join(BENCHMARKS)}")
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
