"""PDU, primal-dual unlearning (Entesari et al. 2025, arXiv 2506.05314).

L = γ·mean_t(max_v z_t − mean_v z_t)² + λ·(CE(B_r) − ε), z_t the logits at answer token t (they predict the
token after it). λ is the price of the constraint CE(B_r) ≤ ε: after each optimiser step λ ← max(0, λ +
η·(CE(B_r) − ε)), but for the epochs of the dual warm-up. λ follows from the training curve, so that a
resumed run has it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from palinode.methods.method import Method, StartSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from palinode.data.batches import Batch
    from palinode.training.objectives import CurvePoint, Objective

SLACK = 1.1
"""ε as a multiple of the first step's retain loss, where no ε is given."""


class PDUSettings(StartSettings):
    """The constraint and its price."""

    gamma: float = Field(default=1.0, ge=0)
    """γ, the weight of the forget loss."""
    price: float = Field(default=1.0, ge=0)
    """λ at the start; the forget loss is quadratic in logits, and published runs take 50 to 100."""
    price_rate: float = Field(default=1.0, ge=0)
    """η, how fast λ moves."""
    warmup_epochs: int = Field(default=5, ge=0)
    """Epochs before λ moves."""
    epsilon: float | None = Field(default=None, gt=0)
    """ε, the retain loss that is put up with, in nats a token; None: 1.1 times that of the first step."""


def objective(settings: PDUSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return the flatness of forget logits plus the retain loss at its price; the constant −λε is left
    out."""
    from palinode.models.reading import labelled_logits
    from palinode.training.losses import logit_flatness, scored_tokens
    from palinode.training.objectives import Objective, Term, answer_term

    def total(model: PreTrainedModel, batch: Batch, _frozen: Tensor | None) -> Tensor:
        return logit_flatness(labelled_logits(model, batch).float()).sum()

    forget = Term("forget", ("forget",), total, scored_tokens, settings.gamma)
    retain = answer_term(
        "retain", "retain", coefficient=lambda curve, per_epoch: price(settings, curve, per_epoch)
    )
    return Objective((forget, retain))


def price(settings: PDUSettings, curve: Sequence[CurvePoint], per_epoch: int) -> float:
    """Return λ after the steps of a curve."""
    if not curve:
        return settings.price
    epsilon = settings.epsilon or SLACK * curve[0].terms["retain"]
    found = settings.price
    for point in curve[settings.warmup_epochs * per_epoch :]:
        found = max(0.0, found + settings.price_rate * (point.terms["retain"] - epsilon))
    return found


PDU = Method(
    name="pdu",
    summary="flat logits on the forget set, under a limit on the retain loss",
    source="Entesari et al. 2025, arXiv 2506.05314",
    formula="L = γ·mean(max z − mean z)² + λ·(CE(retain) − ε), λ ← max(0, λ + η(CE(retain) − ε))",
    needs=frozenset({"retain"}),
    settings=PDUSettings,
    objective=objective,
)
