"""Weights that torch.save wrote, found without loading them and without running them.

A file of torch.save (.bin, .pt, .pth) is a pickle that describes tensors, and their storages as raw bytes: in
a zip archive, where each storage is an uncompressed record, or, before PyTorch 1.6, behind the pickle, one
after the other. The pickle is read in a process of its own (unpickler.py) with little time and memory, where
names only leave records; which tensors it describes comes back as JSON. Where a storage lies follows from the
archive's directory, so that a tensor can be read in place. torch.load reads neither a part of a file in place
nor pickles of protocol 3 and above without running code.

A distributed checkpoint (DCP), as FSDP, torchtitan and OLMo-core write it, is a folder of `*.distcp` files
in which torch.save wrote the tensors chunk by chunk. Its `.metadata`, a pickle too, names each tensor with
its chunks (boxes of the tensor, one a rank or several), and says in which range of which file each lies. So a
tensor is a list of pieces, and no process group, no torch and no copy is needed to read it. The metadata also
knows entries that are no weights; `_weights` states which ones are taken.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError
from palinode.records import bare_environment
from palinode.weights.formats import unpickler
from palinode.weights.formats.pieces import Piece, pieced, row_major
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
    whole,
)

START, LOCATOR = b"PK\x03\x04", b"PK\x06\x07"
"""What a local header begins with, and what leads to the 64-bit end record, with sizes of its own."""
LOCAL = struct.Struct("<4s5H3L2H")
ENDS = struct.Struct("<48xQ8xQ4x16xL2x")
"""The end records: where the 64-bit one has the directory, where it lies itself, where the other has it."""

MAX_DIRECTORY = 1 << 24
"""Bytes: 16 MiB name far more records than a model has tensors."""

CIPHERED = 0x2041
"""Flags of a record that is encrypted, in one way or another, or whose directory is."""


def read_directory(window: Window) -> dict[str, zipfile.ZipInfo]:
    """Return the records of a zip archive by name; raises CheckpointError when it is damaged.

    A directory that lies elsewhere than right before its end records is refused: readers differ about it.
    """
    length = min(window.size, ENDS.size)
    end = window.read(window.size - length, length).rjust(ENDS.size, b"\0")
    wide_start, wide_place, start = ENDS.unpack(end)
    sound = end[-22:-18] == b"PK\x05\x06"
    if end[-42:-38] == LOCATOR:
        sound &= start in (0xFFFFFFFF, wide_start) and wide_place == window.size - ENDS.size
        start = wide_start
    size = window.size - start
    if not sound or size < 0:
        raise _damaged(window)
    if size > MAX_DIRECTORY:
        raise CheckpointError(f"{window.file} has a zip directory of {size} bytes, which no model needs")
    try:
        archive = zipfile.ZipFile(io.BytesIO(window.read(start, size)), metadata_encoding="utf-8")
    except (zipfile.BadZipFile, NotImplementedError, UnicodeError):
        raise _damaged(window) from None
    if archive.start_dir or archive.comment:
        raise _damaged(window)
    records: dict[str, zipfile.ZipInfo] = {}
    for record in archive.infolist():
        name = record.orig_filename
        record.header_offset += start  # zipfile takes what it is given for the whole archive
        if records.setdefault(name.lower(), record) is not record:  # torch takes a and A for one name
            raise CheckpointError(f"{window.file} holds the record {shown(name)} twice; fetch it again")
    return {record.orig_filename: record for record in records.values()}


def data_offset(window: Window, record: zipfile.ZipInfo) -> int:
    """Return the byte at which the stored bytes of a record begin.

    Raises CheckpointError when they are compressed, encrypted, or not all there.
    """
    if record.compress_type or record.flag_bits & CIPHERED or record.compress_size != record.file_size:
        raise CheckpointError(
            f"{window.file} is compressed, and weights are read in place; load it and save it again with "
            "torch.save"
        )
    place, name = record.header_offset, record.orig_filename.encode()
    if not 0 <= place <= window.size - LOCAL.size - len(name):
        raise _damaged(window)
    signature, _, _, method, *_, length, extra = LOCAL.unpack(window.read(place, LOCAL.size))
    start = place + LOCAL.size + length + extra
    sound = signature == START and not method and window.read(place + LOCAL.size, len(name)) == name
    if not sound or length != len(name) or start + record.file_size > window.size:
        raise _damaged(window)
    return int(start)


def read_record(window: Window, record: zipfile.ZipInfo, *, limit: int) -> bytes:
    """Return the bytes of a small record; raises CheckpointError when it is larger than `limit`."""
    size = record.file_size
    if size > limit:
        raise CheckpointError(f"{window.file} has a {shown(record.orig_filename)} of {size} bytes, too many")
    return window.read(data_offset(window, record), size)


def _damaged(window: Window) -> CheckpointError:
    return CheckpointError(
        f"{window.file} is cut off or damaged (its zip directory is broken); fetch it again"
    )


MAX_PICKLE = 1 << 24
"""Bytes: 16 MiB. The description of a model with a thousand tensors takes a hundred thousand."""

OLD_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")

SECONDS = 20
"""Time for a process that reads a pickle, and a second more for each MAX_RATE bytes."""
MAX_RATE = 1 << 19

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""What data parallelism, torch.compile and FSDP put before the names of a model's tensors."""

