"""Safetensors files: 8 bytes of header length, that many bytes of JSON, then the raw little-endian tensors.

The JSON is `{name: {dtype, shape, data_offsets}}`. It is checked in full before anything uses it, so that a
half-downloaded or damaged file is named here and not later.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError
from palinode.weights.formats.small_files import parse_json
from palinode.weights.tensors import TensorInfo, is_shape, is_text, itemsize_of, shown

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
