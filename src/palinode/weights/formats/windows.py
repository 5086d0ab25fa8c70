"""A range of bytes in a file: a whole file, or the part of it in which another file lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palinode.errors import CheckpointError
from palinode.weights.files import Files


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
