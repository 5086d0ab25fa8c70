"""leak@k: is the answer among k answers drawn at random? One greedy answer hides what sampling finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from palinode.audit.attack import Attack, Measurement, Test
from palinode.metrics.leakage import leak_values, overlap_leak

if TYPE_CHECKING:
    from palinode.audit.budget import Budget
    from palinode.audit.material import Material
    from palinode.audit.subject import Subject


def measure(subject: Subject, material: Material, budget: Budget) -> Measurement:
    """Draw answers to every forget question; an answer leaks when its ROUGE-L recall is high."""
    from palinode.evaluation.asking import Asking

    asking = Asking(
        generate=False,
        samples=budget.samples,
        temperature=budget.temperature,
        max_new_tokens=budget.max_new_tokens,
        max_length=budget.max_length,
        batch_rows=budget.batch_rows,
        seed=subject.seed,
    )
    asked = [example for example in material.forget if example.form != "document"]
    outcomes = subject.ask(asked, asking, label="drawn answers")
    values = leak_values(outcomes, budget.leak_k, overlap_leak(budget.leak_overlap))
    return Measurement({"leak": {"forget": tuple(values)}}, {"k": budget.leak_k, "samples": budget.samples})


def lacks(material: Material, budget: Budget) -> str | None:  # noqa: ARG001 - every attack is asked alike
    """Say what is missing."""
    if any(example.form != "document" for example in material.forget):
        return None
    return "the forget set holds documents only, and those ask nothing"


SAMPLING = Attack(
    name="sampling",
    title="drawn answers (leak@k)",
    description="answers drawn at random; the share of questions that k of them would give away",
    tests=(
        Test("leak", "leak@k", more=0.1, less=0.2, missing="too few answers, or none that ROUGE can read"),
    ),
    measure=measure,
    lacks=lacks,
)
