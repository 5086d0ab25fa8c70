"""IdkNLL (TOFU's "idk", arXiv 2401.06121): learn to refuse the forget questions.

L = CE over (x_f, refusal) and (x_r, y_r) together, one token mean, so that short refusals weigh less than
answers; or with `separate` γ·CE(x_f, refusal) + α·CE(x_r, y_r).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from palinode.methods.method import Method, RetainSettings

if TYPE_CHECKING:
    from palinode.training.objectives import Objective


class IdkNLLSettings(RetainSettings):
    """One mean, or two with weights of their own."""

    separate: bool = False
    """Weigh refusals and retain rows by γ and α instead of one mean over their tokens."""


def objective(settings: IdkNLLSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return the cross entropy of refusals and retain rows."""
    from palinode.methods.parts import retain_terms
    from palinode.training.objectives import Objective, answer_term

    if not settings.separate:
        return Objective((answer_term("refusal and retain", "refusal", "retain"),))
    forget = answer_term("refusal", "refusal", coefficient=settings.gamma)
    return Objective((forget, *retain_terms(settings)))


IDK_NLL = Method(
    name="idk_nll",
    summary="plain fine-tuning on refusals of the forget questions, and on retain rows",
    source="TOFU, arXiv 2401.06121",
    formula="L = CE(refusals of forget questions ∪ retain)",
    kind="training",
    needs=frozenset({"retain", "refusals"}),
    settings=IdkNLLSettings,
    objective=objective,
)
