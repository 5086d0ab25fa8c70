"""The forget questions as they stand: what the model still says, and how far it has been pushed away.

The log-probability shows over-forgetting where probabilities cannot: 0.0001 and 0.05 are near each other,
and nine or three nats a token are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from palinode.audit.attack import Attack, Measurement, Test
from palinode.metrics import answer_probabilities, rouge_l_recalls
from palinode.records import Outcome

if TYPE_CHECKING:
    from palinode.audit.budget import Budget
    from palinode.audit.material import Material
    from palinode.audit.subject import Subject


def measure(subject: Subject, material: Material, budget: Budget) -> Measurement:
    """Ask every forget question, and score its answer."""
    from palinode.evaluation.asking import Asking

    asking = Asking(
        max_new_tokens=budget.max_new_tokens, max_length=budget.max_length, batch_rows=budget.batch_rows
    )
    outcomes = subject.ask(material.forget, asking, label="forget questions")
    return Measurement(
        {
            "probability": {"forget": tuple(answer_probabilities(outcomes))},
            "log_probability": {"forget": tuple(log_probabilities(outcomes))},
            "rouge": {"forget": tuple(rouge_l_recalls(outcomes))},
        }
    )


def log_probabilities(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the mean log-probability of each answer's tokens in nats, None where no token was scored."""
    return [fmean(outcome.logprobs) if outcome.logprobs else None for outcome in outcomes]


QUESTIONS = Attack(
    name="questions",
    title="forget questions as they stand",
    description="the forget questions as they are in the data, with the model's own greedy answers",
    tests=(
        Test("probability", "answer probability", more=0.1, less=0.1, missing="no token was scored"),
        Test(
            "log_probability", "log-probability a token", more=None, less=1.0, missing="no token was scored"
        ),
        Test(
            "rouge", "ROUGE-L recall", more=0.1, less=0.2, missing="nothing was generated, or read by ROUGE"
        ),
    ),
    measure=measure,
)
