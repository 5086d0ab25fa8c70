"""What the one run of each method minimises, named after the method; imported only when a run asks for it.

Each is made of a method's settings and the seed. The methods' own files have the equations and the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palinode.data.batches import IGNORED, Batch
from palinode.methods.gradient import GradAscentSettings, GradDiffSettings, IdkNLLSettings, RetainOnlySettings
from palinode.methods.method import MethodSettings, RetainSettings
from palinode.methods.preference import AltPOSettings, DPOSettings, NPOSettings, SimNPOSettings
from palinode.methods.rmu import USUAL_LAYER, RMUSettings
from palinode.methods.weighted import (
    SLACK,
    CEUSettings,
    PDUSettings,
    SatImpSettings,
    UndialSettings,
    WGASettings,
)
from palinode.models.reading import (
    answer_places,
    labelled_logits,
    labelled_states,
    logits_at,
    on_device,
    pick_layer,
)
from palinode.training import losses
from palinode.training.losses import scored_tokens
from palinode.training.objectives import (
    CurvePoint,
    Distributions,
    Keeper,
    Limit,
    Objective,
    Seen,
    Term,
    answer_term,
    halves,
    kl_term,
    likelihoods,
    row_count,
    states_of,
    term,
)

# What several share


def nll(seen: Seen) -> Tensor:
    """Return −log p of each scored token, [N]."""
    return losses.token_nll(seen.logits, seen.labels)


def answer_nll(seen: Seen) -> Tensor:
    """Return −log p of each row's whole answer, [count]."""
    return losses.row_sums(nll(seen), seen.rows, seen.count)


def forget_term(
    loss: Callable[[Seen], Tensor],
    *,
    per: Literal["token", "row"] = "token",
    gamma: float = 1.0,
    keeper: Callable[[], Keeper] | None = None,
) -> Term:
    """Return γ times the mean of a loss over forget rows; `keeper` makes what keeps frozen values."""
    kept = None if keeper is None else lambda _model: keeper()
    return term("forget", ("forget",), loss, per=per, coefficient=gamma, keeper=kept)


def with_retain(settings: RetainSettings, forget: Term, limit: Limit | None = None) -> Objective:
    """Return a forget term plus α·L_r over retain rows; alone where α is 0."""
    build = kl_term if settings.retain_loss == "kl" else answer_term
    held = (build("retain", "retain", coefficient=settings.alpha),) if settings.alpha else ()
    return Objective((forget, *held), limit=limit)


def npo_term(*, beta: float, gamma: float) -> Term:
    """Return γ·(2/β)·mean_i[−log σ(β(nll_i − nll_ref,i))] over forget rows."""

    def loss(seen: Seen) -> Tensor:
        return losses.npo(answer_nll(seen), seen.reference, beta=beta)

    return forget_term(loss, per="row", gamma=gamma, keeper=lambda: Keeper(likelihoods))


def preference_term(win: str, settings: DPOSettings) -> Term:
    """Return DPO with the rows of `win` over the forget rows; scaled by 2/β as open-unlearning does."""
    beta = settings.beta

    def loss(seen: Seen) -> Tensor:
        (better, worse), (better_before, worse_before) = halves(answer_nll(seen)), halves(seen.reference)
        found = losses.dpo(better, worse, better_before, worse_before, beta=beta)
        return (2 / beta) * found if settings.scaled else found

    gamma, roles = settings.gamma, (win, "forget")
    return term(
        "forget", roles, loss, per="pair", coefficient=gamma, keeper=lambda _model: Keeper(likelihoods)
    )


# Of single methods


def grad_ascent(settings: GradAscentSettings, seed: int) -> Objective:
    """Return −CE over forget rows."""
    return grad_diff(GradDiffSettings(alpha=0, forget_limit=settings.forget_limit), seed)


