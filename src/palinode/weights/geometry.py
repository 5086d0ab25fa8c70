"""Lengths and angles of directions: norms, cosines, and how both run over the layers.

Products are taken slice by slice and added up in float64, so directions are never held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from palinode.errors import AlgebraError, MismatchError
from palinode.weights import kernels
from palinode.weights.arithmetic import Operands
from palinode.weights.checkpoint import Checkpoint
from palinode.weights.direction import Direction
from palinode.weights.displacement import Displacement, check_displacements
from palinode.weights.dose import part_of, part_order
from palinode.weights.fingerprints import check_files
from palinode.weights.preflight import check_fit, complain_of_nonfinite
from palinode.weights.slices import SLICE, Slice, map_slices, per_thread, slices
from palinode.weights.tensors import Files, TensorInfo


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
    directions: Mapping[str, Direction],
    *,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Profile:
    """Measure named directions: one pass over what they are made of. A tied tensor counts once.

    `on_progress` is told the weights that are done. Raises MismatchError when the checkpoints do not fit
    together, AlgebraError when there is none.
    """
    used = list(dict.fromkeys(term for direction in directions.values() for term in direction.terms))
    checkpoints = [term for term in used if isinstance(term, Checkpoint)]
    displacements = [term for term in used if isinstance(term, Displacement)]
    if not used:
        raise AlgebraError(
            "the directions are all zero (a checkpoint minus itself); name two different checkpoints"
        )
    parts = list(_parts(checkpoints, displacements))
    rows = {term: place for place, term in enumerate((*checkpoints, *displacements))}
    along = np.zeros((len(directions), len(rows) + (not checkpoints)))
    for place, direction in enumerate(directions.values()):
        for term, coefficient in direction.terms.items():
            along[place, rows[term] + (not checkpoints)] = coefficient
    count = len(directions)
    gram = {part_of(part.info.name): np.zeros((count, count)) for part in parts}

    def start() -> Callable[[Slice], np.ndarray]:
        operands = Operands(checkpoints, displacements, files)

        def work(part: Slice) -> np.ndarray:
            found = np.zeros((count, count))
            loaded = operands.load(part, np.dtype(np.float32))
            wides = loaded.wides if checkpoints else np.zeros((1, part.count), loaded.dtype)
            kernels.products(
                loaded.packed,
                loaded.halves,
                wides,
                loaded.extras,
                part.count,
                along.astype(loaded.dtype),
                found,
            )
            if not np.isfinite(found).all() and not loaded.finite(part.count):
                complain_of_nonfinite(checkpoints)
            return found

        return work

    def collect(part: Slice, found: np.ndarray) -> None:
        gram[part_of(part.info.name)] += found

    with Files() as files:
        map_slices(parts, per_thread(start), collect=collect, workers=workers, on_progress=on_progress)
    return Profile(tuple(directions), dict(sorted(gram.items(), key=lambda item: part_order(item[0]))))


def _parts(checkpoints: Sequence[Checkpoint], displacements: Sequence[Displacement]) -> Iterator[Slice]:
    """Yield the slices of all tensors that the directions are made of, a tied one once."""
    if checkpoints:
        layout = checkpoints[0]
        check_fit(layout, checkpoints[1:])
        check_files(checkpoints)
        check_displacements(layout, displacements)
        yield from (part for part in slices(layout) if not layout.is_second_copy(part.info.name))
        return
    infos: dict[str, TensorInfo] = {}
    for displacement in displacements:
        for name, change in displacement.changes.items():
            info = TensorInfo(name, "F32", change.shape, Path(), 0, 4 * math.prod(change.shape))
            if infos.setdefault(displacement.one_name(name), info).shape != change.shape:
                raise MismatchError(
                    f"{displacement.folder} has another shape for {name} than the first vector; are they "
                    "vectors of one model?"
                )
    for info in infos.values():
        for start in range(0, info.size, SLICE):
            yield Slice(info, start, min(SLICE, info.size - start))
