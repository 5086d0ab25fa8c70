"""GradAscent (Yao et al.; TOFU, arXiv 2401.06121): L = −CE(B_f).

B_f is a batch of forget rows and CE the mean −log p of its answer tokens. Unbounded below: training ends
where the forget loss reaches that of a model that knows nothing, or the limit that is set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from palinode.methods.method import Method, StartSettings

if TYPE_CHECKING:
    from palinode.training.objectives import Objective


class GradAscentSettings(StartSettings):
    """When the ascent ends."""

    forget_limit: float | None = Field(default=None, gt=0)
    """Forget loss in nats a token that ends training; None: ln V, that of a model that knows nothing."""


def objective(settings: GradAscentSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return −CE over forget rows."""
    from palinode.methods.parts import ascent_term
    from palinode.training.objectives import Limit, Objective

    return Objective((ascent_term(1.0),), limit=Limit("forget", settings.forget_limit))


GRAD_ASCENT = Method(
    name="grad_ascent",
    summary="gradient ascent on the forget set",
    source="Yao et al. 2023; TOFU, arXiv 2401.06121",
    formula="L = −CE(forget)",
    kind="training",
    settings=GradAscentSettings,
    objective=objective,
)
