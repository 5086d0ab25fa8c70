"""What a report says, as plain values: the page, its Markdown and its JSON are all made of this.

Whoever calls gathers records and outcomes (pipeline/reporting.py); nothing here reads a file. Without
texts the content holds numbers only, so that it may lie beside an unlearned model's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from palinode.report.answers import Outcomes, held_against, log_probabilities, side_by_side
from palinode.report.audit import audit_headline
from palinode.report.comparison import ranking_sentences
from palinode.report.summary import headline
from palinode.report.verdicts import (
    Claim,
    audit_claims,
    claims,
    outcome_sentence,
    untested,
    untested_attacks,
)
from palinode.report.words import at

CONTENT_VERSION = 1
"""Version of the layout of report.json, described in docs/report.md."""

Kind = Literal["unlearn", "demo", "audit", "compare"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about a run, an audit, a comparison or a demo."""

    kind: Kind
    record: Mapping[str, Any] = field(default_factory=dict)
    """record.json of the run (of the demo's own unlearning); table.json of a comparison."""
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


def report_content(facts: Facts) -> dict[str, Any]:
    """Return everything a report says as plain values, strict JSON."""
    if facts.kind in ("audit", "compare"):
        return _of_audit(facts) if facts.kind == "audit" else _of_comparison(facts.record)
    record = facts.record
    found = claims(record, facts.audit)
    return {
        "version": CONTENT_VERSION,
        "kind": facts.kind,
        "title": "Demo report" if facts.kind == "demo" else "Unlearning report",
        "outcome": outcome_sentence(found),
        "headline": headline(record),
        "claims": [claim.as_json() for claim in found],
        "untested": untested(record, facts.audit),
        "notes": list(record.get("notes") or ()),
        "scores": _scores(record),
        "method": record.get("method"),
        "scales": record.get("scales"),
        "log_probabilities": log_probabilities(facts.outcomes),
        "answers": side_by_side(facts.outcomes) if facts.texts else None,
        "held_against": {label: held_against(label, facts.outcomes) for label in ("forget", "retain")},
        "answers_elsewhere": None if facts.texts else facts.elsewhere,
        "vectors": record.get("vectors"),
        "dose": record.get("dose"),
        "training": record.get("training") or {},
        "audit": facts.audit,
        "demo": facts.demo,
        **_origin(record),
    }


def _scores(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of every model, with the estimated yardstick as one more where there is one."""
    estimate = at(record, "scales", "yardstick", "answer_probability")
    scores = dict(record.get("scores") or {})
    return scores | ({"estimate": {"forget": {"answer_probability": estimate}}} if estimate else {})


def _of_audit(facts: Facts) -> dict[str, Any]:
    audit = facts.audit or {}
    found: Sequence[Claim] = audit_claims(audit)
    return {
        "version": CONTENT_VERSION,
        "kind": "audit",
        "title": "Audit report",
        "outcome": _audit_outcome(audit),
        "headline": audit_headline(audit),
        "claims": [claim.as_json() for claim in found],
        "untested": untested_attacks(audit),
        "notes": list(audit.get("notes") or ()),
        "audit": audit,
        **_origin(audit),
    }


def _of_comparison(table: Mapping[str, Any]) -> dict[str, Any]:
    first, *others = ranking_sentences(table) or ["No method was through when this was written."]
    return {
        "version": CONTENT_VERSION,
        "kind": "compare",
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
        **_origin({**table, "models": {}, "data": table.get("rows"), "recipe": _setup(table)}),
    }


def _setup(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was set of a comparison, contestants by name."""
    contestants = {entry["name"]: entry["set"] for entry in table.get("contestants") or ()}
    return {"shared": table.get("shared"), "comparison": table.get("comparison"), "contestants": contestants}


def _audit_outcome(audit: Mapping[str, Any]) -> str:
    more, less = bool(at(audit, "answer", "knows_more")), bool(at(audit, "answer", "knows_less"))
    than = "a model that never saw it"
    if more and less:
        return f"Some attacks draw more of the forget set from the model than from {than}, others less."
    if more:
        return f"Attacks draw more of the forget set from the model than from {than}."
    if less:
        return f"The model knows less of the forget set than {than}: it was made to forget too much."
    if at(audit, "answer", "passed"):
        return f"Within this budget the attacks could not tell the model from {than}."
    return "The audit could not say enough to pass the model."


def _origin(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells where a report's numbers come from, and how to make them again."""
    names = ("palinode", "run", "created", "finished", "command", "seed", "recipe", "policy")
    return {
        **{name: record.get(name) for name in names if record.get(name) is not None},
        "models": record.get("models") or {},
        "data": {name: fact for name, fact in (record.get("data") or {}).items() if fact},
        "environment": record.get("environment") or {},
    }
