"""Finding rows in an exposure log.

What is damaged is left out and named in a note; the rest is used. Step s belongs to the last session that
began before s. Of the sessions before it, everything after their common limit, the least start of a later
session, is superseded: training went back and did it again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

import numpy as np
import numpy.typing as npt

from palinode.data.examples import Example
from palinode.errors import DataError
from palinode.history.duplicates import HASH_BYTES, Hashes, as_hashes, row_hash, sort_keys
from palinode.history.exposures import (
    STEP_COLUMNS,
    UNKNOWN,
    Ints,
    LogHeader,
    Session,
    StepTable,
    check_same,
    read_about,
    read_header,
    read_journal,
    read_sessions,
    rows_of,
    salt_check,
    step_table,
)
from palinode.records import packaged_table
from palinode.weights.tensors import cores

NO_LIMIT = np.iinfo(np.int64).max
KINDS = (".journal", ".parquet")
SHOWN = 4
"""Stretches of steps that a sentence names."""
WORKERS = min(8, cores())
SAYS: Mapping[str, str] = packaged_table("history/warnings.toml")["log"]
"""What is lost, doubled, missing or superseded."""


def _none() -> Ints:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class LogFile:
    """A segment or a journal: what it says it holds, and what of it counts."""

    path: Path
    name: str
    """How it is named in notes: its place in the log's folder."""
    session: int
    rank: int
    table: StepTable
    """All its steps."""
    doubled: Ints = field(default_factory=_none)
    """Steps that an earlier file of its process has."""
    limit: int = int(NO_LIMIT)
    """The last step of its session that no later session supersedes."""

    def counts(self, steps: Ints) -> npt.NDArray[np.bool_]:
        """Return which of these steps count here."""
        return (steps <= self.limit) & ~np.isin(steps, self.doubled)

    def rows(self, keys: npt.NDArray[np.uint64] | None = None) -> tuple[Hashes, Ints]:
        """Return hashes and steps that count: all, or those with one of the sorted keys."""
        if self.path.suffix == ".parquet":
            found, steps = rows_of(self.path, keys)
        else:
            tail = read_journal(self.path)
            found, steps = tail.hashes, tail.steps
        if keys is not None:
            own = sort_keys(found)
            kept = keys[np.searchsorted(keys, own).clip(max=len(keys) - 1)] == own
            found, steps = found[kept], steps[kept]
        counted = self.counts(steps)
        return found[counted], steps[counted]


# The files of a log


def find_files(
    folder: Path, header: LogHeader, sessions: Sequence[Session]
) -> tuple[list[LogFile], list[str]]:
    """Return the files of a log in the order of session, process and time, and notes of damage."""
    found = [path for path in sorted(folder.glob("session-*/rank-*/*")) if path.suffix in KINDS]
    paths = {path.with_suffix(""): path for path in found}  # a sealed segment, not the journal it was
    with ThreadPoolExecutor(WORKERS) as pool:
        opened = list(pool.map(lambda path: _open(path, folder, header), paths.values()))
    notes = [note for _, note in opened if note]
    files = [file for file, _ in opened if file]
    limits = {session.number: _limit(session.number, sessions) for session in sessions}
    stray = [file for file in files if file.session not in limits]
    notes += [SAYS["no_session"].format(file=file.name, session=file.session) for file in stray]
    files = [replace(file, limit=limits[file.session]) for file in files if file.session in limits]
    return _without_overlaps(files, notes), notes


def _limit(number: int, sessions: Sequence[Session]) -> int:
    """Return the last step up to a session of this number that no later session supersedes."""
    return min((later.start for later in sessions if later.number > number), default=int(NO_LIMIT))


