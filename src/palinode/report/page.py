"""A report as one self-contained HTML file: no network, opens from disk, safe with any text in it.

Nothing from the data can run. Texts are escaped by jinja2, figures are JSON in a block that browsers do not
run, and a content security policy lets only the page's own scripts run, by their digests, and nothing load.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from palinode.progress import plain
from palinode.report.content import GridCell, Picture
from palinode.report.reports import report_sections
from palinode.report.words import model_label


def html_report(content: Mapping[str, Any]) -> str:
    """Return the page for the content of a report (`report_content`)."""
    from jinja2 import Environment
    from markupsafe import Markup

    sections = report_sections(content)
    drawn = {
        block.name: block.figure
        for part in sections
        for block in part.blocks
        if isinstance(block, Picture) and block.figure
    }
    first = next(place for place, part in enumerate(sections) if part.bar)
    assets = files("palinode.report").joinpath("assets")
    style, script, template = (
        assets.joinpath(name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js", "page.html.jinja")
    )
    plotly = _plotly() if drawn else ""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_readable)
    environment.filters |= {"kind": lambda block: type(block).__name__, "cell": _cell, "model": model_label}
    return environment.from_string(template).render(
        content=content,
        opening=sections[:first],
        sections=sections[first:],
        figures=Markup(safe_json(drawn)),
        style=Markup(style),
        plotly=Markup(plotly),
        script=Markup(script),
        policy=content_policy([code for code in (plotly, script) if code]),
    )


def _cell(cell: GridCell | str) -> GridCell:
    return GridCell(cell) if isinstance(cell, str) else cell


def _readable(value: Any) -> Any:
    """Return what a page shows of a value: of texts, no marks that steer a terminal or hide themselves."""
    return plain(value) if type(value) is str else value


def safe_json(content: Any) -> str:
    """Return strict JSON that may stand in a script block: no "<", no line end of JavaScript's."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def content_policy(scripts: list[str]) -> str:
    """Return a policy under which only these scripts run and nothing is loaded."""
    digests = (hashlib.sha256(code.encode()).digest() for code in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    code: str = get_plotlyjs()
    if "</script" in code.lower():
        raise ValueError("this release of plotly cannot stand in a page: its script holds an end tag")
    return code
