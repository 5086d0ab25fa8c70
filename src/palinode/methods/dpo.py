"""IdkDPO (TOFU, arXiv 2401.06121): direct preference optimisation of a refusal over the true answer.

L = γ·s·mean_i[−log σ(β·h_i)] + α·L_r with h = (nll_ref − nll)(x, refusal) − (nll_ref − nll)(x, y). s is 2/β
in open-unlearning and 1 in TOFU and in DPO itself. Each forget question is given a refusal drawn anew in
every epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from palinode.methods.method import Method, RetainSettings

if TYPE_CHECKING:
    from palinode.training.objectives import Objective


class DPOSettings(RetainSettings):
    """The weights of both losses, and β."""

    beta: float = Field(default=0.1, gt=0)
    """β."""
    scaled: bool = True
    """Multiply by 2/β as open-unlearning does; false: DPO as TOFU has it."""


def objective(settings: DPOSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return DPO of refusals over forget rows plus the retain loss."""
    from palinode.methods.parts import preference_term, retain_terms
    from palinode.training.objectives import Objective

    forget = preference_term("refusal", beta=settings.beta, gamma=settings.gamma, scaled=settings.scaled)
    return Objective((forget, *retain_terms(settings)))


DPO = Method(
    name="dpo",
    summary="IdkDPO: refusals are preferred to the answers of the forget set",
    source="TOFU, arXiv 2401.06121",
    formula="L = γ·(2/β)·mean[−log σ(β·h)] + α·L_r, h = (nll_ref − nll)(refusal) − (nll_ref − nll)(answer)",
    kind="training",
    needs=frozenset({"retain", "refusals", "frozen_target"}),
    settings=DPOSettings,
    objective=objective,
)
