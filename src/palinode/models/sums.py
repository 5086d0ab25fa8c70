"""What a pass over rows adds up: gradients by parameter, and the inputs of each linear layer.

How much each weight matters to a set of rows, as moments of the gradients of single rows:

    signed      g   = mean_i ∂L_i/∂θ
    magnitude   |g| = mean_i |∂L_i/∂θ|
    fisher      F   = mean_i (∂L_i/∂θ)²        the diagonal of the empirical Fisher information

with L_i the mean loss of row i's answer tokens. For a layer y = W x, the inputs x of all tokens are added up
as Σ x xᵀ, whose leading eigenvectors are U: what τ(I − U Uᵀ) adds to W does nothing to inputs in that space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from palinode.data.batches import Batch, pad_right
from palinode.data.tokenize import TokenRow
from palinode.errors import CheckpointError, DataError
from palinode.models.likelihoods import Say, padded_batches
from palinode.models.loading import check_positions
from palinode.models.reading import answer_nll, linear_layers, model_inputs
from palinode.weights.vectors import basis_of

ROOM = 1 << 29
"""Bytes of sums Σ x xᵀ that are held at a time: 512 MB, or those of one layer."""

BATCH_TOKENS = 2048

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


@dataclass(frozen=True, slots=True)
class InputSpace:
    """The inputs of one linear layer."""

    module: str
    """Name of the layer."""
    basis: np.ndarray
    """U [D, k]."""
    transposed: bool
    """Whether the layer stores its weight as (in, out)."""


def input_spaces(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    *,
    energy: float,
    pad_id: int,
    on_progress: Callable[[int], None] | None = None,
    say: Say | None = None,
) -> Iterator[InputSpace]:
    """Yield U of every linear layer of the blocks: the fewest axes with a share `energy` of Σ|x|².

    Layers are taken as many at a time as fit into `ROOM`, with one pass over the rows for each group. `say`
    hears where rows are read one by one. Raises DataError without rows, InputError for an energy that is no
    share.
    """
    if not rows:
        raise DataError("there are no rows to send through the model; name a retain set")
    check_positions(model.config, rows)
    places = padded_batches(model, rows, pad_id=pad_id, max_tokens=BATCH_TOKENS, max_rows=64, say=say)
    for group in _groups(linear_layers(model)):
        batches = (pad_right([rows[member] for member in members], pad_id=pad_id) for members in places)
        sums = _input_sums(model, dict(group), batches, on_progress)
        for name, layer in group:
            basis = basis_of(sums.pop(name).numpy(), energy=energy)
            yield InputSpace(name, basis, isinstance(layer, Conv1D))


def _width(layer: torch.nn.Module) -> int:
    """Return the number of inputs of a layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0 if isinstance(layer, Conv1D) else 1]


def _groups(layers: Sequence[tuple[str, torch.nn.Module]]) -> Iterator[list[tuple[str, torch.nn.Module]]]:
    """Yield layers, in order, as many at a time as fit."""
    group: list[tuple[str, torch.nn.Module]] = []
    held = 0
    for name, layer in layers:
        size = 8 * _width(layer) ** 2
        if group and held + size > ROOM:
            yield group
            group, held = [], 0
        group.append((name, layer))
        held += size
    if group:
        yield group


@torch.no_grad()
def _input_sums(
    model: PreTrainedModel,
    layers: Mapping[str, torch.nn.Module],
    batches: Iterable[Batch],
    on_progress: Callable[[int], None] | None,
) -> dict[str, Tensor]:
    """Return Σ x xᵀ of each layer [D, D] in float64, over the tokens of the batches."""
    sums = {name: torch.zeros(2 * (_width(layer),), dtype=torch.float64) for name, layer in layers.items()}
    real = torch.empty(0)

    def add_to(total: Tensor) -> Callable[..., None]:
        def take(_layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states = inputs[0].flatten(0, -2).float()  # experts see the tokens of a batch in one line
            if len(states) == real.numel():
                states = states[real.flatten()]
            elif not bool(real.all()):
                raise CheckpointError(
                    f"a linear layer of this model ({type(model).__name__}) sees {len(states)} of the "
                    f"{real.numel()} tokens of a batch, and padding cannot be told from the rest; choose a "
                    "transform that reads no inputs"
                )
            total.add_((states.T @ states).double().cpu())

        return take

    handles = [layer.register_forward_pre_hook(add_to(sums[name])) for name, layer in layers.items()]
    try:
        for batch in batches:
            inputs = model_inputs(model, batch)
            real = inputs["attention_mask"] == 1
            model.base_model(**inputs)
            if on_progress:
                on_progress(len(batch.ids))
    finally:
        for handle in handles:
            handle.remove()
    return sums
