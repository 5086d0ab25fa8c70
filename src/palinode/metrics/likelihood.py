"""How likely the model finds the answer in the data, alone and beside other answers (spec: metrics.md §2).

    P = exp(−l),   l = negative log-likelihood of the answer / number of scored tokens

The answer's tokens and the end token are scored (TOFU, open-unlearning). The length normalisation makes
long and short answers comparable: P is the geometric mean of the token probabilities. Sums of
probabilities are formed from their logarithms, so that very unlikely answers do not become 0/0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

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
    return [_normalised(mean_logprobs(outcome), mean_logprobs(outcome, wrong)) for outcome in outcomes]


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


def _normalised(right: Sequence[float], wrong: Sequence[float]) -> float | None:
    if not right or not wrong:
        return None
    together = [*right, *wrong]
    return math.exp(right[0] - log_mean_exp(together)) / len(together)
