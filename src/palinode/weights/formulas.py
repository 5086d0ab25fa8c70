"""A point laid out for the kernels: its operands in rows, its coefficients over the rows.

A point Σ c_i P_i with Σ c_i = 1 is computed as  A + Σ c_i (P_i − A)  for one of its own terms A, the
pivot: the differences of neighbouring checkpoints are nearly exact in float32, so nothing is lost to
cancellation, and the scales need not add up to 1 in floating point. Displacements (an adapter, a stored
vector) are differences already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from palinode.weights.checkpoint import Checkpoint
from palinode.weights.direction import Direction, Point, Term
from palinode.weights.displacement import Displacement


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """A point as the kernels take it: operands in rows, and coefficients over the rows.

    Row 0 is the pivot A; then come the other checkpoints, less the pivot, and the displacements.
    """

    point: Point
    checkpoints: tuple[Checkpoint, ...]
    displacements: tuple[Displacement, ...]
    order: np.ndarray
    """Rows with a coefficient, those of equal coefficients next to each other."""
    ends: np.ndarray
    """Where in `order` each group of equal coefficients ends."""
    weights: np.ndarray
    """Coefficient of each group."""
    names: tuple[str, ...]
    """Directions that the dose is measured along, and …"""
    along: np.ndarray
    """… their coefficients over the rows."""
    change: np.ndarray
    """The point less its anchor, as coefficients over the rows."""
    target: int
    """Row of the anchor; 0 where it is the pivot."""


def formula(point: Point, along: Mapping[str, Direction] | None = None) -> Formula:
    """Lay out a point, and the directions its dose is to be measured along, for the kernels."""
    along = along or {}
    pivot = pivot_of(point.terms, point.anchor)
    lines = [line.terms for line in along.values()]
    operands = dict.fromkeys([pivot, *point.terms, point.anchor, *(term for line in lines for term in line)])
    checkpoints = tuple(term for term in operands if isinstance(term, Checkpoint))
    displacements = tuple(term for term in operands if isinstance(term, Displacement))
    row = {term: place for place, term in enumerate((*checkpoints, *displacements))}
    groups = [
        (coefficient, [row[term] for term, _ in members])
        for coefficient, members in groupby(
            [term for term in in_order(point.terms) if term[0] != pivot], key=lambda term: term[1]
        )
    ]

    def over_rows(terms: Mapping[Term, float]) -> np.ndarray:
        coefficients = np.zeros(len(row))
        for term, coefficient in terms.items():
            coefficients[row[term]] = coefficient
        return coefficients

    return Formula(
        point,
        checkpoints,
        displacements,
        order=np.array([place for _, members in groups for place in members], np.int64),
        ends=np.cumsum([len(members) for _, members in groups], dtype=np.int64),
        weights=np.array([coefficient for coefficient, _ in groups], np.float64),
        names=tuple(along),
        along=np.array([over_rows(line) for line in lines]).reshape(len(lines), len(row)),
        change=over_rows((point - point.anchor).terms),
        target=row[point.anchor],
    )


def in_order(terms: Mapping[Term, float]) -> list[tuple[Term, float]]:
    """Return the terms in an order that does not depend on how the formula was written."""
    return sorted(terms.items(), key=lambda term: (term[1], str(term[0].folder)))


def pivot_of(terms: Mapping[Term, float], anchor: Checkpoint | None = None) -> Checkpoint:
    """Return the checkpoint that the others are compared with: the anchor where it takes part."""
    if anchor is not None and anchor in terms:
        return anchor
    return next(term for term, _ in in_order(terms) if isinstance(term, Checkpoint))
