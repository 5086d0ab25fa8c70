"""Which columns of a file play which roles: by their names, or as `--columns` says.

A role has its own name and others in use; case does not count. What a file's columns can be read as is told
in `--columns`' own words (`question=Q,answer=A`). Where two columns would do equally, or none does, nothing
is guessed: one sentence says what to type, filled in with the likeliest by name and content.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from palinode.data.sources import Row
from palinode.errors import DataError, RecipeError

Form = Literal["question", "completion", "chat", "document"]
"""What kind of training text an example is."""

SHAPES: Mapping[Form, tuple[str, ...]] = {
    "question": ("question", "answer"),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "document": ("text",),
}
"""Roles that the columns of a row play, by form; the first form whose roles are all there wins."""

INPUT = "input"
"""A role that a question may have besides: what stands below the question."""
ROLES = (*(role for roles in SHAPES.values() for role in roles), INPUT)
_KNOWN_ROLES = "question and answer (and input), prompt and completion, messages, or text"

OTHER_NAMES = {
    "question": ("q", "instruction"),
    "answer": ("a", "output", "response"),
    "completion": ("response",),
    "messages": ("conversations", "conversation"),
}
"""Names of columns that are read as a role where its own is missing."""
BESIDE_INSTRUCTION = ("input", "context")

ASKED = re.compile(r"quest|query|ask|instr|prompt|input|user|human|problem|frage|^q\d*$", re.IGNORECASE)
ANSWERED = re.compile(
    r"answ|repl|respon|output|complet|target|assist|chosen|solution|antwort|^a\d*$", re.IGNORECASE
)
"""What is in the name of a column that may be a question, or an answer: for advice alone."""
LOOKED_AT = 200
"""Rows whose content advice is drawn from."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A form, and the columns that play its roles."""

    form: Form
    columns: Mapping[str, str]
    rank: int = 0
    """0: the roles' own names; 1: but for case; 2: other names in use."""

    @property
    def names(self) -> list[str]:
        """The columns, in the order of the roles."""
        return [*self.columns.values()]

    @property
    def spelt(self) -> str:
        """What `--columns` takes to read a file like this."""
        return shlex.quote(",".join(f"{role}={name}" for role, name in self.columns.items()))


def folded(name: object) -> str:
    """Return a column's name as it is compared: case and blanks around it do not count."""
    return str(name).strip().casefold()


def parse_columns(text: str) -> dict[str, str]:
    """Return the mapping that `question=q,answer=a` spells: role to column name.

    >>> parse_columns("question=q, answer=a")
    {'question': 'q', 'answer': 'a'}
    """
    columns: dict[str, str] = {}
    for part in text.split(","):
        role, _, name = (piece.strip() for piece in part.partition("="))
        if role not in ROLES or not name or role in columns:
            raise RecipeError(
                f"columns has {part.strip()!r}; write ROLE=NAME pairs with commas between them, each role "
                f"once, where the roles are {_KNOWN_ROLES}"
            )
        columns[role] = name
    return columns


def is_header(names: Sequence[str], columns: Mapping[str, str]) -> bool:
    """Tell whether the names on the first line of a text make it a table: those named, or a form's.

    A single word makes one only when it is a role's own name: it may as well be the first line of a text.
    """
    if set(map(folded, columns.values())) <= set(map(folded, names)) and columns:
        return True
    return any(len(names) > 1 or reading.rank == 0 for reading in _readings(names))


