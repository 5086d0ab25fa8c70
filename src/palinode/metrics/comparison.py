"""Forget quality: do the unlearned and the retrained model behave alike on the forget set? (metrics.md §6)

    p-value of the two-sided two-sample Kolmogorov-Smirnov test between the truth ratios R of both models

on the same questions. p near 1: no difference found; p near 0: they differ. The test looks at ranks
only, so R, 1/R and log R give the same p. Figures are usually shown as log10 p.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from palinode.errors import DataError
from palinode.metrics.aggregate import no_score
from palinode.metrics.pairing import partners
from palinode.metrics.truth_ratio import Form, log_truth_ratios
from palinode.records import Outcome, Score

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
    outcomes: Sequence[Outcome],
    reference: Sequence[Outcome] | None,
    *,
    right: str = "paraphrased",
    wrong: str = "perturbed",
    form: Form = "geometric",
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
    ratios = zip(
        log_truth_ratios(outcomes, right, wrong, form=form),
        log_truth_ratios(paired, right, wrong, form=form),
        strict=True,
    )
    known = [(ours, theirs) for ours, theirs in ratios if ours is not None and theirs is not None]
    missing = f"{right} or {wrong} answers are missing"
    if not known:
        return no_score(f"none of {len(outcomes)} examples has a value: {missing}")
    ours, theirs = zip(*known, strict=True)
    if any(map(math.isnan, [*ours, *theirs])):
        return no_score("some truth ratios are not numbers")
    test = ks_test(ours, theirs)
    said = f"Kolmogorov-Smirnov D {test.statistic:.6g}, {test.method} p-value, which has no interval"
    if len(known) < len(outcomes):
        said = f"{len(outcomes) - len(known)} of {len(outcomes)} examples left out: {missing}; {said}"
    return Score(test.p, len(known), None, None, said)
