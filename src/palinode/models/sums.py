"""Gradients of the losses of single rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from palinode.data.batches import pad_right
from palinode.data.tokenize import TokenRow
from palinode.models.loading import check_positions
from palinode.models.reading import answer_nll


def gradient_norms(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    *,
    pad_id: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Return, for each row by itself, the mean over parameter tensors of ‖∂L/∂θ‖₂, L its mean token loss.

    The model stays in evaluation mode, so that dropout plays no part, and is left as it was, without
    gradients (spec: metrics.md §9). Parameters that take no part in L, or are frozen, do not count.
    """
    check_positions(model.config, rows)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms = []
    for row in rows:
        with torch.enable_grad():
            loss = answer_nll(model, pad_right([row], pad_id=pad_id)).mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = [gradient.float().norm() for gradient in gradients if gradient is not None]
        norms.append(float(torch.stack(found).mean()))
        if on_progress:
            on_progress(1)
    return norms
