"""Losses as pure functions of a model and a batch.

A loss is a sum and the weight it is divided by, kept apart: an optimiser step over several
micro-batches divides the summed losses by the summed weights, which gives exactly the loss of one
large batch, however it was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from palinode.data.batches import IGNORED, Batch
from palinode.models.likelihoods import answer_nll


@dataclass(frozen=True, slots=True)
class Loss:
    """A training loss: Σ total / Σ weight over the micro-batches of a step."""

    name: str
    total: Callable[[PreTrainedModel, Batch], Tensor]
    weight: Callable[[Batch], float]


def summed_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return −Σ log p over the scored tokens (answer and end token) of a batch."""
    return answer_nll(model, batch).sum()


def scored_tokens(batch: Batch) -> float:
    """Return the number of scored tokens of a batch."""
    return float((batch.labels != IGNORED).sum())


ANSWER_LOSS = Loss("answer", summed_nll, scored_tokens)
"""CE = Σ nll / Σ n: mean next-token loss over answer tokens (spec: baselines.md §0)."""
