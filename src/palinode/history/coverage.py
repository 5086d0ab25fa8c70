"""Which steps of which process a log holds: gaps, overlaps and what later sessions supersede.

Step s belongs to the last session that began before s. Of the sessions before it, everything after
their common limit, the least start of a later session, is superseded: training went back and did it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from palinode.history.segments import UNKNOWN, Ints, StepTable
from palinode.history.sessions import Session

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
