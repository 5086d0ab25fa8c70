"""The algebra of weight space: checkpoints, which are points in it, and directions.

    point − point = direction        direction ± direction = direction      number · direction = direction
    point ± direction = point        point + point and number · point have no meaning and say so

A sum is kept as coefficients over its terms, which lie on disk: checkpoints, and displacements (directions
of their own, such as a LoRA adapter). `θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0)` has the coefficients
(1, −α, +β, α−β) over (θ_D, θ_1, θ_2, θ_0). Over checkpoints a point's add up to 1 and a direction's to 0;
over displacements they are free. A term whose coefficient is zero is never opened. Nothing is read here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, overload

from palinode.errors import AlgebraError
from palinode.weights.arithmetic import Rounding, combined, formula, settings
from palinode.weights.atomic import Crew
from palinode.weights.displacement import Displacement, Term
from palinode.weights.folders import ModelFolder
from palinode.weights.preflight import Rows
from palinode.weights.store import Written, plan, write

LARGEST = 3.4e38
"""Largest coefficient: about the largest float32, in which sums are computed."""


class Point:
    """A place in weight space: a `Checkpoint` on disk, or a `WeightedSum` of several."""

    __slots__ = ()

    @property
    def terms(self) -> Mapping[Term, float]:
        """Coefficient of each term of the sum; those of checkpoints add up to 1."""
        raise AttributeError("terms")

    @property
    def anchor(self) -> Checkpoint:
        """The checkpoint that lends its layout, config and tokenizer: the leftmost one of the sum."""
        raise AttributeError("anchor")

    def __add__(self, other: object) -> WeightedSum:
        if isinstance(other, Direction):
            return WeightedSum(self.anchor, _sum(self.terms, 1.0, other.terms))
        if isinstance(other, Point):
            raise AlgebraError(
                "two points were added; add a direction to a point instead, "
                "as in target + beta * (theta_2 - base)"
            )
        return NotImplemented

    @overload
    def __sub__(self, other: Point) -> Direction: ...
    @overload
    def __sub__(self, other: Direction) -> WeightedSum: ...
    def __sub__(self, other: object) -> Direction | WeightedSum:
        if isinstance(other, Point):
            return Combination(_sum(self.terms, -1.0, other.terms))
        if isinstance(other, Direction):
            return WeightedSum(self.anchor, _sum(self.terms, -1.0, other.terms))
        return NotImplemented

    def __mul__(self, other: object) -> NoReturn:
        raise AlgebraError(
            "a point was multiplied by a number; scale a direction instead, as in alpha * (theta_1 - base)"
        )

    __rmul__ = __truediv__ = __mul__

    def __neg__(self) -> NoReturn:
        self.__mul__(-1.0)


class Checkpoint(ModelFolder, Point):
    """A model folder on disk: a point in weight space. Two openings of one folder are equal."""

    __slots__ = ()

    @property
    def terms(self) -> Mapping[Term, float]:
        """A checkpoint is the sum of itself alone."""
        return {self: 1.0}

    @property
    def anchor(self) -> Checkpoint:
        """The checkpoint itself."""
        return self


@dataclass(frozen=True, slots=True)
class WeightedSum(Point):
    """A point that is a formula, not yet written: `target - alpha * forget_vector`."""

    anchor: Checkpoint
    terms: Mapping[Term, float]

    def save(
        self,
        output: Path | str,
        *,
        dtype: str | None = None,
        rounding: Rounding = "auto",
        seed: int = 0,
        along: Mapping[str, Direction] | None = None,
    ) -> Saved:
        """Write the sum as a model folder; see `save`."""
        return save(self, Path(output), dtype=dtype, rounding=rounding, seed=seed, along=along or {})


class Direction:
    """A way to go in weight space: `theta_1 - base`, a `Displacement` on disk, or any sum of such.

    It is scaled by a number, added to other directions, and added to a point.
    """

    __slots__ = ()

    @property
    def terms(self) -> Mapping[Term, float]:
        """Coefficient of each term of the sum; those of checkpoints add up to 0."""
        raise AttributeError("terms")

    def __add__(self, other: object) -> Direction:
        if isinstance(other, Direction):
            return Combination(_sum(self.terms, 1.0, other.terms))
        if isinstance(other, Point):
            raise AlgebraError("a point was added to a direction; write the point first: target + direction")
        return NotImplemented

    def __sub__(self, other: object) -> Direction:
        if isinstance(other, Direction):
            return Combination(_sum(self.terms, -1.0, other.terms))
        if isinstance(other, Point):
            raise AlgebraError(
                "a point was subtracted from a direction; write the point first: target - direction"
            )
        return NotImplemented

    def __mul__(self, factor: float) -> Direction:
        if not isinstance(factor, int | float):
            return NotImplemented
        return Combination(_sum({}, _finite(factor), self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> Direction:
        return -1.0 * self

    def __radd__(self, other: object) -> Direction:
        if other == 0:  # so that sum([v1, v2]) works
            return self
        return NotImplemented


@dataclass(frozen=True, slots=True)
class Combination(Direction):
    """A direction that is a formula: a difference of points, or a sum of several directions."""

    terms: Mapping[Term, float]


class StoredDirection(Displacement, Direction):
    """A direction that lies on disk by itself. Two openings of one folder are equal."""

    __slots__ = ()

    @property
    def terms(self) -> Mapping[Term, float]:
        """It is the sum of itself alone."""
        return {self: 1.0}


def _sum(first: Mapping[Term, float], factor: float, second: Mapping[Term, float]) -> dict[Term, float]:
    """Return first + factor · second, without the terms that cancel."""
    total = combined(first, factor, second)
    if not all(abs(coefficient) <= LARGEST for coefficient in total.values()):
        raise AlgebraError("a sum got a coefficient beyond the range of float32; are the scales right?")
    return total


def _finite(number: float) -> float:
    try:
        value = float(number)
    except OverflowError:  # an integer too long for a float
        value = math.inf
    if not abs(value) <= LARGEST:  # neither is NaN
        raise AlgebraError(
            f"a direction was scaled by {value}; the scale must be a finite number in the range of float32"
        )
    return value


# Writing


@dataclass(frozen=True, slots=True)
class Saved(Written):
    """A model folder that was written, and how much of the change asked for arrived in it."""

    checkpoint: Checkpoint = field(kw_only=True)


def save(
    point: Point,
    output: Path,
    *,
    dtype: str | None = None,
    rounding: Rounding = "auto",
    seed: int = 0,
    along: Mapping[str, Direction] | None = None,
    precision: str = "float32",
    rows: Rows = "refuse",
    allow_nonfinite: bool = False,
    check: bool = True,
    crew: Crew | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Saved:
    """Write a weighted sum as a model folder with the layout, config and tokenizer of its anchor.

    `dtype` is "float32", "bfloat16", "float16" or "float64" (default: as in the target, per tensor).
    `along` names the directions whose effective scale the dose reports. `precision` is that of the sums;
    `rows` "shared" sums only the rows that every embedding has; `allow_nonfinite` lets NaN and infinity
    through; `check` reads the result back, compares it, and writes `weights.json` for `palinode verify`.
    `crew` divides the work among processes that each make this very call. Memory stays at a few slices for
    each of the crew's threads (default: the cores). `on_progress` hears the number of weights done.

    Raises MismatchError when the checkpoints do not fit together, CheckpointError when an input cannot be
    read or is not finite, OutputError when the output place cannot be used or did not keep what was written.
    """
    if not isinstance(point, Point):
        raise AlgebraError("a direction is not a model; save a point, as in target - alpha * forget_vector")
    asked = settings(
        dtype=dtype, rounding=rounding, seed=seed, precision=precision, allow_nonfinite=allow_nonfinite
    )
    place, crew = output.expanduser().resolve(), crew or Crew()
    lines = {name: line.terms for name, line in (along or {}).items()}
    job = plan(formula(point.anchor, point.terms, lines), place, asked, rows, crew.workers)
    written = write(job, crew, check=check, on_progress=on_progress)
    parts = (written.dose, written.rounding, written.notes, written.seconds)
    return Saved(*parts, checkpoint=Checkpoint.open(place))
