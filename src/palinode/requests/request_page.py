"""The ledger as a page for people: served on this machine alone, read only, with the reports behind it."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from palinode.errors import OutputError, PalinodeError
from palinode.records import read_bytes
from palinode.report.content import Heading, Paragraph, section
from palinode.report.reports import html_page
from palinode.report.verdicts import SYMBOLS, Light
from palinode.requests.ledger import Ledger
from palinode.requests.standing import Standing, standing
from palinode.requests.telling import events_grid, requests_grid, scores_by_request, served_sentence
from palinode.version import __version__

LOOPBACK = "127.0.0.1"
REPORT = re.compile(r"/(models/\w+|audits/\w+/\w[\w.-]*)/report\.html", re.ASCII)
"""What else is served: the reports of models, without texts, and of audits."""


def ledger_page(folder: Path) -> str:
    """Return the page of a ledger, as it stands now."""
    events = Ledger(folder).events()
    now, today = standing(events), datetime.now(UTC).date()
    waiting = sorted(filter(now.waits, now.requests.values()), key=lambda request: request.due)
    late = [request.id for request in waiting if request.due < today and not request.withdrawn]
    light: Light = "red" if late else "amber" if waiting else "green"
    outcome = (
        f"{len(late)} of {len(waiting)} overdue" if late else f"{len(waiting)} to be published, none overdue"
    )
    model = now.candidate
    before = now.models[-2] if len(now.models) > 1 else None
    told = model and [
        Heading("The model made last"),
        Paragraph(model.verdict["sentence"]),
        scores_by_request(model, before),
    ]
    sections = [
        *section(
            "Requests",
            requests_grid(now, now.requests.values(), today=today, page=_report_of(now, folder)),
            bar="Requests",
        ),
        *section("Model", *(told or ()), bar="Model"),
        *section("Events", Paragraph(f"Head of the chain: {now.head}"), events_grid(events), bar="Events"),
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


def _report_of(now: Standing, folder: Path) -> Callable[[str], str | None]:
    """Return where the report behind a request's verdict is: of its audit, or of the model made for it."""

    def page(name: str) -> str | None:
        for model in reversed(now.models):
            if name in model.requests:
                key = Path(model.folder).name
                places = (f"audits/{key}/{name}", f"audits/{key}/all", f"models/{key}")
                return next(
                    (
                        f"/{place}/report.html"
                        for place in places
                        if (folder / place / "report.html").is_file()
                    ),
                    None,
                )
        return None

    return page


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
            for name, value in {
                "Content-Type": "text/html; charset=utf-8",
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "Cross-Origin-Resource-Policy": "same-origin",
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: what is looked at is nobody's business."""

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Answer)
    except OSError as error:
        raise OutputError(
            f"port {port} cannot be used ({error.strerror}); name another with --port"
        ) from None
