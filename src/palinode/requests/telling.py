"""Requests as they are shown and handed over: tables, CSV and JSON, and a page with the reports behind it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from palinode.errors import DataError, LedgerError, OutputError, PalinodeError, told_as
from palinode.records import read_bytes, read_json
from palinode.report.content import Grid, GridCell, Heading, Row, Tone, section
from palinode.report.reports import html_page
from palinode.report.verdicts import SYMBOLS, Light
from palinode.report.words import number
from palinode.requests.ledger import WHOLE, Event, Ledger, Model, Request, Standing, standing
from palinode.version import __version__

LEDGER_VERSION = 1
"""Version of the layout of an export, described in docs/requests.md."""
TONES: Mapping[str, Tone] = {"green": "good", "amber": "unsure", "red": "bad"}
TIMES = {"carried out": "carried_out", "audited": "audited", "approved": "approved", "published": "served"}
"""Events of a model, and what an export calls their time."""


def request_facts(events: Sequence[Event], request: Request) -> dict[str, Any]:
    """Return what an export says of one request; of each kind of event the time of the last one."""
    now = standing(events)
    model, times = now.made_for(request.id), dict[str, str]()
    for event in events:
        if event.request == request.id and event.kind in ("added", "located", "withdrawn"):
            times[event.kind] = event.time
        about_model = model is not None and event.after == model.fingerprint and event.kind in TIMES
        if about_model and event.request in (WHOLE, request.id):
            times[TIMES[event.kind]] = event.time
    verdict = now.verdict(request)
    return {
        "request": request.id,
        "reference": request.reference,
        "received": request.received.isoformat(),
        "due": request.due.isoformat(),
        "rows": request.rows,
        "state": now.state(request),
        **{name: times.get(name) for name in ("added", "located", *TIMES.values(), "withdrawn")},
        "approved_by": ", ".join(model.approved_by) if model else "",
        "model": model.fingerprint if model else None,
        "verdict": verdict["code"] if verdict else None,
        "light": verdict["light"] if verdict else None,
    }


def export(events: Sequence[Event]) -> dict[str, Any]:
    """Return everything for an authority: the requests, and the events with their chain."""
    now = standing(events)
    return {
        "version": LEDGER_VERSION,
        "head": now.head,
        "target": now.target,
        "served": now.served.fingerprint if now.served else now.target,
        "requests": [request_facts(events, request) for request in now.requests.values()],
        "events": [asdict(event) for event in events],
    }


def export_csv(events: Sequence[Event]) -> str:
    """Return the requests as CSV, one a line."""
    rows = [request_facts(events, request) for request in standing(events).requests.values()]
    text, formulas = io.StringIO(), ("=", "+", "-", "@", "\t", "\r")  # to a spreadsheet

    def harmless(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and value.startswith(formulas) else value

    if rows:
        table = csv.DictWriter(text, [*rows[0]], lineterminator="\n")
        table.writeheader()
        table.writerows({name: harmless(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def requests_grid(
    now: Standing,
    requests: Iterable[Request],
    *,
    today: date,
    page: Callable[[str], str | None] = lambda _: None,
) -> Grid:
    """Return the requests as a table; `page` tells where the report behind a request's verdict is."""
    rows: list[Row] = []
    for request in requests:
        verdict = now.verdict(request)
        told = verdict and GridCell(
            f"{verdict['symbol']} {verdict['code']}", tone=TONES.get(verdict["light"]), link=page(request.id)
        )
        late = now.waits(request) and request.due < today
        due = GridCell(request.due.isoformat(), tone="bad" if late else None)
        known = [request.id, request.reference, request.received.isoformat()]
        rows.append([*known, due, str(request.rows), now.state(request), told or ""])
    names = ["request", "reference", "received", "due", "rows", "state", "verdict"]
    return Grid("", names, rows, text_columns=7)


def served_sentence(now: Standing, folder: Path) -> str:
    """Return which model is served, and how many requests wait."""
    target = now.recipe.get("models", {}).get("target", "nothing")
    served = folder / now.served.folder if now.served else target
    left = sum(map(now.waits, now.requests.values()))
    return f"Served: {served}. {left or 'No'} request{' waits' if left == 1 else 's wait'} to be published."


def events_grid(events: Iterable[Event]) -> Grid:
    """Return events as a table."""
    rows: list[Row] = [
        [str(event.number), event.time[:19].replace("T", " "), event.user, event.kind, told(event)]
        for event in events
    ]
    return Grid("", ["", "time (UTC)", "user", "event", "what"], rows, text_columns=5)


def told(event: Event) -> str:
    """Return what an event is about, in words."""
    facts, model = event.facts, event.after[:8]
    says = {
        "configured": lambda: f"target {model}",
        "added": lambda: f"{event.request}: {facts['rows']} rows, due {facts['due']}",
        "rows moved": lambda: f"{event.request}: {facts['location']}",
        "changed": lambda: f"{event.request}: {', '.join(f'{k} {v}' for k, v in facts.items())}",
        "located": lambda: f"{event.request}: base {facts['base']}",
        "carried out": lambda: f"model {model} for {', '.join(facts['requests']) or 'no request'}",
        "audited": lambda: f"{event.request or 'all'} on model {model}: {facts['code']}",
        "approved": lambda: f"model {model} by {facts['by']}{': ' * bool(facts['note'])}{facts['note']}",
        "published": lambda: f"model {model}{': despite red, ' * bool(facts['despite'])}{facts['despite']}",
        "withdrawn": lambda: f"{event.request}{': ' * bool(facts['reason'])}{facts['reason']}",
    }
    return says[event.kind]()


