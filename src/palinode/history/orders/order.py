"""What an order is, and asking one in which steps some rows were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from palinode.errors import DataError
from palinode.progress import Listener, NullListener


class Order(Protocol):
    """Which rows the batch of each optimiser step held."""

    @property
    def steps(self) -> int:
        """The last step; the first is 1."""

    def rows(self, step: int) -> list[int]:
        """Return the rows of a step's batch over all processes; one that was there twice is twice."""


def check_step(step: int, first: int, last: int) -> None:
    """Raise DataError for a step that an order does not have."""
    if not first <= step <= last:
        raise DataError(f"there is no step {step:,} in this order; it has the steps {first:,} to {last:,}")


def check_positive(**values: int) -> None:
    """Raise DataError for a setting that must be at least 1 and is not."""
    for name, value in values.items():
        if value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")


def steps_of(
    order: Order, rows: Iterable[int], *, first: int = 1, listener: Listener | None = None
) -> dict[int, list[int]]:
    """Return the steps in which each row was, by row, going through the steps from `first` on."""
    found: dict[int, list[int]] = {row: [] for row in rows}
    with (listener or NullListener()).task(
        "going through the order", order.steps + 1 - first, "steps"
    ) as advance:
        for step in range(first, order.steps + 1):
            for row in sorted(found.keys() & set(order.rows(step))):
                found[row].append(step)
            advance(1)
    return found
