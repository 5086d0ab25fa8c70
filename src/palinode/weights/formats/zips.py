"""The directory of a zip archive: which record lies where. torch.save stores its records uncompressed.

Only what is needed to find stored bytes: the end record (22 bytes at the very end, with its 64-bit
variant before it), the central directory of 46-byte entries, and the local header before each record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from palinode.errors import CheckpointError
from palinode.weights.formats.safetensors import Window
from palinode.weights.tensors import shown

START = b"PK\x03\x04"
END = struct.Struct("<4s4H2LH")
LOCATOR = struct.Struct("<4sLQL")
END_64 = struct.Struct("<4sQ2H2L4Q")
ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")

MAX_DIRECTORY = 1 << 24
"""Bytes: 16 MiB name far more records than a model has tensors."""

CIPHERED = 0x2041
"""Flags of a record that is encrypted, in one way or another, or whose directory is."""


@dataclass(frozen=True, slots=True)
class Record:
    """One file in the archive, as the directory describes it."""

    name: str
    header: int
    """Byte of its local header."""
    nbytes: int
    stored: bool
    """Whether its bytes lie in the archive as they are: neither compressed nor encrypted."""


def read_directory(window: Window) -> dict[str, Record]:
    """Return the records of a zip archive by name; raises CheckpointError when it is damaged."""
    start, size = _find_directory(window)
    if size > MAX_DIRECTORY:
        raise CheckpointError(f"{window.file} has a zip directory of {size} bytes, which no model needs")
    records: dict[str, Record] = {}
    known = set[str]()
    for record in _entries(window, window.read(start, size)):
        if record.name.lower() in known:  # torch takes a and A for one name
            raise CheckpointError(
                f"{window.file} holds the record {shown(record.name)} twice; fetch it again"
            )
        known.add(record.name.lower())
        records[record.name] = record
    return records


def data_offset(window: Window, record: Record) -> int:
    """Return the byte at which the stored bytes of a record begin.

    Raises CheckpointError when they are compressed, encrypted, or not all there.
    """
    if not record.stored:
        raise CheckpointError(
            f"{window.file} is compressed, and weights are read in place; load it and save it again with "
            "torch.save"
        )
    head = _read(window, record.header, LOCAL.size)
    signature, _, _, method, *_, name_length, extra_length = LOCAL.unpack(head)
    name = _read(window, record.header + LOCAL.size, name_length)
    start = record.header + LOCAL.size + name_length + extra_length
    sound = signature == START and not method and name == record.name.encode()
    if not sound or start + record.nbytes > window.size:
        raise _damaged(window)
    return int(start)


def read_record(window: Window, record: Record, *, limit: int) -> bytes:
    """Return the bytes of a small record; raises CheckpointError when it is larger than `limit`."""
    if record.nbytes > limit:
        raise CheckpointError(f"{window.file} has a {shown(record.name)} of {record.nbytes} bytes, too many")
    return window.read(data_offset(window, record), record.nbytes)


def _find_directory(window: Window) -> tuple[int, int]:
    """Return (start, size) of the central directory."""
    place = window.size - END.size
    signature, *_, count, size, start, comment = END.unpack(_read(window, place, END.size))
    if signature != b"PK\x05\x06" or comment:
        raise _damaged(window)
    wide = count == 0xFFFF or 0xFFFFFFFF in (size, start)
    if place >= LOCATOR.size:
        signature, _, place_64, _ = LOCATOR.unpack(_read(window, place - LOCATOR.size, LOCATOR.size))
        if signature == b"PK\x06\x07":  # which goes before the end record, even where that has room
            return _wide_directory(window, place_64, size, start)
    if wide:
        raise _damaged(window)
    return start, size


def _wide_directory(window: Window, place: int, size: int, start: int) -> tuple[int, int]:
    """Return the same of the 64-bit end record; numbers for which the other had room must be the same."""
    signature, *_, size_64, start_64 = END_64.unpack(_read(window, place, END_64.size))
    agrees = size in (0xFFFFFFFF, size_64) and start in (0xFFFFFFFF, start_64)
    if signature != b"PK\x06\x06" or not agrees:
        raise _damaged(window)
    return start_64, size_64


def _entries(window: Window, directory: bytes) -> Iterator[Record]:
    place = 0
    while place < len(directory):
        try:
            fields = ENTRY.unpack_from(directory, place)
            signature, flags, method = fields[0], fields[3], fields[4]
            packed, nbytes, name_length, extra_length, comment_length = fields[8:13]
            header = fields[16]
            place += ENTRY.size
            name = directory[place : place + name_length].decode()
            extra = directory[place + name_length : place + name_length + extra_length]
            place += name_length + extra_length + comment_length
            nbytes, packed, header = _wide(extra, [nbytes, packed, header])
        except (struct.error, ValueError):
            raise _damaged(window) from None
        if signature != b"PK\x01\x02" or place > len(directory):
            raise _damaged(window)
        yield Record(name, header, nbytes, stored=method == 0 and not flags & CIPHERED and packed == nbytes)


def _wide(extra: bytes, numbers: list[int]) -> list[int]:
    """Replace the numbers that do not fit 32 bits by those in the extra field of kind 1, in turn."""
    if 0xFFFFFFFF not in numbers:
        return numbers
    place = 0
    while place < len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        place += 4
        if kind == 1:
            found = iter(struct.unpack_from(f"<{length // 8}Q", extra, place))
            return [next(found, number) if number == 0xFFFFFFFF else number for number in numbers]
        place += length
    return numbers


def _read(window: Window, offset: int, length: int) -> bytes:
    """Read a part of the end records; that they lie outside means that the end is not there."""
    if not 0 <= offset <= window.size - length:
        raise _damaged(window)
    return window.read(offset, length)


def _damaged(window: Window) -> CheckpointError:
    return CheckpointError(
        f"{window.file} is cut off or damaged (its zip directory is broken); fetch it again"
    )
