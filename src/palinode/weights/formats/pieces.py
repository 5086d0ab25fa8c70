"""A tensor that lies on disk in pieces or with gaps, put together slice by slice.

A piece is a box of the tensor whose elements lie in one file at regular distances (strides). One piece
with strides is a transposed or cut-out tensor in a PyTorch file; several are the shards of a distributed
checkpoint. Any range of the row-major tensor is a few boxes; each box takes from each piece what they
share. However large the tensor, reading needs one buffer of at most WINDOW bytes.

A mixture's experts, one tensor for each matrix or all in one: each form as a view of the other's bytes.

Fused, gate_up_proj [E, 2I, H] has each expert's gate and, below it, its up, and down_proj [E, H, I] its
down. So one expert's matrix is a run of the fused tensor's bytes, and the fused tensor is made of pieces.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from palinode.errors import CheckpointError
from palinode.weights.formats.unpickler import MAX_PIECES
from palinode.weights.tensors import Files, TensorInfo, plain, shown

WINDOW = 1 << 18
"""Bytes of a file that are read at once to pick elements out of them; more would not stay in cache."""

Array = npt.NDArray[Any]
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The first corner of a box in a tensor, and its lengths."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor: its place in the tensor, and its place in a file."""

    corner: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Byte of the box's first element."""
    strides: tuple[int, ...]
    """Bytes from one element to the next, along each dimension."""


@dataclass(frozen=True, slots=True)
class PiecedTensor(TensorInfo):
    """A tensor in pieces that cover it exactly; `file` and `offset` are those of its first piece."""

    pieces: tuple[Piece, ...]

    def read(self, files: Files, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of the row-major tensor from byte `start` on.

        Raises CheckpointError when a file cannot be read any more, or ends too early.
        """
        first, skipped = divmod(start, self.itemsize)
        last = -(-(start + len(out)) // self.itemsize)
        if skipped or len(out) % self.itemsize:  # the range cuts an element: read whole ones
            whole = memoryview(bytearray((last - first) * self.itemsize))
            self._read_elements(files, first, np.frombuffer(whole, f"V{self.itemsize}"))
            out[:] = whole[skipped : skipped + len(out)]
        elif len(out):
            self._read_elements(files, first, np.frombuffer(out, f"V{self.itemsize}"))

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold a piece."""
        return tuple(dict.fromkeys(piece.file for piece in self.pieces))

    def _read_elements(self, files: Files, first: int, out: Array) -> None:
        """Fill a flat array with the elements from `first` on."""
        done = 0
        for corner, lengths in boxes(self.shape, first, first + len(out)):
            count = math.prod(lengths)
            target = out[done : done + count].reshape(lengths)
            for piece in self.pieces:
                _take(files, piece, corner, target)
            done += count


def pieced(
    name: str, dtype: str, shape: tuple[int, ...], itemsize: int, pieces: Sequence[Piece]
) -> TensorInfo:
    """Return the tensor that these pieces make up; a plain TensorInfo where its bytes lie in one run.

    Raises CheckpointError unless the pieces cover the tensor exactly, none of them twice.
    """
    pieces = sorted((piece for piece in pieces if 0 not in piece.shape), key=lambda piece: piece.corner)
    if not _cover(shape, pieces):
        place = pieces[0].file if pieces else "the checkpoint"
        raise CheckpointError(
            f"the {len(pieces)} pieces of {shown(name)} ({shape}, in {place}) leave a gap or overlap; "
            "is the checkpoint whole, and of one run?"
        )
    nbytes, head = math.prod(shape) * itemsize, pieces[0]
    if len(pieces) == 1 and _in_one_run(head.shape, head.strides, itemsize):
        return TensorInfo(name, dtype, shape, head.file, head.offset, nbytes)
    return PiecedTensor(name, dtype, shape, head.file, head.offset, nbytes, tuple(pieces))


def row_major(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the strides, in bytes, of a tensor without gaps."""
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    """Yield the boxes that, one after the other, make up the elements [first, last) of a row-major tensor."""
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    low, high = -(-first // row), last // row  # the rows that are wanted whole
    if low > high:  # a part of a single row
        yield from _within(shape, high, first, last)
        return
    if first < low * row:
        yield from _within(shape, low - 1, first, low * row)
    if low < high:
        yield (low, *[0] * (len(shape) - 1)), (high - low, *shape[1:])
    if last > high * row:
        yield from _within(shape, high, high * row, last)


def _within(shape: tuple[int, ...], index: int, first: int, last: int) -> Iterator[Box]:
    """Yield the boxes of a part of one row."""
    start = index * math.prod(shape[1:])
    for corner, lengths in boxes(shape[1:], first - start, last - start):
        yield (index, *corner), (1, *lengths)


def _take(files: Files, piece: Piece, corner: tuple[int, ...], target: Array) -> None:
    """Fill the part of `target`, a box at `corner`, that the piece holds."""
    offset = piece.offset
    part: tuple[Any, ...] = ()
    for start, length, own, size, stride in zip(
        corner, target.shape, piece.corner, piece.shape, piece.strides, strict=True
    ):
        low, high = max(start, own), min(start + length, own + size)
        if low >= high:
            return
        part += (slice(low - start, high - start),)
        offset += (low - own) * stride
    _gather(files, piece.file, offset, piece.strides, target[part] if part else target)


def _gather(files: Files, file: Path, offset: int, strides: tuple[int, ...], target: Array) -> None:
    """Fill `target` with elements that lie in a file at regular distances."""
    if _in_one_run(target.shape, strides, target.itemsize) and target.flags.c_contiguous:
        files.read(file, offset, target.reshape(-1).view(np.uint8).data)
        return
    spans = [(length - 1) * stride for length, stride in zip(target.shape, strides, strict=True)]
    extent = sum(spans) + target.itemsize
    if extent <= WINDOW:
        raw = np.empty(extent, np.uint8)
        files.read(file, offset, raw.data)
        target[...] = np.ndarray(target.shape, target.dtype, raw.data, 0, strides)
        return
    axis = spans.index(max(spans))
    middle = target.shape[axis] // 2
    near, far = np.split(target, [middle], axis)
    _gather(files, file, offset, strides, near)
    _gather(files, file, offset + middle * strides[axis], strides, far)


def _in_one_run(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Tell whether elements at these distances lie without gaps; along a length of 1 there is no distance."""
    packed = row_major(shape, itemsize)
    return all(length == 1 or a == b for length, a, b in zip(shape, strides, packed, strict=True))


def _cover(shape: tuple[int, ...], pieces: Sequence[Piece]) -> bool:
    """Tell whether the pieces cover the shape: inside it, as large as it, and no two share an element."""
    if not pieces or len(pieces) > MAX_PIECES:
        return False
    inside = all(
        len(piece.corner) == len(piece.shape) == len(shape)
        and all(
            0 <= low <= low + n <= end for low, n, end in zip(piece.corner, piece.shape, shape, strict=True)
        )
        for piece in pieces
    )
    if not inside or sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
        return False
    if len(pieces) == 1:
        return True
    low = np.array([piece.corner for piece in pieces], np.int64)
    high = low + np.array([piece.shape for piece in pieces], np.int64)
    return not any(
        np.any(np.all((low[i + 1 :] < high[i]) & (high[i + 1 :] > low[i]), axis=1))
        for i in range(len(pieces) - 1)
    )


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
