"""What is known of a run, an audit, a comparison or a demo: as plain values, as sections, as a page.

Whoever calls gathers records and outcomes (pipeline/reporting.py); nothing here reads a file. Without
texts the content holds numbers only, so that it may lie beside an unlearned model's weights. A page is one
HTML file that loads nothing. Nothing from the data can run: texts are escaped by jinja2 and in pictures by
`drawing`, and a content security policy lets only the page's own script run, by its digest.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from palinode.progress import plain
from palinode.records import Outcome, dotted, packaged
from palinode.report.audit_report import audit_headline, audit_section
from palinode.report.comparison_report import comparison_sections, ranking_sentences
from palinode.report.content import (
    Code,
    Grid,
    Lights,
    Picture,
    Section,
    Strong,
    as_cell,
    markdown,
    section,
    template,
)
from palinode.report.location_report import location_sections, location_sentences
from palinode.report.pictures import NARROW, WIDTH, drawing, glance_figure
from palinode.report.run_report import CAUTION, headline, marked, run_sections
from palinode.report.verdicts import RunVerdict, audit_verdict, estimate, run_verdict
from palinode.report.words import DASH, SETS, integer, model_label, words

CONTENT_VERSION = 1
"""Version of the layout of report.json, described in docs/report.md."""
AIM = "The aim is to know as much of the first rows as a model that never saw them, and to keep the rest."
MOST_ROWS = 200
"""Rows of a set whose answers a report shows."""
MOST_BYTES = 1_200_000
"""Of a set's texts as HTML, so that a page stays under 8 MB."""
DIGITS = 5
"""Significant digits of a log-probability; a page holds thousands of them."""

Kind = Literal["unlearn", "demo", "audit", "compare", "locate"]
Outcomes = Mapping[str, Mapping[str, Sequence[Outcome]]]
"""Outcomes by model (target, base, unlearned, retrained) and set (forget, retain)."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about a run, an audit, a comparison or a demo."""

    kind: Kind
    record: Mapping[str, Any] = field(default_factory=dict)
    """record.json of the run (of the demo's own unlearning); table.json of a comparison; a location."""
    audit: Mapping[str, Any] | None = None
    """audit.json of an audit of its unlearned model."""
    outcomes: Outcomes = field(default_factory=dict)
    """What each model did on each row."""
    texts: bool = False
    """Whether the report may show prompts and answers."""
    elsewhere: str | None = None
    """Where the report with texts lies, if this is the one without."""
    demo: Mapping[str, Any] | None = None
    """record.json of the demo's folder."""

    @property
    def answers_gone(self) -> bool:
        """Whether there should be answers, and the workspace that held them is gone."""
        return self.kind in ("unlearn", "demo") and not self.outcomes


def report_sections(content: Mapping[str, Any]) -> list[Section]:
    """Return a report in sections; `content` is what `report_content` returns.

    Every report begins with the claims, what was not tested and notes, and ends with how to repeat it.
    """
    builders = {
        "audit": lambda: audit_section(content["audit"]),
        "compare": lambda: comparison_sections(content["table"]),
        "locate": lambda: location_sections(content["location"]),
    }
    names = ("palinode", "seed", "run", "created", "finished")
    versions = {name: content[name] for name in names if name in content} | content["environment"]
    return [
        *section(
            "In short" if content["claims"] else "",
            Picture("glance", "Before, now, and the aim", glance_figure(content), caption=AIM),
            Lights(content["claims"]),
            CAUTION if content["kind"] != "locate" else None,
        ),
        *section("What was not tested", content["untested"]),
        *section("Notes", content["notes"]),
        *builders.get(content["kind"], lambda: run_sections(content))(),
        *section(
            "How to repeat it",
            Code(content["command"]) if content.get("command") else None,
            _inputs(content),
            {words(name): str(value) for name, value in versions.items() if name != "peak_memory_bytes"},
            _settings(content.get("recipe") or content.get("policy") or {}),
            bar="Repeat",
        ),
    ]


def markdown_report(content: Mapping[str, Any]) -> str:
    """Return the whole report as Markdown; text that comes from the user is escaped."""
    first = section("", Strong(marked(content)), content["headline"])
    return markdown(content["title"], [*first, *report_sections(content)])


def report_content(facts: Facts) -> dict[str, Any]:
    """Return everything a report says as plain values, strict JSON."""
    kinds = {"audit": _of_audit, "compare": _of_comparison, "locate": _of_location}
    return {"version": CONTENT_VERSION, "kind": facts.kind, **kinds.get(facts.kind, _of_run)(facts)}


