"""A model in slices, and a few threads that work on them. Memory does not depend on the model."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Event, local
from typing import TypeVar

from palinode.weights.checkpoint import Checkpoint, TensorInfo

Result = TypeVar("Result")

SLICE = 1 << 18
"""Elements read, summed and written at a time: 512 KB of bfloat16 from each checkpoint."""

RUN = 16
"""Slices that a thread is given at a time, as handing over has its price too."""

AHEAD = 3
"""Runs handed to each thread ahead of the one whose results are taken."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements [start, start + count) of one tensor of the anchor's layout."""

    info: TensorInfo
    start: int
    count: int
    alone: bool = False
    """Rows of an embedding that only the anchor has: its own values, nothing added."""


def slices(
    checkpoint: Checkpoint, *, size: int = SLICE, shared_rows: Mapping[str, int] | None = None
) -> Iterator[Slice]:
    """Yield the floating-point tensors of a checkpoint in pieces of at most `size` elements.

    `shared_rows` names the tensors of which only so many leading rows take part in sums.
    """
    for info in checkpoint.tensors.values():
        if info.is_float:
            rows = (shared_rows or {}).get(info.name)
            shared = info.size if rows is None else rows * (info.size // info.shape[0])
            for first, last, alone in ((0, shared, False), (shared, info.size, True)):
                for start in range(first, last, size):
                    yield Slice(info, start, min(size, last - start), alone)


# Threads


def cores() -> int:
    """Return the number of processor cores that this process may use; on macOS all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Return how many threads work on slices: one for each core this process may use, up to 16."""
    return min(16, cores())


def per_thread(make: Callable[[], Callable[[Slice], Result]]) -> Callable[[Slice], Result]:
    """Return a function on slices that makes itself anew in every thread it is called from."""
    state = local()

    def work(part: Slice) -> Result:
        if not hasattr(state, "work"):
            state.work = make()
        found: Result = state.work(part)
        return found

    return work


def map_slices(
    parts: Iterable[Slice],
    work: Callable[[Slice], Result],
    *,
    collect: Callable[[Slice, Result], None] | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Call `work` on every slice from a few threads.

    `collect` takes slices and results here, in the order of the slices, so that sums over them do not depend
    on the threads. `on_progress` hears the number of elements done. The first error stops the rest
    and is raised.
    """
    count = workers or default_workers()
    pool = ThreadPoolExecutor(count)
    waiting: deque[tuple[tuple[Slice, ...], Future[list[Result]]]] = deque()
    stopped = Event()

    def walk(run: tuple[Slice, ...]) -> list[Result]:
        return [work(part) for part in run if not stopped.is_set()]

    def take() -> None:
        run, future = waiting.popleft()
        for part, result in zip(run, future.result(), strict=True):
            if collect:
                collect(part, result)
            if on_progress:
                on_progress(part.count)

    try:
        for run in _runs(parts):
            waiting.append((run, pool.submit(walk, run)))
            if len(waiting) > AHEAD * count:
                take()
        while waiting:
            take()
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _runs(parts: Iterable[Slice]) -> Iterator[tuple[Slice, ...]]:
    rest = iter(parts)
    while run := tuple(islice(rest, RUN)):
        yield run
