"""Which steps of which process a log holds: gaps, overlaps and what later sessions supersede.

Step s belongs to the last session that began before s. Of the sessions before it, everything after
their common limit, the least start of a later session, is superseded: training went back and did it again.

The files of an exposure log as they are found on disk: sealed segments, open tails and sorted runs.

What is damaged is left out and named in a note; the rest is used.

Finding rows in an exposure log.

Sorting an exposure log for finding: sealed segments in, one sorted run out; the segments stay.

A run holds the live rows of all segments that no run has yet, cut by the first bits of the hash into
parts of about `PART_ROWS` rows and sorted in each. A part is a slice out of every segment, so that
memory is bounded by a part and each row is read about once. A killed compaction goes on with the
parts that are there. Finding m rows then reads at most m row groups, however long the log is.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from palinode.data.examples import Example
from palinode.errors import DataError
from palinode.history.duplicates import HASH_BYTES, Hashes, as_hashes, row_hash, sort_keys
from palinode.history.exposures import (
    LogHeader,
    Session,
    check_same,
    read_header,
    read_sessions,
    salt_check,
)
from palinode.history.segments import (
    FORMAT_VERSION,
    UNKNOWN,
    Ints,
    StepTable,
    open_parquet,
    read_about,
    read_journal,
    rows_of,
    sync_folder,
    write_parquet,
    write_segment,
)
from palinode.progress import Listener, NullListener
from palinode.records import beside, read_json, write_json
from palinode.weights.arithmetic import cores

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

NO_LIMIT = np.iinfo(np.int64).max
SHOWN = 4
"""Stretches of steps that a sentence names."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one file, or one process in a run, holds of one session."""

    session: int
    rank: int
    table: StepTable
    name: str


def limits(sessions: Sequence[Session]) -> dict[int, int]:
    """Return the last step of each session that no later session supersedes."""
    return {
        session.number: min(
            (later.start for later in sessions if later.number > session.number), default=int(NO_LIMIT)
        )
        for session in sessions
    }


def live_steps(recorded: Sequence[Recorded], sessions: Sequence[Session]) -> StepTable:
    """Return the steps that count, with rows and tokens summed over processes; sorted, each once."""
    allowed = limits(sessions)
    tables = [_up_to(entry.table, allowed[entry.session]) for entry in recorded if entry.session in allowed]
    whole = StepTable.joined(tables)
    steps, place = np.unique(whole.step, return_inverse=True)
    rows, tokens = np.zeros(len(steps), np.int64), np.zeros(len(steps), np.int64)
    np.add.at(rows, place, whole.rows)
    np.add.at(tokens, place, np.maximum(whole.tokens, 0))
    tokens[np.unique(place[whole.tokens == UNKNOWN])] = UNKNOWN
    epochs = np.full(len(steps), np.nan)
    epochs[place] = whole.epoch
    return StepTable(steps, rows, tokens, epochs)


def complete_steps(recorded: Sequence[Recorded], sessions: Sequence[Session]) -> Ints:
    """Return the steps that every process of their session has recorded, sorted."""
    allowed = limits(sessions)
    found = [np.empty(0, np.int64)]
    for session in sessions:
        own: dict[int, list[Ints]] = {rank: [] for rank in range(session.world_size)}
        for entry in recorded:
            if entry.session == session.number and entry.rank in own:
                own[entry.rank].append(entry.table.step)
        steps = _common(
            [np.unique(np.concatenate([*parts, np.empty(0, np.int64)])) for parts in own.values()]
        )
        found.append(steps[(steps > session.start) & (steps <= allowed[session.number])])
    return np.unique(np.concatenate(found))


