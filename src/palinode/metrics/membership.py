"""What of the training data shows in a model: membership inference, leaking samples, text known by heart.

A membership attack (metrics.md §9) gives every example a score; the HIGHER, the less likely the example was
in the training data. With l the mean loss over the answer's n tokens and end token, and log p each token's:

    LOSS        l
    ZLib        l / bytes of the zlib-compressed answer
    Min-K%      −mean of the m smallest log p of the n answer tokens,  m = max(1, ⌊n·k⌋)
    Min-K%++    the same on (log p − μ)/σ, over the vocabulary at that position
    GradNorm    mean over parameter tensors of the norm of the loss's gradient, the end token left out
    Reference   l − l of a reference model, usually the retrained one

*Members* are forget rows, *others* are holdout rows that no model has seen.

    AUC = P(score of another > score of a member) + ½ P(equal)

1 means that forget rows still look like training data, ½ that they look like rows never seen, and less than ½
that they look stranger than rows never seen: over-forgetting, which gives them away as well.

Of n ≥ k answers drawn to a question, c of them leaking, leak@k is the share of all choices of k answers that
hold a leaking one, 1 − C(n−c, k) / C(n, k). Greedy decoding sees one answer; a model that forgot its first
choice only still leaks with k.

Text known by heart is read off the first choices under teacher forcing, the end token left out of n:

    exact memorisation   (positions where the first choice is the answer's token) / n
    extraction strength  1 − k*/n,   k* = smallest k such that the first choices from k on are all right

Both follow open-unlearning, whose search for k* ends at n − 1: it is never below 1/n unless `strict`, and 1
for an answer of one token whatever the model does, which therefore has no value here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from math import comb
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from palinode.errors import DataError
from palinode.metrics.aggregate import (
    RESAMPLES,
    ends_of_equals,
    joined,
    no_score,
    partners,
    percentile_interval,
)
from palinode.metrics.matching import rouge
from palinode.records import Outcome, Score

MUSE_RETRAINED = {
    "news": {"min_k": 0.4772, "min_k_20": 0.4931, "loss": 0.4652, "zlib": 0.4328},
    "books": {"min_k": 0.5393, "min_k_20": 0.5582, "loss": 0.4746, "zlib": 0.2773},
}
"""1 − AUC of MUSE's retrained models by corpus and attack (spec: metrics.md §10, from MUSE's evaluator).

`min_k` takes the 40 % least likely tokens, `min_k_20` 20 %; MUSE calls the last two PPL and PPL/zlib. Pass
`1 - MUSE_RETRAINED["news"]["min_k"]` to `privleak` as the reference AUC."""

_CELLS_AT_ONCE = 1_000_000  # resamples × distinct scores held in memory together: 8 MB an array

Counts = NDArray[np.int64]


def loss_values(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return l, the mean loss over the scored tokens (nats), None where there are none."""
    return [-fmean(outcome.logprobs) if outcome.logprobs else None for outcome in outcomes]


