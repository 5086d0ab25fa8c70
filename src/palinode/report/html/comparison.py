"""A comparison of methods as a picture and tables: every point that was tried, the ranking, scores, cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from palinode.report.html.marks import Figure, dots, told
from palinode.report.html.tables import Cell, Table, plain, score_cell
from palinode.report.words import MODELS, at, integer, metric_label, model_label, number, words

PALETTE = ("--unlearned", "--target", "--retrained", "--base", "--amber", "--red", "--other")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up")
"""Seven colours and five symbols: thirty-five contestants look different."""
COLUMNS = tuple(
    (data_set, metric)
    for data_set in ("forget", "retain")
    for metric in ("exact_match", "answer_probability", "rouge_l_recall")
)
"""Set and metric of the scores that the page shows; report.md has the others."""


def comparison_figure(table: Mapping[str, Any]) -> Figure:
    """Return every point of every contestant by forget and retain probability, and the models as they are."""
    traces = [_contestant_trace(place, entry) for place, entry in enumerate(table.get("contestants") or ())]
    for model in MODELS:
        probes = at(table, "models", model, "probes")
        if not probes or probes.get("retain") is None:
            continue
        trace = dots(model, [probes["forget"]], [probes["retain"]])
        lines = [f"forget set: {number(probes['forget'])}", f"retain set: {number(probes['retain'])}"]
        trace["marker"] = {**trace["marker"], "size": 14, "color": "--ink"}
        trace["customdata"] = [told(model_label(model), lines)]
        trace["hovertemplate"] = "%{customdata.text}<extra></extra>"
        traces.append(trace)
    return {
        "data": traces,
        "layout": {
            "height": 600,
            "xaxis": {"title": {"text": "answer probability on the forget set"}},
            "yaxis": {"title": {"text": "answer probability on the retain set"}, "automargin": True},
        },
    }


def _contestant_trace(place: int, entry: Mapping[str, Any]) -> Figure:
    """Return the points of a contestant; the chosen one is filled and larger."""
    points = [point for point in entry["points"] if point.get("retain_probability") is not None]
    colour, symbol = PALETTE[place % len(PALETTE)], SYMBOLS[place % len(SYMBOLS)]
    trace = dots(entry["name"], *([point[key] for point in points] for key in _AXES))
    trace["marker"] = {
        "color": colour,
        "symbol": [symbol if point["chosen"] else f"{symbol}-open" for point in points],
        "size": [16 if point["chosen"] else 8 for point in points],
        "line": {"width": 1.5, "color": colour},
        "opacity": 1,
    }
    trace["customdata"] = [_point_told(entry["name"], point) for point in points]
    trace["hovertemplate"] = "%{customdata.text}<extra></extra>"
    return trace


_AXES = ("forget_probability", "retain_probability")


def _point_told(name: str, point: Mapping[str, Any]) -> dict[str, Any]:
    kept = "keeps the rule" if point["allowed"] else "breaks the rule"
    scales = point.get("scales")
    return told(
        name,
        [
            *([f"α = {scales[0]:g}, β = {scales[1]:g}"] if scales else []),
            *(f"{key.rpartition('.')[2]}: {value}" for key, value in point["settings"].items()),
            f"forget set: {number(point['forget_probability'])}",
            f"retain set: {number(point['retain_probability'])}",
            f"chosen; {kept}" if point["chosen"] else kept,
        ],
    )


def ranking_table(table: Mapping[str, Any]) -> Table | None:
    """Return the contestants by their gap to the ideal, and from whom each cannot be told."""
    rows = [
        [
            Cell(f"{entry['place']}. {entry['name']}"),
            Cell(", ".join(entry["within_noise_of"]) or "none"),
            score_cell({**entry, "value": entry["gap"]}),
        ]
        for entry in at(table, "ranking", "order") or ()
    ]
    return Table(["method", "within noise of", "gap"], rows, 2) if rows else None


def contestant_scores(table: Mapping[str, Any]) -> Table | None:
    """Return what models and contestants scored on rows that nothing was chosen on."""
    models = {model_label(name): at(table, "models", name, "summary", "rows") for name in MODELS}
    contestants = {entry["name"]: at(entry, "summary", "rows") for entry in table.get("contestants") or ()}
    found = {name: scores for name, scores in {**models, **contestants}.items() if scores}
    columns = [
        (data_set, metric)
        for data_set, metric in COLUMNS
        if any(at(scores, data_set, metric, "value") is not None for scores in found.values())
    ]
    rows = [
        [Cell(name), *(score_cell(at(scores, *column)) for column in columns)]
        for name, scores in found.items()
    ]
    head = [f"{data_set}: {metric_label(metric)}" for data_set, metric in columns]
    return Table(["model", *head], rows) if rows and columns else None


def contestant_costs(table: Mapping[str, Any]) -> Table | None:
    """Return what each contestant took, its search included."""
    keys = ("steps", "tokens", "seconds", "search_steps", "search_seconds")
    rows = [
        plain(entry["name"], *(integer(at(entry, "cost", key)) for key in keys))
        for entry in table.get("contestants") or ()
    ]
    return Table(["method", *map(words, keys)], rows) if rows else None
