"""An α of its own for each group of layers: factors on the common one, tried in memory and stored once.

Groups are runs of layers of about equal number; the embedding goes with the first one, the final norm and the
head with the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palinode.weights import Checkpoint, Direction
from palinode.weights.geometry import part_of
from palinode.weights.transforms import transform


def layer_groups(model: Checkpoint, count: int) -> list[list[str]]:
    """Return the parts of a model in so many groups; fewer where it has fewer layers."""
    parts = {part_of(name) for name in model.tensors}
    layers = sorted((part for part in parts if part.startswith("layer ")), key=lambda part: int(part[6:]))
    groups = [list(map(str, group)) for group in np.array_split(layers, min(count, len(layers)) or 1)]
    groups[0] = [*sorted(parts & {"embedding"}), *groups[0]]
    groups[-1] = [*groups[-1], *sorted(parts - {"embedding"} - set(layers))]
    return groups


def belongs_to(parts: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a tensor is in one of the parts."""
    wanted = frozenset(parts)
    return lambda name: part_of(name) in wanted


def scaled_vector(vector: Direction, groups: Sequence[Mapping[str, Any]], folder: Path) -> Direction:
    """Store the vector with each group's factor on its tensors, and return it."""
    factors = {part: float(group["factor"]) for group in groups for part in group["parts"]}

    def rule(name: str, values: Sequence[np.ndarray]) -> np.ndarray:
        scaled: np.ndarray = (values[0] * factors[part_of(name)]).astype(values[0].dtype)
        return scaled

    return transform([vector], rule, folder, label=f"layer groups {sorted(factors.items())}")
