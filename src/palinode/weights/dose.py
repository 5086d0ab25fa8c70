"""How much of the change asked for arrived in the stored weights (spec: msa.md, P3)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np

from palinode.weights.kernels import ALONG, ASKED, ERROR, MEASURED, MOVED, totals_of
from palinode.weights.names import is_head

ENOUGH = 0.95
"""Share of a scale that has to arrive; below it there is a warning."""

SAMPLED_FROM, EVERY = 1 << 20, 8
"""Tensors from a million elements on are measured in one block of 2,048 weights out of eight, smaller ones
whole. A scale found in n weights is off by about the relative error of the rounding, divided by √n."""


@dataclass(frozen=True, slots=True)
class Dose:
    """How much of the change asked for really arrived in the stored weights.

    `effective` holds, for each named direction, the scale found in the stored weights (least squares
    of stored − target on the directions); rounding can make it smaller than the one asked for.
    """

    effective: Mapping[str, float]
    relative_error: float | None
    """|stored − exact| / |exact − target|; 0 when nothing was asked for, None with values not finite."""
    moved_share: float
    """Share of floating-point weights whose stored value differs from the target's."""
    weights: int
    """Number of floating-point weights."""
    unreached_share: float = 0.0
    """Share of all numbers in the files that no sum reaches: integers, buffers, rows that are only the
    target's. They stay as the target has them."""
    parts: Mapping[str, Dose] = field(default_factory=dict, repr=False)
    """The same for each part of the model: "embedding", "layer 0", …, "head", "rest"."""


class DoseMeter:
    """Adds up, slice by slice, the totals that the kernels return, by part of the model."""

    def __init__(self, directions: Sequence[str]) -> None:
        self._directions = tuple(directions)
        self._totals: dict[str, np.ndarray] = {}
        self._weights: dict[str, int] = {}
        self._others: dict[str, int] = {}
        self._alone: dict[str, int] = {}

    def leave_out(self, part: str, numbers: int, *, weights: bool) -> None:
        """Take in numbers that stay the target's: `weights` are added by `add` as well, others are not."""
        kind = self._alone if weights else self._others
        kind[part] = kind.get(part, 0) + numbers

    def add(self, part: str, totals: np.ndarray, weights: int, *, every: int = 1) -> None:
        """Take in the totals of a slice of that many weights, of which one block in `every` was measured."""
        found = self._totals.setdefault(part, totals_of(len(self._directions)))
        found += totals * every
        self._weights[part] = self._weights.get(part, 0) + weights

    def merge(self, other: Mapping[str, tuple[Sequence[float], int]]) -> None:
        """Take in what `state` of another meter returned."""
        for part, (totals, weights) in other.items():
            self.add(part, np.array(totals), weights)

    def state(self) -> dict[str, tuple[list[float], int]]:
        """Return everything added so far as plain numbers: totals and weights of each part."""
        return {part: (totals.tolist(), self._weights[part]) for part, totals in self._totals.items()}

    def result(self) -> Dose:
        """Return the dose of everything added so far."""
        parts = sorted(self._totals, key=part_order)
        total = sum((self._totals[part] for part in parts), totals_of(len(self._directions)))
        everything = {*parts, *self._others, *self._alone}
        return self._dose(
            total, everything, {part: self._dose(self._totals[part], {part}, {}) for part in parts}
        )

    def _dose(self, totals: np.ndarray, members: Set[str], parts: Mapping[str, Dose]) -> Dose:
        """Return the dose of some parts of the model, of which these are the totals."""
        count = len(self._directions)
        weights, others, alone = (
            sum(numbers.get(part, 0) for part in members)
            for numbers in (self._weights, self._others, self._alone)
        )
        unreached = (others + alone) / max(1, weights + others)
        if not np.isfinite(totals).all():
            moved = float(totals[MOVED] / totals[MEASURED])
            return Dose({}, None, moved, weights, unreached, parts)
        gram = totals[ALONG + count :].reshape(count, count)
        effective = np.linalg.lstsq(gram, totals[ALONG : ALONG + count], rcond=1e-12)[0] if count else []
        return Dose(
            effective=dict(zip(self._directions, map(float, effective), strict=True)),
            relative_error=math.sqrt(totals[ERROR] / totals[ASKED]) if totals[ASKED] else 0.0,
            moved_share=float(totals[MOVED] / totals[MEASURED]) if totals[MEASURED] else 0.0,
            weights=weights,
            unreached_share=unreached,
            parts=parts,
        )


def shortfalls(dose: Dose, asked: Mapping[str, float]) -> Iterator[str]:
    """Yield a warning for each scale of which less than 95 % arrived."""
    for name, scale in asked.items():
        share = dose.effective.get(name, scale) / scale if scale else 1.0
        if share < ENOUGH:
            yield (
                f"only {share:.0%} of the {name} scale {scale:g} arrived ({dose.effective[name]:.4g}): its "
                "steps are smaller than the output's dtype can hold; use stochastic rounding, or float32"
            )


# Parts of a model


def part_of(name: str) -> str:
    """Return the part of the model a tensor belongs to.

    >>> part_of("model.layers.11.mlp.up_proj.weight"), part_of("lm_head.weight")
    ('layer 11', 'head')
    """
    found = re.search(r"\.(\d+)\.", name)
    if found:
        return f"layer {found.group(1)}"
    if is_head(name):
        return "head"
    if "embed" in name or "wte" in name or "wpe" in name:
        return "embedding"
    return "head" if "head" in name else "rest"


def part_order(part: str) -> tuple[int, int]:
    """Return a key that sorts parts from the embedding up to the head."""
    if part.startswith("layer "):
        return 1, int(part.removeprefix("layer "))
    return {"embedding": 0, "head": 3}.get(part, 2), 0
