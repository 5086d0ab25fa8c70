"""Rows that begin alike, read together: what they share goes through the model once.

The five to seven answers to one question (the right one, paraphrases, wrong ones) have their prompt in
common, and often their first words. A `Tree` holds every shared beginning once; each token sees the
tokens on its own path and no others, and stands at its place in its own row. What the model says at a
token is then what it would say in the plain row, for every architecture that takes a mask and positions
as they are given; `likelihoods` checks that before it relies on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from palinode.data.batches import IntArray
from palinode.data.tokenize import TokenRow

TREE_TOKENS = 1024
"""Tokens above which rows with a prompt in common are put in several trees: a mask has T × T entries."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Token ids of one or several rows, every common beginning once, parents before children."""

    ids: IntArray
    """int64 [T]."""
    positions: IntArray
    """Place of each token in its row, int64 [T]."""
    branches: tuple[tuple[int, int, int], ...]
    """Stretches of tokens (parent, begin, end): begin follows parent, the others the one before."""
    rows: tuple[int, ...]
    """Which rows of the list given are in it."""
    paths: tuple[IntArray, ...]
    """For each of them, where its ids but the last are, int64 [length − 1]."""

    @property
    def branched(self) -> bool:
        """Whether it is more than one row in a line."""
        return len(self.branches) > 1

    def visible(self) -> npt.NDArray[np.bool_]:
        """Return which tokens (columns) each token (row) sees: itself and those before it, bool [T, T]."""
        seen = np.zeros((len(self.ids), len(self.ids)), np.bool_)
        for parent, begin, end in self.branches:
            if parent >= 0:
                seen[begin:end] = seen[parent]
            seen[begin:end, begin:end] = np.tri(end - begin, dtype=np.bool_)
        return seen


def grow_trees(rows: Sequence[TokenRow], *, share: bool = True) -> list[Tree]:
    """Return trees that hold every row once: rows with one prompt share a tree, if `share`.

    The last id of a row is only ever predicted, never read, so it is in no tree.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.ids[: row.start], []).append(place)
    shared = groups.values() if share else ([place] for place in range(len(rows)))
    return [_grow(rows, part) for members in shared for part in _parts(rows, members)]


def _parts(rows: Sequence[TokenRow], members: Sequence[int]) -> list[list[int]]:
    """Return the members of a group in parts that make trees of at most `TREE_TOKENS`, or of one row."""
    parts: list[list[int]] = []
    size = 0
    for place in members:
        row = rows[place]
        if not parts or size + row.scored > TREE_TOKENS:
            parts.append([])
            size = row.start
        parts[-1].append(place)
        size += row.scored
    return parts


def _grow(rows: Sequence[TokenRow], members: Sequence[int]) -> Tree:
    """Return the tree of some rows; each adds one branch, where it parts from those before it."""
    children: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    positions: list[int] = []
    branches, paths = [], []
    for place in members:
        path, node, begin = [], -1, len(ids)
        for position, token in enumerate(rows[place].ids[:-1]):
            following = children.get((node, token))
            if following is None:
                if len(ids) == begin:
                    parent = node
                following = children[node, token] = len(ids)
                ids.append(token)
                positions.append(position)
            node = following
            path.append(node)
        if len(ids) > begin:
            branches.append((parent, begin, len(ids)))
        paths.append(np.array(path, np.int64))
    return Tree(
        np.array(ids, np.int64),
        np.array(positions, np.int64),
        tuple(branches),
        tuple(members),
        tuple(paths),
    )