def zlib_values(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return l over the number of bytes that zlib makes of the answer in the data (UTF-8).

    The text is `expected`, without the end token and whole even where only a part of it was scored.
    """
    losses = loss_values(outcomes)
    return [
        None if loss is None else loss / len(zlib.compress(outcome.expected.encode()))
        for loss, outcome in zip(losses, outcomes, strict=True)
    ]


def min_k_values(outcomes: Sequence[Outcome], k: float = 0.4) -> list[float | None]:
    """Return minus the mean of the share k of smallest token log-probabilities, the end token left out."""
    return [_least_likely(outcome.logprobs, k) for outcome in outcomes]


def min_k_plus_values(outcomes: Sequence[Outcome], k: float = 0.4) -> list[float | None]:
    """Return minus the mean of the share k of smallest standardised log-probabilities (Min-K%++).

    None where the outcome holds no standardised values. They come with the outcome: (log p − μ)/σ with
    μ = E[log p] and σ² = E[(log p)²] − μ², at least 1e-6, over the vocabulary.
    """
    return [_least_likely(outcome.standardised, k) for outcome in outcomes]


def gradient_norm_values(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the gradient norm that each outcome holds, None where it was not asked for."""
    return [outcome.gradient_norm for outcome in outcomes]


def reference_values(
    outcomes: Sequence[Outcome], reference: Sequence[Outcome] | None = None
) -> list[float | None]:
    """Return l minus the reference model's l on the same row, None where the reference lacks the row."""
    return [
        -fmean(outcome.logprobs) + fmean(partner.logprobs)
        if partner and partner.logprobs and outcome.logprobs
        else None
        for outcome, partner in zip(outcomes, partners(outcomes, reference or ()), strict=True)
    ]


def auc(members: Sequence[float | None], others: Sequence[float | None], *, seed: int = 0) -> Score:
    """Return the area under the ROC curve, P(other > member) + ½ P(other = member).

    1: members look like training data; ½: like rows never seen; 0: stranger than rows never seen. Equal
    scores count one half, exactly. The interval is a seeded percentile bootstrap over both samples. Where
    the samples do not overlap at all, resampling cannot tell 1 from less; the lower end is then 0.025^(1/k)
    with k the smaller sample: of k separate pairs all are in order with probability at most AUC^k.
    """
    return _over_both(members, others, _area, seed=seed, pairs=min)


def true_positive_rate(
    members: Sequence[float | None], others: Sequence[float | None], at: float = 0.01, *, seed: int = 0
) -> Score:
    """Return the largest share of members that can be caught with at most a share `at` of the others.

    A row is taken for a member when its score is at or below a threshold, set as high as the others
    allow; nothing is interpolated. With fewer than 1/`at` others that means none of them, which the
    reason says. The interval is a seeded percentile bootstrap over both samples; where all or none of the
    members are caught in every resample, its other end is the exact bound for n of n (or 0 of n).
    """
    if not 0 <= at <= 1:
        raise DataError(f"the share of false positives is {at}; it must lie between 0 and 1")
    score = _over_both(members, others, partial(_caught, at=at), seed=seed, pairs=lambda n, m: n)  # noqa: ARG005
    known = sum(value is not None for value in others)
    if score.value is None or _allowed(at, known) > 0 or at == 0:
        return score
    few = f"with {known} others, a false positive rate of {at:g} allows none at all"
    return Score(score.value, score.n, score.low, score.high, joined(score.reason, few))


def privleak(auc: Score | float, reference_auc: Score | float | None) -> Score:
    """Return PrivLeak = (A − A_ref) / A_ref · 100 with A = 1 − AUC of Min-K% (MUSE).

    0 is ideal. Negative: forget rows still look like training data (−100: fully). Positive: they look
    stranger than rows never seen. `reference_auc` is the retrained model's AUC; without one,
    open-unlearning takes ½, and MUSE's own constants are in `MUSE_RETRAINED`. The interval is that of
    `auc` and takes the reference as exact.
    """
    ours, theirs = _as_score(auc), _as_score(reference_auc)
    if ours.value is None:
        return no_score(f"there is no AUC: {ours.reason}")
    if theirs.value is None:
        return no_score(f"there is no AUC of a reference model: {theirs.reason}")
    if theirs.value >= 1:
        return no_score("the reference model's AUC is 1, to which nothing can be related")

    theirs_hidden = 1 - theirs.value

    def leak(area: float | None) -> float | None:
        return None if area is None else (1 - area - theirs_hidden) / theirs_hidden * 100

    exact = "the interval takes the reference AUC as exact" if theirs.low is not None else None
    return Score(leak(ours.value), ours.n, leak(ours.high), leak(ours.low), joined(ours.reason, exact))


def _least_likely(logprobs: Sequence[float], k: float) -> float | None:
    answer = logprobs[:-1]  # the last scored token is the end token
    if not answer:
        return None
    return -fmean(sorted(answer)[: max(1, math.floor(len(answer) * k))])


def _as_score(value: Score | float | None) -> Score:
    if isinstance(value, Score):
        return value
    return no_score("none was given") if value is None else Score(float(value), 0, None, None)


# Two samples of scores as counts at each distinct value, lowest value first: shape (..., values). Only the
# order of the scores matters, and equal ones stay equal.


def _area(members: Counts, others: Counts) -> NDArray[np.float64]:
    """Return the area under the ROC curve."""
    below = members.cumsum(axis=-1) - members
    twice_ordered = (others * (2 * below + members)).sum(axis=-1)
    area: NDArray[np.float64] = twice_ordered / (2 * members.sum(axis=-1) * others.sum(axis=-1))
    return area


def _caught(members: Counts, others: Counts, *, at: float) -> NDArray[np.float64]:
    """Return the share of members at or below the highest threshold that takes few enough others along."""
    total = int(others.sum(axis=-1).flat[0])  # the same in every resample
    within = others.cumsum(axis=-1) <= _allowed(at, total)
    caught: NDArray[np.float64] = (members * within).sum(axis=-1) / members.sum(axis=-1)
    return caught


def _allowed(at: float, others: int) -> int:
    return math.floor(at * others + 1e-9)  # 0.29 · 100 is 28.999999999999996


def _over_both(
    members: Sequence[float | None],
    others: Sequence[float | None],
    statistic: Callable[[Counts, Counts], NDArray[np.float64]],
    *,
    seed: int,
    pairs: Callable[[int, int], int],
) -> Score:
    """Return a statistic of two samples with its bootstrap interval, or why there is none."""
    samples = {"members": members, "others": others}
    known = {name: sorted(v for v in sample if v is not None) for name, sample in samples.items()}
    if unusable := [said for name in samples if (said := _unusable(name, samples[name], known[name]))]:
        return no_score("; ".join(unusable))

    n, m = map(len, known.values())
    places = np.unique(np.concatenate(list(known.values())), return_inverse=True)[1]
    distinct, here, there = int(places.max()) + 1, places[:n], places[n:]
    value = float(statistic(_counts(here[None], distinct), _counts(there[None], distinct))[0])
    remarks = [
        f"{len(sample) - len(known[name])} of {len(sample)} {name} left out: no score"
        for name, sample in samples.items()
        if len(known[name]) < len(sample)
    ]
    if distinct == 1:
        remarks.append("all scores are equal")
    if min(n, m) == 1:
        return Score(value, n + m, None, None, joined(*remarks, "one row in a sample gives no interval"))
    low, high = percentile_interval(_resampled(here, there, distinct, statistic, seed=seed))
    if low == high:  # all or none of the pairs in every resample
        low, high = ends_of_equals(low, pairs(n, m))
    return Score(value, n + m, low, high, joined(*remarks))


def _unusable(name: str, sample: Sequence[float | None], known: Sequence[float]) -> str | None:
    if not known:
        return f"none of {len(sample)} {name} has a score" if sample else f"there are no {name}"
    if bad := sum(not math.isfinite(value) for value in known):
        return f"{bad} of {len(sample)} scores of {name} are not finite numbers"
    return None


def _resampled(
    members: Counts,
    others: Counts,
    distinct: int,
    statistic: Callable[[Counts, Counts], NDArray[np.float64]],
    *,
    seed: int,
) -> NDArray[np.float64]:
    """Return the statistic of each bootstrap resample; samples are given as places among distinct values."""
    generator = np.random.default_rng(seed)
    results = np.empty(RESAMPLES)
    step = max(1, _CELLS_AT_ONCE // distinct)
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        drawn = [
            _counts(sample[generator.integers(0, sample.size, (count, sample.size))], distinct)
            for sample in (members, others)
        ]
        results[start : start + count] = statistic(*drawn)
    return results


def _counts(places: Counts, distinct: int) -> Counts:
    """Return how often each distinct value occurs in each row of places."""
    rows = places.shape[0]
    flat = (places + distinct * np.arange(rows)[:, None]).ravel()
    return np.bincount(flat, minlength=rows * distinct).reshape(rows, distinct)


Leaked = Callable[[Outcome, str], bool | None]
"""Whether a drawn answer gives the outcome's content away; None where it cannot be said."""


def leak_values(outcomes: Sequence[Outcome], k: int, leaked: Leaked) -> list[float | None]:
    """Return the probability of each question that k drawn answers hold a leaking one.

    None where fewer than k were drawn, or `leaked` cannot tell of one. Raises DataError when k is below 1.
    """
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
