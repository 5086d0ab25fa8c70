"""The files of an exposure log: sealed segments (Parquet), the open tail (a journal), and their steps.

A segment holds rows (hash, step), sorted by the first 8 bytes of the hash, then step: 20 bytes a row
before compression. It appears under its name only when it is whole and on disk. What is not sealed yet
lies in a journal, to which each step is appended as one record with a checksum, so that a kill loses
nothing and a crash of the machine at most the last half minute (docs/exposure-log.md).
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from palinode.errors import DataError
from palinode.history.duplicates import HASH_BYTES, Hashes, sort_keys
from palinode.records import beside, ordinary, read_bytes

Ints = npt.NDArray[np.int64]

FORMAT_VERSION = 1
ROW_GROUP = 8192
"""Rows that are read together, 160 kB: the least that finding one row costs."""
KEY = b"palinode.exposures"
"""Under which a segment's Parquet metadata says, as JSON, what the segment is."""
FOOTER = b"palinode.footer"
"""Under which a Parquet file of ours has the CRC-32 of its footer, taken with `UNSEALED` in its place."""
UNSEALED = b"--------"
MAGIC = b"PALINODE-JOURNAL-1\n"
_CRC = re.compile(rb"[0-9a-f]{8}")
_HEAD = struct.Struct("<qqdI")
_CHECK = struct.Struct("<I")
UNKNOWN = -1
"""Tokens of a step that nobody counted."""


@dataclass(frozen=True, slots=True)
class StepTable:
    """What is known of each recorded step of one process; arrays of one length, in the order of steps."""

    step: Ints
    rows: Ints
    tokens: Ints
    """`UNKNOWN` where they were not counted."""
    epoch: npt.NDArray[np.float64]
    """NaN where it was not told."""

    def as_lists(self) -> dict[str, Any]:
        """Return it for JSON; columns in which nothing is known are left out."""
        lists: dict[str, Any] = {"step": self.step.tolist(), "rows": self.rows.tolist()}
        if (self.tokens != UNKNOWN).any():
            lists["tokens"] = self.tokens.tolist()
        if not np.isnan(self.epoch).all():
            lists["epoch"] = [None if np.isnan(value) else value for value in self.epoch.tolist()]
        return lists

    @classmethod
    def from_lists(cls, lists: Mapping[str, Any]) -> StepTable:
        """Make it from what `as_lists` returned."""
        count = len(lists["step"])
        epochs = [np.nan if value is None else value for value in lists.get("epoch", [np.nan] * count)]
        return cls(
            np.array(lists["step"], np.int64),
            np.array(lists["rows"], np.int64),
            np.array(lists.get("tokens", [UNKNOWN] * count), np.int64),
            np.array(epochs, np.float64),
        )

    @classmethod
    def from_records(cls, records: Sequence[tuple[int, int, int, float]]) -> StepTable:
        """Make it from (step, rows, tokens, epoch) of each step."""
        step, rows, tokens = (np.array([record[at] for record in records], np.int64) for at in range(3))
        return cls(step, rows, tokens, np.array([record[3] for record in records], np.float64))

    @classmethod
    def joined(cls, tables: Sequence[StepTable]) -> StepTable:
        """Put tables one after the other."""
        if not tables:
            return cls.from_lists({"step": [], "rows": []})
        return cls(
            np.concatenate([table.step for table in tables]),
            np.concatenate([table.rows for table in tables]),
            np.concatenate([table.tokens for table in tables]),
            np.concatenate([table.epoch for table in tables]),
        )


# Sealed segments


def write_segment(
    path: Path, found: Hashes, steps: npt.NDArray[np.int32], about: Mapping[str, Any] | None
) -> None:
    """Write rows as a segment that appears whole; rows given in the order of steps keep it among equals."""
    import pyarrow as pa

    order = np.argsort(sort_keys(found), kind="stable")
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(HASH_BYTES), len(order), [None, pa.py_buffer(np.ascontiguousarray(found[order]))]
        ),
        pa.array(steps[order], pa.int32()),
    ]
    table = pa.table(columns, names=["hash", "step"])
    if about is not None:
        table = table.replace_schema_metadata({KEY: json.dumps(about)})
    write_parquet(
        path,
        table,
        row_group_size=ROW_GROUP,
        use_dictionary=False,
        compression={"hash": "none", "step": "zstd"},  # hashes cannot be compressed
        write_page_checksum=True,
    )


def write_parquet(path: Path, table: Any, **options: Any) -> None:
    """Write a table, footer sealed, as a file that appears whole; options are pyarrow's."""
    import pyarrow.parquet as pq

    table = table.replace_schema_metadata({**(table.schema.metadata or {}), FOOTER: UNSEALED})
    partial = beside(path)
    with partial.open("w+b") as file:
        pq.write_table(table, file, **options)
        footer, begin = _footer(file)
        file.seek(begin + footer.index(UNSEALED, footer.index(FOOTER)))
        file.write(b"%08x" % zlib.crc32(footer))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file of ours once its footer is known to be whole: pyarrow may abort on another.

    Raises DataError for a damaged file, also while it is read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with ordinary(path).open("rb") as stream:
            footer, _ = _footer(stream)
        place = footer.index(FOOTER) + len(FOOTER)
        found = _CRC.search(footer, place)
        if not found or zlib.crc32(footer.replace(found[0], UNSEALED, 1)) != int(found[0], 16):
            raise ValueError("its footer is damaged")
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read ({reason:.100})") from None


