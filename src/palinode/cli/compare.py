"""`palinode compare`: the same target, rows, budget and search for several methods, and one table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palinode.cli.console import listener, out, print_json, secret_workspace
from palinode.cli.options import DryRun, Json, Quiet

if TYPE_CHECKING:
    from palinode.compare import CompareRecipe
    from palinode.compare.comparison_recipe import ComparisonRecipe
    from palinode.report.content import Block


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
