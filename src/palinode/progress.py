"""How long work tells what it is doing, without knowing who listens.

A step opens a task with a label and a total, and calls the function it gets with what it has done
since. The command line shows bars; tests and library users hear nothing unless they ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Called with the amount of work done since the last call."""


class Listener(Protocol):
    """Whoever wants to know how the work is getting on."""

    def say(self, text: str) -> None:
        """Take one line of information."""

    def task(self, label: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Open a task of `total` units; the function returned inside takes progress."""


class Silence:
    """A listener that shows nothing."""

    def say(self, text: str) -> None:
        """Drop the line."""

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Advance]:  # noqa: ARG002
        """Give a function that does nothing."""
        yield lambda _amount: None
