"""Open weight files, read by offset; safe to use from several threads, as no position is shared."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

from palinode.errors import CheckpointError

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
