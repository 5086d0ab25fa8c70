"""The same facts under other questions: forgetting one wording is not forgetting the fact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from palinode.audit.attack import Attack, Measurement, Test
from palinode.metrics import answer_probabilities

if TYPE_CHECKING:
    from palinode.audit.budget import Budget
    from palinode.audit.material import Material
    from palinode.audit.subject import Subject


def measure(subject: Subject, material: Material, budget: Budget) -> Measurement:
    """Ask the paraphrased questions, and score the answers in the data."""
    from palinode.audit.subject import likelihoods_only

    outcomes = subject.ask(material.paraphrased, likelihoods_only(budget), label="paraphrased questions")
    return Measurement({"probability": {"forget": tuple(answer_probabilities(outcomes))}})


def lacks(material: Material, budget: Budget) -> str | None:  # noqa: ARG001 - every attack is asked alike
    """Say what is missing."""
    if material.paraphrased:
        return None
    return "the forget rows have no paraphrased_question; name a column or a file with --paraphrases"


PARAPHRASES = Attack(
    name="paraphrases",
    title="paraphrased questions",
    description="the same facts asked in other words",
    tests=(Test("probability", "answer probability", more=0.1, less=0.1, missing="no token was scored"),),
    measure=measure,
    lacks=lacks,
)
