"""Where a host would wait for a device, as far as a processor can tell: what torch's profiler counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

WAITS = {
    "aten::_local_scalar_dense",  # one number to the host: item(), float(), bool(), if
    "aten::nonzero",  # of which boolean indexing is made: how many are there?
    "aten::masked_select",
    "aten::bincount",
    "aten::_unique2",
}


FUSED = "aten::_fused_adamw_"
"""Reads each tensor's number of steps on a processor; on a GPU that is part of its kernel."""


def waits_of(work: Callable[[], object]) -> Counter[str]:
    """Return how often each kind of waiting occurs in some work."""
    return Counter(event.name for event in _events(work) if event.name in WAITS and not _is_in_fused(event))


def kernels_of(work: Callable[[], object]) -> Counter[str]:
    """Return how often each of torch's operations is called in some work."""
    return Counter(event.name for event in _events(work))


def _events(work: Callable[[], object]) -> Any:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    return profiled.events()


def _is_in_fused(event: Any) -> bool:
    while event := event.cpu_parent:
        if event.name == FUSED:
            return True
    return False


def largest_of(work: Callable[[], object]) -> int:
    """Return the bytes of the largest piece of memory that some work asks for at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    return int(max(event.self_cpu_memory_usage for event in profiled.events()))
