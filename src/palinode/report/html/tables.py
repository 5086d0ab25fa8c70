"""The tables of a page, as plain cells: the template escapes and draws them.

A cell is a text, or a text with a smaller one under it (an interval).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palinode.report.words import (
    DASH,
    SETS,
    TRAININGS,
    at,
    integer,
    interval_text,
    metric_label,
    metrics_on,
    model_label,
    number,
    percent,
    scale,
    scores_on,
    words,
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A text, and perhaps a smaller one under it."""

    text: str
    below: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a head; the columns after the first `text_columns` hold numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1


def score_table(content: Mapping[str, Any], data_set: str) -> Table | None:
    """Return the scores of each model on a set, with their intervals."""
    found = scores_on(content, data_set)
    metrics = metrics_on(content, [data_set])
    rows = [
        [Cell(model_label(model)), *(score_cell(scores.get(name)) for name in metrics)]
        for model, scores in found.items()
    ]
    return Table(["model", *map(metric_label, metrics)], rows) if rows else None


def score_notes(content: Mapping[str, Any], data_set: str) -> list[str]:
    """Return what is said about scores (why one is missing, a caveat), like remarks of models together."""
    models: dict[tuple[str, str], list[str]] = {}
    for model, scores in scores_on(content, data_set).items():
        for metric, score in scores.items():
            if reason := at(score, "reason"):
                models.setdefault((metric, reason), []).append(model_label(model))
    return [
        f"{metric_label(metric)} of {', '.join(names)}: {reason}."
        for (metric, reason), names in models.items()
    ]


def point_table(content: Mapping[str, Any]) -> Table | None:
    """Return every pair of scales that was tried."""
    points = at(content, "scales", "points") or ()
    measured = {
        name: key for name, key in _MEASURED.items() if any(point.get(key) is not None for point in points)
    }
    rows = [
        plain(
            *(scale(point.get(key)) for key in ("forget", "retain")),
            *(number(point.get(key)) for key in measured.values()),
            "yes" if point.get("allowed") else "no",
            "chosen" if point.get("chosen") else "",
        )
        for point in points
    ]
    return Table(["α", "β", *measured, "keeps the rule", ""], rows, 0) if rows else None


_MEASURED = {
    "forget probability": "forget_probability",
    "retain probability": "retain_probability",
    "neutral text": "neutral_probability",
    "distance to the yardstick": "distance",
}


def sensitivity_table(content: Mapping[str, Any]) -> Table | None:
    """Return what a step away from the chosen scales changes."""
    rows = [
        plain(
            *(scale(step.get(key)) for key in ("forget", "retain")),
            *(
                _signed(step.get(f"{key}_change"))
                for key in ("forget_probability", "retain_probability", "distance")
            ),
            "yes" if step.get("allowed") else "no",
        )
        for step in at(content, "scales", "sensitivity") or ()
    ]
    head = [
        "α",
        "β",
        "forget probability",
        "retain probability",
        "distance to the yardstick",
        "keeps the rule",
    ]
    return Table(head, rows, 0) if rows else None


def vector_table(content: Mapping[str, Any]) -> Table | None:
    """Return the length of each vector and the share of it that arrived in the saved model."""
    rows = [
        plain(
            f"{name} vector", number(at(content, "vectors", name, "norm")), percent(at(content, "dose", name))
        )
        for name in SETS
        if at(content, "vectors", name)
    ]
    return Table(["", "length", "share that arrived in the saved model"], rows) if rows else None


def dose_facts(content: Mapping[str, Any]) -> dict[str, str]:
    """Return what else is known of the change, by name."""
    facts = {
        "Cosine between the two vectors": number(at(content, "vectors", "cosine")),
        "Rounding error, relative to the whole change": number(at(content, "dose", "relative_error")),
        "Weights that changed": percent(at(content, "dose", "moved_share")),
        "Numbers that no sum reaches": percent(at(content, "dose", "unreached_share")),
        "Rounding": at(content, "dose", "rounding") or DASH,
    }
    return {name: value for name, value in facts.items() if value != DASH}


def cost_table(content: Mapping[str, Any]) -> Table | None:
    """Return steps, tokens and time of each fine-tuning."""
    runs = {name: run for name, run in (content.get("training") or {}).items() if run}
    rows = [
        plain(
            TRAININGS.get(name, words(name)),
            *(integer(run.get(key)) for key in ("rows", "steps", "tokens")),
            *(number(run.get(key)) for key in ("first_loss", "last_loss")),
            integer(run.get("seconds")),
        )
        for name, run in runs.items()
    ]
    head = ["fine-tuning on", "rows", "steps", "tokens", "first loss", "last loss", "seconds"]
    return Table(head, rows) if rows else None


def audit_table(audit: Mapping[str, Any]) -> Table | None:
    """Return every test of the audited model beside the yardstick."""
    rows = [
        [
            Cell(f"{attack['title']}: {entry['title']}"),
            Cell(finding["verdict"], finding["reason"]),
            score_cell(finding["score"]),
            score_cell(finding["yardstick"]),
            score_cell(finding["difference"]),
        ]
        for attack in (audit.get("attacks") or {}).values()
        for entry in (attack.get("tests") or {}).values()
        if (finding := at(entry, "findings", "audited"))
    ]
    return Table(["test", "verdict", "model", "yardstick", "difference"], rows, 2) if rows else None


def demo_table(demo: Mapping[str, Any]) -> Table | None:
    """Return the demo's exact match: the share of questions answered exactly right."""
    people = demo.get("people") or {}
    rows = [
        plain(
            model_label(name),
            *(f"{recall[part]:.2f}" for part in ("forget", "others", "general")),
            _pair(at(demo, "scales", name)),
        )
        for name, recall in (demo.get("recall") or {}).items()
    ]
    head = ["model", f"{people.get('forget')} forget people", f"{people.get('others')} others"]
    return Table([*head, "general facts", "α, β"], rows) if rows else None


def input_table(content: Mapping[str, Any]) -> Table | None:
    """Return where models and rows are from, with whole fingerprints."""
    inputs = {
        **{model_label(name): fact for name, fact in (content.get("models") or {}).items()},
        **{SETS.get(name, words(name)): fact for name, fact in (content.get("data") or {}).items()},
    }
    rows = [
        plain(
            name,
            str(fact.get("location") or DASH),
            str(fact.get("fingerprint") or DASH),
            integer(fact.get("rows") or fact.get("parameters")),
        )
        for name, fact in inputs.items()
        if fact
    ]
    return Table(["what", "where", "fingerprint", "rows or weights"], rows, 3) if rows else None


def setting_table(content: Mapping[str, Any]) -> Table | None:
    """Return the recipe (of an audit: the policy) with defaults filled in, one dotted key a row."""
    rows = [plain(key, value) for key, value in _flat(content.get("recipe") or content.get("policy") or {})]
    return Table(["setting", "value"], rows, 2) if rows else None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append((f"{prefix}{key}", text))
    return lines


def _signed(value: float | None) -> str:
    return DASH if value is None else f"{value:+.3f}"


def _pair(scales: Mapping[str, float] | None) -> str:
    return f"{scales['forget']:g}, {scales['retain']:g}" if scales else ""


def score_cell(score: Mapping[str, Any] | None) -> Cell:
    """Return a score, with its interval below."""
    score = score or {}
    return Cell(number(score.get("value")), interval_text(score))


def plain(*texts: str) -> list[Cell]:
    """Return a row of plain texts."""
    return [Cell(text) for text in texts]
