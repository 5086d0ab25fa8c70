"""Which forget rows are one erasure request: those that share a column's value, or so many in order."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from palinode.compare.recipe import Requests
from palinode.data.examples import SHAPES, Example
from palinode.data.sources import Row, json_type, read_rows
from palinode.errors import DataError, RecipeError


@dataclass(frozen=True, slots=True)
class Request:
    """One request."""

    number: int
    """From 1, in the order in which requests come."""
    rows: Sequence[Example]


@dataclass(frozen=True, slots=True)
class Requested:
    """All forget rows by request."""

    requests: Sequence[Request]
    others: Sequence[Example]
    """Rows that nobody asks to erase."""
    undo_order: Sequence[int]
    """Numbers of the requests in the order in which they are undone."""

    @property
    def rows(self) -> list[Example]:
        """The rows of all requests, in order."""
        return [row for request in self.requests for row in request.rows]


def divide_requests(settings: Requests, forget: Sequence[Example], names: Mapping[int, str]) -> Requested:
    """Return the forget rows by request; `names` says by row to what it belongs, where a column says so.

    Raises RecipeError where there are fewer requests than asked for, or fewer than two.
    """
    if settings.size is not None:
        places = {row: place for place, row in enumerate(dict.fromkeys(one.row for one in forget))}
        names = {row: str(place // settings.size) for row, place in places.items()}
    groups: dict[str, list[Example]] = {}
    for example in forget:
        groups.setdefault(names[example.row], []).append(example)
    count = settings.count or len(groups)
    if not 2 <= count <= len(groups):
        raise RecipeError(
            f"the {len(forget)} forget rows make {len(groups)} requests and requests.count asks for "
            f"{max(count, 2)}; lower it, or form requests otherwise"
        )
    chosen = list(groups.values())
    drawn = np.random.default_rng(settings.undo_seed).permutation(count) + 1
    return Requested(
        [Request(number, rows) for number, rows in enumerate(chosen[:count], start=1)],
        [row for rows in chosen[count:] for row in rows],
        drawn.tolist(),
    )


def read_names(settings: Requests, location: str, columns: Mapping[str, str]) -> dict[int, str]:
    """Return what each row of a file has in the column that requests are formed by; nothing without one."""
    if settings.by is None:
        return {}
    headers = [tuple(columns.get(role, role) for role in roles) for roles in SHAPES.values()]
    return names_in(read_rows(location, headers=headers), settings.by, location)


def names_in(rows: Sequence[Row], column: str, source: str) -> dict[int, str]:
    """Return each row's value in a column as text; raises DataError for a row without one."""
    known = list(dict.fromkeys(name for row in rows for name in row))
    if column not in known:
        near = difflib.get_close_matches(column, known, n=1, cutoff=0.0)
        raise DataError(
            f"{source} has no column {column!r} (it has: {', '.join(known)}); set requests.by to "
            f"{near[0]!r}, or form requests by size"
        )
    return {place: _name(row.get(column), column, place, source) for place, row in enumerate(rows)}


def _name(value: object, column: str, place: int, source: str) -> str:
    if isinstance(value, str | int) and str(value).strip():
        return str(value)
    got = "empty" if value is None or value == "" else json_type(value)
    raise DataError(
        f"row {place + 1} of {source}: {column!r} is {got}; requests are formed by texts or whole numbers"
    )