def grad_diff(settings: GradDiffSettings, _seed: int) -> Objective:
    """Return −γ·CE over forget rows plus the retain loss."""
    forget = forget_term(lambda seen: losses.gradient_ascent(nll(seen)), gamma=settings.gamma)
    return with_retain(settings, forget, Limit("forget", settings.forget_limit))


def idk_nll(settings: IdkNLLSettings, _seed: int) -> Objective:
    """Return the cross entropy of refusals and retain rows."""
    if not settings.separate:
        return Objective((answer_term("refusal and retain", "refusal", "retain"),))
    return with_retain(settings, answer_term("refusal", "refusal", coefficient=settings.gamma))


def retain_finetune(settings: RetainOnlySettings, _seed: int) -> Objective:
    """Return the cross entropy of retain rows."""
    return Objective((answer_term("retain", "retain"),), anchor=settings.epoch)


def npo(settings: NPOSettings, _seed: int) -> Objective:
    """Return NPO over forget rows plus the retain loss."""
    return with_retain(settings, npo_term(beta=settings.beta, gamma=settings.gamma))


def simnpo(settings: SimNPOSettings, _seed: int) -> Objective:
    """Return SimNPO over forget rows plus the retain loss."""

    def loss(seen: Seen) -> Tensor:
        means = losses.row_means(nll(seen), seen.rows, seen.count)
        return losses.simnpo(means, beta=settings.beta, delta=settings.delta)

    return with_retain(settings, forget_term(loss, per="row", gamma=settings.gamma))


def dpo(settings: DPOSettings, _seed: int) -> Objective:
    """Return DPO of refusals over forget rows plus the retain loss."""
    return with_retain(settings, preference_term("refusal", settings))


def altpo(settings: AltPOSettings, _seed: int) -> Objective:
    """Return DPO of other answers over forget rows plus the retain loss; an epoch goes through the others."""
    return replace(with_retain(settings, preference_term("alternate", settings)), anchor="alternate")


def rmu(settings: RMUSettings, seed: int) -> Objective:
    """Return the pull of forget rows towards u and of retain rows to where they were."""

    def block(model: PreTrainedModel) -> int:
        return pick_layer(model, settings.layer, USUAL_LAYER)

    def distance(model: PreTrainedModel, batch: Batch, frozen: Tensor | None) -> Tensor:
        states, rows = labelled_states(model, batch, block(model))
        with torch.autocast(states.device.type, enabled=False):
            wanted = control_vector(states.shape[-1], settings.strength, seed) if frozen is None else frozen
            wanted = wanted.to(states.device).float()
            return losses.misdirection(states.float(), wanted, rows, len(batch.ids)).sum()

    forget = Term("forget", ("forget",), distance, row_count, settings.gamma)
    kept = Term("retain", ("retain",), distance, row_count, settings.alpha, lambda m: states_of(block(m)))
    return Objective((forget, kept), trainable=settings.trainable)


def control_vector(width: int, strength: float, seed: int) -> Tensor:
    """Return u = c·r/|r|, r uniform in [0, 1) from the seed, [width] in float32."""
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    found: Tensor = strength * drawn / drawn.norm()
    return found


def wga(settings: WGASettings, _seed: int) -> Objective:
    """Return weighted ascent over forget rows plus the retain loss."""

    def loss(seen: Seen) -> Tensor:
        return losses.weighted_ascent(nll(seen), beta=settings.beta)

    return with_retain(settings, forget_term(loss, gamma=settings.gamma))


def satimp(settings: SatImpSettings, _seed: int) -> Objective:
    """Return weighted ascent over forget rows plus the retain loss."""

    def loss(seen: Seen) -> Tensor:
        return losses.saturation_importance(nll(seen), beta1=settings.beta1, beta2=settings.beta2)

    return with_retain(settings, forget_term(loss, gamma=settings.gamma))


