"""Gradients of the losses of single rows, each let go of as soon as backward has made it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palinode.data.batches import pad_right
from palinode.data.tokenize import TokenRow
from palinode.models.loading import check_positions
from palinode.models.reading import answer_nll

Take = Callable[[int, Tensor], None]
"""(number of a parameter among those that are trained, its gradient) → nothing."""


def trained_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the parameters that are not frozen, each once, in their order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def row_backward(
    model: PreTrainedModel, rows: Sequence[TokenRow], take: Take, *, pad_id: int
) -> Iterator[Callable[[TokenRow], None]]:
    """Give what takes a row and hands to `take` the gradients of Σ nll over its scored tokens.

    Beside the model one tensor's gradient is held. Parameters that take no part in a row's loss are left out.
    The model stays in evaluation mode, so that dropout plays no part, and is left without gradients.
    """
    check_positions(model.config, rows)

    def handed(number: int, parameter: Tensor) -> None:
        if parameter.grad is not None:
            take(number, parameter.grad.float())
        parameter.grad = None

    def backward(row: TokenRow) -> None:
        with torch.enable_grad():
            answer_nll(model, pad_right([row], pad_id=pad_id)).sum().backward()

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(handed, number))
        for number, parameter in enumerate(trained_parameters(model))
    ]
    try:
        yield backward
    finally:
        for handle in handles:
            handle.remove()


def gradient_norms(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    *,
    pad_id: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Return, for each row by itself, the mean over parameter tensors of ‖∂L/∂θ‖₂, L its mean token loss.

    Parameters that take no part in L, or are frozen, do not count (spec: metrics.md §9).
    """
    norms, found = list[float](), list[Tensor]()
    with row_backward(model, rows, lambda _, gradient: found.append(gradient.norm()), pad_id=pad_id) as run:
        for row in rows:
            found.clear()
            run(row)
            norms.append(float(torch.stack(found).mean()) / row.scored)
            if on_progress:
                on_progress(1)
    return norms
