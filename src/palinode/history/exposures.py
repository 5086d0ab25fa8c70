"""The exposure log: which rows were in the batch of which optimiser step, written while training.

    log.json                                   what was trained on: fingerprints, run, salted or not
    session-0002.json                          one start of the training: the step it went on from, world size
    session-0002/rank-00003/000017.parquet     a sealed segment of one process (`segments`)
                            000018.journal     its open tail
    runs-0001/                                 the same rows sorted for finding (`compaction`), may be missing

Steps are counted from 1: step s is the update that makes checkpoint s, so a checkpoint of step c has
seen what the steps 1 to c hold. A session that goes on from step k supersedes all later steps of the
sessions before it; nothing that was written is ever changed. The log holds no text.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from palinode.data.examples import Example
from palinode.errors import DataError
from palinode.history.coverage import (
    NO_LIMIT,
    complete_steps,
    find_gaps,
    find_overlaps,
    limits,
    live_steps,
)
from palinode.history.duplicates import HASH_BYTES, Hashes, as_hashes, row_hash, sort_keys
from palinode.history.reading import LogFile, Run, find_files, in_threads, matching, place_of
from palinode.history.segments import UNKNOWN, Ints, Journal, StepTable, rows_of, write_segment
from palinode.history.sessions import (
    LogHeader,
    Session,
    agree,
    check_same,
    rank_folder,
    read_header,
    read_sessions,
    salt_check,
)

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

SEGMENT_ROWS = 1 << 20
"""Rows after which a segment is sealed: 20 MB."""
SEGMENT_STEPS = 1 << 14
"""Steps after which a segment is sealed, however few its rows."""
SYNC_SECONDS = 30.0
"""How often the tail is forced to disk: what a crash of the machine (not of the program) may cost."""


class ExposureLog:
    """Writes the exposures of one process; `open` it, `record` every optimiser step, `close` it."""

    def __init__(
        self, folder: Path, header: LogHeader, session: Session, rank: int, segment_rows: int = SEGMENT_ROWS
    ) -> None:
        self.folder = folder
        self.header = header
        self.session = session
        self.rank = rank
        self._segment_rows = segment_rows
        self._place = rank_folder(folder, session.number, rank)
        self._place.mkdir(parents=True, exist_ok=True)
        if any(self._place.iterdir()):
            raise DataError(
                f"{self._place} holds rows already; a process that starts again begins a new session"
            )
        self._next_file = 0
        self._last = session.start
        self._parts: list[Hashes] = []
        self._steps: list[tuple[int, int, int, float]] = []
        self._rows = 0
        self._synced = time.monotonic()
        self._journal = self._new_journal()

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
        header, number = agree(place, wanted, start, rank, world_size, session)
        return cls(place, header, Session(number, start, world_size), rank, segment_rows)

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
        self._journal.append(step, found, count, fraction)
        self._parts.append(found)
        self._steps.append((step, len(found), count, fraction))
        self._rows += len(found)
        self._last = step
        if self._rows >= self._segment_rows or len(self._steps) >= SEGMENT_STEPS:
            self.seal()
        elif time.monotonic() - self._synced > SYNC_SECONDS:
            self._journal.sync()
            self._synced = time.monotonic()

    def seal(self) -> None:
        """Make the open tail a segment, as happens by itself when it is large."""
        if not self._steps:
            return
        table = StepTable.from_records(self._steps)
        about = {**self._about(), "rows": self._rows, "steps": table.as_lists()}
        path = self._journal.path.with_suffix(".parquet")
        steps = np.repeat(table.step, table.rows).astype(np.int32)
        write_segment(path, np.concatenate(self._parts), steps, about)
        self._journal.close(remove=True)
        self._parts, self._steps, self._rows = [], [], 0
        self._synced = time.monotonic()
        self._journal = self._new_journal()

    def close(self) -> None:
        """Seal what is left and stop."""
        self.seal()
        self._journal.close(remove=True)

    def __enter__(self) -> ExposureLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_journal(self) -> Journal:
        journal = Journal(self._place / f"{self._next_file:06d}.journal", self._about())
        self._next_file += 1
        return journal

    def _about(self) -> dict[str, Any]:
        return {**asdict(self.header), "session": asdict(self.session), "rank": self.rank}


@dataclass(frozen=True, slots=True)
class Exposure:
    """One step in whose batch a row was."""

    row: int
    """Position among the rows that were asked for."""
    step: int
    times: int = 1
    """How often it was in that batch."""
    tokens: int | None = None
    """Tokens trained on up to the end of this step; None where they were not counted."""


class ExposureReader:
    """Finds rows in a log; `open` it."""

    def __init__(self, folder: Path, header: LogHeader) -> None:
        self.folder = folder
        self.header = header
        self.sessions = read_sessions(folder)
        known = {session.number for session in self.sessions}
        found, runs, self._notes = find_files(folder, header)
        files = [file for file in found if file.recorded.session in known]
        self._notes += [
            f"Lost: {file.recorded.name} is of session {file.recorded.session}, whose file is missing."
            for file in found
            if file not in files
        ]
        recorded, doubled, overlaps = find_overlaps([file.recorded for file in files])
        self._notes += overlaps + find_gaps(recorded, self.sessions)
        self._limits = limits(self.sessions)
        self._files = list(zip(files, doubled, strict=True))
        self._runs = runs
        self.steps = live_steps(recorded, self.sessions)
        """The steps that count, in their order, with rows and tokens over all processes."""
        self._recorded = recorded
        self._damaged: set[str] = set()
        self._tokens = np.cumsum(self.steps.tokens)
        complete = self.complete
        ends = np.flatnonzero(complete != np.arange(1, len(complete) + 1))
        self._whole_up_to = int(ends[0]) if len(ends) else len(complete)
        self._known_up_to = int(np.argmax(self.steps.tokens == UNKNOWN)) if self._lacks_tokens else None

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        data: str | None = None,
        tokenizer: str | None = None,
        run: str | None = None,
    ) -> ExposureReader:
        """Open a log, also one that is being written; raise DataError when it is not of what is named."""
        place = Path(folder)
        header = read_header(place)
        check_same(header, place, data=data, tokenizer=tokenizer, run=run)
        return cls(place, header)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is lost, doubled, missing or superseded, in sentences; `find` may add to it."""
        return tuple(self._notes)

    @property
    def complete(self) -> Ints:
        """The steps that all processes recorded, sorted; less those of files that `find` found damaged."""
        kept = [entry for entry in self._recorded if entry.name not in self._damaged]
        return complete_steps(kept, self.sessions)

    def find(self, wanted: Sequence[str | Example | bytes] | Hashes, *, salt: bytes = b"") -> list[Exposure]:
        """Return all exposures of some rows, sorted by row, then step.

        Rows are texts, examples or their hashes. Raises DataError where the log is salted and `salt` is
        not the one it was written with.
        """
        self._check_salt(salt)
        asked = [
            bytes(entry) if isinstance(entry, bytes | np.ndarray) else row_hash(entry, salt=salt)
            for entry in wanted
        ]
        rows: dict[bytes, list[int]] = {}
        for position, digest in enumerate(asked):
            rows.setdefault(digest, []).append(position)
        hits = Counter(
            (position, step)
            for digest, step in self._hits(as_hashes(list(rows)))
            for position in rows.get(digest, ())
        )
        return [
            Exposure(row, step, times, self.tokens_at(step)) for (row, step), times in sorted(hits.items())
        ]

    def at(self, step: int) -> Hashes:
        """Return the hashes of the whole batch of a step, sorted; none for a step that is not in the log."""
        holding = [
            entry
            for entry in self._files
            if step in entry[0].recorded.table.step and step not in entry[1]
            if step <= self._limits[entry[0].recorded.session]
        ]
        parts = [np.empty((0, HASH_BYTES), np.uint8)]
        for file, _ in holding:
            found, steps = self._read(file.path, file.rows)
            parts.append(found[steps == step])
        whole = np.concatenate(parts)
        return whole[np.lexsort(whole.T[::-1])]

    def tokens_at(self, step: int) -> int | None:
        """Return the tokens trained on up to the end of a step, None where they were not all counted."""
        if not step:
            return 0
        if not 0 < step <= self._whole_up_to:
            return None  # a step up to this one is missing
        place = step - 1
        if self._known_up_to is not None and place >= self._known_up_to:
            return None
        return int(self._tokens[place])

    def connect(self) -> DuckDBPyConnection:
        """Return a DuckDB connection with the views `exposures` (hash, step, session, rank) and `steps`.

        Only what counts is in them. Raises DataError where duckdb is not installed.
        """
        try:
            import duckdb
        except ImportError:
            raise DataError(
                "duckdb is not installed; pip install 'palinode[history]', or use find and at"
            ) from None
        connection = duckdb.connect()
        connection.register("steps", _as_table(self.steps))
        selects = [self._select(connection, number) for number in range(len(self._files))]
        empty = (
            "SELECT NULL::BLOB AS hash, NULL::INT AS step, NULL::INT AS session, NULL::INT AS rank WHERE 0=1"
        )
        connection.execute(f"CREATE VIEW exposures AS {' UNION ALL '.join(selects or [empty])}")
        return connection

    @property
    def _lacks_tokens(self) -> bool:
        return bool((self.steps.tokens == UNKNOWN).any())

    def _check_salt(self, salt: bytes) -> None:
        if self.header.salt_check == salt_check(salt):
            return
        if not self.header.salted:
            raise DataError(f"the log in {self.folder} is not salted; ask it without a salt")
        what = "another salt was given" if salt else "none was given"
        raise DataError(f"the log in {self.folder} is salted and {what}; give the salt it was written with")

    def _hits(self, wanted: Hashes) -> list[tuple[bytes, int]]:
        """Return hash and step of the rows that have one of these hashes, or one that begins alike."""
        keys = np.unique(sort_keys(wanted))
        if not len(keys):
            return []
        tasks: list[Callable[[], tuple[Hashes, Ints]]] = []
        for run in self._runs:
            tasks += [partial(self._hits_in_part, path, run, keys) for path in run.parts_of(keys)]
        tasks += [partial(self._hits_in_file, *entry, keys) for entry in self._files if not entry[0].run]
        return [
            (found.tobytes(), int(step))
            for hashes, steps in in_threads(lambda task: task(), tasks)
            for found, step in zip(hashes, steps, strict=True)
        ]

    def _hits_in_part(self, path: Path, run: Run, keys: npt.NDArray[np.uint64]) -> tuple[Hashes, Ints]:
        limit = min(
            (session.start for session in self.sessions if session.number > run.last_session),
            default=int(NO_LIMIT),
        )
        found, steps = self._read(path, partial(rows_of, path), keys)
        hashes, at = matching(found, steps, keys, in_order=True)
        return hashes[at <= limit], at[at <= limit]

    def _hits_in_file(
        self, file: LogFile, doubled: Ints, keys: npt.NDArray[np.uint64]
    ) -> tuple[Hashes, Ints]:
        found, steps = self._read(file.path, file.rows, keys)
        hashes, at = matching(found, steps, keys, in_order=file.path.suffix == ".parquet")
        live = (at <= self._limits[file.recorded.session]) & ~np.isin(at, doubled)
        return hashes[live], at[live]

    def _read(
        self, path: Path, read: Callable[..., tuple[Hashes, Ints]], *keys: npt.NDArray[np.uint64]
    ) -> tuple[Hashes, Ints]:
        """Read rows; where the file turns out to be damaged, note it and go on without."""
        try:
            return read(*keys)
        except (DataError, OSError) as error:
            note = f"Lost: {place_of(path, self.folder)} ({error}); rows in it are not found."
            if note not in self._notes:
                self._notes.append(note)
            self._damaged |= {
                file.recorded.name
                for file, _ in self._files
                if file.path == path or file.run == path.parent.name
            }
            return np.empty((0, HASH_BYTES), np.uint8), np.empty(0, np.int64)

    def _select(self, connection: DuckDBPyConnection, number: int) -> str:
        """Return the SQL for the live rows of one file."""
        file, doubled = self._files[number]
        recorded = file.recorded
        source = f"read_parquet('{str(file.path).replace(chr(39), chr(39) * 2)}')"
        if file.path.suffix == ".journal":
            source = f"tail_{number}"
            connection.register(source, _rows_table(*file.rows()))
        but = f" AND step NOT IN ({', '.join(map(str, doubled.tolist()))})" if len(doubled) else ""
        return (
            f"SELECT hash, step, {recorded.session} AS session, {recorded.rank} AS rank FROM {source} "
            f"WHERE step <= {self._limits[recorded.session]}{but}"
        )


def _as_table(steps: StepTable) -> Any:
    import pyarrow as pa

    tokens = pa.array(steps.tokens, mask=steps.tokens == UNKNOWN)
    epoch = pa.array(steps.epoch, mask=np.isnan(steps.epoch))
    return pa.table({"step": steps.step, "rows": steps.rows, "tokens": tokens, "epoch": epoch})


def _rows_table(hashes: Hashes, steps: Ints) -> Any:
    import pyarrow as pa

    found = pa.array([entry.tobytes() for entry in hashes], pa.binary(HASH_BYTES))
    return pa.table({"hash": found, "step": pa.array(steps, pa.int32())})
