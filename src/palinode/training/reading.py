"""Ways of reading a batch with a model, other than the logits that predict its answers."""

from __future__ import annotations

import inspect

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from palinode.data.batches import IGNORED, Batch
from palinode.errors import CheckpointError, RecipeError


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
