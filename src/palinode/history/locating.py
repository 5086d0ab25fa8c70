"""Where a forget set stands in a training: first and all exposures, and the last clean checkpoint.

Log and order say at which steps a row was in a batch; behaviour says from which checkpoint on it is
known. A checkpoint is clean when it has been through no step with a forget row or a near-copy of one. Where
behaviour sees the rows known earlier than log and order do, the earlier checkpoint is taken and the
disagreement is said: a paraphrase leaves no trace in a log.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from palinode.data.examples import Example
from palinode.errors import DataError, told_as
from palinode.history.duplicates import (
    Duplicate,
    find_duplicates,
    fingerprint_rows,
    fingerprint_tokenizer,
    hashes,
)
from palinode.history.exposures import Ints, read_header, salt_check
from palinode.history.onset import Onset, check_control, find_onset
from palinode.history.orders import Order, first_step, open_palinode, read_order
from palinode.history.reader import ExposureReader, stretches
from palinode.history.series import CheckpointSeries
from palinode.progress import Listener, NullListener
from palinode.records import packaged_table, read_bytes
from palinode.settings import LocateSettings

VERSION = 1
"""Version of the layout of a location's record."""
WARNINGS: Mapping[str, str] = packaged_table("history/warnings.toml")["location"]
"""What to know of a location; `names` are the kinds of evidence that count steps."""


@dataclass(frozen=True, slots=True)
class RowsSeen:
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
    seen: tuple[RowsSeen, ...]
    """All known exposures, earliest first."""
    copies: tuple[Duplicate, ...]
    """Equal and similar texts in the corpus."""

    @property
    def first(self) -> int | None:
        """The first step at which it, or a near-copy, was seen; None where no exposure is known."""
        return self.seen[0].step if self.seen else None


@dataclass(frozen=True, slots=True)
class CheckpointState:
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
class CheckpointChoice:
    """A checkpoint that can serve as the base, and why."""

    place: int
    """Position in the series."""
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
    checkpoints: tuple[CheckpointState, ...]
    recommended: CheckpointChoice | None
    """The last clean checkpoint; None where no checkpoint is clean."""
    next_best: CheckpointChoice | None
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
        record = asdict(self)
        checkpoints = record.pop("checkpoints")
        return {"version": VERSION, "rows": record.pop("rows"), "rungs": checkpoints, **record}


def known_alternatives() -> tuple[Mapping[str, str], ...]:
    """Return what can be done when no checkpoint is clean: its cost, what is known of it, and the source."""
    return tuple(packaged_table("history/alternatives.toml")["alternative"])


