"""SatImp (Yang et al., ICML 2025, arXiv 2505.11953): ascent weighted by saturation and importance.

L = −γ·mean_t w_t·(−log p_t) + α·L_r with w_t = stopgrad(p_t^β1 · (1 − p_t)^β2). The ratio γ : α of 10 is
the paper's; open-unlearning's YAML has it the other way round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from palinode.methods.method import Method, RetainSettings

if TYPE_CHECKING:
    from palinode.training.objectives import Objective


class SatImpSettings(RetainSettings):
    """The weights of both losses, β1 and β2."""

    alpha: float = Field(default=0.1, ge=0)
    """α, the weight of the retain loss."""
    beta1: float = Field(default=5.0, gt=0)
    """β1, the power of p."""
    beta2: float = Field(default=1.0, ge=0)
    """β2, the power of 1 − p; below 0 it would have a pole at p = 1."""


def objective(settings: SatImpSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return weighted ascent over forget rows plus the retain loss."""
    from palinode.methods.parts import retain_terms
    from palinode.training.losses import saturation_importance, token_nll
    from palinode.training.objectives import Objective, term

    forget = term(
        "forget",
        ("forget",),
        lambda seen: saturation_importance(
            token_nll(seen.logits, seen.labels), beta1=settings.beta1, beta2=settings.beta2
        ),
        per="token",
        coefficient=settings.gamma,
    )
    return Objective((forget, *retain_terms(settings)))


SATIMP = Method(
    name="satimp",
    summary="gradient ascent weighted by saturation and importance",
    source="Yang et al. 2025, arXiv 2505.11953",
    formula="L = −γ·mean p^β1·(1 − p)^β2·(−log p) + α·L_r",
    kind="training",
    needs=frozenset({"retain"}),
    settings=SatImpSettings,
    objective=objective,
    training={"epochs": 5},
)
