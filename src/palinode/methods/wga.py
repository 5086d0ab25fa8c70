"""WGA, weighted gradient ascent (Wang et al., ICLR 2025, arXiv 2502.19301).

L = −γ·mean_t w_t·(−log p_t) + α·L_r with w_t = stopgrad(p_t)^β: tokens that are unlikely already count for
little, so that it is bounded. β = 0 is gradient ascent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from palinode.methods.method import Method, RetainSettings

if TYPE_CHECKING:
    from palinode.training.objectives import Objective


class WGASettings(RetainSettings):
    """The weights of both losses, and β."""

    beta: float = Field(default=1.0, gt=0)
    """β; for the unbounded limit of 0 there is grad_diff."""


def objective(settings: WGASettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return weighted ascent over forget rows plus the retain loss."""
    from palinode.methods.parts import retain_terms
    from palinode.training.losses import token_nll, weighted_ascent
    from palinode.training.objectives import Objective, term

    forget = term(
        "forget",
        ("forget",),
        lambda seen: weighted_ascent(token_nll(seen.logits, seen.labels), beta=settings.beta),
        per="token",
        coefficient=settings.gamma,
    )
    return Objective((forget, *retain_terms(settings)))


WGA = Method(
    name="wga",
    summary="gradient ascent weighted by each token's own probability",
    source="Wang et al. 2025, arXiv 2502.19301",
    formula="L = −γ·mean p^β·(−log p) + α·L_r",
    kind="training",
    needs=frozenset({"retain"}),
    settings=WGASettings,
    objective=objective,
    training={"epochs": 5},
)
