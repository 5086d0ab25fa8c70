"""Distributed checkpoints of PyTorch (DCP), as FSDP, torchtitan and OLMo-core write them; read in place.

A folder holds `.metadata` and `*.distcp` files. The metadata, a pickle, names each tensor with its chunks
(boxes of the tensor, one a rank or several), and says in which range of which file torch.save wrote each
chunk. So a tensor is a list of pieces, and no process group, no torch and no copy is needed to read it.
The metadata also knows entries that are no weights; `_weights` states which ones are taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError
from palinode.weights.formats.pickled import TorchFile, place_view, read_saved, unpickle, without_prefix
from palinode.weights.formats.pieces import Piece, pieced
from palinode.weights.formats.unpickler import WRAPPERS
from palinode.weights.tensors import (
    Files,
    TensorInfo,
    Window,
    is_plain_name,
    itemsize_of,
    read_small,
    require_files,
    shown,
)

METADATA = ".metadata"
MAX_METADATA = 1 << 27
"""Bytes; a model of a thousand tensors and its optimiser on a hundred ranks take half of it."""

AT_ONCE = 10_000
"""Chunks whose descriptions are read by one process."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the metadata describes it."""

    name: str
    path: Sequence[str]
    """Where it lay in the nested dictionaries that were saved."""
    dtype: str
    shape: Sequence[int]
    chunks: Sequence[tuple[Sequence[int], Sequence[int]]]
    """Corner and shape of each box of it that was written."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One box of a tensor, and the range of a file in which torch.save wrote it."""

    name: str
    dtype: str
    corner: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    start: int
    length: int


