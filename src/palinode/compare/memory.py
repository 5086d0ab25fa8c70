"""The most memory that a piece of work held: of the device where it has its own, else of the process.

Linux can forget a process's earlier peak; elsewhere no peak of a part can be told.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextlib.contextmanager
def watch_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Give a function that returns the peak since entry in bytes, None where it cannot be told.

    On a CUDA device it is the memory of tensors; on a processor the process's resident memory, weights read
    from mapped files included.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device))
        return
    try:
        _FORGET.write_text("5")  # resets VmHWM, proc(5)
    except OSError:
        yield lambda: None
        return
    yield _resident_peak


def _resident_peak() -> int | None:
    """Return VmHWM of this process, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return None
