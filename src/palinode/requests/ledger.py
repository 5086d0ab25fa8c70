"""The ledger: events about erasure requests, in one SQLite file that only grows; and what they come to.

    hash_n = SHA-256 of (number, time, user, version, kind, request, before, after, facts, hash_{n-1})

An event is there when `append` has returned: one transaction, written through to the disk. A change to an
event of the past shows in its hash, and a chain that was cut short shows against any hash it once had. What
stands is not kept beside the events but told by them:

    received → located → carried out → served          a request; withdrawn, it is to restore → withdrawn
             made → audited → approved → published     a model of all requests that were open when it was made

The model made last is the candidate; the one published last is served, before the first the target. No torch.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from palinode.errors import LedgerError, told_as, unwritable
from palinode.version import __version__

NAME = "ledger.sqlite"
START = ""
"""What stands before the first event."""

LAYOUTS = (
    (
        "CREATE TABLE events (number INTEGER PRIMARY KEY, time TEXT NOT NULL, user TEXT NOT NULL, "
        "version TEXT NOT NULL, kind TEXT NOT NULL, request TEXT NOT NULL, before TEXT NOT NULL, "
        "after TEXT NOT NULL, facts TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL UNIQUE) STRICT",
        "CREATE TRIGGER never_changed BEFORE UPDATE ON events "
        "BEGIN SELECT raise(ABORT, 'events are never changed'); END",
        "CREATE TRIGGER never_removed BEFORE DELETE ON events "
        "BEGIN SELECT raise(ABORT, 'events are never removed'); END",
    ),
)
"""What brings a ledger from each layout to the next; an older one is brought up to date by writing."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    number: int
    """Counted from 1."""
    time: str
    """ISO 8601, UTC."""
    user: str
    """Who was logged in, or who was named."""
    version: str
    """Of Palinode."""
    kind: str
    request: str
    """The request's id; empty where it is about all of them."""
    before: str
    """Fingerprint of the model that stood before; empty where no model changed."""
    after: str
    facts: Mapping[str, Any]
    previous: str
    """Hash of the event before."""
    hash: str

    @property
    def own_hash(self) -> str:
        """The hash that it should have."""
        content = [*astuple(self)[:-1]]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


COLUMNS = [field.name for field in fields(Event)]

Decide = Callable[[Sequence[Event]], Mapping[str, Any] | None]
"""Looks at all events so far and returns the event's own values, or None where nothing is to be written."""


