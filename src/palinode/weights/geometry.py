"""Lengths and angles of directions: norms, cosines, and how both run over the layers.

Products are taken slice by slice and added up in float64, so directions are never held in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from palinode.errors import AlgebraError
from palinode.weights.arithmetic import Operands, Reader, Slice, check_same_shape, map_slices, slices
from palinode.weights.checkpoint import HEADS
from palinode.weights.direction import Direction


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


def profile(directions: Mapping[str, Direction]) -> Profile:
    """Measure named directions: one pass over their checkpoints. A tied tensor counts once.

    Raises MismatchError when the checkpoints do not fit together, AlgebraError when there is none.
    """
    used = list(dict.fromkeys(term for direction in directions.values() for term in direction.terms))
    if not used:
        raise AlgebraError(
            "the directions are all zero (a checkpoint minus itself); name two different checkpoints"
        )
    layout = used[0]
    check_same_shape(used[1:], layout)
    count = len(directions)
    gram: dict[str, np.ndarray] = {part_of(name): np.zeros((count, count)) for name in layout.tensors}

    def work(part: Slice) -> tuple[str, np.ndarray]:
        operands = Operands(reader, part, used)
        vectors = [operands.direction(direction).numpy() for direction in directions.values()]
        return part_of(part.info.name), np.array([[np.dot(a, b) for b in vectors] for a in vectors], float)

    def collect(found: tuple[str, np.ndarray]) -> None:
        gram[found[0]] += found[1]

    with Reader() as reader:
        reader.open(used)
        once = [part for part in slices(layout) if not layout.is_second_copy(part.info.name)]
        map_slices(once, work, collect=collect)
    return Profile(tuple(directions), dict(sorted(gram.items(), key=lambda item: _rank(item[0]))))


def part_of(name: str) -> str:
    """Return the part of the model a tensor belongs to.

    >>> part_of("model.layers.11.mlp.up_proj.weight"), part_of("lm_head.weight")
    ('layer 11', 'head')
    """
    found = re.search(r"\.(\d+)\.", name)
    if found:
        return f"layer {found.group(1)}"
    if name in HEADS:
        return "head"
    if "embed" in name or "wte" in name or "wpe" in name:
        return "embedding"
    return "head" if "head" in name else "rest"


def _rank(part: str) -> tuple[int, int]:
    if part.startswith("layer "):
        return 1, int(part.removeprefix("layer "))
    return (0, 0) if part == "embedding" else (2, 0)
