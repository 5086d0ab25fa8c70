"""How much of the change asked for arrived in the stored weights (spec: msa.md, P3).

Lengths and angles of directions: norms, cosines, and how both run over the layers.

Products are taken slice by slice and added up in float64, so directions are never held in memory.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np

from palinode.errors import AlgebraError
from palinode.weights import kernels
from palinode.weights.arithmetic import (
    Evaluator,
    Formula,
    Operands,
    Settings,
    Slice,
    apart,
    combined,
    cut,
    formula,
    layout_of,
    map_slices,
    over_rows,
)
from palinode.weights.displacement import HasTerms
from palinode.weights.fingerprints import check_files
from palinode.weights.kernels import ALONG, ASKED, ERROR, MEASURED, MOVED, totals_of
from palinode.weights.preflight import complain_of_nonfinite
from palinode.weights.tensors import Files, is_head

ENOUGH = 0.95
"""Share of a scale that has to arrive; below it there is a warning."""


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
        self._weights: Counter[str] = Counter()
        self._others: Counter[str] = Counter()
        self._alone: Counter[str] = Counter()

    def leave_out(self, part: str, numbers: int, *, weights: bool) -> None:
        """Take in numbers that stay the target's: `weights` are added by `add` as well, others are not."""
        (self._alone if weights else self._others)[part] += numbers

    def add(self, part: str, totals: np.ndarray, weights: int, *, every: int = 1) -> None:
        """Take in the totals of a slice of that many weights, of which one block in `every` was measured."""
        found = self._totals.setdefault(part, totals_of(len(self._directions)))
        found += totals * every
        self._weights[part] += weights

    def merge(self, other: DoseMeter) -> None:
        """Take in all that was added to another meter."""
        for part, totals in other._totals.items():
            self.add(part, totals, other._weights[part])

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
            sum(numbers[part] for part in members) for numbers in (self._weights, self._others, self._alone)
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
        if share < ENOUGH and dose.relative_error:  # of a change that is nothing all arrives
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


@dataclass(frozen=True, slots=True)
class Profile:
    """Norms and cosines of named directions, over all weights and layer by layer."""

    names: tuple[str, ...]
    gram: Mapping[str, np.ndarray]
    """Inner products (n x n, float64) by part of the model: "layer 0", …, "embedding", "head", "rest"."""

    @property
    def total(self) -> np.ndarray:
        """Inner products over all weights, n x n."""
        total: np.ndarray = sum(self.gram.values(), np.zeros((len(self.names), len(self.names))))
        return total

    def norms(self, part: str | None = None) -> dict[str, float]:
        """Return the Euclidean norm of each direction, over all weights or in one part."""
        gram = self.total if part is None else self.gram[part]
        return dict(zip(self.names, np.sqrt(np.diag(gram)).tolist(), strict=True))

    def cosine(self, first: str, second: str, part: str | None = None) -> float | None:
        """Return the cosine between two directions; None when one of them is zero."""
        gram = self.total if part is None else self.gram[part]
        i, j = self.names.index(first), self.names.index(second)
        length = float(np.sqrt(gram[i, i] * gram[j, j]))
        return float(gram[i, j]) / length if length else None


def profile(
    directions: Mapping[str, HasTerms],
    *,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Profile:
    """Measure named directions: one pass over what they are made of. A tied tensor counts once.

    `on_progress` is told the weights that are done. Raises MismatchError when the checkpoints do not fit
    together, AlgebraError when there is none.
    """
    checkpoints, displacements = apart(term for line in directions.values() for term in line.terms)
    if not (checkpoints or displacements):
        raise AlgebraError(
            "the directions are all zero (a checkpoint minus itself); name two different checkpoints"
        )
    parts = [part for info in layout_of([*checkpoints, *displacements]) for part in cut(info)]
    check_files(checkpoints)
    rows = [*(checkpoints or [None]), *displacements]  # row 0 is the pivot, or zero where there is none
    along, count = over_rows([line.terms for line in directions.values()], rows), len(directions)
    gram = {part_of(part.info.name): np.zeros((count, count)) for part in parts}

    def start() -> Callable[[Slice], np.ndarray]:
        operands = Operands(checkpoints, displacements, files)

        def work(part: Slice) -> np.ndarray:
            found = np.zeros((count, count))
            loaded = operands.load(part, np.dtype(np.float32))
            wides = loaded.wides if checkpoints else np.zeros((1, part.count), loaded.dtype)
            values = (loaded.packed, loaded.halves, wides, loaded.extras)
            kernels.products(values, part.count, along.astype(loaded.dtype), found)
            if not np.isfinite(found).all() and not loaded.finite(part.count):
                complain_of_nonfinite(checkpoints)
            return found

        return work

    def collect(part: Slice, found: np.ndarray) -> None:
        gram[part_of(part.info.name)] += found

    with Files() as files:
        map_slices(parts, start, collect=collect, workers=workers, on_progress=on_progress)
    return Profile(tuple(directions), dict(sorted(gram.items(), key=lambda item: part_order(item[0]))))


SAMPLE = 1 << 14
"""Elements of each tensor that decide between the two roundings."""

TOLERANCE = 0.01
"""Share of the dose that rounding to nearest may lose (or add) before `auto` takes the stochastic one."""


def choose_rounding(form: Formula, asked: Settings, parts: Iterable[Slice]) -> tuple[Settings, float | None]:
    """Return the settings with `auto` settled, and the share of the dose that nearest would deliver.

    The share, ⟨stored − target, exact − target⟩ / |exact − target|², is measured on a few thousand weights
    in the middle of every tensor; it is None where nothing is rounded to 16 bits or the choice was given.
    """
    if asked.rounding != "auto":
        return asked, None
    extents = {part.info: part.start + part.count for part in parts if not part.alone}
    halved = ("F16", "BF16")
    extents = {info: extent for info, extent in extents.items() if (asked.code or info.dtype) in halved}
    change = combined(form.terms, -1.0, {form.anchor: 1.0})
    if not extents or not change:
        return replace(asked, rounding="nearest"), None
    nearest = replace(asked, rounding="nearest", allow_nonfinite=True)
    meter = DoseMeter(["all"])
    with Files() as files:
        evaluator = Evaluator(formula(form.anchor, form.terms, {"all": change}), nearest, files, measure=True)
        for info, extent in extents.items():
            count = min(SAMPLE, extent)
            middle = (extent - count) // 2 // kernels.BLOCK * kernels.BLOCK
            _, totals = evaluator.evaluate(Slice(info, middle, count))
            meter.add("all", totals, count)
    found = meter.result()
    if not found.relative_error:  # nothing was asked for there, or nothing of it is lost, or it is not finite
        return replace(asked, rounding="nearest"), None
    share = found.effective["all"]
    keeps = abs(share - 1) <= TOLERANCE
    return replace(asked, rounding="nearest" if keeps else "stochastic"), share
