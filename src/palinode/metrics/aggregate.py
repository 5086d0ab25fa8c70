"""From one value per example to one score: the mean, n and a percentile bootstrap interval.

What could not be computed is left out and said, never counted as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from palinode.records import Score

RESAMPLES = 9999
"""Bootstrap resamples behind each interval."""
_DRAWS_AT_ONCE = 4_000_000  # examples × resamples held in memory together: 32 MB


def mean_score(
    values: Sequence[float | None],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    missing: str = "no value",
) -> Score:
    """Return the mean of the values that exist, with n and a seeded bootstrap interval.

    The order of the values changes nothing. `missing` says why a value may be None; it goes into the
    score's reason. A value that is not finite leaves the score without a value.
    """
    known = sorted(value for value in values if value is not None)
    not_finite = sum(not math.isfinite(value) for value in known)
    if not_finite:
        return _no_score(f"{not_finite} of {len(values)} values are not finite numbers")
    if not known:
        return _no_score(f"none of {len(values)} examples: {missing}" if values else "there are no examples")

    mean = fmean(known)
    low, high = _interval(known, mean, seed=seed, confidence=confidence)
    return Score(mean, len(known), low, high, _reason(len(known), len(values), missing))


def _no_score(reason: str) -> Score:
    return Score(value=None, n=0, low=None, high=None, reason=reason)


def _reason(known: int, total: int, missing: str) -> str | None:
    reasons = []
    if known < total:
        reasons.append(f"{total - known} of {total} examples left out: {missing}")
    if known == 1:
        reasons.append("one example gives no interval")
    return "; ".join(reasons) or None


def _interval(
    known: list[float], mean: float, *, seed: int, confidence: float
) -> tuple[float | None, float | None]:
    if len(known) == 1:
        return None, None
    if known[0] == known[-1]:  # sorted, so all are equal
        return mean, mean

    from scipy.stats import bootstrap  # takes a second, so only when it is used

    interval = bootstrap(
        (np.array(known),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _DRAWS_AT_ONCE // len(known)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