def _of_run(facts: Facts) -> dict[str, Any]:
    record, estimated = facts.record, estimate(facts.record)
    one_more = {"estimate": {"forget": {"answer_probability": estimated}}} if estimated else {}
    return {
        "title": "Demo report" if facts.kind == "demo" else "Unlearning report",
        **_judged(run_verdict(record, facts.audit), record),
        "headline": headline(record),
        "scores": dict(record.get("scores") or {}) | one_more,
        "method": record.get("method"),
        "scales": record.get("scales"),
        "log_probabilities": log_probabilities(facts.outcomes),
        "answers": side_by_side(facts.outcomes) if facts.texts else None,
        "held_against": {label: held_against(label, facts.outcomes) for label in ("forget", "retain")},
        "answers_elsewhere": None if facts.texts else facts.elsewhere,
        "vectors": record.get("vectors"),
        "foretold": record.get("foretold"),
        "dose": record.get("dose"),
        "training": record.get("training") or {},
        "audit": facts.audit,
        "demo": facts.demo,
        **({"influence": record["influence"]} if record.get("influence") else {}),
        **_origin(record),
    }


def _judged(verdict: RunVerdict, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the verdict as every report tells it, with the notes of the record."""
    return {
        "outcome": verdict.sentence,
        "verdict": {key: verdict.as_json()[key] for key in ("code", "light", "symbol", "exit_code")},
        "claims": [claim.as_json() for claim in verdict.claims],
        "untested": list(verdict.untested),
        "notes": [*verdict.remarks, *(record.get("notes") or ())],
    }


def _of_audit(facts: Facts) -> dict[str, Any]:
    audit = facts.audit or {}
    return {
        "title": "Audit report",
        **_judged(audit_verdict(audit), audit),
        "headline": audit_headline(audit),
        "audit": audit,
        **_origin(audit),
    }


def _of_comparison(facts: Facts) -> dict[str, Any]:
    table = facts.record
    first, *others = ranking_sentences(table) or ["No method was through when this was written."]
    contestants = {entry["name"]: entry["set"] for entry in table.get("contestants") or ()}
    setup = {"shared": table.get("shared"), "comparison": table.get("comparison"), "contestants": contestants}
    return {
        "title": "Comparison report",
        "outcome": first,
        "headline": " ".join(others),
        "claims": [],
        "untested": [
            "Other wordings of the same facts, and attacks other than those among the scores.",
            "Settings outside of the points that were tried.",
        ],
        "notes": list(table.get("notes") or ()),
        "table": table,
        **_origin({**table, "models": {}, "data": table.get("rows"), "recipe": setup}),
    }


def _of_location(facts: Facts) -> dict[str, Any]:
    first, *others = location_sentences(facts.record)
    return {
        "title": "When the forget rows were seen",
        "outcome": first,
        "headline": " ".join(others),
        "claims": [],
        "untested": [],
        "notes": facts.record["warnings"],
        "location": facts.record,
        **_origin({}),
    }


# Where a report's numbers come from


def _origin(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells where a report's numbers come from, and how to make them again."""
    names = ("palinode", "run", "created", "finished", "command", "seed", "recipe", "policy")
    return {
        **{name: record.get(name) for name in names if record.get(name) is not None},
        "models": record.get("models") or {},
        "data": {name: fact for name, fact in (record.get("data") or {}).items() if fact},
        "environment": record.get("environment") or {},
    }


def _inputs(content: Mapping[str, Any]) -> Grid:
    """Return where models and rows are from, with whole fingerprints."""
    inputs = {
        **{model_label(name): fact for name, fact in content["models"].items()},
        **{SETS.get(name, words(name)): fact for name, fact in content["data"].items()},
    }
    rows = []
    for name, fact in inputs.items():
        if fact:
            known = (str(fact.get(key) or DASH) for key in ("location", "fingerprint"))
            rows.append([name, *known, integer(fact.get("rows") or fact.get("parameters"))])
    return Grid("Models and data", ["what", "where", "fingerprint", "rows or weights"], rows, text_columns=3)


def _settings(tree: Mapping[str, Any]) -> Grid:
    """Return the recipe (of an audit: the policy) with defaults filled in, one dotted key a row."""
    rows = [
        [key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)]
        for key, value in dotted(tree)
        if value is not None and not isinstance(value, Mapping)
    ]
    head = ["setting", "value"]
    return Grid("Every setting, defaults filled in", head, rows, text_columns=2, folded=True)


