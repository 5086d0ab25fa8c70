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

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from palinode.data.batches import IGNORED, Batch
from palinode.models.reading import answer_nll, first_scored, last_logits, on_device

MOSTLY_SCORED = 0.5
"""Share of positions from which on it costs less to read the logits of all."""


def summed_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return −Σ log p over the scored tokens (answer and end token) of a batch.

    Where most positions are scored, the logits of all are used as they lie: picking out the scored ones
    would hold them twice. The values are the same.
    """
    first = first_scored(batch)
    labels = np.full((len(batch.ids), batch.ids.shape[1] - first + 1), IGNORED)
    labels[:, :-1] = batch.labels[
        :, first:
    ]  # the logits from first − 1 on predict them, the last ones nothing
    if (labels != IGNORED).mean() < MOSTLY_SCORED:
        return answer_nll(model, batch).sum()
    logits = last_logits(model, batch, labels.shape[1])
    wanted, scored = (
        on_device(part, logits.device) for part in (labels.ravel(), np.flatnonzero(labels != IGNORED))
    )
    nll = functional.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none")
    return nll[scored].sum()


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
