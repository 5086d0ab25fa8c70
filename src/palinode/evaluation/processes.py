"""Work divided over the processes of `accelerate launch` or torchrun, with all of its results in each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(work: Callable[[list[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
    """Return `work(items)`, one result an item, each process having worked on its share of the items.

    Process r of n takes the items r, r + n, r + 2n, …; every process returns all results in order. An
    error in any of them is raised in all, so that none waits for another. With one process this is
    `work(items)`. All processes must call it with the same items, as often as each other.
    """
    count, rank = _group()
    if count < 2:
        return list(work(list(items)))
    from torch import distributed

    own: tuple[Sequence[Result], Exception | None]
    try:
        own = (work(list(items[rank::count])), None)
    except Exception as error:  # raised below, in every process
        own = ((), error)
    shares: list[tuple[Sequence[Result], Exception | None]] = [((), None)] * count
    distributed.all_gather_object(shares, own)
    for _, failure in shares:
        if failure is not None:
            raise failure
    return [shares[place % count][0][place // count] for place in range(len(items))]


def _group() -> tuple[int, int]:
    """Return how many processes there are and which this one is; join the others unless that was done."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 1, 0

    import torch
    from torch import distributed

    if not distributed.is_available():
        return 1, 0
    if not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    return distributed.get_world_size(), distributed.get_rank()
