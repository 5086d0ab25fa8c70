"""leak@k: would at least one of k answers drawn at random give the forgotten content away?

Of n ≥ k answers drawn to a question, c of them leaking, the unbiased estimate is the share of all choices of
k answers that hold a leaking one,

    leak@k = 1 − C(n−c, k) / C(n, k)

averaged over questions. Greedy decoding sees one answer; a model that forgot its first choice only still
leaks with k.

How much of the answer the model has by heart, read off its first choices under teacher forcing.

With n answer tokens, the end token left out:

    exact memorisation   EM = (positions where the first choice is the answer's token) / n
    extraction strength  ES = 1 − k*/n,   k* = smallest k such that the first choices from k on are all right

Both follow open-unlearning, whose search for k* ends at n − 1: ES is never below 1/n unless `strict`. Of an
answer of one token it is therefore 1 whatever the model does, and has no value here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from math import comb
from statistics import fmean

from palinode.errors import DataError
from palinode.metrics.aggregate import mean_score
from palinode.metrics.matching import rouge
from palinode.records import Outcome, Score

Leaked = Callable[[Outcome, str], bool | None]
"""Whether a drawn answer gives the outcome's content away; None where it cannot be said."""


def leak_at_k(outcomes: Sequence[Outcome], k: int, leaked: Leaked, *, seed: int = 0) -> Score:
    """Return the mean over questions of the probability that k drawn answers hold a leaking one.

    Questions with fewer than k samples, or with samples of which `leaked` cannot tell, are left out and
    said. The interval is a bootstrap over questions. Raises DataError when k is below 1.
    """
    missing = f"fewer than {k} samples were drawn, or it cannot be said whether they leak"
    return mean_score(leak_values(outcomes, k, leaked), seed=seed, missing=missing)


def leak_values(outcomes: Sequence[Outcome], k: int, leaked: Leaked) -> list[float | None]:
    """Return the probability of each question that k drawn answers hold a leaking one, None as above."""
    if k < 1:
        raise DataError(f"leak@k needs k of at least 1, and got {k}")
    values: list[float | None] = []
    for outcome in outcomes:
        verdicts = [leaked(outcome, sample) for sample in outcome.samples]
        n, c = len(verdicts), sum(map(bool, verdicts))
        values.append(None if n < k or None in verdicts else 1 - comb(n - c, k) / comb(n, k))
    return values


def overlap_leak(threshold: float = 0.5) -> Leaked:
    """Return a rule: an answer leaks when its ROUGE-L recall (stemmed) is at least the threshold.

    It cannot tell for answers of which ROUGE reads no word. Raises DataError unless 0 < threshold ≤ 1.
    """
    if not 0 < threshold <= 1:
        raise DataError(f"the overlap threshold is {threshold}; it must be above 0 and at most 1")

    def leaked(outcome: Outcome, text: str) -> bool | None:
        recall = rouge(outcome.expected, text)
        return None if recall is None else recall >= threshold

    return leaked


ONE_TOKEN = "the answer has one token, for which it is 1 whatever the model does"
"""Why an answer may have no extraction strength."""


def exact_memorizations(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the share of each answer's tokens that the model ranks first, None where there are none."""
    return [fmean(hits) if hits else None for hits in map(_answer_hits, outcomes)]


def extraction_strengths(
    outcomes: Sequence[Outcome], *, strict: bool = False, single: float | None = None
) -> list[float | None]:
    """Return the share of each answer after the model's last mistake, None where the answer has no tokens.

    A wrong last token gives 1/n as in open-unlearning, or 0 if `strict`. An answer of one token then has the
    value `single`: None, for 1 would say nothing of the model (open-unlearning's logs have 1).
    """
    values: list[float | None] = []
    for hits in map(_answer_hits, outcomes):
        right_at_end = sum(takewhile(bool, reversed(hits)))  # n − k*
        if not hits or (len(hits) == 1 and not strict):
            values.append(single if hits else None)
        else:
            values.append(max(right_at_end, 0 if strict else 1) / len(hits))
    return values


def _answer_hits(outcome: Outcome) -> tuple[bool, ...]:
    return outcome.hits[:-1]  # the last scored token is the end token
