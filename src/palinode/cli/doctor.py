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
from palinode.cli.options import AllowPickle, Columns, Device, Json, MaxLength, Quiet, Tracker

if TYPE_CHECKING:
    from palinode.pipeline.doctor import DoctorFinding

SIGNS = {"ok": ("✓", "green"), "note": ("·", "dim"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}


def doctor(
    target: Annotated[str | None, typer.Option(help="The model to be cleaned (θ_D).")] = None,
    base: Annotated[str | None, typer.Option(help="The earlier checkpoint (θ_0).")] = None,
    retrained: Annotated[str | None, typer.Option(help="The gold standard, where one exists.")] = None,
    forget: Annotated[str | None, typer.Option(help="The forget set.")] = None,
    retain: Annotated[str | None, typer.Option(help="Rows whose effect must stay.")] = None,
    refusals: Annotated[str | None, typer.Option(help="Refusals, one a line.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder that the unlearned model would have.")] = None,
    workspace: Annotated[str | None, typer.Option(help="Where steps would keep their results.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A TOML recipe, instead of these; options given are laid over it.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="A method's name. [default: msa]")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Set any key of a recipe; repeatable.")
    ] = None,
    columns: Columns = None,
    max_length: MaxLength = None,
    allow_pickle: AllowPickle = False,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Forget rows in the retain set are to be left out.")
    ] = False,
    tracker: Tracker = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Whether everything is here, and whether a run would work, with the fix for each problem; does nothing.

    The exit code is 1 when something fails.
    """
    from palinode.data import parse_columns
    from palinode.pipeline.doctor import examine_equipment, examine_run

    content = _read(recipe) if recipe else {}
    given = {
        "method": method,
        "device": device if device != "auto" else None,
        "tracker": tracker,
        "models": {
            "target": target,
            "base": base,
            "retrained": retrained,
            "allow_pickle": allow_pickle or None,
        },
        "data": {
            "forget": forget,
            "retain": retain,
            "refusals": refusals,
            "columns": parse_columns(columns) if columns else None,
            "allow_overlap": allow_overlap or None,
        },
        "training": {"max_length": max_length},
        "evaluation": {"max_length": max_length},
        "output": {"folder": output, "workspace": workspace},
    }
    content = _laid_over(content, given)
    place = content.get("output", {}).get("folder") or "."
    findings = [*examine_equipment(Path(place))]
    if any(content.get(section) for section in ("models", "data", "output")) or changes or tracker:
        findings += examine_run(content, changes or [], listener=listener(quiet=quiet))
    counts = Counter[str](finding.state for finding in findings)
    if as_json:
        whole = {"ok": not counts["fail"], "counts": {name: counts[name] for name in SIGNS}}
        print_json({**whole, "findings": [asdict(finding) for finding in findings]})
    else:
        _show(findings, counts, looked_at_run=bool(content))
    if counts["fail"]:
        raise typer.Exit(1)


def _read(path: Path) -> dict[str, Any]:
    """Return a recipe's content as it is written; whether it is right is for the examination to say."""
    from palinode.pipeline.recipe import read_recipe

    return read_recipe(path)


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
