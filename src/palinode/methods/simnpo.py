"""SimNPO (Fan et al. 2024, arXiv 2410.07163): NPO without a reference, by length.

L = γ·(2/β)·mean_i[−log σ(β(nll_i / n_i − δ))] + α·L_r, with n_i the number of answer tokens of forget row
i. The paper writes the margin outside of β: its γ is β·δ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from palinode.methods.method import Method, RetainSettings

if TYPE_CHECKING:
    from palinode.training.objectives import Objective


class SimNPOSettings(RetainSettings):
    """The weights of both losses, β and δ; the defaults are open-unlearning's."""

    gamma: float = Field(default=0.125, ge=0)
    """γ, the weight of the forget loss."""
    beta: float = Field(default=4.5, gt=0)
    """β."""
    delta: float = Field(default=0.0, ge=0)
    """δ, in nats a token."""


def objective(settings: SimNPOSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return SimNPO over forget rows plus the retain loss."""
    from palinode.methods.parts import retain_terms
    from palinode.training.losses import row_means, simnpo, token_nll
    from palinode.training.objectives import Objective, term

    forget = term(
        "forget",
        ("forget",),
        lambda seen: simnpo(
            row_means(token_nll(seen.logits, seen.labels), seen.rows, seen.count),
            beta=settings.beta,
            delta=settings.delta,
        ),
        per="row",
        coefficient=settings.gamma,
    )
    return Objective((forget, *retain_terms(settings)))


SIMNPO = Method(
    name="simnpo",
    summary="NPO by length and without a reference",
    source="Fan et al. 2024, arXiv 2410.07163",
    formula="L = γ·(2/β)·mean[−log σ(β(nll/n − δ))] + α·L_r",
    kind="training",
    needs=frozenset({"retain"}),
    settings=SimNPOSettings,
    objective=objective,
)
