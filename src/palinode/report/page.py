"""A report as one self-contained HTML file: no network, opens from disk, safe with any text in it.

Nothing from the data can run. Texts are escaped by jinja2 and in pictures by `drawing`, and a content
security policy lets only the page's own script run, by its digest, and nothing load.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from palinode.progress import plain
from palinode.report.content import GridCell
from palinode.report.pictures import NARROW, WIDTH, drawing
from palinode.report.reports import report_sections
from palinode.report.words import model_label


def html_report(content: Mapping[str, Any]) -> str:
    """Return the page for the content of a report (`report_content`)."""
    from jinja2 import Environment
    from markupsafe import Markup

    sections = report_sections(content)
    first = next(place for place, part in enumerate(sections) if part.bar)
    assets = files("palinode.report").joinpath("assets")
    style, script, template = (
        assets.joinpath(name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js", "page.html.jinja")
    )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_readable)
    environment.filters |= {
        "kind": lambda block: type(block).__name__,
        "cell": _cell,
        "model": model_label,
        "drawn": lambda figure, width: Markup(drawing([figure], width=width)),
    }
    return environment.from_string(template).render(
        content=content,
        opening=sections[:first],
        sections=sections[first:],
        style=Markup(style),
        script=Markup(script),
        policy=content_policy(script),
        widths={"wide": WIDTH, "narrow": NARROW},
    )


def _cell(cell: GridCell | str) -> GridCell:
    return GridCell(cell) if isinstance(cell, str) else cell


def _readable(value: Any) -> Any:
    """Return what a page shows of a value: of texts, no marks that steer a terminal or hide themselves."""
    return plain(value) if type(value) is str else value


def content_policy(script: str) -> str:
    """Return a policy under which only this script runs and nothing is loaded."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
