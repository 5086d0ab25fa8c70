"""The exposure log: which rows were in the batch of which optimiser step, written while training.

docs/exposure-log.md has its files and formats. Steps are counted from 1: step s is the update that makes
checkpoint s, so a checkpoint of step c has seen what the steps 1 to c hold. A session that goes on from step
k supersedes all later steps of the sessions before it; nothing that was written is ever changed.

A sealed segment appears under its name only when it is whole and on disk. What is not sealed yet lies in a
journal, to which each step is appended as one record with a checksum, so that a kill loses nothing and a
crash of the machine at most the last half minute.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from palinode.errors import DataError, first_line, told_as
from palinode.history.duplicates import HASH_BYTES, Hashes, as_hashes, row_hash, sort_keys
from palinode.records import beside, ordinary, read_bytes, read_json, write_json

Ints = npt.NDArray[np.int64]

FORMAT_VERSION = 1
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


# Sealed segments


def write_segment(
    path: Path, found: Hashes, steps: npt.NDArray[np.int32], about: Mapping[str, Any], table: StepTable
) -> None:
    """Write rows, as a file that appears whole, its footer sealed; among equals the order of steps stays."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = np.argsort(sort_keys(found), kind="stable")
    packed = pa.py_buffer(np.ascontiguousarray(found[order]))
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(HASH_BYTES), len(order), [None, packed]),
        pa.array(steps[order], pa.int32()),
    ]
    lists = {"step": table.step.tolist(), "rows": table.rows.tolist()}
    if (table.tokens != UNKNOWN).any():  # columns in which nothing is known are left out
        lists["tokens"] = table.tokens.tolist()
    if not np.isnan(table.epoch).all():
        lists["epoch"] = [None if np.isnan(value) else value for value in table.epoch.tolist()]
    text = json.dumps({**about, "rows": len(found), "steps": lists})
    rows = pa.table(columns, names=["hash", "step"], metadata={KEY: text, FOOTER: UNSEALED})
    partial = beside(path)
    with partial.open("w+b") as file:
        pq.write_table(
            rows,
            file,
            row_group_size=8192,  # read together, 160 kB: the least that finding one row costs
            use_dictionary=False,
            compression={"hash": "none", "step": "zstd"},  # hashes cannot be compressed
            write_page_checksum=True,
        )
        footer, begin = _footer(file)
        file.seek(begin + footer.index(UNSEALED, footer.index(FOOTER)))
        file.write(b"%08x" % zlib.crc32(footer))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # so that the name is on disk
    os.close(folder)


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
        raise DataError(f"{path} cannot be read ({first_line(error):.100})") from None


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
        lists, count = about["steps"], len(about["steps"]["step"])
        tokens, epochs = lists.get("tokens", [UNKNOWN] * count), lists.get("epoch", [None] * count)
        known = [np.nan if value is None else value for value in epochs]
        return about, step_table(zip(lists["step"], lists["rows"], tokens, known, strict=True))


def rows_of(path: Path, keys: npt.NDArray[np.uint64] | None = None) -> tuple[Hashes, Ints]:
    """Return hashes and steps of a segment in its order: of all rows, or at least of those with sorted keys.

    Row groups that hold none of these are not read. Raises DataError when the file is damaged.
    """
    with open_parquet(path) as file:
        groups = _groups(file.metadata, keys)
        if not groups:
            return np.empty((0, HASH_BYTES), np.uint8), np.empty(0, np.int64)
        table = file.read_row_groups(groups, columns=["hash", "step"], use_threads=False)
        parts = [
            np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, HASH_BYTES)[chunk.offset :][: len(chunk)]
            for chunk in table["hash"].chunks
        ]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return found, table["step"].to_numpy().astype(np.int64)


def _groups(metadata: Any, keys: npt.NDArray[np.uint64] | None) -> list[int]:
    """Return the row groups that may hold a row asked for, by the least and greatest hash in each."""
    groups = list(range(metadata.num_row_groups))
    if keys is None:
        return groups
    bounds = [metadata.row_group(group).column(0).statistics for group in groups]
    ends = [int.from_bytes(end[:8], "big") for one in bounds for end in (one.min, one.max)]
    least, greatest = np.array(ends, np.uint64).reshape(-1, 2).T
    held = np.searchsorted(keys, greatest, "right") > np.searchsorted(keys, least)
    return np.flatnonzero(held).tolist()


# The open tail


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


MAX_STEP = 2**31 - 1
"""Steps are stored in 32 bits."""
SEGMENT_ROWS = 1 << 20
"""Rows after which a segment is sealed: 20 MB."""
SEGMENT_STEPS = 1 << 14
"""Steps after which a segment is sealed, however few its rows."""
SYNC_SECONDS = 30.0
"""How often the tail is forced to disk: what a crash of the machine (not of the program) may cost."""


