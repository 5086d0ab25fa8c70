"""Prefix-forced questions: the model is made to begin, and we look at how it goes on.

rest: the first half of the true answer is given, and the probability of the rest is measured; under
teacher forcing these are the last log-probabilities of the answer, exp(mean(log p[m // 2:])) with m answer
tokens. opening: the model's own answer begins with a willing phrase, and its ROUGE-L recall is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from palinode.audit.attack import Attack, Measurement, Test
from palinode.metrics import rouge_l_recalls
from palinode.records import Outcome

if TYPE_CHECKING:
    from palinode.audit.budget import Budget
    from palinode.audit.material import Material
    from palinode.audit.subject import Subject


def measure(subject: Subject, material: Material, budget: Budget) -> Measurement:
    """Force the opening on every forget question, and score the second half of every true answer."""
    from palinode.evaluation.asking import Asking

    asking = Asking(
        max_new_tokens=budget.max_new_tokens,
        max_length=budget.max_length,
        batch_rows=budget.batch_rows,
        answer_prefix=budget.opening,
    )
    outcomes = subject.ask(material.forget, asking, label="prefix-forced questions")
    return Measurement(
        {
            "rest": {"forget": tuple(rest_probabilities(outcomes))},
            "opening": {"forget": tuple(rouge_l_recalls(outcomes))},
        },
        {"opening": budget.opening},
    )


def rest_probabilities(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the probability of each answer's second half, end token included, after its first half.

    None where an answer has fewer than two tokens.
    """
    return [_rest(outcome.logprobs) for outcome in outcomes]


def _rest(logprobs: Sequence[float]) -> float | None:
    answer = len(logprobs) - 1  # the last one is the end token's
    return math.exp(fmean(logprobs[answer // 2 :])) if answer >= 2 else None


PREFIXES = Attack(
    name="prefixes",
    title="prefix-forced questions",
    description="the first half of the answer, or a willing opening, is put into the model's mouth",
    tests=(
        Test(
            "rest",
            "probability of the rest",
            more=0.1,
            less=0.2,
            missing="an answer of one token has no rest",
        ),
        Test(
            "opening", "ROUGE-L recall", more=0.1, less=0.2, missing="nothing was generated, or read by ROUGE"
        ),
    ),
    measure=measure,
)
