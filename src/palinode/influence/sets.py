"""What taking a set of rows back does to answers: the model without them is made in memory and asked.

    ΔL_q(S) = L_q(θ_D − α τ_S) − L_q(θ_D)        and to first order    −α ⟨∇L_q(θ_D), τ_S⟩

with L_q = −log p(answer | question), in nats over all tokens of the answer. A positive ΔL says that the rows
made the answer more probable. It is exact for that subtraction; whether the subtraction is the model
that never saw the rows is the verdict's question, not this one's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from palinode.data.examples import Example
from palinode.data.tokenize import TokenRow
from palinode.models.inplace import put
from palinode.models.likelihoods import score_rows
from palinode.models.sums import row_backward, trained_parameters
from palinode.weights import Checkpoint, Direction


@dataclass(frozen=True, slots=True)
class AskedAnswer:
    """A question with the answer that is asked about."""

    example: Example
    rows: tuple[TokenRow, ...]
    """Its tokens; several for a long document."""
    own: bool
    """Whether the answer is the target's own."""
    words: tuple[str, ...]
    """What the scored tokens say, one by one."""


@dataclass(frozen=True, slots=True)
class SetInfluence:
    """What the model without a set of rows makes of one answer."""

    question: str
    answer: str
    own: bool
    """Whether it is the target's own greedy answer."""
    nats: float
    """ΔL, over all tokens of the answer."""
    first_order: float
    probability: tuple[float, float]
    """Of the answer, per token (the geometric mean): with the rows, and without them."""
    tokens: tuple[tuple[str, float], ...]
    """Each token of the answer, and its part of ΔL; they add up to it."""

    def as_record(self) -> dict[str, Any]:
        """Return it as plain values, with |ΔL − first order| / |ΔL|, how far from a straight line it is."""
        off = abs(self.nats - self.first_order) / abs(self.nats) if self.nats else None
        return {**asdict(self), "curvature": off}


@torch.no_grad()
def influence_of_set(
    model: PreTrainedModel,
    target: Checkpoint,
    vector: Direction,
    alpha: float,
    asked: Sequence[AskedAnswer],
    *,
    pad_id: int,
) -> list[SetInfluence]:
    """Return what θ_D − α·vector makes of each answer; `model` is the target's live copy and stays so."""
    rows = [row for one in asked for row in one.rows]
    before = score_rows(model, rows, pad_id=pad_id)
    put(target, model, dtype="float32")
    step = [parameter.detach().clone() for parameter in trained_parameters(model)]
    put(target - alpha * vector, model, dtype="float32")
    after = score_rows(model, rows, pad_id=pad_id)
    for start, parameter in zip(step, trained_parameters(model), strict=True):
        torch.sub(parameter, start, out=start)
    put(target, model, dtype="float32")
    slopes = _slopes(model, rows, step, pad_id)
    found, place = [], 0
    for one in asked:
        own = range(place, place := place + len(one.rows))
        losses = [[-value for at in own for value in side[at].logprobs] for side in (before, after)]
        parts = [late - early for early, late in zip(*losses, strict=True)]
        mean = [math.exp(-math.fsum(side) / len(side)) for side in losses]
        found.append(
            SetInfluence(
                one.example.prompt,
                one.example.answer,
                one.own,
                math.fsum(parts),
                math.fsum(slopes[at] for at in own),
                (mean[0], mean[1]),
                tuple(zip(one.words, parts, strict=True)),
            )
        )
    return found


def _slopes(
    model: PreTrainedModel, rows: Sequence[TokenRow], step: Sequence[torch.Tensor], pad_id: int
) -> list[float]:
    """Return ⟨∇L, step⟩ of each row by itself."""
    slopes, total = [], [0.0]

    def take(number: int, gradient: torch.Tensor) -> None:
        total[0] += float((gradient.double() * step[number]).sum())

    with row_backward(model, rows, take, pad_id=pad_id) as run:
        for row in rows:
            total[0] = 0.0
            run(row)
            slopes.append(total[0])
    return slopes
