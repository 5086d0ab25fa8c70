"""How much of the answer the model has by heart, read off its first choices under teacher forcing.

With n answer tokens, the end token left out:

    exact memorisation   EM = (positions where the first choice is the answer's token) / n
    extraction strength  ES = 1 − k*/n,   k* = smallest k such that the first choices from k on are all right

Both follow open-unlearning, whose search for k* ends at n − 1: ES is never below 1/n unless `strict`. Of an
answer of one token it is therefore 1 whatever the model does, and has no value here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean

from palinode.records import Outcome

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
    return [_strength(hits, strict, single) for hits in map(_answer_hits, outcomes)]


def _strength(hits: Sequence[bool], strict: bool, single: float | None) -> float | None:
    if not hits:
        return None
    if strict:
        return _right_at_end(hits) / len(hits)
    return single if len(hits) == 1 else max(_right_at_end(hits), 1) / len(hits)


def _answer_hits(outcome: Outcome) -> tuple[bool, ...]:
    return outcome.hits[:-1]  # the last scored token is the end token


def _right_at_end(hits: Sequence[bool]) -> int:
    """Return n − k*, the number of right tokens after the last wrong one."""
    return sum(takewhile(bool, reversed(hits)))
