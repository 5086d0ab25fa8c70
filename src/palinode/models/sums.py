"""How much each weight matters to a set of rows, as moments of the gradients of single rows.

    signed      g   = mean_i ∂L_i/∂θ
    magnitude   |g| = mean_i |∂L_i/∂θ|
    fisher      F   = mean_i (∂L_i/∂θ)²        the diagonal of the empirical Fisher information

with L_i the mean loss of row i's answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palinode.data.batches import pad_right
from palinode.data.tokenize import TokenRow
from palinode.errors import DataError
from palinode.models.loading import check_positions
from palinode.models.reading import answer_nll

Moment = Literal["signed", "magnitude", "fisher"]

_PART: Mapping[Moment, Callable[[Tensor], Tensor]] = {
    "signed": lambda gradient: gradient,
    "magnitude": torch.abs,
    "fisher": torch.square,
}


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


def gradient_moment(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    moment: Moment,
    *,
    pad_id: int,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Return a moment of the rows' gradients by parameter name, in float32 on the model's device.

    A gradient is added up and let go of as soon as backward has made it, so that beside the model one copy
    of it is held. The model stays in evaluation mode. Raises DataError without rows.
    """
    if not rows:
        raise DataError("there are no rows to take gradients of; name a set that has some")
    check_positions(model.config, rows)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}

    def add_to(total: Tensor) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            if parameter.grad is not None:
                total.add_(_PART[moment](parameter.grad.float()))
            parameter.grad = None

        return take

    handles = [
        value.register_post_accumulate_grad_hook(add_to(sums[name])) for name, value in parameters.items()
    ]
    try:
        for row in rows:
            with torch.enable_grad():
                answer_nll(model, pad_right([row], pad_id=pad_id)).mean().backward()
            if on_progress:
                on_progress(1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.div_(len(rows)) for name, total in sums.items()}
