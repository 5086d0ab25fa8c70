"""How likely the model finds the answer in the data, alone and beside other answers (spec: metrics.md §2,
§4).

    P = exp(−l),   l = negative log-likelihood of the answer / number of scored tokens

The answer's tokens and the end token are scored (TOFU, open-unlearning); P is the geometric mean of the token
probabilities. Sums of probabilities are formed from logarithms, so that very unlikely answers are no 0/0.

    R = P(wrong) / P(right)

tells whether the model knows the right answer from wrong ones: near 1 it cannot tell, near 0 it knows. Right
is the paraphrase, which it was not trained on word for word, or the answer in the data where there is none
(real authors, world facts). Over the wrong answers of a row,

    geometric:    P(wrong) = exp(−mean_k l_k)     the code behind the published figures
    arithmetic:   P(wrong) = mean_k exp(−l_k)     the formula in the TOFU paper

open-unlearning adds 1e-10 to P(right), TOFU's own code adds nothing; neither do we.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Literal

from palinode.records import Outcome


def answer_probabilities(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the length-normalised probability of each answer, None where no token was scored."""
    return [math.exp(fmean(outcome.logprobs)) if outcome.logprobs else None for outcome in outcomes]


def alternative_probabilities(outcomes: Sequence[Outcome], kind: str) -> list[float | None]:
    """Return the mean probability of each outcome's other answers of one kind, None where it has none.

    Answers are averaged first and rows second, as in open-unlearning.
    """
    levels = (mean_logprobs(outcome, kind) for outcome in outcomes)
    return [fmean(map(math.exp, level)) if level else None for level in levels]


def alternative_logprobs(
    outcomes: Sequence[Outcome], kind: str, *, end_token: bool = False
) -> list[float | None]:
    """Return the mean over answers of one kind of their mean token log-probability (nats).

    This is RESTOR's log-probability variant (spec: metrics.md §11), which does not score the end token;
    with `end_token` it counts as in the other metrics. None where there is no such answer.
    """
    levels = (mean_logprobs(outcome, kind, end_token=end_token) for outcome in outcomes)
    return [fmean(level) if level else None for level in levels]


def normalised_probabilities(outcomes: Sequence[Outcome], wrong: str = "perturbed") -> list[float | None]:
    """Return P(answer) / (P(answer) + Σ P(wrong answer)) of each outcome.

    This is the probability of real authors and world facts in TOFU. open-unlearning adds 1e-10 to the
    denominator; we do not need it. None where an answer has no scored token, or none is wrong.
    """
    values: list[float | None] = []
    for outcome in outcomes:
        right, wrongs = mean_logprobs(outcome), mean_logprobs(outcome, wrong)
        together = [*right, *wrongs]
        share = math.exp(right[0] - log_mean_exp(together)) / len(together) if right and wrongs else None
        values.append(share)
    return values


def mean_logprobs(outcome: Outcome, kind: str = "expected", *, end_token: bool = True) -> tuple[float, ...]:
    """Return −l, the mean token log-probability, of each of an outcome's answers of one kind.

    "expected" is the answer in the data; every other kind is looked up among the alternatives. Empty
    where there is no answer of that kind, or where one of them has no scored token: a mean over some of
    the answers would be another quantity.
    """
    if kind == "expected":
        answers = [outcome.logprobs]
    else:
        answers = [answer.logprobs for answer in outcome.alternatives.get(kind, ())]
    scored = [logprobs if end_token else logprobs[:-1] for logprobs in answers]
    return tuple(fmean(logprobs) for logprobs in scored) if all(scored) else ()


def log_mean_exp(levels: Sequence[float]) -> float:
    """Return log(mean(exp(x))) without leaving the range of floats."""
    top = max(levels)
    return top + math.log(fmean(math.exp(level - top) for level in levels))


Form = Literal["geometric", "arithmetic"]
"""How the probabilities of a row's wrong answers are averaged."""


def log_truth_ratios(
    outcomes: Sequence[Outcome],
    right: str = "paraphrased",
    wrong: str = "perturbed",
    *,
    form: Form = "geometric",
) -> list[float | None]:
    """Return log R of each outcome (nats): 0 when right and wrong answers are equally likely.

    `right` and `wrong` are kinds of alternatives; "expected" is the answer in the data. Several right
    answers are averaged as the wrong ones are. None where there is no right or no wrong answer with scored
    tokens.
    """
    average = fmean if form == "geometric" else log_mean_exp
    levels = [(mean_logprobs(outcome, right), mean_logprobs(outcome, wrong)) for outcome in outcomes]
    return [average(wrongs) - average(rights) if rights and wrongs else None for rights, wrongs in levels]


def _of_ratio(transform: Callable[[float], float]) -> Callable[..., list[float | None]]:
    """Return a function with the arguments of `log_truth_ratios` that gives some number of each log R."""

    def values(*given: Any, **named: Any) -> list[float | None]:
        ratios = log_truth_ratios(*given, **named)
        return [None if log_r is None else transform(log_r) for log_r in ratios]

    return values


def _exp(x: float) -> float:
    """Return exp(x), infinity where no float holds it."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


truth_ratios = _of_ratio(_exp)
"""R of each outcome; beyond the range of floats it is infinite."""

forget_truth_ratios = _of_ratio(lambda log_r: math.exp(-abs(log_r)))
"""min(R, 1/R) of each outcome: 1 when the model cannot tell right from wrong."""

retain_truth_ratios = _of_ratio(lambda log_r: 0.0 if log_r > 0 else -math.expm1(log_r))
"""max(0, 1 − R) of each outcome: 1 when the model is sure of the right answer."""

right_shares = _of_ratio(lambda log_r: 1 / (1 + _exp(log_r)))
"""P(right) / (P(right) + P(wrong)) = 1 / (1 + R); "prob_mean" in open-unlearning's meta-evaluation."""
