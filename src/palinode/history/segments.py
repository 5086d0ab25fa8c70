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
from collections.abc import Iterable, Iterator, Mapping
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
_CRC = re.compile(rb"[0-9a-f]{8}")
MAGIC = b"PALINODE-JOURNAL-1\n"
_CHECK = struct.Struct("<I")
_HEAD = struct.Struct("<qqdI")
UNKNOWN = -1
"""Tokens of a step that nobody counted."""

StepTable = np.recarray[Any, Any]
"""What is known of each recorded step of one process, in the order of steps: columns `STEP_COLUMNS`."""
STEP_COLUMNS = np.dtype([("step", "i8"), ("rows", "i8"), ("tokens", "i8"), ("epoch", "f8")])
"""`tokens` is `UNKNOWN` where they were not counted, `epoch` NaN where it was not told."""


def step_table(records: Iterable[tuple[int, int, int, float]]) -> StepTable:
    """Return the table of (step, rows, tokens, epoch) of each step."""
    return np.array(list(records), STEP_COLUMNS).view(np.recarray)


def _as_lists(table: StepTable) -> dict[str, Any]:
    """Return a table for JSON; columns in which nothing is known are left out."""
    lists = {"step": table.step.tolist(), "rows": table.rows.tolist()}
    if (table.tokens != UNKNOWN).any():
        lists["tokens"] = table.tokens.tolist()
    if not np.isnan(table.epoch).all():
        lists["epoch"] = [None if np.isnan(value) else value for value in table.epoch.tolist()]
    return lists


def _from_lists(lists: Mapping[str, Any]) -> StepTable:
    count = len(lists["step"])
    tokens, epochs = lists.get("tokens", [UNKNOWN] * count), lists.get("epoch", [None] * count)
    known = [np.nan if value is None else value for value in epochs]
    return step_table(zip(lists["step"], lists["rows"], tokens, known, strict=True))


# Sealed segments


def write_segment(
    path: Path,
    found: Hashes,
    steps: npt.NDArray[np.int32],
    about: Mapping[str, Any] | None = None,
    table: StepTable | None = None,
) -> None:
    """Write rows as a segment that appears whole; rows given in the order of steps keep it among equals."""
    import pyarrow as pa

    order = np.argsort(sort_keys(found), kind="stable")
    packed = pa.py_buffer(np.ascontiguousarray(found[order]))
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(HASH_BYTES), len(order), [None, packed]),
        pa.array(steps[order], pa.int32()),
    ]
    rows = pa.table(columns, names=["hash", "step"])
    if about is not None and table is not None:
        text = json.dumps({**about, "rows": len(found), "steps": _as_lists(table)})
        rows = rows.replace_schema_metadata({KEY: text})
    write_parquet(
        path,
        rows,
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
        found = _CRC.search(footer, footer.index(FOOTER) + len(FOOTER))
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


def read_about(path: Path) -> tuple[dict[str, Any], StepTable]:
    """Return what a segment says of itself, and its steps; raise DataError when it is damaged or none."""
    with open_parquet(path) as file:
        about: dict[str, Any] = json.loads((file.metadata.metadata or {})[KEY])
        if about["version"] > FORMAT_VERSION:
            raise DataError(
                f"{path} has format {about['version']}, newer than {FORMAT_VERSION}; use a newer Palinode"
            )
        return about, _from_lists(about["steps"])


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
        table = file.read_row_groups(groups, columns=["hash", "step"], use_threads=False)
        parts = [
            np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, HASH_BYTES)[chunk.offset :][: len(chunk)]
            for chunk in table["hash"].chunks
        ]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return found, table["step"].to_numpy().astype(np.int64)


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


# The open tail


def journal_head(about: Mapping[str, Any]) -> bytes:
    """Return what a journal begins with."""
    return MAGIC + json.dumps(about).encode() + b"\n"


def journal_record(step: int, found: Hashes, tokens: int, epoch: float) -> bytes:
    """Return one step as a journal has it: a checksum, then the rest."""
    body = _HEAD.pack(step, tokens, epoch, len(found)) + found.tobytes()
    return _CHECK.pack(zlib.crc32(body)) + body


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
    end = content.find(b"\n", len(MAGIC))
    try:
        if not content.startswith(MAGIC) or end < 0:
            raise ValueError
        about = json.loads(content[len(MAGIC) : end])
    except ValueError:
        raise DataError(f"{path} is no journal, or its beginning is damaged") from None
    place, records, parts = end + 1, [], [np.empty((0, HASH_BYTES), np.uint8)]
    while place + _CHECK.size + _HEAD.size <= len(content):
        begin = place + _CHECK.size
        step, tokens, epoch, count = _HEAD.unpack_from(content, begin)
        end = begin + _HEAD.size + count * HASH_BYTES
        if end > len(content) or zlib.crc32(content[begin:end]) != _CHECK.unpack_from(content, place)[0]:
            break
        rows = np.frombuffer(content, np.uint8, count * HASH_BYTES, begin + _HEAD.size)
        parts.append(rows.reshape(-1, HASH_BYTES))
        records.append((step, count, tokens, epoch))
        place = end
    table = step_table(records)
    return Tail(about, np.concatenate(parts), np.repeat(table.step, table.rows), table, len(content) - place)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
