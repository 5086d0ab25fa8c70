"""The picture of forgetting against keeping: every pair of scales that was tried, and every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from palinode.report.html.marks import COLOURS, Figure, dots, errors, told
from palinode.report.verdicts import YARDSTICKS, yardstick
from palinode.report.words import (
    SETS,
    at,
    model_label,
    number,
    scale,
    scores_on,
)


def tradeoff_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return every pair of scales tried, and the models, by forget and retain probability.

    Without a retain set the height is α, since there is nothing else to show.
    """
    points = [point for point in at(content, "scales", "points") or () if _placed(point)]
    retain = any(point.get("retain_probability") is not None for point in points)
    data_set = "retain_unseen" if at(content, "scores", "unlearned", "retain_unseen") else "retain"
    traces = _model_traces(content, data_set) if retain or not points else []
    traces += _front_trace(content) if retain else []
    traces += _point_traces(points, with_retain=retain)
    if not traces:
        return None
    above = "answer probability on the retain set" if retain or not points else "α"
    return {
        "data": traces,
        "layout": {
            "height": 520,
            "xaxis": {"title": {"text": "answer probability on the forget set"}},
            "yaxis": {"title": {"text": above}, "automargin": True},
            "shapes": _yardstick_band(content),
        },
    }


def _placed(point: Mapping[str, Any]) -> bool:
    return point.get("forget_probability") is not None


def _front_trace(content: Mapping[str, Any]) -> list[Figure]:
    """Return a line along the points that no other one beats on both sides."""
    front = sorted(
        (point["forget_probability"], point["retain_probability"])
        for point in at(content, "scales", "front") or ()
        if _placed(point) and point.get("retain_probability") is not None
    )
    if len(front) < 2:
        return []
    xs, ys = zip(*front, strict=True)
    line = {"color": "--unlearned", "width": 1, "dash": "dot"}
    trace = {"type": "scatter", "mode": "lines", "name": "front", "x": list(xs), "y": list(ys)}
    return [{**trace, "line": line, "hoverinfo": "skip"}]


def _point_traces(points: Sequence[Mapping[str, Any]], *, with_retain: bool) -> list[Figure]:
    """Return the points in three groups: chosen, allowed by the rule, and not."""

    def group(point: Mapping[str, Any]) -> str:
        return "chosen" if point.get("chosen") else "allowed" if point.get("allowed") else "not allowed"

    marks = {
        "allowed": {"color": "--unlearned", "symbol": "circle-open", "size": 11, "line": {"width": 2}},
        "not allowed": {"color": "--other", "symbol": "x-thin-open", "size": 9, "line": {"width": 2}},
        "chosen": {"color": "--unlearned", "symbol": "star", "size": 17},
    }
    traces = []
    for name, marker in marks.items():
        members = [point for point in points if group(point) == name]
        if not members:
            continue
        height = "retain_probability" if with_retain else "forget"
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"point tried, {name}" if name != "chosen" else "point chosen",
                "x": [point["forget_probability"] for point in members],
                "y": [point[height] for point in members],
                "marker": marker,
                "customdata": [_point_told(point) for point in members],
                "hovertemplate": "%{customdata.text}<extra></extra>",
            }
        )
    return traces


def _point_told(point: Mapping[str, Any]) -> dict[str, Any]:
    kept = "keeps the rule" if point.get("allowed") else "breaks the rule"
    figures = {
        "forget set": point.get("forget_probability"),
        "retain set": point.get("retain_probability"),
        "neutral text": point.get("neutral_probability"),
        "distance to the yardstick": point.get("distance"),
    }
    return told(
        f"α = {scale(point.get('forget'))}, β = {scale(point.get('retain'))}",
        [
            *(f"{name}: {number(value)}" for name, value in figures.items() if value is not None),
            *([f"{point['rows']} probe rows"] if point.get("rows") else []),
            f"chosen; {kept}" if point.get("chosen") else kept,
        ],
        model="unlearned" if point.get("chosen") else None,
    )


def _model_traces(content: Mapping[str, Any], data_set: str) -> list[Figure]:
    traces = []
    forget, retain = scores_on(content, "forget"), scores_on(content, data_set)
    for model in (name for name in forget if name in retain):
        pair = [at(rows[model], "answer_probability") or {} for rows in (forget, retain)]
        if any(score.get("value") is None for score in pair):
            continue
        trace = dots(model, [pair[0]["value"]], [pair[1]["value"]])
        colour = COLOURS.get(model, "--other")
        trace |= {"error_x": errors(pair[:1], colour), "error_y": errors(pair[1:], colour)}
        lines = [f"forget set: {number(pair[0]['value'])}", f"{SETS[data_set]}: {number(pair[1]['value'])}"]
        trace["customdata"] = [told(model_label(model), lines, model=model)]
        trace["hovertemplate"] = "%{customdata.text}<extra></extra>"
        traces.append(trace)
    return traces


def _yardstick_band(content: Mapping[str, Any]) -> list[Figure]:
    """Return the yardstick's interval as a band across the picture."""
    held = yardstick(content)
    if held is None or held[1].get("low") is None or held[1].get("high") is None:
        return []
    band = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "x0": held[1]["low"], "x1": held[1]["high"]}
    label = {"text": "yardstick", "textposition": "top left", "font": {"size": 12, "color": "--faint"}}
    return [{**band, "fillcolor": "--band", "line": {"width": 0}, "layer": "below", "label": label}]


def tradeoff_caption(content: Mapping[str, Any]) -> str:
    """Return what the picture shows, in words."""
    held = yardstick(content)
    goal = f" The band is the interval of {YARDSTICKS[held[0]]}." if held else ""
    return (
        f"Left is less of the forget set, up is more of the rest.{goal} Points were tried on probe rows and "
        "models measured on the evaluation rows, so the chosen point and the unlearned model need not "
        "coincide. Click a mark for its figures."
    )
