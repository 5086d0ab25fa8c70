"""WGA, weighted gradient ascent (Wang et al., ICLR 2025, arXiv 2502.19301).

L = −γ·mean_t w_t·(−log p_t) + α·L_r with w_t = stopgrad(p_t)^β: tokens that are unlikely already count for
little, so that it is bounded. β = 0 is gradient ascent.

SatImp (Yang et al., ICML 2025, arXiv 2505.11953): ascent weighted by saturation and importance.

L = −γ·mean_t w_t·(−log p_t) + α·L_r with w_t = stopgrad(p_t^β1 · (1 − p_t)^β2). The ratio γ : α of 10 is the
paper's; open-unlearning's YAML has it the other way round.

CE-U, cross entropy unlearning (arXiv 2503.01224): towards the model's own guess without the answer.

L = mean_t −Σ_v q_t(v) log p_θ(v), q_t the softmax of the model's own detached logits with the label at −∞.
Its gradient vanishes as p of the label does.

UNDIAL, self-distillation with adjusted logits (Dong et al., NAACL 2025, arXiv 2402.10052).

L = γ·mean_t −Σ_v q_t(v) log p_θ(v) + α·L_r with q_t = softmax(z_ref − β·onehot(label)): the frozen target's
own distribution with the label pushed down. Least where p_θ = q.

PDU, primal-dual unlearning (Entesari et al. 2025, arXiv 2506.05314): flat logits, under a limit.

L = γ·mean_t(max_v z_t − mean_v z_t)² + λ·(CE(B_r) − ε), z_t the logits at answer token t. λ is the price of
CE(B_r) ≤ ε: after each optimiser step λ ← max(0, λ + η·(CE(B_r) − ε)), but for the epochs of the dual
warm-up. λ follows from the training curve, so that a resumed run has it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from palinode.methods.method import Method, RetainSettings, StartSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from palinode.data.batches import Batch
    from palinode.training.objectives import CurvePoint, Objective, Seen, Term


class WGASettings(RetainSettings):
    """The weights of both losses, and β."""

    beta: float = Field(default=1.0, gt=0)
    """β; for the unbounded limit of 0 there is grad_diff."""


def wga_objective(settings: WGASettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return weighted ascent over forget rows plus the retain loss."""
    from palinode.methods.parts import forget_term, nll, with_retain
    from palinode.training.losses import weighted_ascent

    def loss(seen: Seen) -> Tensor:
        return weighted_ascent(nll(seen), beta=settings.beta)

    return with_retain(settings, forget_term(loss, per="token", gamma=settings.gamma))


WGA = Method(
    name="wga",
    summary="gradient ascent weighted by each token's own probability",
    source="Wang et al. 2025, arXiv 2502.19301",
    formula="L = −γ·mean p^β·(−log p) + α·L_r",
    needs=frozenset({"retain"}),
    settings=WGASettings,
    objective=wga_objective,
    training={"epochs": 5},
)


class SatImpSettings(RetainSettings):
    """The weights of both losses, β1 and β2."""

    alpha: float = Field(default=0.1, ge=0)
    """α, the weight of the retain loss."""
    beta1: float = Field(default=5.0, gt=0)
    """β1, the power of p."""
    beta2: float = Field(default=1.0, ge=0)
    """β2, the power of 1 − p; below 0 it would have a pole at p = 1."""


def satimp_objective(settings: SatImpSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return weighted ascent over forget rows plus the retain loss."""
    from palinode.methods.parts import forget_term, nll, with_retain
    from palinode.training.losses import saturation_importance

    def loss(seen: Seen) -> Tensor:
        return saturation_importance(nll(seen), beta1=settings.beta1, beta2=settings.beta2)

    return with_retain(settings, forget_term(loss, per="token", gamma=settings.gamma))


SATIMP = Method(
    name="satimp",
    summary="gradient ascent weighted by saturation and importance",
    source="Yang et al. 2025, arXiv 2505.11953",
    formula="L = −γ·mean p^β1·(1 − p)^β2·(−log p) + α·L_r",
    needs=frozenset({"retain"}),
    settings=SatImpSettings,
    objective=satimp_objective,
    training={"epochs": 5},
)


class CEUSettings(StartSettings):
    """Which tokens count."""

    ignore_first: int = Field(default=1, ge=0)
    """Answer tokens at the beginning of each row that do not count."""


def ce_u_objective(settings: CEUSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return the cross entropy to the model's own distribution without the label."""
    from dataclasses import replace

    from palinode.data.batches import IGNORED
    from palinode.training.losses import cross_entropy_unlearning
    from palinode.training.objectives import Objective, term

    def loss(seen: Seen) -> Tensor:
        later = place_in_row(seen) >= settings.ignore_first
        return cross_entropy_unlearning(seen.logits[later], seen.labels[later])

    def weight(batch: Batch) -> float:
        scored = (batch.labels != IGNORED).sum(axis=1)
        return float((scored - settings.ignore_first).clip(min=0).sum())

    return Objective((replace(term("forget", ("forget",), loss, per="token"), weight=weight),))


def place_in_row(seen: Seen) -> Tensor:
    """Return the place of each scored token in its row, counted from 0, [N]."""
    import torch

    numbers = torch.bincount(seen.rows, minlength=seen.count)
    begins = numbers.cumsum(0) - numbers
    return torch.arange(len(seen.rows), device=seen.rows.device) - begins[seen.rows]


CE_U = Method(
    name="ce_u",
    summary="cross entropy to the model's own distribution without the answer",
    source="arXiv 2503.01224",
    formula="L = mean −Σ q·log p_θ, q = softmax(own logits with the answer at −∞)",
    settings=CEUSettings,
    objective=ce_u_objective,
)


class UndialSettings(RetainSettings):
    """β, and the weights of both losses."""

    alpha: float = Field(default=0.0, ge=0)
    """α, the weight of the retain loss; by default there is none."""
    beta: float = Field(default=10.0, ge=0)
    """β, how far the logit of the label is pushed down."""
    compat: Literal["none", "ou"] = "none"
    """"ou": as open-unlearning, over all tokens of a row and with β taken off token V − 100 where a token is
    not scored; padding, whose amount depends on how rows are batched, is left out here too."""


def undial_objective(settings: UndialSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
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
    objective=undial_objective,
    training={"learning_rate": 1e-4},
)


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


def pdu_objective(settings: PDUSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
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
    objective=pdu_objective,
)
