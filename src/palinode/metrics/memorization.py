"""How much of the answer the model has by heart, read off its first choices under teacher forcing.

With n answer tokens, the end token left out:

    exact memorisation   EM = (positions where the first choice is the answer's token) / n
    extraction strength  ES = 1 − k*/n,   k* = smallest k such that the first choices from k on are all right

Both follow open-unlearning, whose search for k* ends at n − 1: ES is never below 1/n unless `strict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean

from palinode.records import Outcome


def exact_memorizations(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the share of each answer's tokens that the model ranks first, None where there are none."""
    return [fmean(hits) if hits else None for hits in map(_answer_hits, outcomes)]


def extraction_strengths(outcomes: Sequence[Outcome], *, strict: bool = False) -> list[float | None]:
    """Return the share of each answer after the model's last mistake, None where the answer has no tokens.

    A wrong last token gives 1/n as in open-unlearning, or 0 if `strict`.
    """
    least = 0 if strict else 1
    return [
        max(_right_at_end(hits), least) / len(hits) if hits else None for hits in map(_answer_hits, outcomes)
    ]


def one_token_answers(outcomes: Sequence[Outcome]) -> str | None:
    """Return a warning when answers have a single token: their extraction strength is 1 in any case."""
    count = sum(len(_answer_hits(outcome)) == 1 for outcome in outcomes)
    if not count:
        return None
    return f"{count} of {len(outcomes)} answers have one token, for which it is 1 whatever the model does"


def _answer_hits(outcome: Outcome) -> tuple[bool, ...]:
    return outcome.hits[:-1]  # the last scored token is the end token


def _right_at_end(hits: Sequence[bool]) -> int:
    """Return n − k*, the number of right tokens after the last wrong one."""
    return sum(takewhile(bool, reversed(hits)))