View = Sequence[Any]
"""A tensor as its pickle describes it: number of its storage, dtype, first element, shape, strides."""


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What torch.save wrote: what its pickle says (see `unpickler`), and where each storage lies."""

    said: Mapping[str, Any]
    locate: Callable[[int], tuple[int, int]]
    """Returns first byte and length of the storage of this number."""


def read_pickled(file: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the tensors of one file of torch.save by name, and notes on what was left out.

    Raises CheckpointError when it is damaged, or holds anything but weights and plain values.
    """
    infos, notes = read_pickled_part(file)
    names, more = without_prefix(file, [*infos])
    return {
        name: replace(info, name=name) for name, info in zip(names, infos.values(), strict=True)
    }, notes + more


def read_pickled_part(file: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the same of one of several files of a model, where the names are those of an index."""
    with Files() as files:
        window = whole(files, file)
        (saved,) = read_saved([window], "weights")
        infos = {name: _info(window, saved, name, view) for name, view in saved.said["tensors"].items()}
    notes = [
        f"{file.name}: took the weights under {wrapper!r} and left out {', '.join(map(shown, others[:5]))}"
        for wrapper, others in saved.said["left"]
        if others
    ]
    return infos, notes


def read_saved(windows: Sequence[Window], asked: str) -> list[TorchFile]:
    """Read what torch.save wrote into files or parts of them: `weights`, or one `tensor` in each.

    Raises CheckpointError where one is damaged.
    """
    for window in windows:
        if window.size < 8:
            raise CheckpointError(f"{window.file} is cut off ({window.size} bytes); fetch it again")
    if len(windows) == 1 and windows[0].read(0, 4) != START:
        return [_read_old(windows[0], asked)]
    pickles, places = zip(*map(_open_archive, windows), strict=True)
    told = unpickle([(window.file, raw) for window, raw in zip(windows, pickles, strict=True)], asked)
    return [
        TorchFile(said, partial(locate, said["storages"])) for said, locate in zip(told, places, strict=True)
    ]


def _info(window: Window, saved: TorchFile, name: str, view: View) -> TensorInfo:
    piece = place_view(window, saved, name, view)
    if 0 in piece.shape:
        return TensorInfo(name, view[1], piece.shape, piece.file, piece.offset, 0)
    return pieced(name, view[1], piece.shape, itemsize_of(window.file, name, view[1]), [piece])


def place_view(window: Window, saved: TorchFile, name: str, view: View) -> Piece:
    """Return where a tensor lies; raises CheckpointError when its elements are not all in its storage."""
    file, (storage, dtype, first, shape, strides) = window.file, view
    itemsize = itemsize_of(file, name, dtype)
    if None in (first, shape, strides) or len(shape) != len(strides):
        raise CheckpointError(f"{file}: the description of {shown(name)} is malformed; fetch it again")
    corner = (0,) * len(shape)
    if 0 in shape:
        return Piece(corner, tuple(shape), file, window.start, tuple(strides))
    start, nbytes = saved.locate(storage)
    reach = first[0] + 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if reach * itemsize > nbytes:
        raise CheckpointError(f"{file} holds only {nbytes} bytes of {shown(name)}; fetch it again")
    if math.prod(shape) * itemsize > nbytes:
        raise CheckpointError(
            f"{file}: elements of {shown(name)} share their place; make it contiguous() and save it again"
        )
    places = tuple(
        stride * itemsize if length > 1 else own
        for length, stride, own in zip(shape, strides, row_major(shape, itemsize), strict=True)
    )
    return Piece(corner, tuple(shape), file, window.start + start + first[0] * itemsize, places)


def without_prefix(file: Path, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return names without a prefix of PREFIXES that all of them have, and notes that say so."""
    kept, notes = [*names], []
    for prefix in PREFIXES:
        if kept and all(name.startswith(prefix) for name in kept):
            notes.append(f"{file.name}: left out {prefix!r}, with which every name began")
            kept = [name.removeprefix(prefix) for name in kept]
    return kept, notes


# The two kinds of file


Storages = Sequence[tuple[str, str, int]]
"""Key, dtype and number of elements of each storage that a pickle speaks of."""


def _open_archive(window: Window) -> tuple[bytes, Callable[[Storages, int], tuple[int, int]]]:
    """Return the pickle of a zip archive, and what finds a storage: a record for each, below one folder.

    Raises CheckpointError where the archive holds something else than weights.
    """
    file, records = window.file, read_directory(window)
    top = next(iter(records), "").split("/")[0]

    def record(name: str) -> zipfile.ZipInfo:
        if (found := records.get(f"{top}/{name}")) is None:
            raise CheckpointError(f"{file} lacks its record {shown(name)}: torch.save did not write it")
        return found

    def locate(storages: Storages, number: int) -> tuple[int, int]:
        key, dtype, count = storages[number]
        own, needed = record(f"data/{key}"), count * itemsize_of(file, f"storage {key}", dtype)
        if own.file_size != needed:
            raise CheckpointError(
                f"{file} holds {own.file_size} bytes of the storage {shown(key)} where its {count} elements "
                f"need {needed}; fetch it again"
            )
        return data_offset(window, own), needed

    if f"{top}/constants.pkl" in records:
        raise CheckpointError(f"{file} is a TorchScript program; only weights (a state dict) can be used")
    if f"{top}/byteorder" in records and read_record(window, record("byteorder"), limit=16) != b"little":
        raise CheckpointError(f"{file} is big-endian; save it again on an ordinary machine")
    return read_record(window, record("data.pkl"), limit=MAX_PICKLE), locate


def _read_old(window: Window, asked: str) -> TorchFile:
    """Read five pickles (magic, version, system, content, keys), then each storage behind its length."""
    raw = window.read(0, min(window.size, MAX_PICKLE))
    if raw[257:262] == b"ustar":
        raise CheckpointError(
            f"{window.file} is a tar archive, as torch wrote before 2018; load it with torch once and save "
            "it again"
        )
    if OLD_MAGIC not in raw[:32]:
        raise CheckpointError(f"{window.file} is no file that torch.save wrote; is it whole?")
    (said,) = unpickle([(window.file, raw)], asked, old=True)
    storages, place, places = said["storages"], said["end"], dict[int, tuple[int, int]]()
    for number in said["order"]:
        key, dtype, count = storages[number]
        if int.from_bytes(window.read(place, 8), "little") != count:
            raise CheckpointError(
                f"{window.file} holds a storage {shown(key)} that no tensor has; fetch it again"
            )
        places[number] = place + 8, count * itemsize_of(window.file, f"storage {key}", dtype)
        place += 8 + places[number][1]
    if place > window.size:
        raise CheckpointError(f"{window.file} has {window.size} bytes where it needs {place}; fetch it again")

    def locate(number: int) -> tuple[int, int]:
        if number not in places:
            key = storages[number][0]
            raise CheckpointError(f"{window.file} lacks the storage {shown(key)}; fetch it again")
        return places[number]

    return TorchFile(said, locate)


def unpickle(pickles: Sequence[tuple[Path, bytes]], asked: str, *, old: bool = False) -> list[dict[str, Any]]:
    """Return what is asked of the pickles of these files, read in a process of its own (see `unpickler`).

    None of their code is run. Raises CheckpointError when one is damaged, names what is no part of weights
    (or of `metadata`), or asks for more time and memory than a description of weights needs.
    """
    total = sum(len(raw) for _, raw in pickles)
    with tempfile.TemporaryFile() as question, tempfile.TemporaryFile() as answer:
        for _, raw in pickles:
            question.write(len(raw).to_bytes(8, "little") + raw)
        question.seek(0)
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", unpickler.__file__, asked, "old" if old else "new"],
                env=bare_environment(),
                stdin=question,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS + total // MAX_RATE,
                check=True,
            )
        except subprocess.SubprocessError:
            raise CheckpointError(
                f"{pickles[0][0]} cannot be read: its pickle takes more time or memory than weights need; "
                "save a plain state dict again, best as safetensors"
            ) from None
        answer.seek(0)
        found: list[dict[str, Any]] = json.load(answer)
    for (file, _), said in zip(pickles, found, strict=True):
        if "error" in said:
            raise CheckpointError(f"{file} {said['error'].format(shown(said['about']))}")
    return found


# Distributed checkpoints


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
