"""Sorting an exposure log for finding: sealed segments in, one sorted run out; the segments stay.

A run holds the live rows of all segments that no run has yet, cut by the first bits of the hash into
parts of about `PART_ROWS` rows and sorted in each. A part is a slice out of every segment, so that
memory is bounded by a part and each row is read about once. A killed compaction goes on with the
parts that are there. Finding m rows then reads at most m row groups, however long the log is.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palinode.errors import DataError
from palinode.history.coverage import find_overlaps, limits
from palinode.history.duplicates import HASH_BYTES, Hashes
from palinode.history.reading import LogFile, find_files, rows_within
from palinode.history.segments import (
    FORMAT_VERSION,
    Ints,
    StepTable,
    sync_folder,
    write_parquet,
    write_segment,
)
from palinode.history.sessions import Session, read_header, read_sessions
from palinode.progress import Listener, NullListener
from palinode.records import beside, read_json, write_json

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
