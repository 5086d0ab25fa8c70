"""Pictures of what was measured: scores with their intervals, and log-probabilities row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from palinode.report.html.marks import COLOURS, NAMES, Figure, dots, errors, label_of
from palinode.report.words import (
    METRICS,
    MODELS,
    at,
    interval_text,
    known_first,
    metric_label,
    metrics_on,
    number,
    scores_on,
)

POINTS_SHOWN = 400
"""Rows of a set up to which a distribution shows each as a dot."""


def score_figure(content: Mapping[str, Any], data_set: str) -> Figure | None:
    """Return each model's scores on a set as dots with their intervals, a line of dots a metric."""
    rows = scores_on(content, data_set)
    metrics = [name for name in metrics_on(content, [data_set]) if name in METRICS]
    if not rows or not metrics:
        return None
    traces = []
    for place, (model, scores) in enumerate(rows.items()):
        known = [(i, name) for i, name in enumerate(metrics) if at(scores, name, "value") is not None]
        offset = 0.16 * (place - (len(rows) - 1) / 2)
        found = [scores[name] for _, name in known]
        trace = dots(model, [score["value"] for score in found], [i + offset for i, _ in known])
        trace["error_x"] = errors(found, COLOURS.get(model, "--other"))
        trace["customdata"] = [
            f"{metric_label(name)}: {number(score['value'])}<br>"
            f"interval {interval_text(score) or 'not known'}, {score.get('n')} examples"
            for (_, name), score in zip(known, found, strict=True)
        ]
        trace["hovertemplate"] = f"<b>{label_of(model)}</b><br>%{{customdata}}<extra></extra>"
        traces.append(trace)
    ticks = {"tickvals": list(range(len(metrics))), "ticktext": [metric_label(name) for name in metrics]}
    return {
        "data": traces,
        "layout": {
            "height": 130 + 70 * len(metrics),
            "xaxis": {"range": [-0.04, 1.04], "title": {"text": "score"}},
            "yaxis": {**ticks, **NAMES},
        },
    }


def likelihood_figure(content: Mapping[str, Any], data_set: str) -> Figure | None:
    """Return how each model's log-probability of the right answer is spread over the rows of a set."""
    rows = at(content, "log_probabilities", data_set) or {}
    traces = []
    for model in known_first(rows, MODELS):
        values, colour = rows[model], COLOURS.get(model, "--other")
        traces.append(
            {
                "type": "violin",
                "name": label_of(model),
                "x": values,
                "y0": label_of(model),
                "orientation": "h",
                "points": "all" if len(values) <= POINTS_SHOWN else False,
                "jitter": 0.5,
                "pointpos": 0,
                "marker": {"size": 3.5, "color": colour, "opacity": 0.7},
                "line": {"color": colour, "width": 1.5},
                "meanline": {"visible": True},
                "box": {"visible": True, "width": 0.18},
                "spanmode": "hard",
                "hoveron": "points+kde" if len(values) <= POINTS_SHOWN else "violins",
                "hovertemplate": f"<b>{label_of(model)}</b><br>%{{x:.3f}}<extra></extra>",
                "showlegend": False,
            }
        )
    if not traces:
        return None
    return {
        "data": traces,
        "layout": {
            "height": 110 + 90 * len(traces),
            "xaxis": {"title": {"text": "mean log-probability a token, in nats"}},
            "yaxis": NAMES,
        },
    }
