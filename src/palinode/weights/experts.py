"""A mixture's experts, one tensor for each matrix or all in one: each form as a view of the other's bytes.

Fused, gate_up_proj [E, 2I, H] has each expert's gate and, below it, its up, and down_proj [E, H, I] its
down. So one expert's matrix is a run of the fused tensor's bytes, and the fused tensor is made of pieces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from palinode.weights.formats.pieces import Piece, pieced, row_major
from palinode.weights.names import plain
from palinode.weights.tensors import TensorInfo

EXPERT = re.compile(r"((?:.*\.)?experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def one_expert(tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo | None:
    """Return one expert's matrix out of the tensor that holds all of them; `tensors` by their plain names."""
    if not (found := EXPERT.fullmatch(plain(name))):
        return None
    whole, kinds = next((entry, kinds) for entry, kinds in FUSED.items() if found[3] in kinds)
    fused, halves = tensors.get(f"{found[1]}.{whole}"), len(kinds)
    if type(fused) is not TensorInfo or len(fused.shape) != 3 or fused.shape[1] % halves:
        return None
    count, rows, columns = fused.shape
    place = int(found[2]) * halves + kinds.index(found[3])
    if place >= count * halves:
        return None
    nbytes, shape = fused.nbytes // (count * halves), (rows // halves, columns)
    offset, label = fused.offset + place * nbytes, f"{fused.name}[{place}]"
    return replace(fused, name=label, shape=shape, offset=offset, nbytes=nbytes)


def all_experts(tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo | None:
    """Return the tensor of all experts, put together from one of each; `tensors` by their plain names."""
    stem, _, whole = plain(name).rpartition(".")
    kinds = FUSED.get(whole, ())
    members = (
        [found for key in tensors if (found := EXPERT.fullmatch(key)) and found[1] == stem] if kinds else []
    )
    count = len({found[2] for found in members})
    wanted = [f"{stem}.{expert}.{kind}.weight" for expert in range(count) for kind in kinds]
    if not wanted or not all(key in tensors for key in wanted):
        return None
    parts = [tensors[key] for key in wanted]
    first, halves = parts[0], len(kinds)
    if len(first.shape) != 2 or {(type(part), part.dtype, part.shape) for part in parts} != {
        (TensorInfo, first.dtype, first.shape)
    }:
        return None
    rows, columns = first.shape
    box, strides = (1, rows, columns), row_major((1, rows, columns), first.itemsize)
    pieces = [
        Piece((place // halves, place % halves * rows, 0), box, part.file, part.offset, strides)
        for place, part in enumerate(parts)
    ]
    return pieced(first.name, first.dtype, (count, halves * rows, columns), first.itemsize, pieces)
