"""Verbs that measure: `evaluate` scores models, `audit` attacks one, `compare` holds methods together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palinode.cli.console import (
    after_audit,
    answer,
    ending,
    listener,
    secret,
    secret_workspace,
)
from palinode.cli.options import (
    DryRun,
    Json,
    Key,
    Quiet,
    completion,
    takes,
)
from palinode.errors import RecipeError
from palinode.pipeline.recipe import named
from palinode.records import Score
from palinode.settings import AuditSettings, EvaluationSettings

if TYPE_CHECKING:
    from palinode.pipeline.audit_run import AuditPlan
    from palinode.report.content import Block

ANSWERS = "questions and answers"
BEYOND = {"split", "options", "metrics", "against", "judge", "key_variable", "general", "general_include"}
"""Settings that go beyond the four basic scores of rows."""


class EvaluationOptions(EvaluationSettings):
    """What is asked, and how."""

    data: str | None = None
    """Rows of your own (JSONL, JSON, CSV, Parquet, text or hub data set); with --benchmark the folder of its
    files. [default: the benchmark's hub data set]"""
    benchmark: str | None = None
    """tofu, restor, muse, rwku, … or own; see palinode list benchmarks."""
    retain: str | None = None
    """Rows of your own that must be kept."""
    holdout: str | None = None
    """Rows of your own, like the forget rows, that no model has seen."""


@takes(
    Key("max_rows", help="Rows of each set. [default: 400; all of a benchmark]"),
    Key("max_new_tokens", help="Length limit of answers. [default: 200, or the benchmark's]"),
    Key("max_length", help="Tokens of a row, prompt included. [default: 512, or the benchmark's]"),
    Key(
        "options",
        flag="option",
        help="An option of the benchmark, as in prompt=plain; repeatable.",
        kind=list[str],
        read=lambda texts: _pairs(texts),
    ),
    Key("general", flag="lm-eval"),
    Key("general_include", flag="lm-eval-include"),
    of=EvaluationOptions,
    only=[name for name in EvaluationOptions.model_fields if name != "batch_rows"],
)
def evaluate(
    settings: EvaluationOptions,
    model: Annotated[str, typer.Argument(help="The model: a folder, or a hub id[@revision].")],
    *,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score what a model does on rows, or a benchmark.

    On rows: answer probability, ROUGE-L recall, exact memorization and extraction
    strength. With --benchmark, --against, --holdout and the like all metrics that the data allows.
    """
    from palinode import jobs
    from palinode.evaluation.evaluate import evaluate as ask_rows
    from palinode.report.content import Paragraph

    hear, data = listener(quiet=quiet), settings.data
    benchmark, retain, holdout = settings.benchmark, settings.retain, settings.holdout
    beyond = settings.open_unlearning or any(getattr(settings, name) for name in BEYOND)
    if benchmark or retain or holdout or beyond:
        found = jobs.evaluate_benchmark(
            model, benchmark or "own", data, retain=retain, holdout=holdout, settings=settings, listener=hear
        )
        record = found.record
        split = "" if record["benchmark"] == "own" else f" {record['split']}"
        said = _scores_told(found.scores, f"{record['benchmark']}{split} on {record['model']['location']}")
        if settings.output is not None:
            said.append(Paragraph(f"{settings.output}: scores.json and the outcomes of each set"))
        answer(record, said, as_json=as_json)
    elif data is None:
        raise RecipeError("evaluate needs --data: a file of rows, or the folder of the benchmark's files")
    else:
        scores = ask_rows(model, data, settings, listener=hear).scores
        facts = {name: asdict(score) for name, score in scores.items()}
        answer(facts, _scores_told({"rows": scores}, ""), as_json=as_json)
    if settings.output is not None:
        secret(settings.output, ANSWERS, of=settings.output, as_json=as_json)


def _scores_told(scores: Mapping[str, Mapping[str, Score]], title: str) -> list[Block]:
    from palinode.cli.console import benchmark_notes, scores_grid
    from palinode.report.content import Items

    return [scores_grid(scores, title=title), Items([*benchmark_notes(scores)])]


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise RecipeError(f"option {text!r} is not NAME=VALUE")
        pairs[name.strip()] = value.strip()
    return pairs


class AuditOptions(AuditSettings):
    """What is audited, how, and where it is written."""

    against: str
    """The reference model: retrained without the forget set, or the base checkpoint."""
    forget: str
    """The forget set: JSONL, JSON, CSV, Parquet or text; file or hub data set."""
    output: Path
    """Folder for report.html, audit.md, audit.json and the results so far."""
    target: str | None = None
    """The model before unlearning; `inside`, `pair` and `traces` need it, and it is attacked too."""
    retain: str | None = None
    """Retain rows, for relearning from them alone."""
    holdout: str | None = None
    """Rows that no model has seen, for the membership attacks."""


@takes(of=AuditOptions)
def audit(
    settings: AuditOptions,
    model: Annotated[str, typer.Argument(help="The model to be audited: a folder, or a hub id[@revision].")],
    *,
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            "--yardstick",
            help="What --against is: retrained or base.",
            autocompletion=completion(("retrained", "base")),
        ),
    ] = "retrained",
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Attack a model and a reference model, and compare.

    Looks for evidence that a model knows more, or less, of a forget set than the reference model does.
    """
    from palinode import jobs

    if dry_run:
        models = named(audited=model, reference=settings.against, target=settings.target)
        rows = named(**settings.model_dump(include={"forget", "retain", "holdout"}))
        _show_audit_plan(jobs.plan_audit(models, rows, reference, settings), as_json=as_json)
        return
    places = settings.model_dump(include={"against", "forget", "output", "target", "retain", "holdout"})
    kind: Any = reference  # it is checked there
    found = jobs.audit(model, **places, kind=kind, settings=settings, listener=listener(quiet=quiet))
    _show_audit(found.record, model, settings.output, as_json=as_json)
    secret(settings.output / "results", "row by row", of=settings.output, as_json=as_json)
    if not found.passed:
        raise typer.Exit(1)


def _show_audit(record: Mapping[str, Any], model: str, output: Path, *, as_json: bool) -> None:
    from palinode.report.audit_report import audit_brief
    from palinode.report.verdicts import audit_verdict

    answer(record, audit_brief(record), as_json=as_json)
    ending(
        verdict=audit_verdict(record).as_json(),
        places={"Page": f"{output / 'report.html'} (beside audit.md and audit.json)"},
        following=after_audit(model, output),
        as_json=as_json,
    )


def _show_audit_plan(plan: AuditPlan, *, as_json: bool) -> None:
    from palinode.pipeline.audit_run import open_models
    from palinode.report.audit_report import audit_plan_blocks

    open_models(plan)
    costs = {name: asdict(cost) for name, cost in plan.costs().items()}
    content = {"models": plan.models, "cost_of_each_model": costs, "not_tested": plan.reasons()}
    answer(content, audit_plan_blocks(len(plan.models), costs, plan.reasons()), as_json=as_json)


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
    """Compare methods: one budget, one search, one rule."""
    from palinode.compare.comparing import FILES, PAGE, describe_plan, plan_comparison
    from palinode.compare.comparing import compare as run_comparison
    from palinode.compare.comparison_recipe import load_comparison
    from palinode.report.comparison_report import comparison_brief

    folder = json.dumps(str(output), ensure_ascii=False)  # as a TOML text
    given = [*(changes or []), *([f"output.folder={folder}"] if output else [])]
    loaded = load_comparison(recipe, given)
    if dry_run:
        planned = plan_comparison(loaded)
        answer(planned, "\n".join(describe_plan(planned)), as_json=as_json)
        return
    result = run_comparison(loaded, listener=listener(quiet=quiet))
    answer(result.table, comparison_brief(result.table), as_json=as_json)
    files = f"{result.output} ({', '.join(FILES)})"
    ending(places={"Folder": files, "Page": result.output / PAGE}, as_json=as_json)
    secret_workspace(loaded.workspace, result.output, "rows, vectors", as_json=as_json)
