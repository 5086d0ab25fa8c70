"""Losses as pure functions of what a model said, one for each equation of spec/baselines.md.

Every loss returns its contributions, one a token or one a row, and its value is their mean. So an optimiser
step over several micro-batches divides the summed contributions by their number, which gives exactly
the loss of one large batch, however it was cut.

    logits     [N, V], those that predict the N scored tokens, the labels [N]
    nll        −log p of each scored token [N], or its sum over each row [B]
    rows       [N], the row that each token belongs to; there are `count` rows, B
    reference  the same of the frozen model at the start of unlearning
    σ          the logistic function; −log σ(x) = softplus(−x), which is stable
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from palinode.data.batches import IGNORED, Batch
from palinode.models.likelihoods import LOGIT_BYTES, has_plain_head
from palinode.models.reading import answer_nll, answer_places, last_logits, model_inputs, on_device

WHOLE = 8
"""On a processor so many times `LOGIT_BYTES` of logits still exist as a whole, which is a little faster."""

MOSTLY_SCORED = 0.5
"""Share of positions from which on it costs less to read the logits of all."""


def summed_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return −Σ log p over the scored tokens (answer and end token) of a batch.

    Logits of more than `LOGIT_BYTES` never exist as a whole, if the model has a plain head. Of others, where
    most positions are scored, those of all are used as they lie: picking out the scored ones would hold them
    twice. The values are the same.
    """
    if (head := _head_for_parts(model, batch)) is not None:
        states = model.base_model(**model_inputs(model, batch)).last_hidden_state
        places = (*answer_places(batch).nonzero(), batch.labels[batch.labels != IGNORED])
        *chosen, own = (on_device(part, states.device) for part in places)
        total: Tensor = _NllInParts.apply(states[*chosen], head.weight, head.bias, own)  # type: ignore[no-untyped-call]
        return total
    first = int((batch.labels != IGNORED).any(axis=0).argmax())
    labels = np.full((len(batch.ids), batch.ids.shape[1] - first + 1), IGNORED)
    # the logits from first − 1 on predict them, the last ones nothing
    labels[:, :-1] = batch.labels[:, first:]
    if (labels != IGNORED).mean() < MOSTLY_SCORED:
        return answer_nll(model, batch).sum()
    logits = last_logits(model, batch, labels.shape[1])
    wanted, scored = (
        on_device(part, logits.device) for part in (labels.ravel(), np.flatnonzero(labels != IGNORED))
    )
    nll = functional.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none")
    return nll[scored].sum()


def _head_for_parts(model: PreTrainedModel, batch: Batch) -> nn.Linear | None:
    """Return the output head of a model whose logits on this batch had better not exist as a whole."""
    head = getattr(model, "get_output_embeddings", lambda: None)()  # it is wrapped on several processes
    most = LOGIT_BYTES if model.device.type == "cuda" else WHOLE * LOGIT_BYTES
    if type(head) is not nn.Linear or 4 * scored_tokens(batch) * head.out_features <= most:
        return None
    ids = batch.ids[0][batch.mask[0] == 1][:16].tolist()
    with torch.autocast(model.device.type, enabled=False):
        return head if has_plain_head(model, ids) else None


class _NllInParts(torch.autograd.Function):
    """−Σ log p of N labels, from hidden states [N, D] and head [V, D], for some positions at a time.

    Gradients of a sum are the same whatever it is multiplied by later, so they are had with its value.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        device = states.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        given = (states, weight, bias)
        slopes = [
            torch.zeros_like(part) if part is not None and part.requires_grad else None for part in given
        ]
        total = torch.zeros((), device=states.device)
        at_once = max(1, LOGIT_BYTES // (4 * len(weight)))
        with torch.autocast(device, enabled=False):
            cast = weight.to(kind)
            for begin in range(0, len(states), at_once):
                own, wanted = states[begin : begin + at_once].to(kind), labels[begin : begin + at_once, None]
                logits = functional.linear(own, cast, None if bias is None else bias.to(kind)).float()
                whole = logits.logsumexp(-1, keepdim=True)
                total += (whole - logits.gather(1, wanted)).sum()
                slope = logits.sub_(whole).exp_()
                slope = slope.scatter_add_(1, wanted, -torch.ones_like(whole)).to(kind)
                if slopes[0] is not None:
                    slopes[0][begin : begin + at_once] = slope @ cast
                if slopes[1] is not None:
                    slopes[1] += slope.T @ own  # [V, D]
                if slopes[2] is not None:
                    slopes[2] += slope.sum(0)
        ctx.save_for_backward(*slopes)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return *(None if part is None else part * slope for part in ctx.saved_tensors), None


def scored_tokens(batch: Batch) -> float:
    """Return the number of scored tokens of a batch."""
    return float((batch.labels != IGNORED).sum())


# Common parts


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return −log p of each scored token, [N]."""
    return functional.cross_entropy(logits, labels, reduction="none")


