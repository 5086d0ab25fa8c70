"""Ways of reading a batch with a model: logits and hidden states at the places that a loss asks for.

Logits at position t − 1 score the token at t. Only the positions from the first one wanted on go through the
output head, where the architecture can leave the others out.

Gradients of the losses of single rows are each let go of as soon as backward has made them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from transformers.pytorch_utils import Conv1D

from palinode.data.batches import IGNORED, Batch, pad_right
from palinode.data.tokenize import TokenRow
from palinode.errors import CheckpointError, RecipeError
from palinode.models.loading import check_positions
from palinode.processes import divided

MASKED = {"cpu", "mps"}
"""Devices on which rows padded on the right come with a mask. No token sees what stands behind it, so none
needs one, as the trial of `must_be_apart` finds out; a mask has the device asked and takes slower kernels."""


def on_device(array: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Return what lies in the host's memory as a tensor on a device; nobody waits for the copy."""
    found = array if isinstance(array, Tensor) else torch.from_numpy(array)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


@contextmanager
def never_packed() -> Iterator[None]:
    """Keep transformers from asking the device, at each pass, whether a row holds several sequences."""
    asked = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None  # noqa: ARG005
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Return a batch as a model takes it, on the model's device."""
    inputs: dict[str, Any] = {"input_ids": on_device(batch.ids, model.device), "use_cache": False}
    if model.device.type in MASKED:
        inputs["attention_mask"] = on_device(batch.mask, model.device)
    return inputs


def last_logits(model: PreTrainedModel, batch: Batch, keep: int) -> Tensor:
    """Return the logits at the last `keep` positions of every row, [B, keep, V]."""
    inputs = model_inputs(model, batch)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = keep
    logits: Tensor = model(**inputs).logits[:, -keep:]
    return logits


def logits_at(model: PreTrainedModel, batch: Batch, places: npt.NDArray[np.bool_]) -> Tensor:
    """Return the logits at these places of a batch, bool [B, T], row by row: [N, V]."""
    first = int(places.any(axis=0).argmax())
    logits = last_logits(model, batch, places.shape[1] - first)
    rows, columns = (on_device(part, logits.device) for part in places[:, first:].nonzero())
    return logits[rows, columns]


def answer_logits(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logits_NV, labels_N, rows_N) over the N scored tokens of a batch.

    `rows_N` tells which row of the batch each scored token belongs to.
    """
    logits = logits_at(model, batch, answer_places(batch))
    scored = batch.labels != IGNORED
    labels, rows = (on_device(part, logits.device) for part in (batch.labels[scored], scored.nonzero()[0]))
    return logits, labels, rows


def answer_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return −log p of each of the N scored tokens, in float32."""
    logits, labels, _ = answer_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def answer_places(batch: Batch, *, everywhere: bool = False) -> npt.NDArray[np.bool_]:
    """Return where the logits stand that predict scored tokens, or any token of a row: bool [B, T]."""
    predicted = batch.mask[:, 1:] == 1 if everywhere else batch.labels[:, 1:] != IGNORED
    return np.pad(predicted, ((0, 0), (0, 1)))


def labelled_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the logits AT scored tokens, which predict the ones after them, [N, V] (baselines.md §13)."""
    return logits_at(model, batch, batch.labels != IGNORED)


def labelled_states(model: PreTrainedModel, batch: Batch, layer: int) -> tuple[Tensor, Tensor]:
    """Return what a decoder block puts out at scored tokens, [N, D], and the row of each, [N].

    What comes after the block is not computed.
    """

    def stop(_block: torch.nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    rows, columns = (on_device(part, model.device) for part in (batch.labels != IGNORED).nonzero())
    handle = decoder_blocks(model)[layer].register_forward_hook(stop)
    try:
        model(**model_inputs(model, batch))
    except _Reached as reached:
        return reached.states[rows, columns], rows
    finally:
        handle.remove()
    raise CheckpointError(f"the model never runs its decoder block {layer}; choose another method")


class _Reached(Exception):  # noqa: N818 - no error: the block has been run
    """Carries the output of the block that was wanted."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def decoder_blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the decoder blocks of a model, in order. Raises CheckpointError when they cannot be told."""
    count = int(model.config.get_text_config().num_hidden_layers)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise CheckpointError(
        f"no list of {count} decoder blocks is found in the model ({type(model).__name__}); "
        "choose a method that needs no hidden states"
    )


def linear_layers(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """Return the linear layers of the decoder blocks with their names, in order."""
    inside = {id(module) for module in decoder_blocks(model).modules()}
    return [
        (name, module)
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, torch.nn.Linear | Conv1D)
    ]


def pick_layer(model: PreTrainedModel, layer: int | None, usual: int) -> int:
    """Return the block asked for; by default the usual one, or the middle one of a shallower model."""
    count = len(decoder_blocks(model))
    if layer is None:
        return usual if usual < count else count // 2
    if layer >= count:
        raise RecipeError(f"layer is {layer} and the model has {count}, counted from 0; name one of them")
    return layer


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
