"""Open weight files, read by offset; safe to use from several threads, as no position is shared.

Where one tensor lies and how its raw bytes are read, whatever the layout of the checkpoint on disk.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from palinode.errors import CheckpointError
from palinode.weights.names import is_buffer

LONGEST_READ = 1 << 24
"""Bytes that are read at a time where they are copied."""


class Files:
    """Weight files that are open for reading: each is opened at its first use, and closed with this."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def size(self, file: Path) -> int:
        """Return how many bytes a file has now."""
        return os.fstat(self.handle(file)).st_size

    def read(self, file: Path, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a file from `offset` on.

        Raises CheckpointError when the file cannot be read, or ends too early.
        """
        handle, done = self.handle(file), 0
        while done < len(out):
            try:
                count = _read(handle, out[done:], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{file} cannot be read at byte {offset + done} ({error.strerror}); fetch the model again"
                ) from None
            if count <= 0:
                raise CheckpointError(
                    f"{file} ended at byte {offset + done}; it was cut off while being read"
                )
            done += count

    def handle(self, file: Path) -> int:
        """Return the open file's number; it stays open as long as this does."""
        known = self._handles.get(file)
        return self._open(file) if known is None else known

    def _open(self, file: Path) -> int:
        with self._lock:
            if file not in self._handles:
                try:
                    self._handles[file] = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(
                        f"{file} cannot be read ({error.strerror}); fetch the model again"
                    ) from None
            return self._handles[file]


def _read(handle: int, out: memoryview, offset: int) -> int:
    """Read into `out` and return how many bytes came; some systems (older macOS) read only into new bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, [out], offset)
    found = os.pread(handle, min(len(out), LONGEST_READ), offset)
    out[: len(found)] = found
    return len(found)


FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
OTHER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}

MAX_DIMENSIONS = 32
"""A shape with more dimensions is no shape of a weight; numpy knows no more either."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor whose bytes lie in one file, in row-major order without gaps."""

    name: str
    dtype: str
    """Code of the safetensors format: F32, BF16, F16, I64, …"""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Bytes from the start of the file."""
    nbytes: int

    def read(self, files: Files, start: int, out: memoryview) -> None:
        """Fill `out` with the tensor's raw little-endian bytes from byte `start` on (row-major order).

        Raises CheckpointError when the file cannot be read any more, or ends too early.
        """
        files.read(self.file, self.offset + start, out)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold a part of the tensor."""
        return (self.file,)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether sums can be formed of it; integers and a model's own buffers are copied from the target."""
        return self.dtype in FLOAT_BYTES and not is_buffer(self.name, self.shape, is_float=True)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return FLOAT_BYTES.get(self.dtype) or OTHER_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class HeldTensor(TensorInfo):
    """A tensor that had to be decoded and is held in memory; `file` is where it came from."""

    data: memoryview = field(repr=False, compare=False)
    """All of its raw bytes, row-major."""

    def read(self, files: Files, start: int, out: memoryview) -> None:  # noqa: ARG002 - it needs no file
        """Fill `out` with the tensor's raw bytes from byte `start` on."""
        out[:] = self.data[start : start + len(out)]


def itemsize_of(file: Path, name: str, dtype: str) -> int:
    """Return the bytes of one element; raises CheckpointError for a dtype that we do not know."""
    itemsize = FLOAT_BYTES.get(dtype) or OTHER_BYTES.get(dtype)
    if itemsize is None:
        eight = dtype.lower().startswith(("f8", "float8"))
        kind = "FP8, a packed type" if eight else "a packed or quantised type"
        way_out = "load it with dequantize=True in transformers and save_pretrained, or " if eight else ""
        raise CheckpointError(
            f"{file}: {shown(name)} is stored as {shown(dtype)}, {kind}; weights can be added only in "
            f"float64, float32, float16 or bfloat16: {way_out}use the model it was made from"
        )
    return itemsize


def is_shape(shape: Sequence[Any]) -> bool:
    """Tell whether these are the lengths of a tensor's dimensions: few, whole and not negative."""
    return len(shape) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 1 << 63 for n in shape)


def is_text(name: str) -> bool:
    """Tell whether a name can be written as UTF-8: half a surrogate pair cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: str) -> str:
    """Return a name from a file as a message can show it: on one line, and not endless."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= 200 else f"{text[:200]}…"


def by_file(infos: Iterable[TensorInfo]) -> dict[Path, list[TensorInfo]]:
    """Return tensors grouped by the (first) file they lie in, in their order."""
    grouped: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        grouped.setdefault(info.file, []).append(info)
    return grouped
