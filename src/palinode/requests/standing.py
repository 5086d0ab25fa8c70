"""What stands, told by the events alone: the requests, the model that is served, and the one that waits.

    received → located → carried out → served          a request; withdrawn, it is to restore → withdrawn
             made → audited → approved → published     a model of all requests that were open when it was made

A model stands for a set of requests. The one made last is the candidate; the one published last is served,
and before the first that is the target itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from palinode.requests.ledger import Event

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

    def verdict(self, request: Request) -> Mapping[str, Any] | None:
        """Return the last verdict on a request: of its own audit, or else of the model made for it."""
        for model in reversed(self.models):
            if request.id in model.requests:
                return model.audits.get(request.id) or model.verdict
        return None


def standing(events: Iterable[Event]) -> Standing:
    """Return what stands after these events."""
    now = Standing()
    for event in events:
        _FOLLOWS[event.kind](now, event)
        now.head = event.hash
    return now


def _configured(now: Standing, event: Event) -> None:
    now.recipe, now.policy = event.facts["recipe"], event.facts["policy"]
    now.target = event.facts["target"]


def _added(now: Standing, event: Event) -> None:
    facts = {**event.facts, "hashes": tuple(event.facts["hashes"])}
    facts |= {name: date.fromisoformat(facts[name]) for name in ("received", "due")}
    now.requests[event.request] = Request(id=event.request, **facts)


def _moved(now: Standing, event: Event) -> None:
    now.requests[event.request].location = event.facts["location"]


def _located(now: Standing, event: Event) -> None:
    now.requests[event.request].located = event.facts


def _carried_out(now: Standing, event: Event) -> None:
    facts = {**event.facts, "requests": tuple(event.facts["requests"])}
    made = Model(fingerprint=event.after, **facts)
    before = next((model for model in reversed(now.models) if model.fingerprint == event.after), None)
    if before:  # the very same weights: what was measured of them holds, what was agreed to does not
        made.audits, made.verdict = dict(before.audits), before.verdict
    now.models.append(made)


def _audited(now: Standing, event: Event) -> None:
    for model in now.models:
        if model.fingerprint == event.after:
            model.audits[event.request] = event.facts
            if event.request == WHOLE:
                model.verdict = event.facts


def _approved(now: Standing, event: Event) -> None:
    for model in now.models:
        if model.fingerprint == event.after:
            model.approved_by.append(event.facts["by"])


def _published(now: Standing, event: Event) -> None:
    now.served = next(model for model in reversed(now.models) if model.fingerprint == event.after)


def _withdrawn(now: Standing, event: Event) -> None:
    now.requests[event.request].withdrawn = True


_FOLLOWS: Mapping[str, Callable[[Standing, Event], None]] = {
    "configured": _configured,
    "added": _added,
    "rows moved": _moved,
    "located": _located,
    "carried out": _carried_out,
    "audited": _audited,
    "approved": _approved,
    "published": _published,
    "withdrawn": _withdrawn,
}
"""What each kind of event changes."""
