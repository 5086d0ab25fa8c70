"""Which rows an objective is given: forget and retain rows, refusals, other answers, by their roles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from palinode.data.examples import Example
from palinode.errors import DataError
from palinode.records import read_bytes

if TYPE_CHECKING:
    from palinode.training.objectives import Objective
    from palinode.training.roles import Material


def gather(
    objective: Objective,
    *,
    forget: Sequence[Example],
    retain: Sequence[Example] = (),
    refusals: Sequence[str] = (),
    alternates: Sequence[tuple[int, str]] = (),
) -> Material:
    """Return the examples of the roles that an objective names, and which of them go together.

    A refusal may go with any forget question and becomes its answer; an alternate is (position of its
    forget example, text). Raises DataError for a role without examples.
    """
    from palinode.training.roles import Material

    roles = objective.roles
    examples: dict[str, Sequence[Example]] = {"forget": forget, "retain": retain}
    candidates: dict[str, Sequence[Sequence[int]]] = {}
    if "refusal" in roles:
        examples["refusal"] = [replace(one, answer=line) for one in forget for line in refusals]
        count = len(refusals)
        candidates["refusal"] = [range(at * count, (at + 1) * count) for at in range(len(forget))]
    if "alternate" in roles:
        examples["alternate"] = [replace(forget[at], answer=text) for at, text in alternates]
        candidates["forget"] = [(at,) for at, _ in alternates]
    for role in sorted(roles):
        if not examples[role]:
            raise DataError(f"there are no {role} rows, and this method is trained on them")
    return Material(objective.anchor, {role: examples[role] for role in sorted(roles)}, candidates)


def read_refusals(location: str | Path) -> list[str]:
    """Return the refusals of a file: one a line, plain or as a JSON string. Raises DataError."""
    try:
        lines = read_bytes(Path(location).expanduser()).decode("utf-8-sig").splitlines()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"the refusals {location} cannot be read ({error}); name a text file") from None
    found = [_text(line.strip()) for line in lines if line.strip()]
    if not found:
        raise DataError(f"{location} holds no refusals; write one a line")
    return list(dict.fromkeys(found))


def _text(line: str) -> str:
    """Return what a line says; lines such as "I do not know." in quotes are JSON."""
    if not line.startswith('"'):
        return line
    try:
        value = json.loads(line)
    except ValueError:
        return line
    return value if isinstance(value, str) and value.strip() else line
