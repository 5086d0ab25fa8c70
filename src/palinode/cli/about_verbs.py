"""Verbs that tell: `doctor` of inputs and machine, `report` of what a run left, `list` of what there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palinode.cli.console import answer, listener, print_json, warn
from palinode.cli.options import (
    ADVANCED,
    ALLOW_PICKLE,
    COLUMNS,
    FORGET,
    METHOD,
    NEED,
    OUTPUT,
    TARGET,
    Changes,
    Json,
    Key,
    Quiet,
    completion,
    takes,
)
from palinode.errors import RecipeError, meant
from palinode.pipeline.recipe import laid_over, read_recipe

if TYPE_CHECKING:
    from palinode.pipeline.doctor import DoctorFinding
    from palinode.report.content import Block, Tone

SIGNS: dict[str, tuple[str, Tone | None]] = {
    "ok": ("✓", "good"),
    "note": ("·", None),
    "warn": ("!", "unsure"),
    "fail": ("✗", "bad"),
}


@takes(
    TARGET,
    "models.base",
    Key("models.retrained", group=NEED),
    FORGET,
    OUTPUT,
    METHOD,
    "data.retain",
    "data.refusals",
    COLUMNS,
    "data.allow_overlap",
    Key("training.max_length", group=ADVANCED),
    Key("output.workspace", group=ADVANCED),
    "tracker",
    ALLOW_PICKLE,
    "device",
)
def doctor(
    given: dict[str, Any],
    *,
    recipe: Annotated[
        Path | None, typer.Option(help="A TOML recipe, instead of these; options given are laid over it.")
    ] = None,
    changes: Changes = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tell whether a run would work, and what to mend.

    The exit code is 1 when something fails. Without options it looks at libraries and machine alone.
    """
    from palinode.pipeline.doctor import examine_equipment, examine_run

    if "max_length" in given.get("training", {}):
        given["evaluation"] = {"max_length": given["training"]["max_length"]}
    content = laid_over(read_recipe(recipe) if recipe else {}, given)
    place = content.get("output", {}).get("folder") or "."
    findings = [*examine_equipment(Path(place))]
    if changes or any(content.get(key) for key in ("models", "data", "output", "tracker")):
        findings += examine_run(content, changes or [], listener=listener(quiet=quiet))
    counts = Counter[str](finding.state for finding in findings)
    whole = {"ok": not counts["fail"], "counts": {name: counts[name] for name in SIGNS}}
    facts = {**whole, "findings": [asdict(finding) for finding in findings]}
    answer(facts, _told(findings, counts, looked_at_run=bool(content)), as_json=as_json)
    if counts["fail"]:
        raise typer.Exit(1)


def _told(findings: Sequence[DoctorFinding], counts: Counter[str], *, looked_at_run: bool) -> Iterator[Block]:
    """Yield the findings by area, and what they come to."""
    from palinode.report.content import Grid, GridCell, Paragraph, Row

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
    yield Paragraph(text)


def report(
    place: Annotated[
        Path,
        typer.Argument(help="Folder that `unlearn`, `run`, `audit`, `compare` or `demo` wrote."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write: .html, .md or .json. [default: all three, in the workspace of a run, and "
            "without texts in its folder; else in PLACE]"
        ),
    ] = None,
    without_texts: Annotated[
        bool, typer.Option("--without-texts", help="Numbers only: no prompt and no answer.")
    ] = False,
    audit: Annotated[
        Path | None, typer.Option(help="Folder of an audit of the unlearned model, to be told as well.")
    ] = None,
    as_json: Json = False,
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
    if as_json and output is None:
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
    answer(content, "\n".join([marked(content), *handed_over, *pages]), as_json=as_json)


KINDS = ("methods", "transforms", "benchmarks", "metrics", "attacks")


def list_everything(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="methods, transforms, benchmarks, metrics or attacks. [default: all but attacks]",
            autocompletion=completion(KINDS),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Name methods, transforms, benchmarks, metrics, attacks."""

    known = {form: name for name in KINDS for form in (name, name.removesuffix("s"))}
    wanted = known.get(kind.lower()) if kind else None
    if kind and not wanted:
        raise RecipeError(f"there is no list of {kind}; there are {', '.join(KINDS)}{meant(kind, known)}")
    own = {"attacks": attack_tests()} if wanted == "attacks" else listings()
    listed = {name: lines for name, lines in own.items() if wanted in (None, name)}
    told = []
    for name, lines in listed.items():
        width = max(map(len, lines), default=0)
        told += [f"{name}:", *(f"  {one:{width}}  {description}" for one, description in lines.items())]
    answer(listed, "\n".join(told), as_json=as_json)


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
