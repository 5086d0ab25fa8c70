"""`palinode verify`: is a model that Palinode wrote still what it was?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from palinode.cli.console import listener, out, print_json
from palinode.cli.options import Json, Quiet

if TYPE_CHECKING:
    from palinode.weights.manifest import Verification

MOST_ROWS = 20
"""Rows of the table; --json has them all."""


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A model folder that Palinode wrote.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tell whether a model is still as it was written.

    It takes one pass; the exit code is 1 when something changed.
    """
    from palinode.weights import Checkpoint
    from palinode.weights.manifest import check_manifest, read_manifest

    read_manifest(folder)
    with listener(quiet=quiet).task("verifying", Checkpoint.open(folder).nbytes, "bytes") as advance:
        found = check_manifest(folder, on_progress=advance)
    if as_json:
        print_json({"folder": str(folder), "ok": found.ok, **asdict(found)})
    else:
        _show(folder, found)
    if not found.ok:
        raise typer.Exit(1)


def _show(folder: Path, found: Verification) -> None:
    size = f"{found.checked} tensors, {found.nbytes / 1e6:,.4g} MB"
    if found.ok:
        out().print(f"{folder} is as it was written ({size}).", soft_wrap=True)
        return
    rows = [
        *((name, "tensor", "changed") for name in found.changed),
        *((name, "tensor", "missing") for name in found.missing),
        *((name, "tensor", "new") for name in found.extra),
        *((name, "file", finding) for name, finding in found.companions.items()),
    ]
    count = f"{len(rows)} thing{'s' if len(rows) > 1 else ''} changed"
    out().print(f"{folder} is not what was written: {count} ({size} compared).", soft_wrap=True)
    out().print(_table(rows))


def _table(rows: list[tuple[str, str, str]]) -> Table:
    table = Table("name", "what", "now")
    for name, what, now in rows[:MOST_ROWS]:
        table.add_row(Text(ascii(name)[1:-1] if not name.isprintable() else name, overflow="fold"), what, now)
    if len(rows) > MOST_ROWS:
        table.add_row(f"and {len(rows) - MOST_ROWS} more", "", "--json has all of them")
    return table