def read_distributed(metadata: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the model's tensors, by name, of the folder with this metadata, and notes on what was left out.

    Raises CheckpointError when the metadata or a chunk is damaged, a file is missing, or the chunks of a
    tensor do not cover it exactly.
    """
    (found,) = unpickle([(metadata, read_small(metadata, limit=MAX_METADATA))], "metadata")
    entries, notes = _weights(metadata, [Entry(*about) for about in found["tensors"]])
    places = {}
    for name, corner, file, start, length in found["places"]:
        if not is_plain_name(file):
            raise CheckpointError(
                f"{metadata} names {file!a:.200}, a file outside its folder; do not trust it"
            )
        places[name, None if corner is None else tuple(corner)] = metadata.with_name(file), start, length
    chunks = {name: [*_chunks(metadata, name, entry, places)] for name, entry in entries.items()}
    pieces = _pieces(metadata, chunks)
    infos = {}
    for name, entry in entries.items():
        itemsize, shape = itemsize_of(metadata, name, entry.dtype), tuple(entry.shape)
        infos[name] = (
            TensorInfo(name, entry.dtype, shape, metadata, 0, 0)
            if 0 in shape
            else pieced(name, entry.dtype, shape, itemsize, pieces[name])
        )
    return infos, notes


# Which of it are the weights


def _weights(metadata: Path, entries: list[Entry]) -> tuple[dict[str, Entry], list[str]]:
    """Return the model's tensors by name. The rule:

    What lies under a key such as "optim" or "optimizer" is left out. Where a key of WRAPPERS is there
    ("model", "state_dict", …), perhaps below one key that holds everything, what lies under it is the
    model and all else is left out, with a note. Otherwise everything that is left is the model. Keys are
    those of the dictionaries that were saved; where they were flattened before and an optimiser lies
    beside the model, a key is the text up to the first dot.
    """
    notes: list[str] = []
    if any(len(entry.path) == 1 and _is_optimiser(entry.path[0].split(".")[0]) for entry in entries):
        entries = [  # paths that were flattened into one text: the first key apart
            replace(entry, path=entry.path[0].split(".", 1)) if len(entry.path) == 1 else entry
            for entry in entries
        ]
    while True:
        entries = [entry for entry in entries if len(entry.path) == 1 or not _is_optimiser(entry.path[0])]
        wrapper = _wrapper(entries)
        if wrapper is None:
            break
        inner = [entry for entry in entries if entry.path[0] == wrapper and len(entry.path) > 1]
        if others := len(entries) - len(inner):
            notes.append(
                f"{metadata.name}: took the weights under {wrapper!r} and left out {others} other tensors"
            )
        entries = [replace(entry, path=entry.path[1:]) for entry in inner]
    names = [".".join(entry.path) for entry in entries]
    names, more = without_prefix(metadata, names)
    if len(set(names)) < len(names):
        raise CheckpointError(f"{metadata} holds two tensors of one name; save the checkpoint again")
    return dict(zip(names, entries, strict=True)), notes + more


def _is_optimiser(key: str) -> bool:
    """Tell whether what lies under this key is an optimiser's: optim, optimizer_0, optimizer_states, …"""
    return re.fullmatch(r"optim(izers?)?(_?states?(_dict)?)?(_?\d+)?", key) is not None


def _wrapper(entries: Sequence[Entry]) -> str | None:
    """Return the key under which the model lies, or the one under which that key lies."""
    inner = {entry.path[0] for entry in entries if len(entry.path) > 1}
    below = {entry.path[1] for entry in entries if len(entry.path) > 2}
    if len(inner) == 1 and below.intersection(WRAPPERS) and all(len(entry.path) > 2 for entry in entries):
        return inner.pop()
    return next((name for name in WRAPPERS if name in inner), None)


# The chunks


def _chunks(
    metadata: Path, name: str, entry: Entry, places: Mapping[tuple[str, Any], tuple[Path, int, int]]
) -> Iterator[Chunk]:
    """Yield each chunk of a tensor once, with where it lies; empty ones lie nowhere."""
    boxes = dict.fromkeys((tuple(corner), tuple(shape)) for corner, shape in entry.chunks)
    for corner, shape in boxes:
        place = places.get((entry.name, corner))
        if place is None and len(boxes) == 1:
            place = places.get((entry.name, None))
        if 0 in shape:
            continue
        if place is None:
            raise CheckpointError(f"{metadata} does not say where {shown(entry.name)} lies; save it again")
        yield Chunk(name, entry.dtype, corner, shape, *place)


def _pieces(metadata: Path, chunks: Mapping[str, Sequence[Chunk]]) -> dict[str, list[Piece]]:
    """Look into every chunk, one file after the other, and return where its elements lie."""
    pieces: dict[str, list[Piece]] = {name: [] for name in chunks}
    wanted = sorted(
        (chunk for own in chunks.values() for chunk in own), key=lambda one: (one.file, one.start)
    )
    require_files(metadata.parent, list(dict.fromkeys(chunk.file.name for chunk in wanted)))
    with Files() as files:
        for chunk in wanted:
            if chunk.start + chunk.length > files.size(chunk.file):
                raise CheckpointError(f"{chunk.file} is cut off inside {shown(chunk.name)}; fetch it again")
        for start in range(0, len(wanted), AT_ONCE):
            part = wanted[start : start + AT_ONCE]
            windows = [Window(files, chunk.file, chunk.start, chunk.length) for chunk in part]
            for chunk, window, saved in zip(part, windows, read_saved(windows, "tensor"), strict=True):
                pieces[chunk.name].append(_piece(chunk, window, saved))
    return pieces


def _piece(chunk: Chunk, window: Window, saved: TorchFile) -> Piece:
    """Return where a chunk's elements lie, after checking that it is the one that the metadata speaks of."""
    view = saved.said["tensor"]
    if view is None:
        raise CheckpointError(f"{chunk.file} holds something else than a tensor for {shown(chunk.name)}")
    piece = place_view(window, saved, chunk.name, view)
    if (view[1], piece.shape) != (chunk.dtype, chunk.shape):
        raise CheckpointError(
            f"{chunk.file} holds {view[1]}{[*piece.shape]} for a chunk of {shown(chunk.name)} where the "
            f"metadata says {chunk.dtype}{[*chunk.shape]}; are the files of one checkpoint?"
        )
    return replace(piece, corner=chunk.corner)
