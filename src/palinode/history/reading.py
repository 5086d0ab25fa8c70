"""The files of an exposure log as they are found on disk: sealed segments, open tails and sorted runs.

What is damaged is left out and named in a note; the rest is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from palinode.errors import DataError
from palinode.history.coverage import Recorded
from palinode.history.duplicates import Hashes, sort_keys
from palinode.history.segments import (
    FORMAT_VERSION,
    Ints,
    StepTable,
    open_parquet,
    read_about,
    read_journal,
    rows_of,
)
from palinode.history.sessions import LogHeader
from palinode.records import read_json
from palinode.weights.arithmetic import cores

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
