"""UNDIAL, self-distillation with adjusted logits (Dong et al., NAACL 2025, arXiv 2402.10052).

L = γ·mean_t −Σ_v q_t(v) log p_θ(v) + α·L_r with q_t = softmax(z_ref − β·onehot(label)): the frozen target's
own distribution with the label pushed down. Least where p_θ = q.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from palinode.methods.method import Method, RetainSettings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from palinode.data.batches import Batch
    from palinode.training.objectives import Objective, Seen, Term


class UndialSettings(RetainSettings):
    """β, and the weights of both losses."""

    alpha: float = Field(default=0.0, ge=0)
    """α, the weight of the retain loss; by default there is none."""
    beta: float = Field(default=10.0, ge=0)
    """β, how far the logit of the label is pushed down."""
    compat: Literal["none", "ou"] = "none"
    """"ou": as open-unlearning, over all tokens of a row and with β taken off token V − 100 where a token is
    not scored; padding, whose amount depends on how rows are batched, is left out here too."""


def objective(settings: UndialSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return the cross entropy to the adjusted distribution plus the retain loss."""
    from palinode.methods.parts import forget_term, with_retain
    from palinode.training.losses import undial
    from palinode.training.objectives import Distributions

    def loss(seen: Seen) -> Tensor:
        return undial(seen.logits, seen.reference, seen.labels, beta=settings.beta)

    if settings.compat == "ou":
        return with_retain(settings, _everywhere(settings))
    kept = forget_term(loss, per="token", gamma=settings.gamma, keeper=Distributions)
    return with_retain(settings, kept)


def _everywhere(settings: UndialSettings) -> Term:
    from palinode.models.reading import all_logits
    from palinode.training.losses import undial
    from palinode.training.objectives import Distributions, Term

    def total(model: PreTrainedModel, batch: Batch, frozen: Tensor | None) -> Tensor:
        assert frozen is not None
        logits, labels = all_logits(model, batch)
        labels = labels.where(labels >= 0, logits.shape[-1] + labels)  # −100 counts from the end
        return undial(logits.float(), frozen.float(), labels, beta=settings.beta).sum()

    def tokens(batch: Batch) -> float:
        return float(batch.mask[:, 1:].sum())

    return Term(
        "forget",
        ("forget",),
        total,
        tokens,
        settings.gamma,
        keeper=lambda _model: Distributions(everywhere=True),
    )


UNDIAL = Method(
    name="undial",
    summary="self-distillation with the answer's logits pushed down",
    source="Dong et al. 2025, arXiv 2402.10052",
    formula="L = γ·mean −Σ q·log p_θ, q = softmax(z_ref − β·onehot(answer))",
    needs=frozenset({"retain", "frozen_target"}),
    settings=UndialSettings,
    objective=objective,
    training={"learning_rate": 1e-4},
)
