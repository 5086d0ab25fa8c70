"""How much of the answer in the data the model writes by itself.

ROUGE-L recall = longest common subsequence of words / words of the answer, by the rouge-score package with
its stemmer on, as in the TOFU evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from palinode.records import Outcome

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


def rouge_l_recalls(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the ROUGE-L recall of each generated answer against the answer in the data.

    An empty text on either side gives 0. None where nothing was generated, and where rouge-score, which
    reads only Latin letters without accents and digits, finds no word in the answer.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second, so only when it is used

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [_recall(scorer, outcome.expected, outcome.generated) for outcome in outcomes]


def _recall(scorer: RougeScorer, expected: str, generated: str | None) -> float | None:
    if generated is None or _is_unreadable(expected):
        return None
    return float(scorer.score(target=expected, prediction=generated)["rougeL"].recall)


def _is_unreadable(text: str) -> bool:
    """Whether a text has content, none of which rouge-score keeps: a 0 would say "forgotten"."""
    return bool(text.strip()) and not re.search(r"[a-z0-9]", text.lower())
