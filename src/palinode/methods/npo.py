"""NPO, negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868).

L = γ·(2/β)·mean_i[−log σ(β(nll_i − nll_ref,i))] + α·L_r, with nll_i = −log p of the whole answer of forget
row i and nll_ref the frozen target's. Its gradient fades as the answer becomes less likely than it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from palinode.methods.method import Method, RetainSettings

if TYPE_CHECKING:
    from palinode.training.objectives import Objective


class NPOSettings(RetainSettings):
    """The weights of both losses, and β."""

    beta: float = Field(default=0.1, gt=0)
    """β; near 0 it is gradient ascent."""


def objective(settings: NPOSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return NPO over forget rows plus the retain loss."""
    from palinode.methods.parts import retain_terms
    from palinode.training.frozen import Likelihoods
    from palinode.training.losses import npo, row_sums, token_nll
    from palinode.training.objectives import Objective, term

    forget = term(
        "forget",
        ("forget",),
        lambda seen: npo(
            row_sums(token_nll(seen.logits, seen.labels), seen.rows, seen.count),
            seen.reference,
            beta=settings.beta,
        ),
        per="row",
        coefficient=settings.gamma,
        keeper=lambda _model: Likelihoods(),
    )
    return Objective((forget, *retain_terms(settings)))


NPO = Method(
    name="npo",
    summary="negative preference optimisation: the target's own answers become less preferred",
    source="Zhang et al. 2024, arXiv 2404.05868",
    formula="L = γ·(2/β)·mean[−log σ(β(nll − nll_ref))] + α·L_r",
    kind="training",
    needs=frozenset({"retain", "frozen_target"}),
    settings=NPOSettings,
    objective=objective,
)