def read_as(rows: Sequence[Row], source: str, columns: Mapping[str, str], *, beside: bool = False) -> Reading:
    """Return how rows are read: as `columns` says, else by their own names.

    Columns that were named must be there; with `beside`, for a set beside the one they were named for, a file
    that has none of them is read by its own names. Raises `DataError`, `RecipeError` for roles of two forms.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    shape = next((form for form, roles in SHAPES.items() if set(columns) <= {*roles, *_beside(form)}), None)
    if shape is None:
        raise RecipeError(f"columns names the roles {', '.join(columns)}; name {_KNOWN_ROLES}")
    if columns and not (beside and not any(_named(name, names) for name in columns.values())):
        roles = [*SHAPES[shape], *(role for role in columns if role not in SHAPES[shape])]
        wanted = {role: columns.get(role, role) for role in roles}
        found = {role: _named(name, names) for role, name in wanted.items()}
        missing = [repr(wanted[role]) for role, name in found.items() if name is None]
        if missing:
            raise DataError(
                f"{source} has no column {' and no '.join(missing)} ({_told(names)}){_advice(names, rows)}"
            )
        return Reading(shape, {role: str(name) for role, name in found.items()})
    return _by_name(names, rows, source)


def _by_name(names: Sequence[str], rows: Sequence[Row], source: str) -> Reading:
    """Return the one reading that the names allow."""
    found = sorted(_readings(names), key=lambda reading: reading.rank)
    if not found:
        raise DataError(
            f"{source}: it is not clear what its columns are ({_told(names)}){_advice(names, rows)}"
        )
    first, order = found[0], [*SHAPES]
    rivals = [
        other
        for other in found[1:]
        if order.index(other.form) < order.index(first.form)
        or (other.rank == first.rank and (other.rank == 2 or other.form == first.form))
    ]
    if rivals:
        ways = " or ".join(f"--columns {reading.spelt}" for reading in (first, *rivals))
        raise DataError(f"{source} can be read in several ways ({_told(names)}); say {ways}")
    return first


def _readings(names: Sequence[str]) -> Iterator[Reading]:
    """Yield every form that the columns can be read as, by every choice of columns for its roles."""
    for form, roles in SHAPES.items():
        for chosen in product(*([name for name in names if _rank(name, role) < 3] for role in roles)):
            rank = max(_rank(name, role) for name, role in zip(chosen, roles, strict=True))
            columns = dict(zip(roles, chosen, strict=True))
            more = [name for name in names if folded(name) in BESIDE_INSTRUCTION]
            if form != "question" or folded(chosen[0]) != "instruction":
                more = []
            for one in more or [""]:
                below = {"question": chosen[0], INPUT: one} if one else {}
                yield Reading(form, below | columns, rank)


def _rank(name: str, role: str) -> int:
    """Return how well a column's name fits a role, as `Reading.rank` has it; 3 where it does not."""
    if name == role:
        return 0
    return 1 if folded(name) == role else 2 if folded(name) in OTHER_NAMES.get(role, ()) else 3


def _beside(form: Form) -> tuple[str, ...]:
    return (INPUT,) if form == "question" else ()


def _named(name: str, names: Sequence[str]) -> str | None:
    """Return the column of this name, or the only one but for case."""
    alike = [other for other in names if folded(other) == folded(name)]
    return name if name in names else alike[0] if len(alike) == 1 else None


def _told(names: Sequence[str]) -> str:
    return f"it has: {', '.join(map(str, names))[:200] or 'none'}"


def _advice(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Return the end of a sentence that says what to type, or what is needed."""
    guess = likeliest(names, rows[:LOOKED_AT])
    if guess is None:
        return f"; we need {_KNOWN_ROLES}, with a text in each"
    return f"; say which are which, probably --columns {guess.spelt}"


def likeliest(names: Sequence[str], rows: Sequence[Row]) -> Reading | None:
    """Return how these columns would most likely be read, by name and content: for advice alone."""
    values = {name: [row[name] for row in rows if row.get(name) not in (None, "")] for name in names}
    usable = {name: found for name, found in values.items() if found and not set(",=") & set(name)}
    texts = {
        name: [str(value) for value in found]
        for name, found in usable.items()
        if all(isinstance(value, str) for value in found)
    }
    lists = [name for name, found in usable.items() if all(_is_talk(value) for value in found)]
    wordy = [
        name for name, found in texts.items() if sum(" " in text.strip() for text in found) * 2 > len(found)
    ]
    asked = [name for name in texts if ASKED.search(name)] or [
        name
        for name in wordy
        if sum(text.rstrip().endswith("?") for text in texts[name]) * 2 > len(texts[name])
    ]
    rest = [name for name in wordy if name not in asked[:1]]
    answered = [name for name in texts if ANSWERED.search(name) and name not in asked[:1]]
    answered = answered or (rest if asked else [])
    asked = asked or [name for name in rest if name not in answered[:1]]
    if lists:
        return Reading("chat", {"messages": lists[0]})
    if asked and answered:
        return Reading("question", {"question": asked[0], "answer": answered[0]})
    if len(rest) > 1:
        return Reading("question", {"question": rest[0], "answer": rest[1]})
    return Reading("document", {"text": [*wordy, *texts][0]}) if texts else None


def _is_talk(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
