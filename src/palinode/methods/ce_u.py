"""CE-U, cross entropy unlearning (arXiv 2503.01224): towards the model's own guess without the answer.

L = mean_t −Σ_v q_t(v) log p_θ(v), q_t the softmax of the model's own detached logits with the label at −∞.
Its gradient vanishes as p of the label does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from palinode.methods.method import Method, StartSettings

if TYPE_CHECKING:
    from torch import Tensor

    from palinode.data.batches import Batch
    from palinode.training.objectives import Objective, Seen


class CEUSettings(StartSettings):
    """Which tokens count."""

    ignore_first: int = Field(default=1, ge=0)
    """Answer tokens at the beginning of each row that do not count."""


def objective(settings: CEUSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
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
    kind="training",
    settings=CEUSettings,
    objective=objective,
)
