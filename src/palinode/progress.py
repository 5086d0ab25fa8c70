"""How long work tells what it is doing, without knowing who listens.

A step opens a task with a label and a total, and calls the function it gets with what it has done
since; the points of its curves it hands to whoever records them. The command line shows bars, `--tracker`
keeps curves; tests and library users hear nothing unless they ask.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Protocol, runtime_checkable

JOINER = re.compile("(?<=[^\\x00-\\x7f])[\\u200c\\u200d](?=[^\\x00-\\x7f])")
"""What stands inside words of some scripts, and inside emoji, and is no ruse there."""

Advance = Callable[[int], None]
"""Called with the amount of work done since the last call."""

Figures = Mapping[str, float]
"""What was measured at one point of a curve, by name."""


def plain(text: object) -> str:
    """Return a text from outside as it may be shown, on a terminal, in Markdown or on a page.

    What would steer a terminal, turn the direction of reading, or not be seen at all is spelt out, as in
    \\x1b and \\u202e; line ends, tabs and blanks of all kinds stay.
    """
    words = str(text)
    if words.isprintable():
        return words
    joiners = {match.start() for match in JOINER.finditer(words)}
    return "".join(
        sign if sign.isprintable() or sign in "\n\t" or place in joiners else _spelt(sign)
        for place, sign in enumerate(words)
    )


def _spelt(sign: str) -> str:
    blank = unicodedata.category(sign) == "Zs"
    return " " if blank else sign.encode("unicode_escape").decode("ascii")


@contextmanager
def hushed() -> Iterator[None]:
    """Keep what libraries print and log, on either stream, from the user."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


class Listener(Protocol):
    """Whoever wants to know how the work is getting on."""

    def say(self, text: str) -> None:
        """Take one line of information."""

    def task(self, label: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Open a task of `total` units; the function returned inside takes progress."""


@runtime_checkable
class Recorder(Protocol):
    """A listener that keeps curves as well."""

    def record(self, series: str, step: int, figures: Figures) -> None:
        """Take one point of a curve; steps of a series count up from 1."""


def record(listener: Listener, series: str, step: int, figures: Figures) -> None:
    """Hand one point of a curve to a listener that keeps curves; any other hears nothing of it."""
    if isinstance(listener, Recorder):
        listener.record(series, step, figures)


class NullListener:
    """A listener that shows nothing."""

    def say(self, text: str) -> None:
        """Drop the line."""

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Advance]:  # noqa: ARG002
        """Give a function that does nothing."""
        yield lambda _amount: None


class Relay:
    """A listener that hands everything on to another."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def say(self, text: str) -> None:
        """Hand a line on."""
        self.listener.say(text)

    def task(self, label: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Hand a task on."""
        return self.listener.task(label, total, unit)

    def record(self, series: str, step: int, figures: Figures) -> None:
        """Hand a point of a curve on."""
        record(self.listener, series, step, figures)


def rate_text(rate: float, unit: str) -> str:
    """Return a rate in words, the slow ones as time for each unit.

    >>> rate_text(1234.5, "tokens"), rate_text(2.5, "rows"), rate_text(0.05, "points")
    ('1,234 tokens/s', '2.5 rows/s', '20 s for each of the points')
    """
    if rate >= 10:
        return f"{rate:,.0f} {unit}/s"
    if rate >= 1:
        return f"{rate:.1f} {unit}/s"
    return f"{1 / rate:,.0f} s for each of the {unit}" if rate < 0.1 else f"{rate:.2f} {unit}/s"


def duration_text(seconds: float) -> str:
    """Return a time in words, rounded as one would say it.

    >>> duration_text(42.3), duration_text(300), duration_text(9000)
    ('42 s', '5 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size_text(count: int) -> str:
    """Return a number of bytes in words.

    >>> size_text(1200), size_text(737_600_000), size_text(13_800_000_000)
    ('1.2 kB', '737.6 MB', '13.8 GB')
    """
    unit, name = next((one for one in ((1e9, "GB"), (1e6, "MB")) if count >= one[0]), (1e3, "kB"))
    return f"{count / unit:,.1f} {name}"
