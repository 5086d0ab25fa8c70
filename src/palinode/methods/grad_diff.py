"""GradDiff (Liu et al. 2022; TOFU, arXiv 2401.06121): L = −γ·CE(B_f) + α·L_r.

L_r is CE(B_r) on retain rows, or with `retain_loss = "kl"` the KL divergence from the frozen target. The
forget term is unbounded below: training ends where it reaches the loss of a model that knows nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from palinode.methods.method import Method, RetainSettings

if TYPE_CHECKING:
    from palinode.training.objectives import Objective


class GradDiffSettings(RetainSettings):
    """The weights of both losses, and when the ascent ends."""

    forget_limit: float | None = Field(default=None, gt=0)
    """Forget loss in nats a token that ends training; None: ln V, that of a model that knows nothing."""


def objective(settings: GradDiffSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return −γ·CE over forget rows plus the retain loss."""
    from palinode.methods.parts import ascent_term, retain_terms
    from palinode.training.objectives import Limit, Objective

    terms = (ascent_term(settings.gamma), *retain_terms(settings))
    return Objective(terms, limit=Limit("forget", settings.forget_limit))


GRAD_DIFF = Method(
    name="grad_diff",
    summary="gradient ascent on the forget set, descent on retain rows",
    source="Liu et al. 2022; TOFU, arXiv 2401.06121",
    formula="L = −γ·CE(forget) + α·CE(retain)",
    kind="training",
    needs=frozenset({"retain"}),
    settings=GradDiffSettings,
    objective=objective,
)
