"""Put a weighted sum into a live model: any (α, β) can be tried without writing a model.

The values are those that `weights.store.save` would write, rounding included, so that what a search
sees is what the saved model does. Every parameter is touched once; no second model is held.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from palinode.errors import MismatchError
from palinode.weights.arithmetic import (
    Operands,
    Reader,
    Rounding,
    Slice,
    check_rounding,
    check_same_shape,
    map_slices,
    slices,
)
from palinode.weights.checkpoint import Checkpoint
from palinode.weights.direction import Point
from palinode.weights.store import code_of, round_slice


@torch.no_grad()
def put(
    point: Point,
    model: PreTrainedModel,
    *,
    dtype: str | None = None,
    rounding: Rounding = "auto",
    seed: int = 0,
) -> None:
    """Overwrite the model's parameters with the point's values.

    `dtype`, `rounding` and `seed` are those of `save`. Putting the target itself brings the target back
    bit for bit. Raises MismatchError when the model's parameters and the checkpoint's tensors are not
    the same.
    """
    check_rounding(rounding)
    anchor, terms, code = point.anchor, list(point.terms), code_of(dtype)
    check_same_shape([other for other in terms if other != anchor], anchor)
    flat = _flat_parameters(model, anchor)

    def work(part: Slice) -> None:
        kind = code or part.info.dtype
        operands = Operands(reader, part, terms, kind)
        _, stored = round_slice(point, operands, part, kind, rounding=rounding, seed=seed)
        flat[part.info.name][part.start : part.start + part.count].copy_(stored)

    with Reader() as reader:
        reader.open(terms)
        map_slices([part for part in slices(anchor) if part.info.name in flat], work)


def _flat_parameters(model: PreTrainedModel, anchor: Checkpoint) -> dict[str, torch.Tensor]:
    """Return each parameter as one dimension, by the name it has in the checkpoint's files."""
    flat: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        info = anchor.find(name)
        if info is None or info.shape != tuple(parameter.shape):
            raise MismatchError(
                f"the live model's parameter {name} has no counterpart in {anchor.folder}; "
                "this architecture renames its weights on loading, so give the scales as numbers"
            )
        if info.name in flat:
            raise MismatchError(
                f"the live model has {name} apart from its embedding, and {anchor.folder} has them tied; "
                "load the model from that folder"
            )
        flat[info.name] = parameter.data.view(-1)
    return flat