def _footer(file: IO[bytes]) -> tuple[bytes, int]:
    """Return the footer of a Parquet file, and where it begins; ValueError where it has none."""
    end = file.seek(0, os.SEEK_END) - 8
    file.seek(max(end, 0))
    tail = file.read(8)
    begin = end - int.from_bytes(tail[:4], "little")
    if end < 0 or tail[4:] != b"PAR1" or begin < 4:
        raise ValueError("it is cut off, or no Parquet file")
    file.seek(begin)
    return file.read(end - begin), begin


def read_about(path: Path) -> dict[str, Any]:
    """Return what a segment says of itself; raise DataError when it is damaged or no segment."""
    with open_parquet(path) as file:
        about: dict[str, Any] = json.loads((file.metadata.metadata or {})[KEY])
        if about["version"] > FORMAT_VERSION:
            raise DataError(
                f"{path} has format {about['version']}, newer than {FORMAT_VERSION}; use a newer Palinode"
            )
    return about


def rows_of(
    path: Path, keys: npt.NDArray[np.uint64] | None = None, *, between: tuple[int, int] | None = None
) -> tuple[Hashes, Ints]:
    """Return hashes and steps of a segment in its order: of all rows, or at least those asked for.

    Asked for are rows with one of the sorted `keys`, or a key `between` two; row groups that hold none
    are not read. Raises DataError when the file is damaged.
    """
    with open_parquet(path) as file:
        groups = _groups(file.metadata, keys, between)
        if not groups:
            return np.empty((0, HASH_BYTES), np.uint8), np.empty(0, np.int64)
        return _unpacked(file.read_row_groups(groups, columns=["hash", "step"], use_threads=False))


def _groups(metadata: Any, keys: npt.NDArray[np.uint64] | None, between: tuple[int, int] | None) -> list[int]:
    """Return the row groups that may hold a row asked for, by the least and greatest hash in each."""
    groups = range(metadata.num_row_groups)
    if keys is None and between is None:
        return list(groups)
    found = []
    for group in groups:
        bounds = metadata.row_group(group).column(0).statistics
        least, greatest = (int.from_bytes(bound[:8], "big") for bound in (bounds.min, bounds.max))
        if between is not None and (greatest < between[0] or least > between[1]):
            continue
        if keys is not None:
            place = int(np.searchsorted(keys, np.uint64(least)))
            if place == len(keys) or int(keys[place]) > greatest:
                continue
        found.append(group)
    return found


def _unpacked(table: Any) -> tuple[Hashes, Ints]:
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, HASH_BYTES)[chunk.offset :][: len(chunk)]
        for chunk in table["hash"].chunks
    ]
    found = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return found, table["step"].to_numpy().astype(np.int64)


# The open tail


class Journal:
    """An append-only file of steps that are not sealed yet."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._write(MAGIC + json.dumps(about).encode() + b"\n")

    def append(self, step: int, found: Hashes, tokens: int, epoch: float) -> None:
        """Add one step as one record."""
        body = _HEAD.pack(step, tokens, epoch, len(found)) + found.tobytes()
        self._write(_CHECK.pack(zlib.crc32(body)) + body)

    def sync(self) -> None:
        """Wait until all of it is on disk."""
        getattr(os, "fdatasync", os.fsync)(self._handle)  # macOS has none

    def close(self, *, remove: bool) -> None:
        """Close it, and remove it once its rows are sealed."""
        os.close(self._handle)
        if remove:
            self.path.unlink()

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._handle, rest) :]


@dataclass(frozen=True, slots=True)
class Tail:
    """What a journal holds."""

    about: dict[str, Any]
    hashes: Hashes
    steps: Ints
    table: StepTable
    lost: int
    """Bytes at the end that are no whole record."""


def read_journal(path: Path) -> Tail:
    """Return what a journal holds up to its first damaged record; raise DataError when even its head is."""
    content = read_bytes(path)
    head, line_end, _ = content[len(MAGIC) :].partition(b"\n")
    if not content.startswith(MAGIC) or not line_end:
        raise DataError(f"{path} is no journal, or its beginning is damaged")
    try:
        about = json.loads(head)
    except ValueError:
        raise DataError(f"{path} is no journal, or its beginning is damaged") from None
    place = len(MAGIC) + len(head) + 1
    parts, records = [], []
    while record := _record(content, place):
        place, step, tokens, epoch, found = record
        parts.append(found)
        records.append((step, len(found), tokens, epoch))
    table = StepTable.from_records(records)
    found = np.concatenate(parts) if parts else np.empty((0, HASH_BYTES), np.uint8)
    return Tail(about, found, np.repeat(table.step, table.rows), table, len(content) - place)


def _record(content: bytes, place: int) -> tuple[int, int, int, float, Hashes] | None:
    """Return the next place and one record, or None at the end or where it is damaged."""
    begin = place + _CHECK.size
    if begin + _HEAD.size > len(content):
        return None
    step, tokens, epoch, count = _HEAD.unpack_from(content, begin)
    end = begin + _HEAD.size + count * HASH_BYTES
    if end > len(content) or zlib.crc32(content[begin:end]) != _CHECK.unpack_from(content, place)[0]:
        return None
    found = np.frombuffer(content, np.uint8, count * HASH_BYTES, begin + _HEAD.size)
    return end, step, tokens, epoch, found.reshape(-1, HASH_BYTES)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
