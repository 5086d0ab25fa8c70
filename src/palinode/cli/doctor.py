"""`palinode doctor`: what is installed, what the machine has, and whether a run would work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from palinode.cli.console import listener, out, print_json
from palinode.cli.options import (
    ADVANCED,
    ALLOW_PICKLE,
    COLUMNS,
    DEVICE,
    FORGET,
    METHOD,
    NEED,
    OUTPUT,
    TARGET,
    Changes,
    Json,
    Key,
    Quiet,
    takes,
)

if TYPE_CHECKING:
    from palinode.pipeline.doctor import DoctorFinding

SIGNS = {"ok": ("✓", "green"), "note": ("·", "dim"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}


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
    DEVICE,
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
    from palinode.pipeline.recipe import read_recipe

    if "max_length" in given.get("training", {}):
        given["evaluation"] = {"max_length": given["training"]["max_length"]}
    content = _laid_over(read_recipe(recipe) if recipe else {}, given)
    place = content.get("output", {}).get("folder") or "."
    findings = [*examine_equipment(Path(place))]
    if changes or any(content.get(key) for key in ("models", "data", "output", "tracker")):
        findings += examine_run(content, changes or [], listener=listener(quiet=quiet))
    counts = Counter[str](finding.state for finding in findings)
    if as_json:
        whole = {"ok": not counts["fail"], "counts": {name: counts[name] for name in SIGNS}}
        print_json({**whole, "findings": [asdict(finding) for finding in findings]})
    else:
        _show(findings, counts, looked_at_run=bool(content))
    if counts["fail"]:
        raise typer.Exit(1)


def _laid_over(content: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return nested values with those that were given in their place."""
    merged = dict(content)
    for name, value in given.items():
        if isinstance(value, dict) and name != "columns":
            below = merged.get(name)
            inner = _laid_over(below if isinstance(below, dict) else {}, value)
            if inner:
                merged[name] = inner
        elif value is not None:
            merged[name] = value
    return merged


def _show(findings: Sequence[DoctorFinding], counts: Counter[str], *, looked_at_run: bool) -> None:
    console = out()
    for area, members in groupby(findings, key=lambda finding: finding.area):
        console.print(_table(area, [*members]))
    failures, warnings = counts["fail"], counts["warn"]
    if failures:
        text = f"{_number(failures, 'thing fails', 'things fail')}; what to do stands beside each."
    elif warnings:
        text = f"Nothing fails; {_number(warnings, 'thing needs', 'things need')} a look."
    else:
        text = "All is well."
    if not looked_at_run:
        text += " To have a run looked at, name --target, --base, --forget and --output, or --recipe."
    console.print(text, soft_wrap=True)


def _table(area: str, findings: Sequence[DoctorFinding]) -> Table:
    table = Table(
        box=None, show_header=False, title=area, title_justify="left", title_style="bold", pad_edge=False
    )
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        sign, style = SIGNS[finding.state]
        text = Text(finding.text)
        if finding.fix:
            text.append(f"\n→ {finding.fix}")
        table.add_row(Text(f"{sign} {finding.state}", style=style), Text(finding.name), text)
    return table


def _number(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
