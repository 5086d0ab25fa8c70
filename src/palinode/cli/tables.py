"""Results as tables and sentences for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from palinode.records import Score

if TYPE_CHECKING:
    from palinode.pipeline.demo_run import DemoResult
    from palinode.weights import Profile

DEMO_ROWS = {
    "target": "target",
    "base": "base checkpoint",
    "unlearned": "unlearned (MSA)",
    "task_vector": "task vector",
    "retrained": "retrained (the truth)",
}


def score_table(scores: Mapping[str, Score]) -> Table:
    """Return metrics with their intervals, one a row."""
    table = Table("metric", "value", "95 % interval", "rows")
    for name, score in scores.items():
        value = "not computed" if score.value is None else f"{score.value:.3f}"
        interval = "" if score.low is None else f"{score.low:.3f} to {score.high:.3f}"
        table.add_row(name.replace("_", " "), value, interval or (score.reason or ""), str(score.n))
    return table


def benchmark_table(scores: Mapping[str, Mapping[str, Score]], *, title: str) -> Table:
    """Return a benchmark's metrics by set, with n and interval; those that were not computed are left out."""
    table = Table(title=title, title_justify="left")
    for heading in ("set", "metric", "value", "95 % interval", "n"):
        table.add_column(heading, no_wrap=heading != "95 % interval")  # names are what --metrics takes
    for name, group in scores.items():
        shown = name
        for metric, score in group.items():
            if score.value is None:
                continue
            interval = "" if score.low is None or score.high is None else _interval(score.low, score.high)
            table.add_row(shown, metric, _figure(score.value), interval, str(score.n))
            shown = ""
        table.add_section()
    return table


def benchmark_notes(scores: Mapping[str, Mapping[str, Score]]) -> Iterator[str]:
    """Yield what to know about scores, and why some were not computed: a line for each set and reason."""
    for name, group in scores.items():
        reasons: dict[str, list[str]] = {}
        for metric, score in group.items():
            if score.reason:
                reasons.setdefault(score.reason, []).append(metric)
        for reason, metrics in reasons.items():
            yield f"{name}: {', '.join(metrics)}: {reason}"


def listing_lines(kind: str, lines: Mapping[str, str]) -> Iterator[str]:
    """Yield a heading, then each name and what it stands for, one a line."""
    width = max(map(len, lines), default=0)
    yield f"{kind}:"
    yield from (f"  {name:{width}}  {description}" for name, description in lines.items())


def _figure(value: float) -> str:
    """Return a figure with three digits; p-values may be very small."""
    return f"{value:.2e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"


def _interval(low: float, high: float) -> str:
    return f"{_figure(low)} to {_figure(high)}"


def demo_table(record: Mapping[str, Any]) -> Table:
    """Return the demo's exact match by model."""
    people = record["people"]
    table = Table(title="Exact match: share of questions answered exactly right", title_justify="left")
    table.add_column("model", no_wrap=True)
    for heading in (
        f"{people['forget']} forget people",
        f"{people['others']} others",
        "general facts",
        "α, β",
    ):
        table.add_column(heading, justify="right")
    for name, label in DEMO_ROWS.items():
        recall, scales = record["recall"][name], record["scales"].get(name)
        pair = f"{scales['forget']:g}, {scales['retain']:g}" if scales else ""
        table.add_row(label, *(f"{recall[part]:.2f}" for part in ("forget", "others", "general")), pair)
    return table


def demo_sentence(result: DemoResult) -> str:
    """Return what happened and where the files are."""
    recall = result.record["recall"]
    return (
        f"The target recalled {recall['target']['forget']:.0%} of what it had learned about the "
        "forget people; "
        f"after unlearning it is {recall['unlearned']['forget']:.0%}, where a model that never saw them has "
        f"{recall['retrained']['forget']:.0%}, and of everyone else it still knows "
        f"{recall['unlearned']['others']:.0%} (before: {recall['target']['others']:.0%}). "
        f"Models, report and record are in {result.folder}."
    )


def vector_content(measured: Profile) -> dict[str, Any]:
    """Return norms and cosines as plain values, in all and by part."""
    return {
        "all": _vectors(measured, None),
        "parts": {part: _vectors(measured, part) for part in measured.gram},
    }


def vector_tables(measured: Profile, *, layers: bool) -> Iterator[Table]:
    """Yield a table of norms and cosines, and one over the parts of the model if asked."""
    table = Table("vector", "norm", *(f"cosine with {name}" for name in measured.names[:-1]))
    for place, name in enumerate(measured.names):
        others = measured.names[:-1]
        cosines = [
            _cosine(measured, name, other) if measured.names.index(other) < place else "" for other in others
        ]
        table.add_row(name, f"{measured.norms()[name]:.5g}", *cosines)
    yield table
    if layers:
        parts = Table("part", *(f"norm: {name}" for name in measured.names))
        for part in measured.gram:
            parts.add_row(part, *(f"{norm:.4g}" for norm in measured.norms(part).values()))
        yield parts


def _vectors(measured: Profile, part: str | None) -> dict[str, Any]:
    names = measured.names
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return {
        "norms": measured.norms(part),
        "cosines": [{"between": [a, b], "cosine": measured.cosine(a, b, part)} for a, b in pairs],
    }


def _cosine(measured: Profile, first: str, second: str) -> str:
    value = measured.cosine(first, second)
    return "undefined" if value is None else f"{value:.4f}"
