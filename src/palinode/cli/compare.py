"""`palinode compare`: the same target, rows, budget and search for several methods, and one table."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from palinode.cli.console import listener, out, print_json
from palinode.cli.options import Json, Quiet


def compare(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe of a comparison.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one key of the recipe, as in budget.steps=200; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the tables. [default: the recipe's]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; do nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare methods of unlearning fairly: one budget, one search, one rule, measured once."""
    from palinode.pipeline.compare import compare as run_comparison
    from palinode.pipeline.compare import load_comparison
    from palinode.report.comparison import comparison_table, ranking_sentences

    given = [*(changes or []), *([f"output.folder={_quoted(output)}"] if output else [])]
    loaded = load_comparison(recipe, given)
    if loaded.comparison.requests:
        _carry_out(loaded, dry_run=dry_run, quiet=quiet, as_json=as_json)
        return
    if loaded.comparison.axis:
        _along(loaded, dry_run=dry_run, quiet=quiet, as_json=as_json)
        return
    if dry_run:
        _show_plan(loaded, as_json=as_json)
        return
    command = shlex.join(["palinode", *sys.argv[1:]])
    result = run_comparison(loaded, command=command, listener=listener(quiet=quiet))
    if as_json:
        print_json(result.table)
        return
    out().print(comparison_table(result.table))
    for line in ranking_sentences(result.table):
        out().print(line, markup=False, soft_wrap=True)
    out().print(f"{result.output}: table.json, report.md and tradeoff.svg", markup=False, soft_wrap=True)


def _quoted(path: Path) -> str:
    """Return a path as a TOML text."""
    import json

    return json.dumps(str(path), ensure_ascii=False)


def _show_plan(loaded: Any, *, as_json: bool) -> None:
    from palinode.pipeline.compare import plan_comparison
    from palinode.pipeline.compare.plan import describe_plan

    planned = plan_comparison(loaded)
    if as_json:
        print_json(planned)
        return
    for line in describe_plan(planned):
        out().print(line, markup=False, soft_wrap=True)


def _carry_out(loaded: Any, *, dry_run: bool, quiet: bool, as_json: bool) -> None:
    """Carry out a recipe's requests one after another, or show what that would be."""
    from palinode.pipeline.compare import carry_out, plan_requests
    from palinode.pipeline.compare.request_plan import FILES, describe_requests
    from palinode.report.requests import requests_table, undo_sentences

    if dry_run:
        planned = plan_requests(loaded)
        if as_json:
            print_json(planned)
            return
        for line in describe_requests(planned):
            out().print(line, markup=False, soft_wrap=True)
        return
    command = shlex.join(["palinode", *sys.argv[1:]])
    result = carry_out(loaded, command=command, listener=listener(quiet=quiet))
    if as_json:
        print_json(result.table)
        return
    out().print(requests_table(result.table))
    for line in undo_sentences(result.table):
        out().print(line, markup=False, soft_wrap=True)
    out().print(f"{result.output}: {', '.join(FILES)}", markup=False, soft_wrap=True)


def _along(loaded: Any, *, dry_run: bool, quiet: bool, as_json: bool) -> None:
    """Run a recipe's comparison at each value of its axis, or show what that would be."""
    from palinode.pipeline.compare import compare_along, plan_axis
    from palinode.pipeline.compare.axis import FILES, describe_axis
    from palinode.report.axis import axis_sentences, axis_table

    if dry_run:
        planned = plan_axis(loaded)
        if as_json:
            print_json(planned)
            return
        for line in describe_axis(planned):
            out().print(line, markup=False, soft_wrap=True)
        return
    command = shlex.join(["palinode", *sys.argv[1:]])
    result = compare_along(loaded, command=command, listener=listener(quiet=quiet))
    if as_json:
        print_json(result.content)
        return
    out().print(axis_table(result.content))
    for line in axis_sentences(result.content):
        out().print(line, markup=False, soft_wrap=True)
    out().print(f"{result.output}: {', '.join(FILES)}", markup=False, soft_wrap=True)
