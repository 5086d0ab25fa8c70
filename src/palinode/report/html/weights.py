"""Pictures of the vectors, the dose and the fine-tunings."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from palinode.report.html.marks import Figure
from palinode.report.words import (
    TRAININGS,
    at,
    words,
)


def norm_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return the length of each vector by part of the model."""
    return _by_part(content, lambda part, name: at(part, name, "norm"), "length", ("forget", "retain"))


def cosine_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return the cosine between the vectors by part of the model."""
    return _by_part(content, lambda part, _: at(part, "cosine"), "cosine of the two vectors", ("cosine",))


def dose_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return the scale found in the stored weights by part of the model, beside the one asked for."""
    parts = at(content, "dose", "parts") or {}
    asked = {name: value for name in ("forget", "retain") if (value := at(content, "scales", name))}
    traces = [
        _line(
            name, parts, [_share(at(part, "effective", name), asked[name]) for part in parts.values()], place
        )
        for place, name in enumerate(asked)
        if any(at(part, "effective", name) is not None for part in parts.values())
    ]
    return _part_layout(traces, "stored / asked scale") if traces else None


def _share(found: float | None, asked: float) -> float | None:
    return None if found is None else found / asked


def _by_part(
    content: Mapping[str, Any],
    value: Callable[[Mapping[str, Any], str], float | None],
    title: str,
    names: Sequence[str],
) -> Figure | None:
    parts = at(content, "vectors", "parts") or {}
    lines = {name: [value(part, name) for part in parts.values()] for name in names}
    traces = [
        _line(name, parts, values, place)
        for place, (name, values) in enumerate(lines.items())
        if any(found is not None for found in values)
    ]
    return _part_layout(traces, title) if traces else None


def _line(name: str, parts: Mapping[str, Any], values: Sequence[float | None], place: int) -> Figure:
    colour = ("--target", "--retrained")[place % 2] if name != "cosine" else "--unlearned"
    label = f"{name} vector" if name != "cosine" else "cosine"
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label,
        "x": [html.escape(part.removeprefix("layer "), quote=False) for part in parts],
        "y": list(values),
        "line": {"color": colour, "dash": ("solid", "dot")[place % 2]},
        "marker": {"color": colour, "symbol": ("circle", "diamond")[place % 2], "size": 7},
        "hovertext": [html.escape(part, quote=False) for part in parts],
        "hovertemplate": f"<b>%{{hovertext}}</b><br>{label}: %{{y:.4g}}<extra></extra>",
    }


def _part_layout(traces: list[Figure], title: str) -> Figure:
    return {
        "data": traces,
        "layout": {
            "height": 340,
            "xaxis": {
                "type": "category",
                "automargin": True,
                "title": {"text": "part, or number of the layer"},
            },
            "yaxis": {"title": {"text": title}, "rangemode": "tozero", "automargin": True},
        },
    }


def training_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return the loss of each fine-tuning by step."""
    traces = []
    for place, (name, run) in enumerate((content.get("training") or {}).items()):
        curve = at(run, "curve") or {}
        if not curve.get("losses"):
            continue
        colour = ("--target", "--retrained", "--base", "--other")[place % 4]
        label = html.escape(TRAININGS.get(name, words(name)), quote=False)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": label,
                "x": curve["steps"],
                "y": curve["losses"],
                "line": {"color": colour, "dash": ("solid", "dash", "dot", "dashdot")[place % 4]},
                "hovertemplate": f"<b>{label}</b><br>step %{{x}}: %{{y:.3f}}<extra></extra>",
            }
        )
    if not traces:
        return None
    axes = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "loss"}, "rangemode": "tozero"},
    }
    return {"data": traces, "layout": {"height": 360, **axes}}
