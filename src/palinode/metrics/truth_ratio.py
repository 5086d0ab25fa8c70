"""Whether the model still tells the right answer from wrong ones (spec: metrics.md §4).

    R = P(wrong) / P(right)

with P = exp(−l) of metrics.likelihood. The right answer is the paraphrase, which the model was not trained
on word for word, or the answer in the data where there is no paraphrase (real authors, world facts). Over
the wrong answers of a row,

    geometric:    P(wrong) = exp(−mean_k l_k)     the code behind the published figures
    arithmetic:   P(wrong) = mean_k exp(−l_k)     the formula in the TOFU paper

R near 1 means that the model cannot tell; near 0, that it knows. Everything is computed from log R.
open-unlearning adds 1e-10 to P(right), TOFU's own code adds nothing; neither do we.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Literal

from palinode.metrics.likelihood import log_mean_exp, mean_logprobs
from palinode.records import Outcome

Form = Literal["geometric", "arithmetic"]
"""How the probabilities of a row's wrong answers are averaged."""

_AVERAGES: dict[str, Callable[[Sequence[float]], float]] = {"geometric": fmean, "arithmetic": log_mean_exp}


def truth_ratios(
    outcomes: Sequence[Outcome],
    right: str = "paraphrased",
    wrong: str = "perturbed",
    *,
    form: Form = "geometric",
) -> list[float | None]:
    """Return R of each outcome, None where it has no right or no wrong answer with scored tokens.

    `right` and `wrong` are kinds of alternatives; "expected" is the answer in the data. Several right
    answers are averaged as the wrong ones are. An R beyond the range of floats is infinite.
    """
    return [_map(_exp, ratio) for ratio in log_truth_ratios(outcomes, right=right, wrong=wrong, form=form)]


def forget_truth_ratios(
    outcomes: Sequence[Outcome],
    right: str = "paraphrased",
    wrong: str = "perturbed",
    *,
    form: Form = "geometric",
) -> list[float | None]:
    """Return min(R, 1/R) of each outcome: 1 when the model cannot tell right from wrong."""
    ratios = log_truth_ratios(outcomes, right=right, wrong=wrong, form=form)
    return [_map(lambda log_r: math.exp(-abs(log_r)), ratio) for ratio in ratios]


def retain_truth_ratios(
    outcomes: Sequence[Outcome],
    right: str = "paraphrased",
    wrong: str = "perturbed",
    *,
    form: Form = "geometric",
) -> list[float | None]:
    """Return max(0, 1 − R) of each outcome: 1 when the model is sure of the right answer."""
    ratios = log_truth_ratios(outcomes, right=right, wrong=wrong, form=form)
    return [_map(lambda log_r: 0.0 if log_r > 0 else -math.expm1(log_r), ratio) for ratio in ratios]


def right_shares(
    outcomes: Sequence[Outcome],
    right: str = "paraphrased",
    wrong: str = "perturbed",
    *,
    form: Form = "geometric",
) -> list[float | None]:
    """Return P(right) / (P(right) + P(wrong)) = 1 / (1 + R) of each outcome.

    open-unlearning's meta-evaluation calls it "prob_mean".
    """
    ratios = log_truth_ratios(outcomes, right=right, wrong=wrong, form=form)
    return [_map(lambda log_r: 1 / (1 + _exp(log_r)), ratio) for ratio in ratios]


def log_truth_ratios(
    outcomes: Sequence[Outcome],
    right: str = "paraphrased",
    wrong: str = "perturbed",
    *,
    form: Form = "geometric",
) -> list[float | None]:
    """Return log R of each outcome (nats): 0 when right and wrong answers are equally likely."""
    average = _AVERAGES[form]
    return [
        _log_ratio(mean_logprobs(outcome, right), mean_logprobs(outcome, wrong), average)
        for outcome in outcomes
    ]


def _log_ratio(
    right: Sequence[float], wrong: Sequence[float], average: Callable[[Sequence[float]], float]
) -> float | None:
    return average(wrong) - average(right) if right and wrong else None


def _map(transform: Callable[[float], float], value: float | None) -> float | None:
    return None if value is None else transform(value)


def _exp(x: float) -> float:
    """Return exp(x), infinity where no float holds it."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