def row_sums(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the sum of token values over each of `count` rows, [B]."""
    return values.new_zeros(count).index_add(0, rows, values)


def row_means(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the mean of token values over each of `count` rows, [B]."""
    numbers = row_sums(torch.ones_like(values), rows, count).clamp(min=1)
    return row_sums(values, rows, count) / numbers


# One a token


def gradient_ascent(nll: Tensor) -> Tensor:
    """Return −nll: L = −CE(B_f) as their mean, unbounded below (spec: baselines.md §1)."""
    return -nll


def kl_to_reference(logits: Tensor, reference: Tensor) -> Tensor:
    """Return KL(p_ref ‖ p_θ) = Σ_v p_ref (log p_ref − log p_θ) of each position (spec: baselines.md §0)."""
    wanted = reference.log_softmax(-1)
    return (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)


def undial(logits: Tensor, reference: Tensor, labels: Tensor, *, beta: float) -> Tensor:
    """Return −Σ_v q log p_θ with q = softmax(z_ref − β·onehot(label)) (arXiv 2402.10052; baselines.md §9).

    Positions labelled `IGNORED` have no penalty, so that q is the reference itself there.
    """
    scored = labels != IGNORED
    penalty = torch.zeros_like(reference)
    penalty.scatter_(-1, labels.clamp(min=0)[:, None], beta * scored.to(penalty.dtype)[:, None])
    wanted = (reference - penalty).softmax(-1)
    return -(wanted * logits.log_softmax(-1)).sum(-1)


def weighted_ascent(nll: Tensor, *, beta: float) -> Tensor:
    """Return −w·nll with w = stopgrad(p)^β (WGA, arXiv 2502.19301; baselines.md §10).

    β = 0 is gradient ascent; with β > 0 it is bounded: x·exp(−βx) ≤ 1/(eβ).
    """
    return -(-beta * nll.detach()).exp() * nll


def saturation_importance(nll: Tensor, *, beta1: float, beta2: float) -> Tensor:
    """Return −w·nll with w = stopgrad(p^β1 · (1 − p)^β2) (SatImp, arXiv 2505.11953; baselines.md §11).

    0^0 is 1. p and 1 − p are had from nll without cancellation.
    """
    held = nll.detach().clamp(min=0)
    weight = (-beta1 * held).exp() * (-torch.expm1(-held)) ** beta2
    return -weight * nll


def cross_entropy_unlearning(logits: Tensor, labels: Tensor) -> Tensor:
    """Return −Σ_v q log p_θ, q the model's own distribution without the true token (CE-U, arXiv 2503.01224).

    q = softmax(stopgrad(z) with −∞ at the label) gets no gradient (baselines.md §12). The gradient vanishes
    as the label's probability does.
    """
    own = logits.detach().scatter(-1, labels[:, None], -torch.inf).softmax(-1)
    return -(own * logits.log_softmax(-1)).sum(-1)


def logit_flatness(logits: Tensor) -> Tensor:
    """Return (max_v z − mean_v z)² of each position (PDU, arXiv 2506.05314; baselines.md §13)."""
    return (logits.max(-1).values - logits.mean(-1)) ** 2


# One a row


def npo(nll: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Return (2/β)·−log σ(β(nll − nll_ref)) of each row (NPO, arXiv 2404.05868; baselines.md §4).

    Summed log-likelihoods, not means. At the reference it is (2/β) ln 2; β → 0 is gradient ascent.
    """
    return (2 / beta) * functional.softplus(-beta * (nll - reference))


def simnpo(mean_nll: Tensor, *, beta: float, delta: float) -> Tensor:
    """Return (2/β)·−log σ(β(nll/n − δ)) of each row (SimNPO, arXiv 2410.07163; baselines.md §5).

    Its paper writes the margin outside of β: its γ is β·δ.
    """
    return (2 / beta) * functional.softplus(-beta * (mean_nll - delta))


def dpo(win: Tensor, lose: Tensor, win_reference: Tensor, lose_reference: Tensor, *, beta: float) -> Tensor:
    """Return −log σ(β·h), h = (nll_ref − nll)(win) − (nll_ref − nll)(lose), of each pair (baselines.md §6).

    All four are summed nll. TOFU uses it as it is; open-unlearning multiplies by 2/β.
    """
    margin = (win_reference - win) - (lose_reference - lose)
    return functional.softplus(-beta * margin)


def misdirection(hidden: Tensor, wanted: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return (1/n) Σ_t (1/d)|h_t − u|² of each row (RMU, arXiv 2403.03218; baselines.md §8).

    `wanted` is the control vector u [D], or the frozen model's own states [N, D] where those must stay.
    """
    return row_means(((hidden - wanted) ** 2).mean(-1), rows, count)