class Ledger:
    """The events of one folder."""

    def __init__(self, folder: Path, *, user: str | None = None) -> None:
        self.path = Path(folder).expanduser() / NAME
        self.user = user

    def create(self) -> None:
        """Make the file, or bring an older one up to date."""
        with self._writing():
            pass

    def append(self, decide: Decide | Mapping[str, Any]) -> Event | None:
        """Add an event, or the one that `decide` returns with no other process in between; return it."""
        with self._writing() as connection:
            events = _chained(connection, self.path)
            values = decide(events) if callable(decide) else decide
            if values is None:
                return None
            event = Event(
                number=len(events) + 1,
                time=datetime.now(UTC).isoformat(timespec="milliseconds"),
                user=self.user or getpass.getuser(),
                version=__version__,
                **{"request": "", "before": "", "after": "", "facts": {}, **values},
                previous=events[-1].hash if events else START,
                hash="",
            )
            event = replace(event, hash=event.own_hash)
            facts = json.dumps(event.facts, sort_keys=True, ensure_ascii=False, allow_nan=False)
            marks = ", ".join(f":{name}" for name in COLUMNS)
            connection.execute(f"INSERT INTO events VALUES ({marks})", {**asdict(event), "facts": facts})
            return event

    def events(self) -> list[Event]:
        """Return all events, their chain checked; raises LedgerError where it is missing or broken."""
        self._be_there()
        try:
            with closing(self._connect("ro")) as connection:
                return _chained(connection, self.path)
        except sqlite3.OperationalError as error:
            if os.access(self.path.parent, os.W_OK):
                raise self._damaged(error) from None
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None
        return self._events_of_copy()

    def _events_of_copy(self) -> list[Event]:
        """Read where nothing can be written beside the file: what SQLite keeps there belongs to it."""
        with tempfile.TemporaryDirectory() as folder:
            for path in self.path.parent.glob(f"{NAME}*"):
                if not path.name.endswith("-shm"):
                    shutil.copyfile(path, Path(folder) / path.name)
            try:
                with closing(sqlite3.connect(Path(folder) / NAME)) as connection:
                    return _chained(connection, self.path)
            except sqlite3.DatabaseError as error:
                raise self._damaged(error) from None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Give a transaction of our own, written through to the disk when it ends well."""
        self._be_there(only_folder=True)
        try:
            with closing(self._connect("rwc")) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("BEGIN IMMEDIATE")
                try:
                    _bring_up_to_date(connection, self.path)
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
        except sqlite3.OperationalError as error:
            raise unwritable(self.path, error) from None
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None

    def _connect(self, mode: str) -> sqlite3.Connection:
        place = f"{self.path.resolve().as_uri()}?mode={mode}"
        # where another process is writing, this one waits a minute for it
        return sqlite3.connect(place, uri=True, timeout=60.0, isolation_level=None)

    def _be_there(self, *, only_folder: bool = False) -> None:
        if not (self.path.parent if only_folder else self.path).exists():
            raise LedgerError(
                f"there is no ledger in {self.path.parent}; make one with palinode requests init, or name "
                "another folder with --ledger"
            )

    def _damaged(self, error: Exception) -> LedgerError:
        return LedgerError(f"{self.path} cannot be read ({error}); put a copy of it in its place")


def _bring_up_to_date(connection: sqlite3.Connection, path: Path) -> None:
    """Go from the file's layout to ours, within the transaction."""
    layout = _layout(connection, path)
    for number, statements in enumerate(LAYOUTS[layout:], start=layout + 1):
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {number}")


def _layout(connection: sqlite3.Connection, path: Path) -> int:
    layout: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if layout > len(LAYOUTS):
        raise LedgerError(
            f"{path} has layout {layout}, and this version of Palinode knows {len(LAYOUTS)}; use a newer one"
        )
    return layout


def _chained(connection: sqlite3.Connection, path: Path) -> list[Event]:
    """Return the events of a connection; raises LedgerError for the first that is not what was written."""
    if _layout(connection, path) == 0:
        return []
    rows = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM events ORDER BY number").fetchall()
    with told_as(LedgerError, f"the ledger {path} was changed: the facts of an event are no JSON"):
        events = [
            Event(**{**dict(zip(COLUMNS, row, strict=True)), "facts": json.loads(row[8])}) for row in rows
        ]
    if broken := first_broken(events):
        raise LedgerError(
            f"the ledger {path} was changed: event {broken} is not what was written; put a copy from before "
            "the change in its place"
        )
    return events


def first_broken(events: Sequence[Event]) -> int | None:
    """Return the place, counted from 1, of the first event that does not follow from those before it."""
    previous = START
    for number, event in enumerate(events, start=1):
        if (event.number, event.previous, event.hash) != (number, previous, event.own_hash):
            return number
        previous = event.hash
    return None


WHOLE = ""
"""In place of a request's id: all requests of a model together."""


@dataclass(slots=True)
class Request:
    """One request to erase rows."""

    id: str
    reference: str
    """What the owner knows it by: a ticket, a case, whoever asked."""
    received: date
    due: date
    rows: int
    hashes: tuple[str, ...]
    """Salted hashes of its rows, in the order of the file."""
    location: str
    """Where the owner keeps the rows."""
    located: Mapping[str, Any] | None = None
    """The base that `locate` found for it, and why."""
    withdrawn: bool = False


