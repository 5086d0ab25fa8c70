"""Ways of reading a batch with a model, other than the logits that predict its answers.

How much each weight matters to a set of rows: moments of the gradients of single rows, in one pass.

    signed      g   = mean_i ∂L_i/∂θ
    magnitude   |g| = mean_i |∂L_i/∂θ|
    fisher      F   = mean_i (∂L_i/∂θ)²        the diagonal of the empirical Fisher information

L_i is the mean loss of row i's answer tokens. A gradient is added up and let go of as soon as backward has
made it, so that beside the model one copy of it is held, and gradients of a layer or two.

The directions that a set of rows sends into each linear layer: principal axes of the layer's inputs.

For a layer y = W x the inputs x of all tokens are added up as Σ x xᵀ; its leading eigenvectors are U.
What τ(I − U Uᵀ) adds to W then does nothing to inputs in that space. Layers are taken a few at a time, as
many as fit into `ROOM`, with one pass over the rows for each group, so that memory is bounded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from palinode.data.batches import IGNORED, Batch, pad_right
from palinode.data.tokenize import TokenRow
from palinode.errors import CheckpointError, DataError, RecipeError
from palinode.models.alone import Say
from palinode.models.likelihoods import answer_nll, padded_batches
from palinode.models.loading import check_positions
from palinode.weights.vectors import basis_of


def answer_places(batch: Batch, *, everywhere: bool = False) -> npt.NDArray[np.bool_]:
    """Return where the logits stand that predict scored tokens, or any token of a row: bool [B, T]."""
    predicted = batch.mask[:, 1:] == 1 if everywhere else batch.labels[:, 1:] != IGNORED
    return np.pad(predicted, ((0, 0), (0, 1)))


def all_logits(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (logits, labels) wherever a token of its row is predicted; `IGNORED` where it is not scored."""
    ids, mask, labels = (
        torch.from_numpy(part).to(model.device) for part in (batch.ids, batch.mask, batch.labels)
    )
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    places = mask[:, 1:] == 1
    return logits[:, :-1][places], labels[:, 1:][places]


def labelled_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the logits AT scored tokens, which predict the ones after them, [N, V] (baselines.md §13)."""
    first = int((batch.labels != IGNORED).any(axis=0).argmax())
    logits = last_logits(model, batch, batch.ids.shape[1] - first)
    return logits[torch.from_numpy(batch.labels[:, first:] != IGNORED).to(logits.device)]


def last_logits(model: PreTrainedModel, batch: Batch, keep: int) -> Tensor:
    """Return the logits at the last `keep` positions of every row, [B, keep, V]."""
    ids, mask = (torch.from_numpy(part).to(model.device) for part in (batch.ids, batch.mask))
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits
    else:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -keep:]
    found: Tensor = logits
    return found


def labelled_states(model: PreTrainedModel, batch: Batch, layer: int) -> tuple[Tensor, Tensor]:
    """Return what a decoder block puts out at scored tokens, [N, D], and the row of each, [N].

    What comes after the block is not computed.
    """
    ids, mask, labels = (
        torch.from_numpy(part).to(model.device) for part in (batch.ids, batch.mask, batch.labels)
    )
    states = _block_output(model, layer, {"input_ids": ids, "attention_mask": mask, "use_cache": False})
    scored = labels != IGNORED
    return states[scored], scored.nonzero()[:, 0]


class _Reached(Exception):  # noqa: N818 - no error: the block has been run
    """Carries the output of the block that was wanted."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def _block_output(model: PreTrainedModel, layer: int, inputs: dict[str, object]) -> Tensor:
    def stop(_block: torch.nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    handle = decoder_blocks(model)[layer].register_forward_hook(stop)
    try:
        model(**inputs)
    except _Reached as reached:
        return reached.states
    finally:
        handle.remove()
    raise CheckpointError(f"the model never runs its decoder block {layer}; choose another method")


def decoder_blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the decoder blocks of a model, in order. Raises CheckpointError when they cannot be told."""
    count = int(model.config.get_text_config().num_hidden_layers)
    found = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise CheckpointError(
            f"no list of {count} decoder blocks is found in the model ({type(model).__name__}); "
            "choose a method that needs no hidden states"
        )
    return found[0]


def pick_layer(model: PreTrainedModel, layer: int | None, usual: int) -> int:
    """Return the block asked for; by default the usual one, or the middle one of a shallower model."""
    count = len(decoder_blocks(model))
    if layer is None:
        return usual if usual < count else count // 2
    if layer >= count:
        raise RecipeError(f"layer is {layer} and the model has {count}, counted from 0; name one of them")
    return layer


Moment = Literal["signed", "magnitude", "fisher"]

_PART: Mapping[Moment, Callable[[Tensor], Tensor]] = {
    "signed": lambda gradient: gradient,
    "magnitude": torch.abs,
    "fisher": torch.square,
}


def gradient_moment(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    moment: Moment,
    *,
    pad_id: int,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Return a moment of the rows' gradients by parameter name, in float32 on the model's device.

    The model stays in evaluation mode and is left without gradients. Raises DataError without rows.
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
