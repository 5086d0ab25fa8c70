"""Distributed checkpoints of PyTorch (DCP), as FSDP, torchtitan and OLMo-core write them; read in place.

A folder holds `.metadata` and `*.distcp` files. The metadata, a pickle, names each tensor with its chunks
(boxes of the tensor, one a rank or several), and says in which range of which file torch.save wrote each
chunk. So a tensor is a list of pieces, and no process group, no torch and no copy is needed to read it.
The metadata also knows entries that are no weights; `_weights` states which ones are taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError
from palinode.weights.formats.pickled import (
    WRAPPERS,
    TorchFile,
    place_view,
    read_saved,
    unpickle,
    without_prefix,
)
from palinode.weights.formats.pieces import MAX_PIECES, Piece, PiecedTensor, pieced, row_major
from palinode.weights.formats.unpickler import Inert, View
from palinode.weights.tensors import (
    Files,
    TensorInfo,
    Window,
    is_plain_name,
    is_shape,
    is_text,
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
class Chunk:
    """One box of a tensor, and the range of a file in which torch.save wrote it."""

    corner: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the metadata describes it."""

    name: str
    path: tuple[str, ...]
    """Where it lay in the nested dictionaries that were saved."""
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def read_distributed(metadata: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the model's tensors, by name, of the folder with this metadata, and notes on what was left out.

    Raises CheckpointError when the metadata or a chunk is damaged, a file is missing, or the chunks of a
    tensor do not cover it exactly.
    """
    content = _read_metadata(metadata)
    entries, notes = _weights(metadata, _entries(metadata, content))
    places = _places(metadata, content)
    chunks = {name: _chunks(metadata, entry, places) for name, entry in entries.items()}
    pieces = _pieces(metadata, entries, chunks)
    return {name: _tensor(metadata, name, entry, pieces[name]) for name, entry in entries.items()}, notes


# The metadata


def _read_metadata(metadata: Path) -> dict[str, Any]:
    """Return the fields of the Metadata object."""
    (held,) = unpickle([(metadata, read_small(metadata, limit=MAX_METADATA))], table="metadata")
    content = held.parts[0]
    if not isinstance(content, Inert) or content.kind != "Metadata" or not isinstance(content.state, dict):
        raise CheckpointError(f"{metadata} is no metadata of a distributed checkpoint")
    return content.state


def _entries(metadata: Path, content: Mapping[str, Any]) -> list[Entry]:
    """Return all tensors that the metadata names, of whatever use they are; other entries are no tensors."""
    described, paths = content.get("state_dict_metadata"), content.get("planner_data")
    if not isinstance(described, dict):
        raise CheckpointError(f"{metadata} names no tensors; save the checkpoint again")
    return [
        _entry(metadata, name, about.state, paths if isinstance(paths, dict) else {})
        for name, about in described.items()
        if isinstance(about, Inert) and about.kind == "TensorStorageMetadata"
    ]


def _entry(metadata: Path, name: Any, about: Any, paths: Mapping[Any, Any]) -> Entry:
    try:
        shape, dtype = about["size"], about["properties"].state[0].code
        chunks = tuple(_box(chunk.state["offsets"], chunk.state["sizes"]) for chunk in about["chunks"])
        path = paths.get(name, (name,))
        sound = isinstance(name, str) and is_text(name) and isinstance(dtype, str) and _is_path(path)
        sound = sound and type(shape) is tuple and is_shape(shape) and len(chunks) <= MAX_PIECES
    except (AttributeError, LookupError, TypeError, ValueError):
        sound = False
    if not sound:
        said = shown(str(name)) if isinstance(name, str | int) else "a tensor"
        raise CheckpointError(f"{metadata} describes {said} in a way that we do not know; save it again")
    return Entry(name, tuple(map(str, path)), dtype, shape, tuple(dict.fromkeys(chunks)))


def _box(corner: Any, shape: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the place of a chunk; raises ValueError when it is none."""
    if not (type(corner) is type(shape) is tuple and is_shape(corner) and is_shape(shape)):
        raise ValueError
    return corner, shape


def _is_path(path: Any) -> bool:
    return type(path) is tuple and len(path) > 0 and all(type(part) in (str, int) for part in path)


def _places(metadata: Path, content: Mapping[str, Any]) -> dict[tuple[Any, Any], tuple[str, int, int]]:
    """Return the file name, first byte and length of each chunk, by tensor name and corner."""
    places: dict[tuple[Any, Any], tuple[str, int, int]] = {}
    listed = content.get("storage_data")
    for index, info in listed.items() if isinstance(listed, dict) else ():
        try:
            name, corner = index.state["fqn"], index.state.get("offset")
            file, start, length = (info.state[key] for key in ("relative_path", "offset", "length"))
            sound = isinstance(name, str) and (corner is None or (type(corner) is tuple and is_shape(corner)))
            sound = sound and isinstance(file, str) and is_shape([start, length])
            transformed = info.state.get("transform_descriptors")
        except (AttributeError, LookupError, TypeError):
            sound = False
        if not sound:
            raise CheckpointError(f"{metadata} does not say where its chunks lie; save the checkpoint again")
        if transformed:
            raise CheckpointError(f"{metadata} says that {shown(name)} is compressed; save it uncompressed")
        if not is_plain_name(file):
            raise CheckpointError(
                f"{metadata} names {file!a:.200}, a file outside its folder; do not trust it"
            )
        places[name, corner] = file, start, length
    return places


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
        entries = [_split(entry) for entry in entries]
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
        entries = [_below(entry) for entry in inner]
    names = [".".join(entry.path) for entry in entries]
    names, more = without_prefix(metadata, names)
    if len(set(names)) < len(names):
        raise CheckpointError(f"{metadata} holds two tensors of one name; save the checkpoint again")
    return dict(zip(names, entries, strict=True)), notes + more


def _is_optimiser(key: str) -> bool:
    """Tell whether what lies under this key is an optimiser's: optim, optimizer_0, optimizer_states, …"""
    return re.fullmatch(r"optim(izers?)?(_?states?(_dict)?)?(_?\d+)?", key) is not None


def _split(entry: Entry) -> Entry:
    """Return an entry whose path was flattened into one text with its first key apart."""
    return replace(entry, path=tuple(entry.path[0].split(".", 1))) if len(entry.path) == 1 else entry


def _below(entry: Entry) -> Entry:
    return replace(entry, path=entry.path[1:])


def _wrapper(entries: Sequence[Entry]) -> str | None:
    """Return the key under which the model lies, or the one under which that key lies."""
    inner = {entry.path[0] for entry in entries if len(entry.path) > 1}
    below = {entry.path[1] for entry in entries if len(entry.path) > 2}
    if len(inner) == 1 and below.intersection(WRAPPERS) and all(len(entry.path) > 2 for entry in entries):
        return inner.pop()
    return next((name for name in WRAPPERS if name in inner), None)


# The chunks


def _chunks(
    metadata: Path, entry: Entry, places: Mapping[tuple[Any, Any], tuple[str, int, int]]
) -> list[Chunk]:
    """Return where each chunk of a tensor lies; empty ones lie nowhere."""
    chunks = []
    for corner, shape in entry.chunks:
        if 0 in shape:
            continue
        place = places.get((entry.name, corner)) or (
            places.get((entry.name, None)) if len(entry.chunks) == 1 else None
        )
        if place is None:
            raise CheckpointError(f"{metadata} does not say where {shown(entry.name)} lies; save it again")
        file, start, length = place
        chunks.append(Chunk(corner, shape, metadata.with_name(file), start, length))
    return chunks


def _pieces(
    metadata: Path, entries: Mapping[str, Entry], chunks: Mapping[str, Sequence[Chunk]]
) -> dict[str, list[Piece]]:
    """Look into every chunk, one file after the other, and return where its elements lie."""
    pieces: dict[str, list[Piece]] = {name: [] for name in entries}
    wanted: dict[Path, list[tuple[str, Chunk]]] = {}
    for name, own in chunks.items():
        for chunk in own:
            wanted.setdefault(chunk.file, []).append((name, chunk))
    require_files(metadata.parent, [file.name for file in sorted(wanted)])
    with Files() as files:
        found = [
            (name, chunk, _window(files, name, chunk))
            for _, members in sorted(wanted.items())
            for name, chunk in sorted(members, key=lambda member: member[1].start)
        ]
        for start in range(0, len(found), AT_ONCE):
            part = found[start : start + AT_ONCE]
            held = read_saved([window for _, _, window in part])
            for (name, chunk, window), saved in zip(part, held, strict=True):
                pieces[name].append(_piece(window, saved, name, entries[name], chunk))
    return pieces


def _window(files: Files, name: str, chunk: Chunk) -> Window:
    """Return the part of a file in which torch.save wrote a chunk."""
    if chunk.start + chunk.length > files.size(chunk.file):
        raise CheckpointError(f"{chunk.file} is cut off inside {shown(name)}; fetch it again")
    return Window(files, chunk.file, chunk.start, chunk.length)


def _piece(window: Window, saved: TorchFile, name: str, entry: Entry, chunk: Chunk) -> Piece:
    """Return where a chunk's elements lie, after checking that it is the one that the metadata speaks of."""
    if not isinstance(saved.content, View):
        raise CheckpointError(f"{chunk.file} holds something else than a tensor for {shown(name)}")
    info = place_view(window, saved, name, saved.content)
    if (info.dtype, info.shape) != (entry.dtype, chunk.shape):
        raise CheckpointError(
            f"{chunk.file} holds {info.dtype}{[*info.shape]} for a chunk of {shown(name)} where the metadata "
            f"says {entry.dtype}{[*chunk.shape]}; are the files of one checkpoint?"
        )
    strides = (
        info.pieces[0].strides if isinstance(info, PiecedTensor) else row_major(info.shape, info.itemsize)
    )
    return Piece(chunk.corner, chunk.shape, chunk.file, info.offset, strides)


def _tensor(metadata: Path, name: str, entry: Entry, pieces: Sequence[Piece]) -> TensorInfo:
    itemsize = itemsize_of(metadata, name, entry.dtype)
    if 0 in entry.shape:
        return TensorInfo(name, entry.dtype, entry.shape, metadata, 0, 0)
    return pieced(name, entry.dtype, entry.shape, itemsize, pieces)
