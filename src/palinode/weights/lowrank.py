"""The product of two thin matrices, row by row, and the thin matrices that come nearest to a given one.

A product is added up in float64 in the order of the inner index, without fused multiply-add: an element has
the same bits whichever rows are computed with it, on any machine.
"""

from __future__ import annotations

import numpy as np

from palinode.weights.kernels import compiled, reduction

TILE = 512
"""Columns worked off at a time, so that they stay in cache for all rows."""


def multiply(left: np.ndarray, right: np.ndarray, scale: float) -> np.ndarray:
    """Return scale · left · right (n x r times r x m) in float64."""
    product = np.zeros((left.shape[0], right.shape[1]))
    _multiply(np.ascontiguousarray(left), np.ascontiguousarray(right), float(scale), product)
    return product


def nearest_factors(
    matrix: np.ndarray, *, rank: int | None = None, energy: float = 1.0, most: int | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return left (n x r) and right (r x m), in float64, whose product is nearest to a matrix.

    They are the truncated singular value decomposition, the square roots of the singular values in both.
    r is `rank`, or the smallest that keeps the share `energy` of the sum of squared singular values; None is
    returned where it is more than `most`. Needs a few copies of the matrix in float64.
    """
    from scipy.linalg import eigh

    if matrix.shape[0] < matrix.shape[1]:
        turned = nearest_factors(matrix.T, rank=rank, energy=energy, most=most)
        return None if turned is None else (turned[1].T, turned[0].T)
    wide = matrix.astype(np.float64)
    gram = wide.T @ wide
    kept = rank_for(np.linalg.eigvalsh(gram)[::-1], energy) if rank is None else rank
    if most is not None and kept > most:
        return None
    _, vectors = eigh(gram, subset_by_index=[len(gram) - kept, len(gram) - 1], driver="evr")
    # Squaring the matrix lost half the digits of the small singular values. The space of the leading
    # vectors is still right, and inside it the decomposition is taken again.
    basis, _ = np.linalg.qr(wide @ vectors)
    rotation, values, right = np.linalg.svd(basis.T @ wide, full_matrices=False)
    roots = np.sqrt(values)
    return (basis @ rotation) * roots, roots[:, None] * right


def rank_for(squares: np.ndarray, energy: float) -> int:
    """Return how many of the squared singular values, given in falling order, make up the share `energy`.

    >>> rank_for(np.array([16.0, 9.0, 0.0]), 0.6), rank_for(np.array([16.0, 9.0, 0.0]), 1.0)
    (1, 2)
    """
    running = np.cumsum(np.maximum(squares, 0.0))
    enough = energy * running[-1] * (1 - 1e-12)  # what rounding leaves behind the last one counts for nothing
    return 1 + int(np.searchsorted(running, enough))


def squares(values: np.ndarray, stored: np.ndarray) -> tuple[float, float]:
    """Return |values|² and |values − stored|² of two flat arrays."""
    size, rest = _squares(values, stored)
    return float(size), float(rest)


@compiled
def _multiply(left, right, scale, out):
    """Set `out`, which is zero, to scale · left · right; four steps of the inner sum in one pass."""
    rank = left.shape[1]
    fours = rank - rank % 4
    for begin in range(0, out.shape[1], TILE):
        end = min(begin + TILE, out.shape[1])
        for i in range(out.shape[0]):
            row = out[i, begin:end]
            for k in range(0, fours, 4):
                a, b = np.float64(left[i, k]), np.float64(left[i, k + 1])
                c, d = np.float64(left[i, k + 2]), np.float64(left[i, k + 3])
                p, q = right[k, begin:end], right[k + 1, begin:end]
                s, t = right[k + 2, begin:end], right[k + 3, begin:end]
                for j in range(row.size):
                    row[j] = (
                        row[j]
                        + a * np.float64(p[j])
                        + b * np.float64(q[j])
                        + c * np.float64(s[j])
                        + d * np.float64(t[j])
                    )
            for k in range(fours, rank):
                a, p = np.float64(left[i, k]), right[k, begin:end]
                for j in range(row.size):
                    row[j] = row[j] + a * np.float64(p[j])
            for j in range(row.size):
                row[j] = row[j] * scale


@reduction
def _squares(values, stored):
    size, rest = 0.0, 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        off = value - np.float64(stored[i])
        size += value * value
        rest += off * off
    return size, rest