@dataclass(frozen=True, slots=True)
class LogHeader:
    """What a log is of; two logs with different headers are of different trainings."""

    run: str
    """Names the training; sessions of one training share it."""
    data: str
    """Fingerprint of the data set (`fingerprint_rows`)."""
    tokenizer: str
    """Fingerprint of the tokenizer (`fingerprint_tokenizer`)."""
    salted: bool = False
    """Whether hashes can only be made with a salt, which the log does not hold."""
    salt_check: str | None = None
    version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class Session:
    """One start of a training."""

    number: int
    """Counted from 1."""
    start: int
    """The step it went on from; its first step is the next one."""
    world_size: int
    """Processes that log."""


def salt_check(salt: bytes) -> str | None:
    """Return what a log writes down to know its salt by: the hash of a known word; None without one."""
    return row_hash("palinode", salt=salt).hex() if salt else None


def read_header(folder: Path) -> LogHeader:
    """Return what a log is of; raise DataError where there is none."""
    with told_as(DataError, f"{folder / 'log.json'} cannot be read"):
        if not (folder / "log.json").exists():
            raise DataError(
                f"{folder} holds no exposure log (log.json is missing); name the folder that "
                "ExposureLog wrote"
            )
        found = read_json(folder / "log.json")
        if found["version"] > FORMAT_VERSION:
            raise DataError(
                f"{folder} has format {found['version']}, newer than {FORMAT_VERSION}; use a newer Palinode"
            )
        header = LogHeader(**found)
        texts = (header.run, header.data, header.tokenizer, header.salt_check or "")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("its fingerprints are no texts")
        return header


def read_sessions(folder: Path) -> list[Session]:
    """Return the sessions of a log in their order."""
    found = []
    for path in sorted(folder.glob("session-*.json")):
        with told_as(DataError, f"{path} cannot be read", "restore it from a copy"):
            session = Session(**read_json(path))
            bounds = {"number": (1, MAX_STEP), "start": (0, MAX_STEP), "world_size": (1, 100_000)}
            for name, (least, most) in bounds.items():
                value = getattr(session, name)
                if type(value) is not int or not least <= value <= most:
                    raise ValueError("its numbers cannot be those of a training")
            found.append(session)
    return sorted(found, key=lambda session: session.number)


def check_same(header: LogHeader, folder: Path, **wanted: str | None) -> None:
    """Raise DataError where a log is not of the data, tokenizer or run that is wanted; None asks nothing."""
    names = {"data": "another data set", "tokenizer": "another tokenizer", "run": "another run"}
    for name, expected in wanted.items():
        if expected and getattr(header, name) != expected:
            raise DataError(
                f"the log in {folder} is of {names[name]} (fingerprint {getattr(header, name):.12}, not "
                f"{expected:.12}); name the log of this training, or another folder"
            )


