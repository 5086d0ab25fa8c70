"""What is known of a forget set's place in a training: rows, checkpoints, and the one to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from palinode.history.duplicates import Duplicate
from palinode.history.onset import Onset

VERSION = 1
"""Version of the layout of a location's record."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One step at which a row, or a near-copy of it, was in the batch."""

    step: int
    evidence: tuple[str, ...]
    """log, order, or both."""
    copy: str | None = None
    """Where the near-copy stands in the corpus; None for the row itself."""
    similarity: float | None = None


@dataclass(frozen=True, slots=True)
class RowHistory:
    """What is known of one forget row."""

    row: int
    """Position in the forget set."""
    place: str
    """Where it stands, as its source names it."""
    seen: tuple[Seen, ...]
    """All known exposures, earliest first."""
    copies: tuple[Duplicate, ...]
    """Equal and similar texts in the corpus."""

    @property
    def first(self) -> int | None:
        """The first step at which it, or a near-copy, was seen; None where no exposure is known."""
        return self.seen[0].step if self.seen else None


@dataclass(frozen=True, slots=True)
class RungState:
    """What is known of one checkpoint."""

    step: int
    tokens: int | None
    location: str
    seen: int | None
    """Forget rows that it has seen by log or order; None without them."""
    unrecorded: int | None
    """Steps up to it that neither log nor order holds: `seen` is a least number where there are any."""
    gap: float | None
    """How far it knows forget rows better than control rows; None where it was not looked at."""
    exposed: bool | None
    """Whether that gap is beyond noise."""


@dataclass(frozen=True, slots=True)
class Distance:
    """A stretch of training; tokens are None where they are not known."""

    steps: int
    tokens: int | None


@dataclass(frozen=True, slots=True)
class Choice:
    """A checkpoint that can serve as the base, and why."""

    place: int
    """Position in the ladder."""
    step: int
    location: str
    clean: bool
    evidence: tuple[str, ...]
    """Kinds of evidence that it rests on: log, order, behaviour."""
    certainty: float | None
    """Behaviour: share of resamples in which it is clean. None for log and order, which count."""
    reason: str
    to_exposure: Distance | None
    """From the checkpoint to the first exposure."""


@dataclass(frozen=True, slots=True)
class Location:
    """The answer for a forget set."""

    rows: tuple[RowHistory, ...]
    rungs: tuple[RungState, ...]
    recommended: Choice | None
    """The last clean checkpoint; None where no checkpoint is clean."""
    next_best: Choice | None
    first: int | None
    """First step at which any row was seen; by behaviour alone: the first checkpoint that knows them."""
    last: int | None
    """Last step at which any row is known to have been seen."""
    target_step: int | None
    first_to_target: Distance | None
    last_to_target: Distance | None
    onset: Onset | None
    alternatives: tuple[Mapping[str, str], ...]
    """What else can be done, where no checkpoint is clean."""
    evidence: tuple[str, ...]
    """Kinds of evidence that were used."""
    warnings: tuple[str, ...]

    def as_record(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; no text of any row is in it."""
        return {"version": VERSION, **asdict(self)}
