"""How far each contestant ends from the ideal, and which differences are more than noise.

    gap(model) = |f(model) − f(ideal)| + max(0, r(ideal) − r(model))

f and r are means of one metric over the forget and retain rows that were measured. The ideal is the
retrained model; without one, the base's f and the target's r. Forgetting too much counts as forgetting too
little does. Two gaps differ if the middle 95 % of their difference, over resampled rows and seeds that both
share, leaves out 0 (a paired bootstrap).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palinode.metrics.aggregate import percentile_interval

RESAMPLES = 4000
Rows = NDArray[np.float64]
"""Values of seeds × rows."""


@dataclass(frozen=True, slots=True)
class Values:
    """What one model did on each measured row, by seed: [seeds, rows]."""

    forget: Rows
    retain: Rows


def rank(
    contestants: Mapping[str, Values], ideal: Values, *, seed: int = 0, resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """Return contestants by their gap, the least first, each with its interval and its equals within noise.

    All models have values of the same rows, and all contestants of the same seeds; the ideal has one.
    """
    random = np.random.default_rng(seed)
    names = list(contestants)
    if not names:
        return []
    counts = {
        "forget": _resampled(ideal.forget.shape[1], resamples, random),
        "retain": _resampled(ideal.retain.shape[1], resamples, random),
        "seeds": _resampled(next(iter(contestants.values())).forget.shape[0], resamples, random),
    }
    best = {name: _gaps(contestants[name], ideal, None)[0] for name in names}
    spread = {name: _gaps(contestants[name], ideal, counts) for name in names}
    order = sorted(names, key=lambda name: (best[name], name))
    found = []
    for place, name in enumerate(order):
        differences = {other: _difference(spread[name], spread[other]) for other in order if other != name}
        low, high = percentile_interval(spread[name])
        found.append(
            {
                "name": name,
                "place": place + 1,
                "gap": best[name],
                "low": low,
                "high": high,
                "differences": {
                    other: {"value": best[name] - best[other], "low": ends[0], "high": ends[1]}
                    for other, ends in differences.items()
                },
                "within_noise_of": [other for other, ends in differences.items() if ends[0] <= 0 <= ends[1]],
            }
        )
    return found


def values_of(seeds: Sequence[Mapping[str, Sequence[float | None]]]) -> Values | None:
    """Return the values of a model's seeds; None where a set has none."""
    parts = {
        name: np.array([[np.nan if value is None else value for value in one[name]] for one in seeds], float)
        for name in ("forget", "retain")
    }
    if any(part.size == 0 or np.isnan(part).all() for part in parts.values()):
        return None
    return Values(parts["forget"], parts["retain"])


def _resampled(count: int, resamples: int, random: np.random.Generator) -> Rows:
    """Return how often each of `count` things is drawn, in each resample: [resamples, count]."""
    return random.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def _gaps(model: Values, ideal: Values, counts: Mapping[str, Rows] | None) -> Rows:
    """Return the gap as it is, or in every resample."""
    forget = _mean(model.forget, counts, "forget") - _mean(ideal.forget, counts, "forget")
    retain = _mean(ideal.retain, counts, "retain") - _mean(model.retain, counts, "retain")
    found: Rows = np.abs(forget) + np.maximum(0.0, retain)
    return found


def _mean(values: Rows, counts: Mapping[str, Rows] | None, name: str) -> Rows:
    """Return the mean over seeds and rows; of resampled ones, one mean for each resample."""
    with_value = ~np.isnan(values)
    filled = np.where(with_value, values, 0.0)
    if counts is None:
        return np.array([filled.sum() / with_value.sum()])
    seeds = counts["seeds"] if values.shape[0] > 1 else np.ones((len(counts[name]), 1))
    total = np.einsum("bs,sr,br->b", seeds, filled, counts[name], optimize=True)
    weight = np.einsum("bs,sr,br->b", seeds, with_value.astype(float), counts[name], optimize=True)
    found: Rows = total / np.maximum(weight, 1e-9)
    return found


def _difference(ours: Rows, theirs: Rows) -> tuple[float, float]:
    return percentile_interval(ours - theirs)