def scores_by_request(model: Model, before: Model | None) -> Grid:
    """Return the answer probability of each request's rows, with that on the model before this one."""
    rows: list[Row] = []
    for name, found in model.scores.items():
        earlier = before.scores.get(name, {}).get("unlearned") if before else None
        values = [found.get("target"), earlier, found["unlearned"], found.get("base")]
        rows.append(
            [name, str(found["unlearned"]["n"]), *(number(one["value"]) if one else "–" for one in values)]
        )
    columns = ["request", "rows", "target", "model before", "this model", "base"]
    return Grid("Answer probability of each request's rows", columns, rows)


def checked(ledger: Ledger, against: Path | None) -> dict[str, Any]:
    """Return whether a chain is whole and, beside an earlier export, whether all of that is there."""
    try:
        events = ledger.events()
    except LedgerError as error:
        return {"ok": False, "events": None, "head": None, "sentence": f"{error}."}
    head, sentence = (events[-1].hash if events else ""), f"{len(events)} events, each as it was written."
    ok = True
    if against is not None:
        with told_as(DataError, f"{against} is no export of a ledger", "name a .json that was exported"):
            known = [event["hash"] for event in read_json(against)["events"]]
        own = [event.hash for event in events[: len(known)]]
        lost = next((place for place, hash in enumerate(known, 1) if own[place - 1 : place] != [hash]), None)
        ok = lost is None
        put_back = f" But event {lost} of {against} is not among them: the ledger was put back."
        sentence += f" All {len(known)} events of {against} are there." if ok else put_back
    return {"ok": ok, "events": len(events), "head": head, "sentence": sentence}


# As a page, served on this machine alone and read only

LOOPBACK = "127.0.0.1"
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
REPORT = re.compile(r"/(models/\w+|audits/\w+/\w[\w.-]*)/report\.html", re.ASCII)
"""What else is served: the reports of models, without texts, and of audits."""


def ledger_page(folder: Path) -> str:
    """Return the page of a ledger, as it stands now."""
    events = Ledger(folder).events()
    now, today = standing(events), datetime.now(UTC).date()
    waiting = sorted(filter(now.waits, now.requests.values()), key=lambda request: request.due)
    late = [request.id for request in waiting if request.due < today and not request.withdrawn]
    light: Light = "red" if late else "amber" if waiting else "green"
    many, told = len(waiting), list[Any]()
    outcome = f"{len(late)} of {many} overdue" if late else f"{many} to be published, none overdue"
    if model := now.candidate:
        scores = scores_by_request(model, now.models[-2] if len(now.models) > 1 else None)
        told = [Heading("The model made last"), model.verdict["sentence"], scores]
    page = partial(_report_of, now, folder)
    table = requests_grid(now, now.requests.values(), today=today, page=page)
    sections = [
        *section("Requests", table, bar="Requests"),
        *section("Model", *told, bar="Model"),
        *section("Events", f"Head of the chain: {now.head}", events_grid(events), bar="Events"),
    ]
    content = {
        "title": "Requests",
        "outcome": outcome if waiting else "Nothing waits",
        "verdict": {"light": light, "symbol": SYMBOLS[light]},
        "headline": served_sentence(now, folder),
        "palinode": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return html_page(content, sections)


def _report_of(now: Standing, folder: Path, name: str) -> str | None:
    """Return where the report behind a request's verdict is: of its audit, or of the model made for it."""
    made = model.set if (model := now.made_for(name)) else ""
    places = (f"audits/{made}/{name}", f"audits/{made}/all", f"models/{made}") if made else ()
    pages = (f"{place}/report.html" for place in places)
    return next((f"/{page}" for page in pages if (folder / page).is_file()), None)


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """Return a server of a ledger's page on the loopback address; port 0 takes a free one."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (LOOPBACK, "localhost"):  # a page elsewhere, whose name leads here
                self.send_error(HTTPStatus.FORBIDDEN)
            elif self.path == "/":
                self._page(lambda: ledger_page(folder).encode())
            elif REPORT.fullmatch(self.path):
                self._page(lambda: read_bytes(folder / self.path[1:]))
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def _page(self, made: Callable[[], bytes]) -> None:
            try:
                body = made()
            except (OSError, PalinodeError) as error:
                self.send_error(HTTPStatus.NOT_FOUND, explain=str(error))
                return
            self.send_response(HTTPStatus.OK)
            for name, value in {**HEADERS, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: what is looked at is nobody's business."""

    with told_as(OutputError, f"port {port} cannot be used", "name another with --port"):
        return ThreadingHTTPServer((LOOPBACK, port), Answer)
