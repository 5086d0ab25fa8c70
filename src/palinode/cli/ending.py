"""How a long verb ends: the verdict, how far it went, where things lie, what comes next, what is secret."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from palinode.cli.console import out
from palinode.records import workspace_beside

STYLES = {"green": "green", "amber": "yellow", "red": "bold red", "grey": "bold"}
"""Of a verdict, by its light."""


def ending(
    *,
    verdict: Mapping[str, Any] | None = None,
    strength: str | None = None,
    places: Mapping[str, object] | None = None,
    following: Iterable[str] = (),
) -> None:
    """Print the end of a verb; `following` are the commands that come next, and what is None is left out."""
    if verdict:
        told = f"{verdict['symbol']} {verdict['sentence']}"
        out().print(Text(told, style=STYLES[verdict["light"]]), soft_wrap=True)
    if strength:
        out().print(f"Strength: {strength}", soft_wrap=True)
    for label, place in (places or {}).items():
        if place is not None:
            out().print(f"{label + ':':<9} {place}", soft_wrap=True)
    for place, command in enumerate(following):
        out().print(f"{'' if place else 'Next:':<9} {command}", soft_wrap=True)


def after_run(record: Mapping[str, Any], output: Path | None) -> Iterator[str]:
    """Yield the commands that come after a run: attack the model, talk to it, check it."""
    if output is None:
        yield f"{record['command']} --keep-unchanged"
        return
    models, data = (record.get("recipe", {}).get(name, {}) for name in ("models", "data"))
    kind = next((kind for kind in ("retrained", "base") if models.get(kind)), None)
    if kind is not None:
        columns = ",".join(f"{name}={column}" for name, column in (data.get("columns") or {}).items())
        yield shlex.join(
            [
                *("palinode", "audit", str(output), "--against", models[kind]),
                *(("--reference", kind) if kind == "base" else ()),
                *("--forget", data["forget"]),
                *(("--columns", columns) if columns else ()),
                *(("--allow-pickle",) if models.get("allow_pickle") else ()),
                *("--output", f"{output}-audit"),
            ]
        )
    if record:
        yield shlex.join(["palinode", "chat", str(output)])
    yield shlex.join(["palinode", "verify", str(output)])


def after_audit(model: str, output: Path) -> Iterator[str]:
    """Yield the command that tells of an audit in the folder of the model, where a run wrote it."""
    if (Path(model).expanduser() / "record.json").is_file():
        yield shlex.join(["palinode", "report", model, "--audit", str(output)])


def after_location(recommended: Any, target: str, forget: str) -> Iterator[str]:
    """Yield the command that takes the recommended checkpoint, if there is one."""
    if recommended is not None:
        models = ("--target", target, "--base", recommended.location)
        yield shlex.join(["palinode", "unlearn", *models, "--forget", forget, "--output", "OUT"])


def secret(folder: Path, what: str, *, of: Path | None = None, as_json: bool) -> None:
    """Say in one line, a verb's last one, what is secret and how to destroy it; nothing where it is gone.

    `of` is what `forget-workspace` finds the folder by; without it the user removes the folder. JSON is the
    result alone.
    """
    command = ["rm", "-r", str(folder)] if of is None else ["palinode", "forget-workspace", str(of)]
    if folder.exists() and not as_json:
        line = f"Secret: {folder} ({what}). Destroy: {shlex.join(command)}"
        out().print(line, markup=False, soft_wrap=True)


def secret_workspace(folder: Path, output: Path, what: str, *, as_json: bool) -> None:
    """Say so of a workspace, which is found by its output where it lies beside that."""
    beside = folder == workspace_beside(output)
    secret(folder, what, of=output if beside else folder, as_json=as_json)