@dataclass
class Judgement:
    """From what is known of rows and checkpoints to the checkpoint to take."""

    series: CheckpointSeries
    rows: tuple[RowHistory, ...]
    onset: Onset | None
    log: ExposureReader | None
    order: Order | None
    target_step: int | None
    warnings: list[str]

    def __post_init__(self) -> None:
        log, order, rows = self.log, self.order, self.rows
        self.steps = [checkpoint.step for checkpoint in self.series.checkpoints]
        self.counted = tuple(name for name, given in (("log", log), ("order", order)) if given is not None)
        self.names = " and ".join(self.counted)
        self.evidence = (*self.counted, *(("behaviour",) if self.onset else ()))
        firsts = [row.first for row in rows if row.first is not None]
        self.first = min(firsts, default=None)
        self.last = max((seen.step for row in rows for seen in row.seen), default=None)
        self.unseen = len(rows) - len(firsts)
        logged = log.complete if log is not None else np.empty(0, np.int64)
        ordered = np.arange(first_step(order), order.steps + 1) if order is not None else logged[:0]
        self.recorded: Ints = np.union1d(logged, ordered)
        """The steps that the log or the order holds, sorted."""

    def location(self) -> Location:
        """Return the whole answer."""
        recommended, next_best = self._choices()
        if self.target_step is None:
            self._warn("target_unknown")
        return Location(
            rows=self.rows,
            checkpoints=tuple(self._state(place) for place in range(len(self.series))),
            recommended=recommended,
            next_best=next_best,
            first=self.first,
            last=self.last,
            target_step=self.target_step,
            first_to_target=self._distance(self.first, self.target_step),
            last_to_target=self._distance(self.last, self.target_step),
            onset=self.onset,
            alternatives=known_alternatives() if recommended is None else (),
            evidence=self.evidence,
            warnings=tuple(dict.fromkeys(self.warnings)),
        )

    def _warn(self, name: str, **facts: object) -> None:
        self.warnings.append(WARNINGS[name].format(names=self.names, **facts))

    def _choices(self) -> tuple[CheckpointChoice | None, CheckpointChoice | None]:
        """Return the recommended checkpoint and the next best.

        The last clean place by each kind of evidence is -1 where none is clean, None where nothing was found.
        """
        counted = behaved = None
        if self.first is not None:
            before = self.series.last_before(self.first)
            counted = -1 if before is None else before
        by_count = counted
        if self.onset is not None and self.onset.state != "never":
            behaved = -1 if self.onset.clean is None else self.onset.clean
        self._warn_of_rows()
        if counted is None and behaved is None:
            return self._unseen_everywhere()
        if behaved is None and counted is not None and counted >= 0:
            counted = self._within_record(counted)
        limit, evidence = self._combine(counted, behaved)
        if limit < 0:
            if behaved is not None or by_count in (None, -1):
                self._warn("none_clean")
            return None, self._least_contaminated(evidence)
        recommended = self._choice(limit, evidence, clean=True)
        if counted is not None and counted > limit and not len(self._unrecorded(counted)):
            return recommended, self._choice(counted, self.counted, clean=True)
        return recommended, self._choice(limit - 1, evidence, clean=True) if limit else None

    def _combine(self, counted: int | None, behaved: int | None) -> tuple[int, tuple[str, ...]]:
        """Return the last clean place on all evidence, and the kinds that it rests on."""
        if behaved is None:
            if self.onset is not None:
                self._warn("never_known")
            assert counted is not None
            return counted, self.counted
        if counted is None:
            self.first = self._exposed_step()
            if self.counted:
                self._warn("known_all_the_same")
            return behaved, ("behaviour",)
        missing = self._unrecorded(counted) if counted >= 0 else self.recorded[:0]
        if len(missing) and behaved >= 0:  # behaviour speaks for the steps that are missing
            place = min(counted, behaved)
            alone = bool(len(self._unrecorded(place)))
            name = "by_behaviour_alone" if alone else "known_soon"
            self._warn(name, missing=stretches(missing), step=self.steps[place])
            return place, ("behaviour",) if alone else (*self.counted, "behaviour")
        if len(missing):
            counted = self._within_record(counted)
        if behaved == counted:
            return counted, (*self.counted, "behaviour")
        if 0 <= behaved < counted:
            self._warn("known_earlier", step=self._exposed_step())
            return behaved, ("behaviour",)
        if behaved > counted:
            self._warn("known_later", step=self.steps[behaved])
        else:
            self._warn("known_from_the_start")
        return counted, self.counted

    def _within_record(self, place: int) -> int:
        """Return the last place up to this one all of whose steps are in the log or order, -1 for none."""
        missing = self._unrecorded(place)
        if not len(missing):
            return place
        whole = [below for below in range(place) if not len(self._unrecorded(below))]
        name = "not_recorded" if whole else "never_recorded"
        self._warn(name, step=self.steps[place], missing=stretches(missing))
        return whole[-1] if whole else -1

    def _unrecorded(self, place: int) -> Ints:
        """Return the steps up to a checkpoint that neither log nor order holds."""
        steps = np.arange(1, self.steps[place] + 1)
        if len(self.recorded) >= len(steps) and self.recorded[: len(steps)][-1:] == steps[-1:]:
            return steps[:0]
        return np.setdiff1d(steps, self.recorded, assume_unique=True)

    def _exposed_step(self) -> int:
        return self.steps[self.onset.exposed if self.onset and self.onset.exposed is not None else 0]

    def _warn_of_rows(self) -> None:
        if not self.counted:
            if unknown := sum(bool(row.copies) and not row.seen for row in self.rows):
                self._warn("copies", rows=unknown)
            return
        missing = self._unrecorded(len(self.series) - 1)
        if len(missing):
            self._warn("steps_lack", missing=stretches(missing))
        if 0 < self.unseen < len(self.rows):
            self._warn("rows_lack", rows=self.unseen, every=len(self.rows))

    def _unseen_everywhere(self) -> tuple[CheckpointChoice | None, CheckpointChoice | None]:
        """Return the latest checkpoint: no evidence says that the rows were seen at all."""
        if self.counted:
            self._warn("holds_none")
        self._warn("no_evidence")
        target, last = self.target_step, len(self.steps) - 1
        place = last if target is None else self.series.last_before(target) or 0
        if self.counted and not self.onset:
            place = self._within_record(place)
        if place < 0:
            return None, self._least_contaminated(self.evidence)
        return self._choice(place, self.evidence, clean=True), None

    def _least_contaminated(self, evidence: tuple[str, ...]) -> CheckpointChoice:
        """Return the checkpoint that has seen the fewest forget rows, least often, the latest of those."""

        def contamination(place: int) -> tuple[int, int, int]:
            step = self.steps[place]
            times = sum(seen.step <= step for row in self.rows for seen in row.seen)
            return self._seen_by(step) or 0, times, -place if self.counted else place

        fewest = min(range(len(self.series)), key=contamination)
        return self._choice(fewest, evidence, clean=False)

    def _choice(self, place: int, evidence: tuple[str, ...], *, clean: bool) -> CheckpointChoice:
        step, certainty = self.steps[place], None
        if evidence == ("behaviour",) and self.onset is not None and clean:
            certainty = self.onset.certainty
        if not clean:
            seen = self._seen_by(step)
            missing = len(self._unrecorded(place)) if seen == 0 else 0
            reason = f"not clean: it has seen {seen} of {len(self.rows)} forget rows"
            if missing:
                reason = f"no exposure known, but the {self.names} lacks {missing:,} of the steps up to it"
            elif not seen:
                reason = "not clean: it knows the forget rows"
        elif self.first is None:
            reason = "no evidence of any exposure"
        else:
            names = {"log": "the exposure log", "order": "the rebuilt order", "behaviour": "behaviour"}
            *others, last = [names[name] for name in evidence]
            told = f"{', '.join(others)} and {last}" if others else last
            reason = f"clean by {told}" + ("" if certainty is None else f", in {certainty:.0%} of resamples")
        location, distance = self.series.checkpoints[place].location, self._distance(step, self.first)
        return CheckpointChoice(place, step, location, clean, evidence, certainty, reason, distance)

    def _seen_by(self, step: int) -> int | None:
        """Return how many forget rows were seen up to a step; None without log and order."""
        if not self.counted:
            return None
        return sum(row.first is not None and row.first <= step for row in self.rows)

    def _state(self, place: int) -> CheckpointState:
        found = self.series.checkpoints[place]
        gap = next((gap for gap in (self.onset.gaps if self.onset else ()) if gap.place == place), None)
        return CheckpointState(
            step=found.step,
            tokens=found.tokens if found.tokens is not None else self._tokens_at(found.step),
            location=found.location,
            seen=self._seen_by(found.step),
            unrecorded=len(self._unrecorded(place)) if self.counted else None,
            gap=gap.values[self.onset.measure][0] if gap and self.onset else None,
            exposed=gap.exposed if gap else None,
        )

    def _distance(self, start: int | None, end: int | None) -> Distance | None:
        if start is None or end is None:
            return None
        before, after = self._tokens_at(start), self._tokens_at(end)
        return Distance(end - start, None if before is None or after is None else after - before)

    def _tokens_at(self, step: int) -> int | None:
        """Return the tokens trained on after a step: as the log counted them, or as the checkpoints tell."""
        counted = None if self.log is None else self.log.tokens_at(step)
        return self.series.tokens_at(step) if counted is None else counted