@dataclass(slots=True)
class Model:
    """A model that was made for a set of requests."""

    requests: tuple[str, ...]
    folder: str
    """Below the ledger's folder, or where the target is."""
    fingerprint: str
    verdict: Mapping[str, Any]
    scores: Mapping[str, Any] = field(default_factory=dict)
    """Answer probability of each request's rows: of the target, and of this model."""
    audits: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the last audit said, by request, and of all rows together."""
    approved_by: list[str] = field(default_factory=list)
    set: str = ""
    """Key of the set of requests: the name of its list, its models and its audits."""
    base: str | None = None
    """Where its vector starts."""


@dataclass(slots=True)
class Standing:
    """What the events come to."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    """How requests are carried out: a recipe but for the forget rows and the output."""
    policy: Mapping[str, Any] = field(default_factory=dict)
    target: str = ""
    """The target's fingerprint."""
    requests: dict[str, Request] = field(default_factory=dict)
    models: list[Model] = field(default_factory=list)
    """Those that were candidates, in order."""
    served: Model | None = None
    """None: the target itself."""
    head: str = ""
    """Hash of the last event."""

    @property
    def candidate(self) -> Model | None:
        """The model made last."""
        return self.models[-1] if self.models else None

    @property
    def open(self) -> list[Request]:
        """The requests that were not withdrawn."""
        return [request for request in self.requests.values() if not request.withdrawn]

    @property
    def carried(self) -> list[str]:
        """Ids of the open requests that the candidate stands for."""
        made = self.candidate.requests if self.candidate else ()
        return [request.id for request in self.open if request.id in made]

    @property
    def outdated(self) -> bool:
        """Whether the candidate stands for a request that was withdrawn meanwhile."""
        return self.candidate is not None and set(self.carried) != set(self.candidate.requests)

    @property
    def erased(self) -> list[str]:
        """Ids of the requests that the served model stands for."""
        return [*self.served.requests] if self.served else []

    def waits(self, request: Request) -> bool:
        """Tell whether the served model is not yet what a request asks for, or its withdrawal."""
        return request.withdrawn == (request.id in self.erased)

    def state(self, request: Request) -> str:
        """Return how far a request is, in words."""
        if request.withdrawn:
            return "to restore" if request.id in self.erased else "withdrawn"
        if request.id in self.erased:
            return "served"
        if request.id in self.carried:
            return "carried out"
        return "located" if request.located else "received"

    def made_for(self, name: str) -> Model | None:
        """Return the model that a request's state speaks of: the served, or the one made last for it."""
        if name in self.erased:
            return self.served
        return next((model for model in reversed(self.models) if name in model.requests), None)

    def verdict(self, request: Request) -> Mapping[str, Any] | None:
        """Return the last verdict on a request: of its own audit, or else of the model made for it."""
        model = self.made_for(request.id)
        return (model.audits.get(request.id) or model.verdict) if model else None


def standing(events: Iterable[Event]) -> Standing:
    """Return what stands after these events."""
    now = Standing()
    for event in events:
        _follow(now, event)
        now.head = event.hash
    return now


def _follow(now: Standing, event: Event) -> None:
    """Change what stands as an event of this kind does."""
    name, facts = event.request, event.facts
    days = {day: date.fromisoformat(facts[day]) for day in ("received", "due") if day in facts}
    about = [model for model in now.models if model.fingerprint == event.after]
    match event.kind:
        case "configured":
            now.recipe, now.policy, now.target = facts["recipe"], facts["policy"], facts["target"]
        case "added":
            now.requests[name] = Request(name, **{**facts, **days, "hashes": tuple(facts["hashes"])})
        case "rows moved" | "changed":
            now.requests[name] = replace(now.requests[name], **{**facts, **days})
        case "located":
            now.requests[name].located = facts
        case "carried out":
            made = Model(fingerprint=event.after, **{**facts, "requests": tuple(facts["requests"])})
            if about:  # the very same weights: what was measured of them holds, what was agreed to does not
                made.audits, made.verdict = dict(about[-1].audits), about[-1].verdict
            now.models.append(made)
        case "audited":
            for model in about:
                model.audits[name] = facts
                model.verdict = facts if name == WHOLE else model.verdict
        case "approved":
            for model in about:
                model.approved_by.append(facts["by"])
        case "published":
            now.served = about[-1]
        case "withdrawn":
            now.requests[name].withdrawn = True
        case other:
            raise ValueError(other)
