"""How much of the answer in the data the model writes by itself: ROUGE by the rouge-score package.

    ROUGE-1   words that both texts have (with their counts)       recall = common / words of the answer
    ROUGE-L   longest common subsequence of words                  F = 2 · common / (words of both)

TOFU reports ROUGE-L recall with the stemmer on, MUSE's own evaluator ROUGE-L F with it off, and
open-unlearning's MUSE ROUGE-L F with it on (spec: metrics.md §3).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

from palinode.records import Outcome

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Kind = Literal["rouge1", "rougeL"]
"""Which words count as common."""
Measure = Literal["recall", "f"]
"""Whether words that the model adds are held against it ("f") or not ("recall")."""

MOST_UNSEEN = 0.2
"""Share of a text's letters that rouge-score may drop (it keeps a to z and digits) before nothing is said."""
UNREADABLE = (
    "nothing was generated, or ROUGE, which reads only a to z and digits, drops over a fifth of a text"
)
"""Why a row may have no ROUGE."""

_TEXTS = 4096  # texts whose words are remembered
_FIELDS = {"recall": "recall", "f": "fmeasure"}


def rouge_values(
    outcomes: Sequence[Outcome],
    kind: Kind = "rougeL",
    measure: Measure = "recall",
    *,
    stemmer: bool = True,
) -> list[float | None]:
    """Return the ROUGE of each generated answer against the answer in the data.

    An empty text on either side gives 0. None where nothing was generated, where rouge-score finds no word
    in the answer, and where it drops more than `MOST_UNSEEN` of the letters of either text.
    """
    return [
        rouge(outcome.expected, outcome.generated, kind, measure, stemmer=stemmer) for outcome in outcomes
    ]


def rouge_l_recalls(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the ROUGE-L recall of each generated answer with the stemmer on, as in TOFU."""
    return rouge_values(outcomes, "rougeL", "recall", stemmer=True)


def rouge(
    expected: str,
    written: str | None,
    kind: Kind = "rougeL",
    measure: Measure = "recall",
    *,
    stemmer: bool = True,
) -> float | None:
    """Return the ROUGE of one text against the expected one; None as in `rouge_values`."""
    if written is None or not re.search(r"[a-z0-9]|^\s*$", expected.lower()):
        return None
    if max(map(unseen_share, (expected, written))) > MOST_UNSEEN:
        return None
    score = _scorer(kind, stemmer).score(target=expected, prediction=written)[kind]
    return float(getattr(score, _FIELDS[measure]))


def unseen_share(text: str) -> float:
    """Return the share of a text's letters, marks and foreign digits that rouge-score drops.

    Its own digits are not counted: a year in a Chinese sentence makes the sentence no more readable.

    >>> unseen_share("in 1964"), unseen_share("1964年東京"), unseen_share("Café")
    (0.0, 1.0, 0.25)
    """
    letters = [
        letter for letter in text.lower() if letter.isalnum() or unicodedata.category(letter)[0] == "M"
    ]
    unseen = sum(not letter.isascii() for letter in letters)
    seen = sum(letter.isascii() and letter.isalpha() for letter in letters)
    return unseen / (unseen + seen) if unseen else 0.0


@cache
def _scorer(kind: Kind, stemmer: bool) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # takes a second, so only when it is used

    return RougeScorer([kind], tokenizer=_Tokens(stemmer=stemmer))


class _Tokens:
    """rouge-score's own words; those of a text that comes again are not worked out again."""

    def __init__(self, *, stemmer: bool) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.tokenize = lru_cache(_TEXTS)(DefaultTokenizer(stemmer).tokenize)