Corpus = Sequence[Example]
"""The rows that were trained on, in the order in which the data set numbers them."""

Steps = Mapping[int, set[tuple[int, Duplicate | None]]]
"""By position of a forget row: the steps it was in, each with the copy where that was a similar text."""

FINGERPRINT = r"[0-9a-f]{32}"
SAMPLED = 5
"""Steps whose whole batches are compared between log and order."""


def open_order(path: Path) -> tuple[Order, Corpus | None]:
    """Return the order that a file describes, and the data that it numbers where the file names them.

    A TOML file is one of `orders.read_order`; a JSON file is of Palinode's own loop.
    """
    return open_palinode(path) if path.suffix == ".json" else (read_order(path), None)


def open_log(
    folder: Path, *, corpus: Corpus | None = None, series: CheckpointSeries | None = None, salt: bytes = b""
) -> ExposureReader:
    """Return the log in a folder; raise DataError where it was kept while training on other data than these,
    or with another tokenizer than that of the series' checkpoints.

    A log that names its data or tokenizer in words instead of by fingerprint cannot be compared, and
    neither can checkpoints that have no tokenizer of their own here.
    """
    from palinode.models.loading import load_tokenizer

    header = read_header(folder)
    data = tokenizer = None
    if corpus and re.fullmatch(FINGERPRINT, header.data) and header.salt_check == salt_check(salt):
        data = fingerprint_rows(hashes(corpus, salt=salt))
    for found in series.checkpoints if series and re.fullmatch(FINGERPRINT, header.tokenizer) else ():
        if (Path(found.location).expanduser() / "tokenizer.json").is_file():
            tokenizer = fingerprint_tokenizer(load_tokenizer(found.checkpoint))
            break
    return ExposureReader.open(folder, data=data, tokenizer=tokenizer)