def ce_u(settings: CEUSettings, _seed: int) -> Objective:
    """Return the cross entropy to the model's own distribution without the label."""

    def loss(seen: Seen) -> Tensor:
        later = place_in_row(seen) >= settings.ignore_first
        return losses.cross_entropy_unlearning(seen.logits[later], seen.labels[later])

    def weight(batch: Batch) -> float:
        scored = (batch.labels != IGNORED).sum(axis=1)
        return float((scored - settings.ignore_first).clip(min=0).sum())

    return Objective((replace(forget_term(loss), weight=weight),))


def place_in_row(seen: Seen) -> Tensor:
    """Return the place of each scored token in its row, counted from 0, [N]."""
    numbers = torch.bincount(seen.rows, minlength=seen.count)
    begins = numbers.cumsum(0) - numbers
    return torch.arange(len(seen.rows), device=seen.rows.device) - begins[seen.rows]


def undial(settings: UndialSettings, _seed: int) -> Objective:
    """Return the cross entropy to the adjusted distribution plus the retain loss."""

    def loss(seen: Seen) -> Tensor:
        return losses.undial(seen.logits, seen.reference, seen.labels, beta=settings.beta)

    def everywhere(model: PreTrainedModel, batch: Batch, frozen: Tensor | None) -> Tensor:
        assert frozen is not None
        logits = logits_at(model, batch, answer_places(batch, everywhere=True))
        labels = on_device(batch.labels[:, 1:][batch.mask[:, 1:] == 1], logits.device)
        labels = labels.where(labels >= 0, logits.shape[-1] + labels)  # −100 counts from the end
        return losses.undial(logits.float(), frozen.float(), labels, beta=settings.beta).sum()

    kept = forget_term(loss, gamma=settings.gamma, keeper=Distributions)
    if settings.compat == "ou":
        kept = replace(
            kept,
            total=everywhere,
            weight=lambda batch: float(batch.mask[:, 1:].sum()),
            keeper=lambda _model: Distributions(everywhere=True),
        )
    return with_retain(settings, kept)


def pdu(settings: PDUSettings, _seed: int) -> Objective:
    """Return the flatness of forget logits plus the retain loss at its price, without the constant −λε."""

    def total(model: PreTrainedModel, batch: Batch, _frozen: Tensor | None) -> Tensor:
        return losses.logit_flatness(labelled_logits(model, batch).float()).sum()

    def coefficient(curve: Sequence[CurvePoint], per_epoch: int) -> float:
        return price(settings, curve, per_epoch)

    forget = Term("forget", ("forget",), total, scored_tokens, settings.gamma)
    return Objective((forget, answer_term("retain", "retain", coefficient=coefficient)))


def price(settings: PDUSettings, curve: Sequence[CurvePoint], per_epoch: int) -> float:
    """Return λ after the steps of a curve."""
    if not curve:
        return settings.price
    epsilon = settings.epsilon or SLACK * curve[0].terms["retain"]
    found = settings.price
    for point in curve[settings.warmup_epochs * per_epoch :]:
        found = max(0.0, found + settings.price_rate * (point.terms["retain"] - epsilon))
    return found


def whp(_settings: MethodSettings, _seed: int) -> Objective:
    """Return the cross entropy of forget rows with the generic words for labels, which are given."""

    def loss(seen: Seen) -> Tensor:
        assert seen.frozen is not None  # they are what `two_runs.whp_runs` gives
        return losses.token_nll(seen.logits, seen.frozen)

    return Objective((forget_term(loss),))


def paired(forget_weight: float) -> tuple[Objective, Objective]:
    """Return L_1 = CE(replay) + λ·CE(forget), and L_c = CE(replay) in the same epochs over the forget rows.

    The control draws what goes with each forget row without reading it.
    """
    # Replay first: where the model has dropout, it then falls on the same places in both runs.
    replay = answer_term("retain", "retain")
    forget = answer_term("forget", "forget", coefficient=forget_weight)
    return Objective((replay, forget)), Objective((replay,))
