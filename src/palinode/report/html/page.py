"""Put a page together: the template, its style and script, plotly's script, and what they show.

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
from palinode.report.comparison import gap_sentence
from palinode.report.html import comparison, tables
from palinode.report.html.figures import figures
from palinode.report.html.tradeoff import tradeoff_caption
from palinode.report.words import SETS, at, model_label, scale, words

SECTIONS = {
    "demo": ("Demo", "The demo's world"),
    "comparison": ("Methods", "The methods side by side"),
    "scores": ("Scores", "Before, after, yardstick"),
    "tradeoff": ("Trade-off", "Forgetting against keeping"),
    "answers": ("Answers", "Answers side by side"),
    "likelihoods": ("Row by row", "How sure of each right answer"),
    "audit": ("Audit", "Under attack"),
    "vectors": ("Vectors", "Vectors and dose"),
    "cost": ("Training", "Training and cost"),
    "origin": ("Repeat", "How to repeat it"),
}
"""The sections in their order: anchor, name in the bar, heading."""


def html_report(content: Mapping[str, Any]) -> str:
    """Return the page for the content of a report (`report_content`)."""
    from jinja2 import Environment
    from markupsafe import Markup

    drawn = figures(content)
    assets = files("palinode.report.html")
    style, script, template = (
        assets.joinpath(name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js", "page.html.jinja")
    )
    plotly = _plotly() if drawn else ""
    scripts = [code for code in (plotly, script) if code]
    environment = Environment(autoescape=True, trim_blocks=True, finalize=_readable)
    return environment.from_string(template).render(
        **_view(content, drawn),
        figures=Markup(safe_json(drawn)),
        style=Markup(style),
        plotly=Markup(plotly),
        script=Markup(script),
        policy=content_policy(scripts),
    )


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


def _view(content: Mapping[str, Any], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template shows."""
    audit, demo = content.get("audit"), content.get("demo")
    parts: dict[str, Any] = {
        "demo": tables.demo_table(demo) if demo else None,
        "comparison": _comparison(content.get("table")),
        "scores": _score_parts(content),
        "answers": _answer_parts(content),
        "likelihoods": [
            {"name": name, "label": label} for name, label in SETS.items() if f"likelihood-{name}" in drawn
        ],
        "audit": tables.audit_table(audit) if audit else None,
        "vectors": tables.vector_table(content),
        "dose": tables.dose_facts(content),
        "points": tables.point_table(content),
        "sensitivity": tables.sensitivity_table(content),
        "costs": tables.cost_table(content),
        "inputs": tables.input_table(content),
        "settings": tables.setting_table(content),
    }
    there = {
        **parts,
        "tradeoff": "tradeoff" in drawn,
        "answers": parts["answers"] or content.get("answers_elsewhere"),
        "vectors": parts["vectors"] or parts["dose"],
        "cost": parts["costs"],
        "origin": True,
    }
    return {
        **parts,
        "content": content,
        "bar": {anchor: name for anchor, (name, _) in SECTIONS.items() if there[anchor]},
        "sections": {anchor: heading for anchor, (_, heading) in SECTIONS.items()},
        "figure_names": list(drawn),
        "tradeoff_caption": tradeoff_caption(content),
        "alpha": scale(at(content, "scales", "forget")),
        "beta": scale(at(content, "scales", "retain")),
        "labels": {model: model_label(model) for model in _models(content)},
        "memory": _memory(content),
        "versions": _versions(content),
    }


def _score_parts(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "label": label, "table": table, "notes": tables.score_notes(content, name)}
        for name, label in SETS.items()
        if (table := tables.score_table(content, name))
    ]


def _comparison(table: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not table:
        return None
    return {
        "ranking": comparison.ranking_table(table),
        "gap": gap_sentence(table),
        "scores": comparison.contestant_scores(table),
        "costs": comparison.contestant_costs(table),
        "rule": table.get("rule"),
    }


def _answer_parts(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "label": SETS.get(name, words(name)),
            "against": model_label(at(content, "held_against", name) or ""),
            **part,
        }
        for name, part in (content.get("answers") or {}).items()
    ]


def _models(content: Mapping[str, Any]) -> set[str]:
    parts = (content.get("answers") or {}).values()
    return {model for part in parts for case in part["rows"] for model in case["answers"]}


def _memory(content: Mapping[str, Any]) -> str | None:
    peak = at(content, "environment", "peak_memory_bytes")
    return f"{peak / 1e9:.1f} GB" if peak else None


def _versions(content: Mapping[str, Any]) -> dict[str, str]:
    """Return seed, run and versions, what is there of them."""
    known = {
        name: content[name] for name in ("palinode", "seed", "run", "created", "finished") if name in content
    }
    environment = {
        name: value for name, value in content["environment"].items() if name != "peak_memory_bytes"
    }
    return {words(name): str(value) for name, value in {**known, **environment}.items()}