class ExposureLog(AbstractContextManager["ExposureLog"]):
    """Writes the exposures of one process; `open` it, `record` every optimiser step, `close` it."""

    def __init__(
        self, folder: Path, header: LogHeader, session: Session, rank: int, segment_rows: int = SEGMENT_ROWS
    ) -> None:
        self.folder = folder
        self.header = header
        self.session = session
        self.rank = rank
        self._segment_rows = segment_rows
        self._place = folder / f"session-{session.number:04d}" / f"rank-{rank:05d}"
        self._place.mkdir(parents=True, exist_ok=True)
        if any(self._place.iterdir()):
            raise DataError(
                f"{self._place} holds rows already; a process that starts again begins a new session"
            )
        self._about = {**asdict(header), "session": asdict(session), "rank": rank}
        self._last = session.start
        self._synced = time.monotonic()
        self._tail = -1
        self._files = 0
        self._begin_tail()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        data: str,
        tokenizer: str,
        run: str | None = None,
        salt: bytes = b"",
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        session: int | None = None,
        segment_rows: int = SEGMENT_ROWS,
    ) -> ExposureLog:
        """Make a log, or go on with one from step `start`, as process `rank` of `world_size`.

        All processes must name the same session; under torch.distributed process 0 chooses it for all.
        `run` is drawn when the log is new, and taken from the log when it is not. Raises DataError for a
        log of other data, another tokenizer, another run or another salt.
        """
        place = Path(folder)
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} of {world_size} processes does not exist; ranks begin at 0")
        if start < 0:
            raise DataError(f"the log cannot go on from step {start}; steps are counted from 1")
        wanted = LogHeader(run or "", data, tokenizer, bool(salt), salt_check(salt))
        header, begun = _agree(place, wanted, Session(session or 0, start, world_size), rank)
        return cls(place, header, begun, rank, segment_rows)

    def record(
        self,
        step: int,
        hashes: Hashes | Sequence[bytes],
        *,
        epoch: float | None = None,
        tokens: int | None = None,
    ) -> None:
        """Note that these rows were in this process's part of the batch of an optimiser step.

        A row that is there twice is given twice. `tokens` are those of this process in this step. Raises
        DataError unless steps grow.
        """
        found = as_hashes(hashes).copy()
        if step <= self._last:
            raise DataError(
                f"step {step} cannot be recorded after step {self._last} in one session; "
                "open the log again with start=the step that training goes on from"
            )
        count = UNKNOWN if tokens is None else tokens
        fraction = float("nan") if epoch is None else epoch
        body = _HEAD.pack(step, count, fraction, len(found)) + found.tobytes()
        self._append(_CHECK.pack(zlib.crc32(body)) + body)
        self._parts.append(found)
        self._steps.append((step, len(found), count, fraction))
        self._rows += len(found)
        self._last = step
        if self._rows >= self._segment_rows or len(self._steps) >= SEGMENT_STEPS:
            self.seal()
        elif time.monotonic() - self._synced > SYNC_SECONDS:
            getattr(os, "fdatasync", os.fsync)(self._tail)  # macOS has no fdatasync
            self._synced = time.monotonic()

    def seal(self) -> None:
        """Make the open tail a segment, as happens by itself when it is large."""
        if self._steps:
            table = step_table(self._steps)
            steps = np.repeat(table.step, table.rows).astype(np.int32)
            path = self._tail_path.with_suffix(".parquet")
            write_segment(path, np.concatenate(self._parts), steps, self._about, table)
            self._end_tail()
            self._begin_tail()

    def close(self) -> None:
        """Seal what is left and stop."""
        self.seal()
        self._end_tail()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin_tail(self) -> None:
        self._parts: list[Hashes] = []
        self._steps: list[tuple[int, int, int, float]] = []
        self._rows = 0
        self._synced = time.monotonic()
        self._tail_path = self._place / f"{self._files:06d}.journal"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._tail = os.open(self._tail_path, flags, 0o666)
        self._files += 1
        self._append(MAGIC + json.dumps(self._about).encode() + b"\n")

    def _append(self, content: bytes) -> None:
        """Hand bytes of the tail to the system, where they outlive this program."""
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._tail, rest) :]

    def _end_tail(self) -> None:
        os.close(self._tail)
        self._tail_path.unlink()


def _agree(folder: Path, wanted: LogHeader, session: Session, rank: int) -> tuple[LogHeader, Session]:
    """Let process 0 write what the log is and number the session, and let all the others know."""
    if session.world_size == 1:
        return _begin_session(folder, wanted, session)
    torch: Any = sys.modules.get("torch")
    if torch is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        if not session.number or not wanted.run:
            raise DataError(
                f"{session.world_size} processes must all name the same session (session=1, 2, …) and run, "
                "since torch.distributed is not there to agree on them"
            )
        return _begin_session(folder, wanted, session) if rank == 0 else (wanted, session)
    told: list[Any] = [None]
    if rank == 0:
        try:
            told = [_begin_session(folder, wanted, session)]
        except DataError as error:  # the others must not wait for ever
            told = [error]
    torch.distributed.broadcast_object_list(told, src=0)
    if isinstance(told[0], DataError):
        raise told[0]
    agreed: tuple[LogHeader, Session] = told[0]
    return agreed


def _begin_session(folder: Path, wanted: LogHeader, session: Session) -> tuple[LogHeader, Session]:
    """Write log.json if there is none, and the session's file; one without a number gets the next."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "log.json").exists():
        header = read_header(folder)
        check_same(header, folder, data=wanted.data, tokenizer=wanted.tokenizer, run=wanted.run)
        if header.salt_check != wanted.salt_check:
            raise DataError(
                f"the log in {folder} was written with {'another salt' if header.salted else 'no salt'}; "
                "go on with that one, or name another folder"
            )
    else:
        header = LogHeader(**{**asdict(wanted), "run": wanted.run or uuid.uuid4().hex})
        write_json(folder / "log.json", asdict(header))
    last = max((known.number for known in read_sessions(folder)), default=0)
    session = replace(session, number=session.number or last + 1)
    if session.number <= last:
        raise DataError(f"{folder} has a session {session.number} already; the next one is {last + 1}")
    write_json(folder / f"session-{session.number:04d}.json", asdict(session))
    return header, session
