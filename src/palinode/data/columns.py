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


@dataclass(frozen=True, slots=True)
class Reading:
    """A form, and the columns that play its roles."""

    form: Form
    columns: Mapping[str, str]
    rank: int = 0
    """0: the roles' own names; 1: but for case; 2: other names in use."""

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
    """Tell whether the first line of a text makes it a table: by the columns named, or those of a form."""
    if columns and set(map(folded, columns.values())) <= set(map(folded, names)):
        return True
    # A single word may as well be the first line of a text, and must be a role's own name.
    return any(len(names) > 1 or reading.rank == 0 for reading in _readings(names))


def read_as(rows: Sequence[Row], source: str, columns: Mapping[str, str], *, beside: bool = False) -> Reading:
    """Return how rows are read: as `columns` says, else by their own names.

    Columns that were named must be there; with `beside`, for a set beside the one they were named for, a file
    that has none of them is read by its own names. Raises `DataError`, `RecipeError` for roles of two forms.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    form = next((form for form, roles in SHAPES.items() if set(columns) - {INPUT} <= set(roles)), None)
    if form is None or (INPUT in columns and form != "question"):
        raise RecipeError(f"columns names the roles {', '.join(columns)}; name {_KNOWN_ROLES}")
    if not columns or (beside and not any(_named(name, names) for name in columns.values())):
        return _by_name(names, rows, source)
    wanted = {role: columns.get(role, role) for role in dict.fromkeys((*SHAPES[form], *columns))}
    found = {role: _named(name, names) for role, name in wanted.items()}
    if missing := [repr(wanted[role]) for role, name in found.items() if name is None]:
        raise DataError(f"{source} has no column {' and no '.join(missing)} {_advice(names, rows)}")
    return Reading(form, {role: str(name) for role, name in found.items()})


def _by_name(names: Sequence[str], rows: Sequence[Row], source: str) -> Reading:
    """Return the one reading that the names allow."""
    found = sorted(_readings(names), key=lambda reading: reading.rank)
    if not found:
        raise DataError(f"{source}: it is not clear what its columns are {_advice(names, rows)}")
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
            asks = form == "question" and folded(chosen[0]) == "instruction"
            below = [name for name in names if asks and folded(name) in BESIDE_INSTRUCTION]
            for place in [{"question": chosen[0], INPUT: name} for name in below] or [{}]:
                yield Reading(form, place | columns, rank)


def _rank(name: str, role: str) -> int:
    """Return how well a column's name fits a role, as `Reading.rank` has it; 3 where it does not."""
    if name == role:
        return 0
    return 1 if folded(name) == role else 2 if folded(name) in OTHER_NAMES.get(role, ()) else 3


def _named(name: str, names: Sequence[str]) -> str | None:
    """Return the column of this name, or the only one but for case."""
    alike = [other for other in names if folded(other) == folded(name)]
    return name if name in names else alike[0] if len(alike) == 1 else None


def _told(names: Sequence[str]) -> str:
    return f"it has: {', '.join(map(str, names))[:200] or 'none'}"


def _advice(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Return the end of a sentence: what there is, and what to type, or what is needed."""
    guess = _likeliest(names, rows[:200])
    say = f"say which are which, probably --columns {guess.spelt}" if guess else f"we need {_KNOWN_ROLES}"
    return f"({_told(names)}); {say}"


def _likeliest(names: Sequence[str], rows: Sequence[Row]) -> Reading | None:
    """Return what these columns most likely are, by name and content."""
    values = {name: [row[name] for row in rows if row.get(name) not in (None, "")] for name in names}
    talks = [name for name, found in values.items() if found and all(isinstance(one, list) for one in found)]
    texts = {
        name: [one.strip() for one in found if isinstance(one, str)]
        for name, found in values.items()
        if found and all(isinstance(one, str) for one in found) and not set(",=") & set(name)
    }

    def most(name: str, mark: str) -> bool:
        return sum(mark in one for one in texts[name]) * 2 > len(texts[name])

    wordy = [name for name in texts if most(name, " ")]
    asked = [*filter(ASKED.search, texts), *(name for name in wordy if most(name, "?")), *wordy][:1]
    others = [name for name in texts if name not in asked]
    answered = [*filter(ANSWERED.search, others), *(name for name in others if name in wordy)]
    if talks:
        return Reading("chat", {"messages": talks[0]})
    if asked and answered:
        return Reading("question", {"question": asked[0], "answer": answered[0]})
    return Reading("document", {"text": [*wordy, *texts][0]}) if texts else None
