"""A range of bytes in a file: a whole file, or the part of it in which another file lies.

Files that are read whole: configs and indexes. Only ordinary files, and never more than a limit.

Safetensors files: 8 bytes of header length, that many bytes of JSON, then the raw little-endian tensors.

The JSON is `{name: {dtype, shape, data_offsets}}`. It is checked in full before anything uses it, so that a
half-downloaded or damaged file is named here and not later.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError
from palinode.records import read_bytes
from palinode.weights.tensors import Files, TensorInfo, is_shape, is_text, itemsize_of, shown


@dataclass(frozen=True, slots=True)
class Window:
    """`size` bytes of an open file from byte `start` on; all offsets below count from there."""

    files: Files
    file: Path
    start: int
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on; raises CheckpointError when they lie outside."""
        if not 0 <= offset <= offset + length <= self.size:
            raise CheckpointError(
                f"{self.file} is damaged: it points to {length} bytes at {offset} of {self.size}; fetch "
                "it again"
            )
        raw = bytearray(length)
        self.files.read(self.file, self.start + offset, memoryview(raw))
        return bytes(raw)


def whole(files: Files, file: Path) -> Window:
    """Return all of a file."""
    return Window(files, file, 0, files.size(file))


MAX_JSON = 100_000_000
"""Bytes, as for the header of a safetensors file."""
MAX_PARTS = 2_000_000
"""Lists and objects in a JSON file: those of six hundred thousand tensors."""


def read_small(file: Path, *, limit: int) -> bytes:
    """Return all bytes of a file.

    Raises CheckpointError when there is none, when it is a folder, a pipe or the like, or has more than
    `limit` bytes.
    """
    try:
        return read_bytes(file, limit=limit)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); fetch the model again") from None


def read_json(file: Path, *, unique: bool = False, limit: int = MAX_JSON) -> Any:
    """Return the content of a JSON file; with `unique`, no object may name a key twice.

    Raises CheckpointError when it cannot be read, or has more than `limit` bytes.
    """
    raw = read_small(file, limit=limit)
    try:
        return parse_json(raw, unique=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({shown(str(error))}); fetch the model again") from None


def parse_json(raw: bytes, *, unique: bool) -> Any:
    """Return the content of a JSON text; raises ValueError, or RecursionError where it is nested too deep."""
    if raw.count(b"[") + raw.count(b"{") > MAX_PARTS:
        raise ValueError(f"it has more than {MAX_PARTS} lists and objects")
    collects = gc.isenabled()
    gc.disable()  # which would look through all that is read so far again and again
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique if unique else None)
    finally:
        if collects:
            gc.enable()


def read_index(file: Path) -> Mapping[str, str]:
    """Return which tensor lies in which file, as an index of shards says, all of them in its folder.

    Raises CheckpointError when it cannot be read, or names a file outside its folder or one that is missing.
    """
    index = read_json(file, unique=True)
    index = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(index, dict) or not index:
        raise CheckpointError(
            f"{file} cannot be read (its weight_map is missing, empty or no object); fetch the model again"
        )
    names = list(dict.fromkeys(map(str, index.values())))
    outside = [name for name in names if not is_plain_name(name)]
    if outside:
        raise CheckpointError(f"{file} names {outside[0]!a}, a file outside its folder; do not trust it")
    require_files(file.parent, names)
    return {name: str(place) for name, place in index.items()}


def is_plain_name(name: str) -> bool:
    """Tell whether this names a file in a folder, and not one elsewhere."""
    return name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")


def require_files(folder: Path, names: Sequence[str]) -> None:
    """Raise CheckpointError unless all these files are in the folder."""
    # os.path.isfile, as Path.is_file raises for what the system does not take for a name
    missing = [name for name in names if not os.path.isfile(folder / name)]  # noqa: PTH113
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files (first: {shown(missing[0])}); "
            "finish the download"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raises ValueError when it names a key twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it names {twice!a:.200} twice")
    return entries


MAX_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer headers as well."""


def read_header(file: Path) -> list[TensorInfo]:
    """Return the tensors of one safetensors file in the order of their bytes.

    Raises CheckpointError when the header is absurd, a tensor's bytes do not fit its shape, tensors
    overlap, or the file is longer or shorter than its header says.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            raw = stream.read(length) if length <= min(size - 8, MAX_HEADER) else None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); fetch the model again") from None
    if raw is None:
        raise CheckpointError(
            f"{file} is cut off or no safetensors file ({size} bytes, header of {length}); fetch it again"
        )
    infos = sorted(_parse_header(file, raw, 8 + length), key=lambda info: (info.offset, info.nbytes))
    end = 8 + length
    for info in infos:
        if info.offset != end:
            raise CheckpointError(
                f"{file}: the bytes of {shown(info.name)} overlap another tensor or leave a gap"
            )
        end += info.nbytes
    if end != size:
        raise CheckpointError(f"{file} has {size} bytes where its header needs {end}; fetch it again")
    return infos


def _parse_header(file: Path, raw: bytes, data_start: int) -> Iterator[TensorInfo]:
    try:
        entries = parse_json(raw, unique=True)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a header that cannot be read ({error}); fetch it again") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file} has a header that is not a JSON object; fetch it again")
    about = entries.get("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise CheckpointError(
            f"{file} has a __metadata__ that does not consist of texts, as the format asks; fetch it again"
        )
    for name, entry in entries.items():
        if name != "__metadata__":
            yield _tensor_info(file, name, entry, data_start)


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(dtype, str) and is_shape(shape) and is_shape([start, stop]) and is_text(name)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: the header entry of {name!a:.200} is malformed; fetch it again")
    itemsize = itemsize_of(file, name, dtype)
    if math.prod(shape) * itemsize != stop - start:
        raise CheckpointError(
            f"{file}: {shown(name)} has {stop - start} bytes where its shape needs another number"
        )
    return TensorInfo(name, dtype, shape, file, data_start + start, stop - start)
