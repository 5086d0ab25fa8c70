"""The directions that a set of rows sends into each linear layer: principal axes of the layer's inputs.

For a layer y = W x the inputs x of all tokens are added up as Σ x xᵀ; its leading eigenvectors are U.
What τ(I − U Uᵀ) adds to W then does nothing to inputs in that space. Layers are taken a few at a time, as
many as fit into `ROOM`, with one pass over the rows for each group, so that memory is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from palinode.data.batches import pad_right
from palinode.data.tokenize import TokenRow
from palinode.errors import CheckpointError, DataError
from palinode.models.alone import Say
from palinode.models.likelihoods import padded_batches
from palinode.models.loading import check_positions
from palinode.training.reading import decoder_blocks
from palinode.weights.transforms import basis_of

ROOM = 1 << 29
"""Bytes of sums that are held at a time: 512 MB, or those of one layer."""

BATCH_TOKENS = 2048


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

    `say` hears where rows are read one by one. Raises DataError without rows, InputError for an energy that
    is no share.
    """
    if not rows:
        raise DataError("there are no rows to send through the model; name a retain set")
    check_positions(model.config, rows)
    inside = {id(module) for module in decoder_blocks(model).modules()}
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, torch.nn.Linear | Conv1D)
    ]
    batches = padded_batches(model, rows, pad_id=pad_id, max_tokens=BATCH_TOKENS, max_rows=64, say=say)
    for group in _groups(layers):
        sums = _sums(model, dict(group), rows, batches, pad_id=pad_id, on_progress=on_progress)
        for name, module in group:
            yield InputSpace(
                name, basis_of(sums.pop(name).numpy(), energy=energy), isinstance(module, Conv1D)
            )


def _width(module: torch.nn.Module) -> int:
    """Return the number of inputs of a layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0 if isinstance(module, Conv1D) else 1]


def _groups(
    layers: Sequence[tuple[str, torch.nn.Module]],
) -> Iterator[list[tuple[str, torch.nn.Module]]]:
    """Yield layers, in order, as many at a time as fit."""
    group: list[tuple[str, torch.nn.Module]] = []
    held = 0
    for name, module in layers:
        size = 8 * _width(module) ** 2
        if group and held + size > ROOM:
            yield group
            group, held = [], 0
        group.append((name, module))
        held += size
    if group:
        yield group


@torch.no_grad()
def _sums(
    model: PreTrainedModel,
    layers: dict[str, torch.nn.Module],
    rows: Sequence[TokenRow],
    batches: Sequence[Sequence[int]],
    *,
    pad_id: int,
    on_progress: Callable[[int], None] | None,
) -> dict[str, Tensor]:
    """Return Σ x xᵀ of each layer [D, D] in float64, over the tokens of the rows."""
    sums = {name: torch.zeros(2 * (_width(module),), dtype=torch.float64) for name, module in layers.items()}
    real = torch.empty(0)

    def add_to(total: Tensor) -> Callable[..., None]:
        def take(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
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

    handles = [module.register_forward_pre_hook(add_to(sums[name])) for name, module in layers.items()]
    try:
        for members in batches:
            batch = pad_right([rows[member] for member in members], pad_id=pad_id)
            ids, mask = (torch.from_numpy(part).to(model.device) for part in (batch.ids, batch.mask))
            real = mask == 1
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            if on_progress:
                on_progress(len(members))
    finally:
        for handle in handles:
            handle.remove()
    return sums
