"""Every byte of a model's tensors, block by block: on all cores, in bounded memory, in any format."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from threading import local
from typing import TypeVar

from palinode.weights.checkpoint import TensorInfo
from palinode.weights.tensors import Files

Result = TypeVar("Result")

BLOCK = 1 << 19
"""Bytes of a block: 512 KiB, so that a thread still has it in its cache when it works on it."""

RUN = 16
"""Blocks of one tensor that a thread is given at a time."""

AHEAD = 4
"""Runs for each thread that wait or are under way, so that the list of what is to do stays short."""


def map_blocks(
    infos: Iterable[TensorInfo],
    work: Callable[[TensorInfo, memoryview], Result],
    *,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[TensorInfo, Result]]:
    """Yield what `work` makes of each block of each tensor, in the order of tensors and blocks.

    A block is BLOCK raw little-endian bytes, the last one of a tensor what is left over; a tensor of size
    zero has none. `work` runs in several threads and must not keep the block, which is overwritten.
    `on_progress` is told, in the caller's thread, the bytes that were done. Raises CheckpointError when a
    file cannot be read or is cut off.
    """
    threads, own = workers or os.cpu_count() or 1, local()

    def equip() -> None:
        own.buffer = bytearray(BLOCK)

    def walk(info: TensorInfo, start: int) -> list[Result]:
        stop = min(start + RUN * BLOCK, info.nbytes)
        return [work(info, _fill(files, info, place, own.buffer)) for place in range(start, stop, BLOCK)]

    with ExitStack() as stack:
        files = stack.enter_context(Files())
        pool = stack.enter_context(
            ThreadPoolExecutor(threads, initializer=equip)
        )  # ends before the files are closed
        runs = ((info, start) for info in infos for start in range(0, info.nbytes, RUN * BLOCK))
        pending: deque[tuple[TensorInfo, int, Future[list[Result]]]] = deque()
        for info, start in islice(runs, AHEAD * threads):
            pending.append((info, start, pool.submit(walk, info, start)))
        while pending:
            info, start, future = pending.popleft()
            results = future.result()
            for following in islice(runs, 1):
                pending.append((*following, pool.submit(walk, *following)))
            if on_progress:
                on_progress(min(RUN * BLOCK, info.nbytes - start))
            for result in results:
                yield info, result


def _fill(files: Files, info: TensorInfo, place: int, buffer: bytearray) -> memoryview:
    """Read the block that starts at byte `place` of a tensor, and return it."""
    block = memoryview(buffer)[: min(BLOCK, info.nbytes - place)]
    info.read(files, place, block)
    return block