def find_overlaps(recorded: Sequence[Recorded]) -> tuple[list[Recorded], list[Ints], list[str]]:
    """Return tables without the steps that an earlier file of their process has, those steps, and notes."""
    known: dict[tuple[int, int], list[Ints]] = {}
    kept, doubled, notes = [], [], []
    for entry in recorded:
        before = known.setdefault((entry.session, entry.rank), [])
        again = np.zeros(len(entry.table.step), np.bool_)
        for steps in before:
            if len(steps) and len(entry.table.step) and steps[-1] >= entry.table.step[0]:
                again |= np.isin(entry.table.step, steps)
        before.append(entry.table.step)
        doubled.append(entry.table.step[again])
        kept.append(Recorded(entry.session, entry.rank, _where(entry.table, ~again), entry.name))
        if again.any():
            notes.append(
                f"{entry.name} overlaps an earlier file of its process at {stretches(doubled[-1])}; "
                "these steps are counted once."
            )
    return kept, doubled, notes


def find_gaps(recorded: Sequence[Recorded], sessions: Sequence[Session]) -> list[str]:
    """Return a sentence for each process's missing steps, and for what was superseded."""
    if not sessions:
        return []
    notes = list(_superseded(recorded, sessions))
    allowed = limits(sessions)
    begin = min(session.start for session in sessions)
    if begin:
        notes.append(f"The log begins after step {begin:,}; what was seen before is not in it.")
    by_process: dict[tuple[int, int], list[Ints]] = {}
    for entry in recorded:
        by_process.setdefault((entry.session, entry.rank), []).append(entry.table.step)
    for session in sessions:
        notes += _missing(session, allowed[session.number], by_process)
    return notes


def stretches(steps: Ints) -> str:
    """Return steps in words.

    >>> stretches(np.array([1, 2, 3, 7, 9, 10]))
    'steps 1 to 3, 7, 9 to 10'
    """
    found = np.unique(steps)
    ends = np.flatnonzero(np.diff(found) != 1)
    return _in_words(found[[0, *(ends + 1)]], found[[*ends, len(found) - 1]])


def _in_words(first: Ints, last: Ints) -> str:
    """Return stretches of steps, each from its first to its last, in words."""
    words = [f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in zip(first, last, strict=True)]
    more = f" and {len(words) - SHOWN:,} more stretches" if len(words) > SHOWN else ""
    one = len(first) == 1 and first[0] == last[0]
    return f"{'step' if one else 'steps'} {', '.join(words[:SHOWN])}{more}"


def _missing(session: Session, limit: int, by_process: Mapping[tuple[int, int], list[Ints]]) -> Iterator[str]:
    """Yield what the processes of one session lack of the steps that belong to it."""
    own = {
        rank: np.unique(np.concatenate(by_process.get((session.number, rank), [np.empty(0, np.int64)])))
        for rank in range(session.world_size)
    }
    seen = np.unique(np.concatenate(list(own.values())))
    end = limit if limit != NO_LIMIT else max(int(seen[-1]) if len(seen) else 0, session.start)
    seen = seen[(seen > session.start) & (seen <= end)]
    edges = np.concatenate([[session.start], seen, [end + 1]])  # a gap may be far longer than the log
    holes = np.flatnonzero(np.diff(edges) > 1)
    if len(holes):
        gaps = _in_words(edges[holes] + 1, edges[holes + 1] - 1)
        yield f"Gap: {gaps} of session {session.number} are in no file of the log."
    for rank, steps in own.items():
        rest = np.setdiff1d(seen, steps, assume_unique=True)
        if len(rest):
            yield f"Gap: process {rank} of session {session.number} lacks {stretches(rest)}."


def _superseded(recorded: Sequence[Recorded], sessions: Sequence[Session]) -> Iterator[str]:
    allowed = limits(sessions)
    for session in sessions:
        steps = [entry.table.step for entry in recorded if entry.session == session.number]
        past = np.unique(np.concatenate([*steps, np.empty(0, np.int64)]))
        past = past[past > allowed[session.number]]
        if len(past):
            yield (
                f"Training went back to step {allowed[session.number]:,} after session {session.number}: "
                f"its {stretches(past)} were done again and do not count."
            )


