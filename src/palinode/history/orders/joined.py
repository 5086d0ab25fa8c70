"""An order put together of several: a training that went on with other settings, or another sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from palinode.errors import DataError
from palinode.history.orders.order import Order, check_step


@dataclass(frozen=True, slots=True)
class JoinedOrder:
    """Orders one after the other; each says what it gave at the training's own step numbers."""

    parts: tuple[tuple[int, Order], ...]
    """(step after which the order holds, order), the first from step 0."""

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.parts]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise DataError(f"the parts of an order begin after the steps {starts}; begin with 0, and grow")

    @property
    def steps(self) -> int:
        """The last step."""
        return self.parts[-1][1].steps

    def rows(self, step: int) -> list[int]:
        """Return the rows of a step, from the order that held then."""
        check_step(step, 1, self.steps)
        return [order for start, order in self.parts if start < step][-1].rows(step)

    @classmethod
    def of(cls, parts: Sequence[tuple[int, Order]]) -> JoinedOrder:
        """Put orders together."""
        return cls(tuple(parts))
