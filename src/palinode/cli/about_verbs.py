"""Verbs that look: `evaluate`, `audit` and `compare` measure models; `doctor`, `report` and `list` tell of
inputs and machine, of what a run left, and of what there is.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any

import typer

from palinode.cli.console import (
    after_audit,
    answer,
    ending,
    given,
    listener,
    print_json,
    secret,
    secret_workspace,
    warn,
)
from palinode.cli.options import keys, lengths_alike, takes
from palinode.errors import RecipeError, meant
from palinode.pipeline.recipe import laid_over, named
from palinode.records import Score
from palinode.settings import AuditSettings, EvaluationSettings, read_settings

if TYPE_CHECKING:
    from palinode.pipeline.doctor import DoctorFinding
    from palinode.report.content import Block, Tone

SIGNS: dict[str, tuple[str, Tone | None]] = {
    "ok": ("✓", "good"),
    "note": ("·", None),
    "warn": ("!", "unsure"),
    "fail": ("✗", "bad"),
}


@takes(*keys("doctor"))
def doctor(told: dict[str, Any], *, recipe: Path | None = None, changes: list[str] | None = None) -> None:
    """Tell whether a run would work, and what to mend.

    The exit code is 1 when something fails. Without options it looks at libraries and machine alone.
    """
    from palinode.pipeline.doctor import examine_equipment, examine_run

    lengths_alike(told)
    content = laid_over(read_settings(recipe, "recipe") if recipe else {}, told)
    place = content.get("output", {}).get("folder") or "."
    findings = [*examine_equipment(Path(place))]
    if changes or any(content.get(key) for key in ("models", "data", "output", "tracker")):
        findings += examine_run(content, changes or [], listener=listener())
    counts = Counter[str](finding.state for finding in findings)
    whole = {"ok": not counts["fail"], "counts": {name: counts[name] for name in SIGNS}}
    facts = {**whole, "findings": [asdict(finding) for finding in findings]}
    answer(facts, _told(findings, counts, looked_at_run=bool(content)))
    if counts["fail"]:
        raise typer.Exit(1)


def _told(findings: Sequence[DoctorFinding], counts: Counter[str], *, looked_at_run: bool) -> Iterator[Block]:
    """Yield the findings by area, and what they come to."""
    from palinode.report.content import Grid, GridCell, Row

    for area, members in groupby(findings, key=lambda finding: finding.area):
        rows: list[Row] = [
            [
                GridCell(f"{SIGNS[found.state][0]} {found.state}", tone=SIGNS[found.state][1]),
                found.name,
                GridCell(found.text, f"→ {found.fix}" if found.fix else None),
            ]
            for found in members
        ]
        yield Grid(area, ["", "", ""], rows, text_columns=3)
    text = "All is well."
    if failures := counts["fail"]:
        text = f"{failures} thing{' fails' if failures == 1 else 's fail'}; what to do stands beside each."
    elif warnings := counts["warn"]:
        text = f"Nothing fails; {warnings} thing{' needs' if warnings == 1 else 's need'} a look."
    if not looked_at_run:
        text += " To have a run looked at, name --target, --base, --forget and --output, or --recipe."
    yield text


def report(
    place: Path, output: Path | None = None, without_texts: bool = False, audit: Path | None = None
) -> None:
    """Write the report of a run as one self-contained page.

    HTML, and the same as Markdown and JSON.
    """
    from dataclasses import replace

    from palinode.pipeline.reporting import default_page, gather, refresh, suffixes_for, write_reports
    from palinode.pipeline.signing import SIGNATURE
    from palinode.report.reports import report_content
    from palinode.report.run_report import marked

    facts = gather(place, audit=audit)
    if facts.answers_gone and not without_texts:
        warn("the outcomes are not there any more, so the report has no answers")
    facts = replace(facts, texts=facts.texts and not without_texts)
    content, whole = report_content(facts), facts.kind == "unlearn" and output is None
    if given("as_json") and output is None:
        print_json(content)
        return
    page = output or default_page(facts, place)
    suffixes = suffixes_for(facts, output)
    if whole:
        refresh(facts, place)
        if (place / SIGNATURE).exists():
            warn(f"{place} was signed before this; sign it anew, for the old signature covers the old files")
    else:
        write_reports(facts, page, suffixes)
    handed_over = [f"{place}: README.md, record.json and the report without texts"] if whole else []
    pages = [str(page.with_suffix(suffix)) for suffix in suffixes]
    answer(content, "\n".join([marked(content), *handed_over, *pages]))


KINDS = ("methods", "transforms", "benchmarks", "metrics", "attacks")


def list_everything(kind: str | None = None) -> None:
    """Name methods, transforms, benchmarks, metrics, attacks."""

    known = {form: name for name in KINDS for form in (name, name.removesuffix("s"))}
    wanted = known.get(kind.lower()) if kind else None
    if kind and not wanted:
        raise RecipeError(f"there is no list of {kind}; there are {', '.join(KINDS)}{meant(kind, known)}")
    own = {"attacks": attack_tests()} if wanted == "attacks" else listings()
    listed = {name: lines for name, lines in own.items() if wanted in (None, name)}
    told, room = [], shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    for name, lines in listed.items():
        width = max(map(len, lines), default=0)
        fill = TextWrapper(max(room, width + 30), subsequent_indent=" " * (width + 4)).fill
        told += [f"{name}:", *(fill(f"  {one:{width}}  {description}") for one, description in lines.items())]
    answer(listed, "\n".join(told))


def listings() -> dict[str, dict[str, str]]:
    """Return each method, transform, benchmark and metric with a line about it, by kind."""
    from palinode.benchmarks import BENCHMARKS
    from palinode.methods import METHODS
    from palinode.methods.transforms import TRANSFORMS
    from palinode.metrics.table import ATTACKS, COMPARISONS, METRICS

    return {
        "methods": {name: method.summary for name, method in METHODS.items()},
        "transforms": {name: f"{one.summary}: {one.formula}" for name, one in TRANSFORMS.items()},
        "benchmarks": {
            **{name: f"{one.description} ({', '.join(one.splits)})" for name, one in BENCHMARKS.items()},
            "demo": "an invented world whose truth is known; run by palinode demo",
        },
        "metrics": {
            **{name: metric.description for name, metric in METRICS.items()},
            **COMPARISONS,
            **{f"auc_{name}": f"membership attack {attack.description}" for name, attack in ATTACKS.items()},
        },
    }


def attack_tests() -> dict[str, str]:
    """Return each test of each attack with a line about it, and how often it told right; needs torch."""
    from palinode.audit.attacks import tests_by_key
    from palinode.audit.policy import told_right

    return {
        key: f"{attack.title}: {test.title}" + (f"; {told_right()[key]}" if key in told_right() else "")
        for key, (attack, test) in tests_by_key().items()
    }


ANSWERS = "questions and answers"
BEYOND = {"split", "options", "metrics", "against", "judge", "key_variable", "general", "general_include"}
"""Settings that go beyond the four basic scores of rows."""


@takes(
    *keys("evaluate"),
    of=EvaluationSettings,
    only=[name for name in EvaluationSettings.model_fields if name != "batch_rows"],
)
def evaluate(
    settings: EvaluationSettings,
    model: str,
    data: str | None = None,
    benchmark: str | None = None,
    retain: str | None = None,
    holdout: str | None = None,
) -> None:
    """Score what a model does on rows, or a benchmark.

    On rows: answer probability, ROUGE-L recall, exact memorization and extraction
    strength. With --benchmark, --against, --holdout and the like all metrics that the data allows.
    """
    from palinode import jobs
    from palinode.evaluation.evaluate import evaluate as ask_rows

    hear = listener()
    beyond = settings.open_unlearning or any(getattr(settings, name) for name in BEYOND)
    if benchmark or retain or holdout or beyond:
        found = jobs.evaluate_benchmark(
            model, benchmark or "own", data, retain=retain, holdout=holdout, settings=settings, listener=hear
        )
        record = found.record
        split = "" if record["benchmark"] == "own" else f" {record['split']}"
        said = _scores_told(found.scores, f"{record['benchmark']}{split} on {record['model']['location']}")
        if settings.output is not None:
            said.append(f"{settings.output}: scores.json and the outcomes of each set")
        answer(record, said)
    elif data is None:
        raise RecipeError("evaluate needs --data: a file of rows, or the folder of the benchmark's files")
    else:
        scores = ask_rows(model, data, settings, listener=hear).scores
        facts = {name: asdict(score) for name, score in scores.items()}
        answer(facts, _scores_told({"rows": scores}, ""))
    if settings.output is not None:
        secret(settings.output, ANSWERS, of=settings.output)


def _scores_told(scores: Mapping[str, Mapping[str, Score]], title: str) -> list[Block]:
    from palinode.cli.console import benchmark_notes, scores_grid

    return [scores_grid(scores, title=title), [*benchmark_notes(scores)]]


@takes(of=AuditSettings)
def audit(
    settings: AuditSettings,
    model: str,
    against: str,
    forget: str,
    output: Path,
    target: str | None = None,
    retain: str | None = None,
    holdout: str | None = None,
    *,
    reference: str = "retrained",
    dry_run: bool = False,
) -> None:
    """Attack a model and a reference model, and compare.

    Looks for evidence that a model knows more, or less, of a forget set than the reference model does.
    """
    from palinode import jobs
    from palinode.pipeline.audit_run import open_audit
    from palinode.report.audit_report import audit_brief, audit_plan_blocks
    from palinode.report.verdicts import audit_verdict

    rows = named(forget=forget, retain=retain, holdout=holdout)
    if dry_run:
        models = named(audited=model, reference=against, target=target)
        plan = jobs.plan_audit(models, rows, reference, settings)
        open_audit(plan, output)
        costs, left_out = {name: asdict(cost) for name, cost in plan.costs().items()}, plan.reasons()
        content = {"models": plan.models, "cost_of_each_model": costs, "not_tested": left_out}
        answer(content, audit_plan_blocks(len(plan.models), costs, left_out))
        return
    places: Any = {**rows, "against": against, "output": output, "target": target, "kind": reference}
    found = jobs.audit(model, **places, settings=settings, listener=listener())
    answer(found.record, audit_brief(found.record))
    ending(
        verdict=audit_verdict(found.record).as_json(),
        places={"Page": f"{output / 'report.html'} (beside audit.md and audit.json)"},
        following=after_audit(model, output),
    )
    secret(output / "results", "row by row", of=output)
    if not found.passed:
        raise typer.Exit(1)


def compare(
    recipe: Path, changes: list[str] | None = None, output: Path | None = None, dry_run: bool = False
) -> None:
    """Compare methods: one budget, one search, one rule."""
    from palinode.compare.comparing import FILES, PAGE, describe_plan, plan_comparison
    from palinode.compare.comparing import compare as run_comparison
    from palinode.compare.comparison_recipe import load_comparison
    from palinode.report.comparison_report import comparison_brief

    folder = json.dumps(str(output), ensure_ascii=False)  # as a TOML text
    loaded = load_comparison(recipe, [*(changes or []), *([f"output.folder={folder}"] if output else [])])
    if dry_run:
        planned = plan_comparison(loaded)
        answer(planned, "\n".join(describe_plan(planned)))
        return
    result = run_comparison(loaded, listener=listener())
    answer(result.table, comparison_brief(result.table))
    files = f"{result.output} ({', '.join(FILES)})"
    ending(places={"Folder": files, "Page": result.output / PAGE})
    secret_workspace(loaded.workspace, result.output, "rows, vectors")