def _common(parts: Sequence[Ints]) -> Ints:
    shared = parts[0]
    for part in parts[1:]:
        shared = np.intersect1d(shared, part, assume_unique=True)
    return shared


def _up_to(table: StepTable, limit: int) -> StepTable:
    return _where(table, table.step <= limit)


def _where(table: StepTable, kept: npt.NDArray[np.bool_]) -> StepTable:
    return StepTable(table.step[kept], table.rows[kept], table.tokens[kept], table.epoch[kept])


T = TypeVar("T")
R = TypeVar("R")

WORKERS = min(8, cores())


@dataclass(frozen=True, slots=True)
class LogFile:
    """One segment or journal, and what it says it holds."""

    path: Path
    recorded: Recorded
    run: str | None = None
    """The sorted run that has its rows too."""

    def rows(self, keys: npt.NDArray[np.uint64] | None = None) -> tuple[Hashes, Ints]:
        """Return hashes and steps, of all rows or where one of these sorted keys may be."""
        if self.path.suffix == ".journal":
            tail = read_journal(self.path)
            return tail.hashes, tail.steps
        return rows_of(self.path, keys)


@dataclass(frozen=True, slots=True)
class Run:
    """The rows of many segments, cut into parts by the first bits of the hash and sorted in each."""

    folder: Path
    bits: int
    last_session: int
    """Sessions up to this one were known: what they supersede is not in it."""
    files: tuple[LogFile, ...]

    def part(self, number: int) -> Path:
        """Return where the rows are whose hash begins with these bits."""
        return self.folder / f"part-{number:05d}.parquet"

    def parts_of(self, keys: npt.NDArray[np.uint64]) -> list[Path]:
        """Return the parts that may hold one of these keys."""
        if not self.bits:
            return [self.part(0)]
        return [self.part(int(number)) for number in np.unique(keys >> np.uint64(64 - self.bits))]


def find_files(folder: Path, header: LogHeader) -> tuple[list[LogFile], list[Run], list[str]]:
    """Return the files of a log in the order of session, process and time; its runs; and notes of damage."""
    notes: list[str] = []
    runs = [run for path in sorted(folder.glob("runs-*/manifest.json")) if (run := _read_run(path, notes))]
    covered = {file.path: file for run in runs for file in run.files}
    paths = sorted(folder.glob("session-*/rank-*/*"))
    sealed = {path for path in paths if path.suffix == ".parquet"} | covered.keys()
    open_tails = [
        path for path in paths if path.suffix == ".journal" and path.with_suffix(".parquet") not in sealed
    ]
    asked = [path for path in sorted([*sealed, *open_tails]) if path not in covered]
    read = dict(zip(asked, in_threads(lambda path: _open(path, folder, header), asked), strict=True))
    files = []
    for path in sorted([*covered, *asked]):
        found = covered.get(path) or read[path]
        if isinstance(found, LogFile):
            files.append(found)
        else:
            notes.append(found)
    notes += [note for path in open_tails if (note := _torn(path, folder))]
    return files, runs, notes


