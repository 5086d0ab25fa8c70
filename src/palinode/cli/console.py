"""What the terminal shows while work goes on: progress bars to stderr, results to stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from palinode.progress import Advance, Listener, Silence

SECONDS_BETWEEN_LINES = 30
"""Where there is no terminal, a long task says this often how far it is."""


class Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        """Return the rate of a task, with its unit."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "")


class Terminal:
    """A listener that shows one bar a task on a terminal, and one line a task elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        """Show a task while it runs; leave one line when it is done."""
        started = time.monotonic()
        if self.console.is_terminal:
            with self._bars() as bars:
                task = bars.add_task(label, total=total, unit=unit)
                yield lambda amount: bars.advance(task, amount)
        else:
            yield _Lines(self, label, total, unit).advance
        self.say(f"{label}: {total:,} {unit} in {time.monotonic() - started:.1f} s")

    def _bars(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )


class _Lines:
    """Progress where bars make no sense: a line every half minute."""

    def __init__(self, terminal: Terminal, label: str, total: int, unit: str) -> None:
        self.terminal = terminal
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self.started = self.spoken = time.monotonic()

    def advance(self, amount: int) -> None:
        """Count work done, and speak now and then."""
        self.done += amount
        now = time.monotonic()
        if now - self.spoken < SECONDS_BETWEEN_LINES or not 0 < self.done < self.total:
            return
        self.spoken = now
        rate = self.done / (now - self.started)
        left = (self.total - self.done) / rate
        self.terminal.say(
            f"{self.label}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.1f} {self.unit}/s, "
            f"about {left:,.0f} s left"
        )


def listener(*, quiet: bool) -> Listener:
    """Return the listener for a command."""
    return Silence() if quiet else Terminal()


def out() -> Console:
    """Return the console for results."""
    return Console(highlight=False)


def warn(text: str) -> None:
    """Print a note to stderr, in one line."""
    Console(stderr=True, highlight=False).print(f"Note: {text}", markup=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """Print a result as strict JSON on standard output."""
    print(json.dumps(content, indent=2, allow_nan=False))