# What models answered, side by side, and how likely each right answer was to them


def log_probabilities(outcomes: Outcomes) -> dict[str, dict[str, list[float]]]:
    """Return by set and model the mean log-probability of each row's answer tokens, in nats."""
    return {
        label: {
            model: [_short(value) for outcome in sets[label] if (value := _mean(outcome)) is not None]
            for model, sets in outcomes.items()
            if sets.get(label)
        }
        for label in _labels(outcomes)
    }


def side_by_side(outcomes: Outcomes) -> dict[str, dict[str, Any]]:
    """Return by set: the cases shown, the worst first, and of how many they are.

    A case is bad on the forget set when the unlearned model is far from a model that never saw it, above or
    below; on other sets when it lost much of what the target knew. Long texts are kept whole; what would
    make a page too large to open is left out at the end of the list, and counted.
    """
    shown = {}
    for label in _labels(outcomes):
        cases = _worst_first(outcomes, label)
        total, fitting = 0, list[dict[str, Any]]()
        for case in cases[:MOST_ROWS]:
            texts = (case["prompt"], case["expected"], *(answer or "" for answer in case["answers"].values()))
            total += sum(len(html.escape(text).encode("utf-8", "replace")) for text in texts)
            if fitting and total > MOST_BYTES:
                break
            fitting.append(case)
        shown[label] = {"of": len(cases), "rows": fitting}
    return shown


def held_against(label: str, models: Container[str]) -> str | None:
    """Return the model whose answers the unlearned one's should be like on a set; None without one."""
    goals = ("retrained", "base") if label == "forget" else ("target",)
    return next((name for name in goals if name in models), None)


def _worst_first(outcomes: Outcomes, label: str) -> list[dict[str, Any]]:
    """Return the rows on which the unlearned model was measured, with what each model makes of them."""
    by_model = {
        model: {outcome.row: outcome for outcome in sets[label]}
        for model, sets in outcomes.items()
        if sets.get(label)
    }
    goal = by_model.get(held_against(label, by_model) or "", {})
    cases = list[tuple[float, int, dict[str, Any]]]()  # how well it went; row; what is told of it
    for row, mine in by_model.get("unlearned", {}).items():
        found = {model: rows[row] for model, rows in by_model.items() if row in rows}
        first = next(iter(found.values()))
        now, should = _probability(mine), _probability(goal[row]) if row in goal else None
        difference = None if now is None or should is None else now - should
        case = {
            "row": row,
            "prompt": first.prompt,
            "expected": first.expected,
            "difference": None if difference is None else _short(difference),
            "answers": {name: outcome.generated for name, outcome in found.items()},
            "probabilities": {name: _probability(outcome) for name, outcome in found.items()},
        }
        cases.append((-abs(difference or 0.0) if label == "forget" else difference or 0.0, row, case))
    return [case for *_, case in sorted(cases, key=lambda one: one[:2])]


def _labels(outcomes: Outcomes) -> list[str]:
    return list(dict.fromkeys(label for sets in outcomes.values() for label, found in sets.items() if found))


def _mean(outcome: Outcome) -> float | None:
    return math.fsum(outcome.logprobs) / len(outcome.logprobs) if outcome.logprobs else None


def _probability(outcome: Outcome) -> float | None:
    """Return exp of the mean log-probability of the answer's tokens: the metric answer_probability."""
    mean = _mean(outcome)
    return None if mean is None else _short(math.exp(mean))


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def html_report(content: Mapping[str, Any]) -> str:
    """Return the page for the content of a report (`report_content`)."""
    return html_page(content, report_sections(content))


def html_page(content: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Return a page of these sections; the content has its title, outcome, verdict and headline."""
    from markupsafe import Markup

    first = next(place for place, part in enumerate(sections) if part.bar)
    script = packaged("report/assets/report.js")
    page: str = _page().render(
        content=content,
        opening=sections[:first],
        sections=sections[first:],
        style=Markup(packaged("report/assets/report.css")),
        script=Markup(script),
        policy=content_policy(script),
        widths={"wide": WIDTH, "narrow": NARROW},
    )
    return page


@cache
def _page() -> Any:
    from markupsafe import Markup

    def readable(value: Any) -> Any:  # no marks that steer a terminal or hide themselves
        return plain(value) if type(value) is str else value

    filters = {"cell": as_cell, "drawn": lambda figure, width: Markup(drawing([figure], width=width))}
    return template("page.html.jinja", readable, filters)


def content_policy(script: str) -> str:
    """Return a policy under which only this script runs and nothing is loaded."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