def matching(
    found: Hashes, steps: Ints, keys: npt.NDArray[np.uint64], *, in_order: bool
) -> tuple[Hashes, Ints]:
    """Return the rows whose key is among these sorted ones; `in_order` tells that the rows are sorted."""
    own = sort_keys(found)
    if not in_order:
        kept = np.flatnonzero(np.isin(own, keys))
        return found[kept], steps[kept]
    first, last = np.searchsorted(own, keys, "left"), np.searchsorted(own, keys, "right")
    hit = last > first
    places = [np.arange(a, b) for a, b in zip(first[hit], last[hit], strict=True)]
    kept = np.concatenate(places) if places else np.empty(0, np.int64)
    return found[kept], steps[kept]


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Do the same with every item, a few at a time, and return what came of it in order."""
    given = list(items)
    if len(given) < 2:
        return [work(item) for item in given]
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(work, given))


def place_of(path: Path, folder: Path) -> str:
    """Return how a file of the log is named in notes."""
    return path.relative_to(folder).as_posix()


def _open(path: Path, folder: Path, header: LogHeader) -> LogFile | str:
    """Return a file with its steps, or a sentence about what is lost; raise DataError when it is foreign."""
    if path.suffix == ".journal" and not path.exists():
        path = path.with_suffix(".parquet")  # it has been sealed meanwhile
    try:
        if path.suffix == ".journal":
            tail = read_journal(path)
            about, table = tail.about, tail.table
        else:
            about = read_about(path)
            table = StepTable.from_lists(about["steps"])
        session, rank = int(about["session"]["number"]), int(about["rank"])
    except (DataError, OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{path} ") if isinstance(error, DataError) else f"({error})"
        return f"Lost: {place_of(path, folder)} {reason}; its steps are not in what is found."
    for name in ("run", "data", "tokenizer", "salt_check"):
        if about.get(name) != getattr(header, name):
            raise DataError(
                f"{place_of(path, folder)} in {folder} is of another training than its log.json (they differ "
                f"in {name}); take the file away"
            )
    return LogFile(path, Recorded(session, rank, table, place_of(path, folder)))


def _torn(path: Path, folder: Path) -> str | None:
    """Return a sentence where a journal ends in a damaged record."""
    try:
        tail = read_journal(path)
    except (DataError, OSError):
        return None  # it was said that the whole file is lost
    if not tail.lost:
        return None
    last = f"after step {int(tail.table.step[-1]):,}" if len(tail.table.step) else "at its first step"
    return f"Lost: {place_of(path, folder)} is cut off {last}; {tail.lost:,} bytes behind it cannot be read."


def _read_run(path: Path, notes: list[str]) -> Run | None:
    """Return a run, or note why it is not used; the segments are there without it."""
    folder = path.parent
    log = folder.parent
    try:
        manifest = read_json(path)
        if manifest["version"] > FORMAT_VERSION:
            raise ValueError("it is of a newer format")
        for entry in manifest["files"]:
            source = log / entry["name"]
            if source.exists() and source.stat().st_size != entry["bytes"]:
                raise ValueError(f"{entry['name']} has changed since")
        with open_parquet(folder / "steps.parquet") as steps:
            table = steps.read()
        columns = {name: table[name].to_numpy() for name in ("file", "step", "rows", "tokens", "epoch")}
        return Run(
            folder,
            int(manifest["bits"]),
            int(manifest["last_session"]),
            tuple(
                _covered(log, entry, number, columns, folder)
                for number, entry in enumerate(manifest["files"])
            ),
        )
    except (DataError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        notes.append(f"{folder.name} is not used ({error}); the segments that it was made from are.")
        return None


def _covered(
    log: Path,
    entry: dict[str, object],
    number: int,
    columns: dict[str, npt.NDArray[np.generic]],
    folder: Path,
) -> LogFile:
    """Return a segment that is in a run, from what the run knows of it."""
    begin, end = np.searchsorted(columns["file"], [number, number + 1])
    own = {name: values[begin:end] for name, values in columns.items()}
    table = StepTable(
        own["step"].astype(np.int64),
        own["rows"].astype(np.int64),
        own["tokens"].astype(np.int64),
        own["epoch"].astype(np.float64),
    )
    name = str(entry["name"])
    recorded = Recorded(int(str(entry["session"])), int(str(entry["rank"])), table, name)
    return LogFile(log / name, recorded, folder.name)


def rows_within(file: LogFile, least: int, greatest: int) -> tuple[Hashes, Ints]:
    """Return the rows of a segment whose key lies between two keys, both included."""
    found, steps = rows_of(file.path, between=(least, greatest))
    own = sort_keys(found)
    begin = int(np.searchsorted(own, np.uint64(least), "left"))
    end = int(np.searchsorted(own, np.uint64(greatest), "right"))
    return found[begin:end], steps[begin:end]


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


PART_ROWS = 1 << 21
"""Rows of a part, about 40 MB on disk and 150 MB while it is sorted."""


def compact(
    folder: str | Path, *, part_rows: int = PART_ROWS, listener: Listener | None = None
) -> Path | None:
    """Sort the sealed segments that are in no run yet into a new one; return its folder, None without any.

    May be killed and called again, and may be called while a training writes to the log. Raises DataError
    where a segment is damaged.
    """
    log = Path(folder)
    files, runs, notes = find_files(log, read_header(log))
    lost = [note for note in notes if note.startswith("Lost:") and ".parquet" in note]
    if lost:
        raise DataError(f"{lost[0].removeprefix('Lost: ')} Take the file away before sorting the log.")
    sessions = read_sessions(log)
    _, doubled, _ = find_overlaps([file.recorded for file in files])
    pairs = [(file, steps) for file, steps in zip(files, doubled, strict=True) if _is_new(file)]
    if not pairs:
        return None
    target = log / f"runs-{1 + max((int(run.folder.name[5:]) for run in runs), default=0):04d}"
    rows = sum(int(file.recorded.table.rows.sum()) for file, _ in pairs)
    bits = max(0, int(np.ceil(np.log2(max(1, rows / part_rows)))))
    manifest = {
        "version": FORMAT_VERSION,
        "bits": bits,
        "last_session": max(session.number for session in sessions),
        "rows": rows,
        "files": [_entry(file) for file, _ in pairs],
    }
    partial = _begin(target, manifest)
    with (listener or NullListener()).task("sorting the log", 1 << bits, "parts") as advance:
        for number in range(1 << bits):
            path = partial / f"part-{number:05d}.parquet"
            if not path.exists():
                write_segment(path, *_part(pairs, sessions, number, bits), None)
            advance(1)
    _write_steps(partial / "steps.parquet", [file for file, _ in pairs])
    write_json(partial / "manifest.json", manifest)
    partial.replace(target)
    sync_folder(log)
    return target


def _is_new(file: LogFile) -> bool:
    return file.run is None and file.path.suffix == ".parquet"


def _entry(file: LogFile) -> dict[str, Any]:
    recorded = file.recorded
    size = file.path.stat().st_size
    return {"name": recorded.name, "bytes": size, "session": recorded.session, "rank": recorded.rank}


def _begin(target: Path, manifest: dict[str, Any]) -> Path:
    """Return the folder to fill; parts that an earlier call left count only if it had the same plan."""
    partial = beside(target)
    plan = partial / "plan.json"
    try:
        same = read_json(plan) == manifest
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write_json(plan, manifest)
    return partial


def _part(
    pairs: Sequence[tuple[LogFile, Ints]], sessions: Sequence[Session], number: int, bits: int
) -> tuple[Hashes, Any]:
    """Return the live rows of all segments whose hash begins with these bits."""
    width = 1 << (64 - bits)
    allowed = limits(sessions)
    parts: list[tuple[Hashes, Ints]] = [(np.empty((0, HASH_BYTES), np.uint8), np.empty(0, np.int64))]
    for file, doubled in pairs:
        found, steps = rows_within(file, number * width, (number + 1) * width - 1)
        live = steps <= allowed[file.recorded.session]
        if len(doubled):
            live &= ~np.isin(steps, doubled)
        parts.append((found[live], steps[live]))
    hashes, steps = (np.concatenate(column) for column in zip(*parts, strict=True))
    return hashes, steps.astype(np.int32)


def _write_steps(path: Path, files: Sequence[LogFile]) -> None:
    """Write which steps each segment holds, so that nobody has to open the segments for it."""
    import pyarrow as pa

    tables = [file.recorded.table for file in files]
    whole = StepTable.joined(tables)
    numbers = np.repeat(np.arange(len(tables)), [len(table.step) for table in tables])
    columns = {"file": numbers, "step": whole.step, "rows": whole.rows, "tokens": whole.tokens}
    write_parquet(path, pa.table({**columns, "epoch": whole.epoch}))