def _open(path: Path, folder: Path, header: LogHeader) -> tuple[LogFile | None, str | None]:
    """Return a file, and a sentence about what of it is lost; raise DataError when it is foreign."""
    if not path.exists():
        path = path.with_suffix(".parquet")  # it has been sealed meanwhile
    place = path.relative_to(folder).as_posix()
    note = None
    try:
        if path.suffix == ".journal":
            tail = read_journal(path)
            about, table = tail.about, tail.table
            if tail.lost:
                last = f"after step {int(table.step[-1]):,}" if len(table) else "at its first step"
                note = SAYS["cut_off"].format(file=place, last=last, lost=tail.lost)
        else:
            about, table = read_about(path)
        session, rank = int(about["session"]["number"]), int(about["rank"])
    except (DataError, OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{path} ") if isinstance(error, DataError) else f"({error})"
        return None, f"Lost: {place} {reason}; its steps are not in what is found."
    for name in ("run", "data", "tokenizer", "salt_check"):
        if about.get(name) != getattr(header, name):
            raise DataError(
                f"{place} in {folder} is of another training than its log.json (they differ in {name}); "
                "take the file away"
            )
    return LogFile(path, place, session, rank, table), note


# What of a log counts, and what is missing


def _without_overlaps(files: Sequence[LogFile], notes: list[str]) -> list[LogFile]:
    """Return the files with their doubled steps, and note these."""
    known: dict[tuple[int, int], list[Ints]] = defaultdict(list)
    found = []
    for file in files:
        own, before = file.table.step, known[file.session, file.rank]
        again = np.zeros(len(own), np.bool_)
        for steps in before:
            if len(steps) and len(own) and steps[-1] >= own[0]:
                again |= np.isin(own, steps)
        before.append(own)
        found.append(replace(file, doubled=own[again]))
        if again.any():
            notes.append(SAYS["overlaps"].format(file=file.name, steps=stretches(own[again])))
    return found


def _counted(files: Sequence[LogFile]) -> StepTable:
    """Return the steps that count, with rows and tokens summed over processes; sorted, each once."""
    tables = [file.table[file.counts(file.table.step)] for file in files]
    whole = np.concatenate([step_table([]), *tables])
    steps, place = np.unique(whole["step"], return_inverse=True)
    found = np.zeros(len(steps), STEP_COLUMNS).view(np.recarray)
    found.step = steps
    np.add.at(found.rows, place, whole["rows"])
    np.add.at(found.tokens, place, np.maximum(whole["tokens"], 0))
    found.tokens[np.unique(place[whole["tokens"] == UNKNOWN])] = UNKNOWN
    found.epoch[place] = whole["epoch"]
    return found


def _by_process(files: Sequence[LogFile], session: Session) -> list[Ints]:
    """Return the steps that each process of a session has recorded, sorted."""
    parts = [[_none()] for _ in range(session.world_size)]
    for file in files:
        if file.session == session.number and 0 <= file.rank < session.world_size:
            parts[file.rank].append(file.table.step)
    return [np.unique(np.concatenate(own)) for own in parts]


def _gaps(files: Sequence[LogFile], sessions: Sequence[Session]) -> Iterator[str]:
    """Yield a sentence for what was superseded, and for each process's missing steps."""
    for session in sessions:
        limit = _limit(session.number, sessions)
        recorded = [file.table.step for file in files if file.session == session.number]
        past = np.unique(np.concatenate([_none(), *recorded]))
        past = past[past > limit]
        if len(past):
            yield SAYS["went_back"].format(step=limit, session=session.number, steps=stretches(past))
    begin = min((session.start for session in sessions), default=0)
    if begin:
        yield SAYS["begins_late"].format(step=begin)
    for session in sessions:
        own = _by_process(files, session)
        seen = np.unique(np.concatenate(own))
        limit = _limit(session.number, sessions)
        end = limit if limit != NO_LIMIT else max([session.start, *seen[-1:].tolist()])
        seen = seen[(seen > session.start) & (seen <= end)]
        edges = np.concatenate([[session.start], seen, [end + 1]])  # a gap may be far longer than the log
        holes = np.flatnonzero(np.diff(edges) > 1)
        if len(holes):
            missing = _in_words(edges[holes] + 1, edges[holes + 1] - 1)
            yield SAYS["gap"].format(steps=missing, session=session.number)
        for rank, steps in enumerate(own):
            rest = np.setdiff1d(seen, steps, assume_unique=True)
            if len(rest):
                yield SAYS["process_lacks"].format(rank=rank, session=session.number, steps=stretches(rest))


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


# Finding


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
        self._files, self._notes = find_files(folder, header, self.sessions)
        self._notes += _gaps(self._files, self.sessions)
        self._damaged: set[str] = set()
        self.steps = _counted(self._files)
        """The steps that count, in their order, with rows and tokens over all processes."""
        complete = self.complete
        broken = complete != np.arange(1, len(complete) + 1)
        whole = int(np.argmax(broken)) if broken.any() else len(complete)
        unknown = np.flatnonzero(self.steps.tokens == UNKNOWN)[:1].tolist()
        self._tokens = np.cumsum(self.steps.tokens)[: min([whole, *unknown])]
        """After each step up to the first that is missing, or whose tokens were not all counted."""

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
        files = [file for file in self._files if file.name not in self._damaged]
        found = [_none()]
        for session in self.sessions:
            steps = reduce(np.intersect1d, _by_process(files, session))
            limit = _limit(session.number, self.sessions)
            found.append(steps[(steps > session.start) & (steps <= limit)])
        return np.unique(np.concatenate(found))

    def find(self, wanted: Sequence[str | Example | bytes] | Hashes, *, salt: bytes = b"") -> list[Exposure]:
        """Return all exposures of some rows, sorted by row, then step.

        Rows are texts, examples or their hashes. Raises DataError where the log is salted and `salt` is
        not the one it was written with.
        """
        if self.header.salt_check != salt_check(salt):
            if not self.header.salted:
                raise DataError(f"the log in {self.folder} is not salted; ask it without a salt")
            what = "another salt was given" if salt else "none was given"
            raise DataError(
                f"the log in {self.folder} is salted and {what}; give the salt it was written with"
            )
        rows: dict[bytes, list[int]] = defaultdict(list)
        for position, entry in enumerate(wanted):
            given = isinstance(entry, bytes | np.ndarray)
            rows[bytes(entry) if given else row_hash(entry, salt=salt)].append(position)
        keys = np.unique(sort_keys(as_hashes(list(rows))))
        if not len(keys):
            return []
        with ThreadPoolExecutor(WORKERS) as pool:
            parts = list(pool.map(lambda file: self._rows(file, keys), self._files))
        hits = Counter(
            (position, int(step))
            for hashes, steps in parts
            for digest, step in zip(hashes, steps, strict=True)
            for position in rows.get(digest.tobytes(), ())
        )
        return [
            Exposure(row, step, times, self.tokens_at(step)) for (row, step), times in sorted(hits.items())
        ]

    def at(self, step: int) -> Hashes:
        """Return the hashes of the whole batch of a step, sorted; none for a step that is not in the log."""
        parts = [np.empty((0, HASH_BYTES), np.uint8)]
        for file in self._files:
            if step in file.table.step and file.counts(np.array([step])).all():
                found, steps = self._rows(file)
                parts.append(found[steps == step])
        whole = np.concatenate(parts)
        return whole[np.lexsort(whole.T[::-1])]

    def tokens_at(self, step: int) -> int | None:
        """Return the tokens trained on up to the end of a step, None where they were not all counted."""
        if not step:
            return 0
        return int(self._tokens[step - 1]) if 0 < step <= len(self._tokens) else None

    def _rows(self, file: LogFile, keys: npt.NDArray[np.uint64] | None = None) -> tuple[Hashes, Ints]:
        """Read rows; where the file turns out to be damaged, note it and go on without."""
        try:
            return file.rows(keys)
        except (DataError, OSError) as error:
            note = SAYS["damaged"].format(file=file.name, error=error)
            if note not in self._notes:
                self._notes.append(note)
            self._damaged.add(file.name)
            return np.empty((0, HASH_BYTES), np.uint8), _none()
