"""From one value per example to one score: a mean, n and a percentile bootstrap interval.

    mean_score       the mean of one list of values
    harmonic_score   TOFU's model utility: the harmonic mean of the means of several lists
    forget_quality   p-value of the two-sided two-sample Kolmogorov-Smirnov test between the truth ratios R of
                     the unlearned and the retrained model on the same questions (metrics.md §6)

What could not be computed is left out and said, never counted as 0. Of forget quality p near 1 means that no
difference was found. The test looks at ranks only, so R, 1/R and log R give the same p; figures are usually
shown as log10 p.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, harmonic_mean
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from palinode.errors import DataError
from palinode.metrics.likelihood import Form, log_truth_ratios
from palinode.records import Outcome, Score


def partners(outcomes: Sequence[Outcome], reference: Sequence[Outcome]) -> list[Outcome | None]:
    """Return for each outcome the reference's outcome of the same row and text, None where there is none.

    Rows are numbered in their source, so the order of either side does not matter; each reference outcome
    is used once. Texts must agree where both sides have them (published logs may hold numbers only): the
    same answer, and one prompt inside the other, as a log may keep the prompt with its chat template.
    """

    def alike(one: Outcome, other: Outcome) -> bool:
        answers = one.expected.strip(), other.expected.strip()
        prompts = one.prompt.strip(), other.prompt.strip()
        same_answer = not all(answers) or answers[0] == answers[1]
        return same_answer and (prompts[0] in prompts[1] or prompts[1] in prompts[0])

    waiting: dict[int, list[Outcome]] = {}
    for outcome in reference:
        waiting.setdefault(outcome.row, []).append(outcome)
    found: list[Outcome | None] = []
    for outcome in outcomes:
        candidates = waiting.get(outcome.row, [])
        partner = next((other for other in candidates if alike(outcome, other)), None)
        if partner is not None:
            candidates[:] = [other for other in candidates if other is not partner]
        found.append(partner)
    return found


RESAMPLES = 9999
"""Bootstrap resamples behind each interval."""
TAIL = 0.025
"""Share of them on either side of it."""
_DRAWS_AT_ONCE = 4_000_000  # examples × resamples held in memory together: 32 MB


def mean_score(
    values: Sequence[float | None], *, seed: int = 0, missing: str = "no value", shares: bool = True
) -> Score:
    """Return the mean of the values that exist, with n and a seeded bootstrap interval.

    The order of the values changes nothing. `missing` says why a value may be None; it goes into the
    score's reason. A value that is not finite leaves the score without a value. `shares` says that values
    lie between 0 and 1, so that all 0 or all 1 have the exact interval of a share.
    """
    known = sorted(value for value in values if value is not None)
    not_finite = sum(not math.isfinite(value) for value in known)
    if not_finite:
        return no_score(f"{not_finite} of {len(values)} values are not finite numbers")
    if not known:
        return no_score(
            f"none of {len(values)} examples has a value: {missing}" if values else "there are no examples"
        )

    mean, (low, high) = fmean(known), (None, None)
    if len(known) > 1 and known[0] == known[-1]:  # sorted, so all are equal
        low, high = ends_of_equals(mean, len(known)) if shares else (mean, mean)
    elif len(known) > 1:
        low, high = percentile_interval(_resampled_means(np.array(known), np.random.default_rng(seed)))
    left_out = len(values) - len(known)
    few = f"{left_out} of {len(values)} examples left out: {missing}" if left_out else None
    single = "one example gives no interval" if len(known) == 1 else None
    return Score(mean, len(known), low, high, joined(few, single))


def harmonic_score(parts: Mapping[str, Sequence[float | None]], *, seed: int = 0) -> Score:
    """Return the harmonic mean of the parts' means: TOFU's model utility (spec: metrics.md §5).

    TOFU has nine parts: answer probability (normalised for the last two), ROUGE-L recall and truth ratio
    on retain rows, real authors and world facts. A part whose mean is 0 makes the score 0. A part without
    values leaves the score without one, and the reason names it: a mean of the others is not utility.

    The interval is a seeded percentile bootstrap over the rows of each part, apart from one another. `n`
    is the number of values in all parts together. The order of parts and of values changes nothing.
    """
    if not parts:
        return no_score("there are no parts")
    known = {name: sorted(v for v in parts[name] if v is not None) for name in sorted(parts)}
    if unusable := [wrong for name, values in known.items() if (wrong := _unusable(name, values))]:
        return no_score("; ".join(unusable))

    mean = harmonic_mean([fmean(values) for values in known.values()])
    left_out = [
        f"{len(parts[name]) - len(values)} of {len(parts[name])} rows of {name} left out: no value"
        for name, values in known.items()
        if len(values) < len(parts[name])
    ]
    single = [f"one row in {name} gives no interval" for name, values in known.items() if len(values) == 1]
    reason = joined(*left_out, *single)
    n = sum(map(len, known.values()))
    if single:
        return Score(mean, n, None, None, reason)

    generator = np.random.default_rng(seed)
    means = np.stack([_resampled_means(np.array(values), generator) for values in known.values()])
    with np.errstate(divide="ignore", over="ignore"):  # 1/0 is infinite, and the harmonic mean then 0
        utilities = len(means) / (1 / means).sum(axis=0)
    return Score(mean, n, *percentile_interval(utilities), reason)


def known_mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that there are; None without any."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def no_score(reason: str) -> Score:
    """Return the score of something that could not be computed, with the reason."""
    return Score(value=None, n=0, low=None, high=None, reason=reason)


def joined(*reasons: str | None) -> str | None:
    """Return what there is to say about a score as one line, None where there is nothing."""
    return "; ".join(reason for reason in reasons if reason) or None


def percentile_interval(resampled: NDArray[np.float64]) -> tuple[float, float]:
    """Return the middle 95 % of the resampled values."""
    low, high = np.quantile(resampled, [TAIL, 1 - TAIL])
    return float(low), float(high)


def _unusable(name: str, values: Sequence[float]) -> str | None:
    if not values:
        return f"{name} has no value"
    if bad := sum(not math.isfinite(value) for value in values):
        return f"{bad} of {len(values)} values of {name} are not finite numbers"
    if values[0] < 0:  # sorted
        return f"{name} has negative values, of which there is no harmonic mean"
    return None


def _resampled_means(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Return the mean of each bootstrap resample."""
    means = np.empty(RESAMPLES)
    step = max(1, _DRAWS_AT_ONCE // values.size)
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        draws = generator.integers(0, values.size, (count, values.size))
        means[start : start + count] = values[draws].mean(axis=1)
    return means


def ends_of_equals(value: float, count: int) -> tuple[float, float]:
    """Return the interval of a mean where all values are equal, which resampling would make a point.

    All 0 or all 1 are shares at their end: a true share p gives n zeros with probability (1 − p)^n, so the
    exact (Clopper-Pearson) interval of n zeros is [0, 1 − TAIL^(1/n)].
    """
    rest = TAIL ** (1 / count)
    if value == 0:
        return 0.0, 1 - rest
    return (rest, 1.0) if value == 1 else (value, value)


_EXACT_UP_TO = 10_000  # rows; scipy's own limit


@dataclass(frozen=True, slots=True)
class KS:
    """The two-sided two-sample Kolmogorov-Smirnov test."""

    statistic: float
    """D, the largest gap between the two distribution functions."""
    p: float
    """Probability of a D this large when both samples come from one distribution."""
    method: Literal["exact", "asymptotic"]
    """How p was computed; the asymptotic formula is the fallback for large samples."""


def ks_test(a: Sequence[float], b: Sequence[float]) -> KS:
    """Return the two-sample Kolmogorov-Smirnov test of a against b.

    p is exact up to 10 000 values a sample, and asymptotic beyond or where the exact computation fails.
    Raises DataError when a sample is empty or holds a value that is not a number.
    """
    for name, sample in {"first": a, "second": b}.items():
        if not len(sample):
            raise DataError(f"the {name} sample is empty; the Kolmogorov-Smirnov test needs values in both")
        if any(map(math.isnan, sample)):
            raise DataError(f"the {name} sample holds a value that is not a number; leave it out and say so")

    from scipy.stats import ks_2samp  # takes a second, so only when it is used

    exact = max(len(a), len(b)) <= _EXACT_UP_TO
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = ks_2samp(a, b, method="exact" if exact else "asymp")
    fell_back = any("asymp" in str(warning.message) for warning in said)
    method: Literal["exact", "asymptotic"] = "exact" if exact and not fell_back else "asymptotic"
    return KS(float(found.statistic), float(found.pvalue), method)


def forget_quality(
    outcomes: Sequence[Outcome], reference: Sequence[Outcome] | None, *, form: Form = "geometric"
) -> Score:
    """Return the p-value of the KS test between the truth ratios of a model and of the retrained one.

    `reference` holds the retrained model's outcomes on the same forget rows, in any order. Without them,
    or when the rows do not correspond, there is no value: not 1. The reason always states D, the method
    and what was left out; a p-value has no interval. `n` counts rows, the same for both models.
    """
    if not outcomes:
        return no_score("there are no examples")
    if not reference:
        return no_score("there are no outcomes of a retrained model to compare with")
    paired = [partner for partner in partners(outcomes, reference) if partner is not None]
    if not len(paired) == len(outcomes) == len(reference):
        return no_score(
            f"{len(paired)} of {len(outcomes)} rows correspond to the {len(reference)} rows of the "
            "retrained model; both must be asked the same questions of the same set"
        )
    ratios = zip(log_truth_ratios(outcomes, form=form), log_truth_ratios(paired, form=form), strict=True)
    known = [(ours, theirs) for ours, theirs in ratios if ours is not None and theirs is not None]
    missing = "paraphrased or perturbed answers are missing"
    if not known:
        return no_score(f"none of {len(outcomes)} examples has a value: {missing}")
    ours, theirs = zip(*known, strict=True)
    if any(map(math.isnan, [*ours, *theirs])):
        return no_score("some truth ratios are not numbers")
    test = ks_test(ours, theirs)
    said = f"Kolmogorov-Smirnov D {test.statistic:.6g}, {test.method} p-value, which has no interval"
    left_out = len(outcomes) - len(known)
    few = f"{left_out} of {len(outcomes)} examples left out: {missing}" if left_out else None
    return Score(test.p, len(known), None, None, joined(few, said))
