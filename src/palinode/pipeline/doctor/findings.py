"""What the doctor found: one finding for each thing that was looked at, with what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from palinode.errors import PalinodeError

State = Literal["ok", "note", "warn", "fail"]
"""note is neither good nor bad; warn works, but should be looked at; fail will not work."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class DoctorFinding:
    """One thing that was looked at."""

    area: str
    """The part it belongs to: installed, machine, models, pair, rows or run."""
    name: str
    state: State
    text: str
    fix: str | None = None
    """What to do about it."""


@dataclass(slots=True)
class Findings:
    """Findings so far."""

    all: list[DoctorFinding] = field(default_factory=list)

    def say(self, area: str, name: str, state: State, text: str, fix: str | None = None) -> None:
        """Keep a finding."""
        self.all.append(DoctorFinding(area, name, state, text, fix))

    def attempt(self, area: str, name: str, action: Callable[[], Result], *, fix: str) -> Result | None:
        """Return what an action gives; keep its refusal as a failure, with `fix` if it names none."""
        try:
            return action()
        except PalinodeError as error:
            self.say(area, name, "fail", *text_and_fix(str(error), fix))
        except OSError as error:
            self.say(area, name, "fail", f"{error.filename or name}: {error.strerror or error}", fix)
        return None

    @property
    def failures(self) -> int:
        """The number of things that fail."""
        return sum(finding.state == "fail" for finding in self.all)


def text_and_fix(sentence: str, otherwise: str) -> tuple[str, str]:
    """Return what is wrong and what to do, which our errors say after their last semicolon.

    >>> text_and_fix("there is no room; make some", "look at the disk")
    ('there is no room', 'make some')
    """
    text, semicolon, fix = sentence.rpartition("; ")
    return (text, fix) if semicolon else (sentence, otherwise)
