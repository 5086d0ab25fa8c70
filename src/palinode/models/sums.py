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
from palinode.processes import divided

Take = Callable[[int, Tensor], None]
"""(number of a parameter among those that are trained, its gradient) → nothing."""


def trained_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the parameters that are not frozen, each once, in their order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def row_backward(
    model: PreTrainedModel, rows: Sequence[TokenRow], take: Take, *, pad_id: int
) -> Iterator[Callable[..., None]]:
    """Give what takes a row and hands to `take` the gradients of Σ nll over its scored tokens, or of one.

    Beside the model one tensor's gradient is held. Parameters that take no part in a row's loss are left out.
    The model stays in evaluation mode, so that dropout plays no part, and is left without gradients.
    """
    check_positions(model.config, rows)

    def handed(number: int, parameter: Tensor) -> None:
        if parameter.grad is not None:
            take(number, parameter.grad.float())
        parameter.grad = None

    def backward(row: TokenRow, token: int | None = None) -> None:
        with torch.enable_grad():
            losses = answer_nll(model, pad_right([row], pad_id=pad_id))
            (losses.sum() if token is None else losses[token]).backward()

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(handed, number))
        for number, parameter in enumerate(trained_parameters(model))
    ]
    try:
        yield backward
    finally:
        for handle in handles:
            handle.remove()


@divided
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


WIDTH = 4093
"""Numbers that a gradient is projected to: a prime, so that no column of a matrix falls onto itself."""


class Projection:
    """A random projection of gradients, which keeps inner products on average: E⟨Rg, Rh⟩ = ⟨g, h⟩.

    (Rg)_b = Σ_{j ≡ b mod width} ε_j g_j, with signs ε drawn with the seed, a byte for each weight. The
    variance of ⟨Rg, Rh⟩ is about (|g|²|h|² + ⟨g, h⟩²) / width.
    """

    def __init__(self, model: PreTrainedModel, *, seed: int, width: int = WIDTH) -> None:
        generator, start = torch.Generator().manual_seed(seed), 0
        self.width, self.signs, self.starts = width, list[Tensor](), list[int]()
        for parameter in trained_parameters(model):
            drawn = torch.randint(0, 2, (parameter.numel(),), generator=generator, dtype=torch.int8)
            self.signs.append((2 * drawn - 1).to(parameter.device))
            self.starts.append(start % width)
            start += parameter.numel()

    def of(self, number: int, gradient: Tensor) -> Tensor:
        """Return what one parameter's gradient adds to the projection, [width]."""
        first, signed = self.starts[number], gradient.flatten() * self.signs[number]
        filled = torch.nn.functional.pad(signed, (first, -(first + len(signed)) % self.width))
        return filled.view(-1, self.width).sum(0)