def read_salt(path: Path | None) -> bytes:
    """Return the bytes of a log's salt, none without a file; raise DataError where it cannot be read."""
    with told_as(DataError, f"the salt {path} cannot be read", "name the file that holds it"):
        return read_bytes(path) if path else b""


def locate(
    forget: Sequence[Example],
    series: CheckpointSeries,
    *,
    log: ExposureReader | None = None,
    salt: bytes = b"",
    order: Order | None = None,
    corpus: Corpus | None = None,
    control: Sequence[Example] | None = None,
    target_step: int | None = None,
    settings: LocateSettings | None = None,
    listener: Listener | None = None,
) -> Location:
    """Return when the forget rows were seen and which checkpoint to take, on the evidence given.

    `corpus` are the rows that were trained on: the order's numbers point into it, and copies of forget
    rows are looked for in it, equal ones and similar ones (`duplicates`). Behaviour is looked at when
    `control` rows are given. Raises DataError without any evidence, for control rows that are forget rows,
    and for an order that disagrees with the log.
    """
    listener, settings = listener or NullListener(), settings or LocateSettings()
    if log is None and order is None and not control:
        raise DataError(
            "there is nothing to locate the rows by; name an exposure log (--log), a data order (--order) "
            "with its data (--corpus), or control rows (--control)"
        )
    if order is not None and corpus is None:
        raise DataError("an order gives row numbers; name the data that they point into (--corpus)")
    if control:
        check_control(forget, control)
    copies: list[list[Duplicate]] = [[] for _ in forget]
    if corpus:
        for copy in find_duplicates(forget, corpus, threshold=settings.similarity, listener=listener):
            copies[copy.row].append(copy)
    found: dict[str, Steps] = {}
    if log is not None:
        found["log"] = _steps_in_log(log, forget, copies, corpus or (), salt)
    if order is not None:
        found["order"] = _steps_in_order(order, copies, listener)
    if log is not None and order is not None and corpus:
        _check_agreement(log, order, corpus, found, forget, salt)
    warnings = list(series.notes)
    if log is not None:
        if not len(log.steps):
            reason = " ".join(log.notes) or "it is empty"
            raise DataError(f"no step of the log in {log.folder} can be read: {reason}")
        told = log.tokens_at(series.checkpoints[0].step)
        warnings = [*log.notes, *(series.notes if told is None else ())]
    onset = None
    if control:
        onset = find_onset(forget, control, series, settings=settings, listener=listener)
        warnings += onset.notes
        if log is not None and (trained := {entry.row for entry in log.find(control, salt=salt)}):
            known = f"{len(trained)} of {len(control)} control rows were trained on, by the log"
            warnings.append(f"{known}: the evidence from behaviour is weaker than it looks.")
    rows = tuple(
        RowHistory(number, example.place, _seen(number, found), tuple(copies[number]))
        for number, example in enumerate(forget)
    )
    return Judgement(series, rows, onset, log, order, target_step, warnings).location()


def _steps_in_log(
    log: ExposureReader,
    forget: Sequence[Example],
    copies: Sequence[Sequence[Duplicate]],
    corpus: Corpus,
    salt: bytes,
) -> Steps:
    """Return the steps at which the log has each forget row, or a similar text of the corpus."""
    asked: list[tuple[int, Duplicate | None]] = []
    for number, own in enumerate(copies):
        asked += [(number, None), *((number, copy) for copy in own if not copy.exact)]
    texts = [corpus[copy.number] if copy else forget[number] for number, copy in asked]
    found = defaultdict(set)
    for entry in log.find(texts, salt=salt):
        number, copy = asked[entry.row]
        found[number].add((entry.step, copy))
    return found


def _steps_in_order(order: Order, copies: Sequence[Sequence[Duplicate]], listener: Listener) -> Steps:
    """Return the steps at which the order has each forget row, or a similar text, going through all steps."""
    steps = steps_of(order, {copy.number for own in copies for copy in own}, listener=listener)
    return {
        number: {(step, None if copy.exact else copy) for copy in own for step in steps[copy.number]}
        for number, own in enumerate(copies)
    }


def steps_of(order: Order, rows: Iterable[int], *, listener: Listener | None = None) -> dict[int, list[int]]:
    """Return the steps in which each row was, by row, going through the whole order."""
    found: dict[int, list[int]] = {row: [] for row in rows}
    steps = range(first_step(order), order.steps + 1)
    with (listener or NullListener()).task("going through the order", len(steps), "steps") as advance:
        for step in steps:
            for row in sorted(found.keys() & set(order.rows(step))):
                found[row].append(step)
            advance(1)
    return found


def _check_agreement(
    log: ExposureReader,
    order: Order,
    corpus: Corpus,
    found: Mapping[str, Steps],
    forget: Sequence[Example],
    salt: bytes,
) -> None:
    """Raise DataError where log and order disagree, in a step that both have.

    The steps of every forget row are compared (`found`, by name), and the whole batches of a few.
    """
    both = [int(step) for step in log.steps.step if first_step(order) <= step <= order.steps]
    if not both:
        raise DataError(
            f"log and order have no step in common (the order has the steps 1 to {order.steps:,}); are they "
            "of one training?"
        )

    def refuse(what: str, step: int) -> None:
        raise DataError(
            f"log and order disagree on {what} at step {step:,}; are both of this training, and are the "
            "order's data the rows that were trained on?"
        )

    covered = set(both)
    for number, example in enumerate(forget):
        ours, theirs = (
            {(step, copy.place if copy else "") for step, copy in steps.get(number, ()) if step in covered}
            for steps in (found["log"], found["order"])
        )
        if ours != theirs:
            refuse(example.place, min(step for step, _ in ours ^ theirs))
    for step in sorted({both[len(both) * part // SAMPLED] for part in range(SAMPLED)}):
        rebuilt = hashes([corpus[row] for row in order.rows(step)], salt=salt)
        if {entry.tobytes() for entry in rebuilt} != {entry.tobytes() for entry in log.at(step)}:
            refuse("the batch", step)


def _seen(number: int, found: Mapping[str, Steps]) -> tuple[RowsSeen, ...]:
    """Put what log and order know of one row together, earliest first."""
    seen: dict[tuple[int, str], RowsSeen] = {}
    for name, steps in found.items():
        for step, copy in steps.get(number, ()):
            key = (step, copy.place if copy else "")
            before = seen[key].evidence if key in seen else ()
            place, like = (copy.place, copy.similarity) if copy else (None, None)
            seen[key] = RowsSeen(step, (*before, name), place, like)
    return tuple(seen[key] for key in sorted(seen))
