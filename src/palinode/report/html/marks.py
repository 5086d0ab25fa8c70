"""What the pictures of a page share: a colour, a symbol and a name for each model, dots and intervals.

A colour is the name of a variable of the style sheet ("--target"); the page's script looks it up, so that
pictures follow light and dark. Models differ by symbol as well as by colour. Names from the data are escaped,
for plotly reads a part of HTML in its texts.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from palinode.report.words import (
    model_label,
)

Figure = dict[str, Any]
"""`data` and `layout` as plotly takes them."""

COLOURS = {
    "target": "--target",
    "unlearned": "--unlearned",
    "retrained": "--retrained",
    "base": "--base",
    "estimate": "--retrained",
}
MARKS = {
    "target": "square",
    "unlearned": "circle",
    "retrained": "diamond",
    "base": "triangle-up",
    "estimate": "diamond-open",
}
OTHER_MARKS = ("cross", "x", "star", "pentagon")
NAMES = {"autorange": "reversed", "automargin": True, "showgrid": False}
"""An axis with names, the first at the top."""


def dots(model: str, xs: Sequence[float], ys: Sequence[float]) -> Figure:
    """Return the trace of a model: dots in its colour and with its symbol."""
    mark = MARKS.get(model) or OTHER_MARKS[sum(map(ord, model)) % len(OTHER_MARKS)]
    marker = {"color": COLOURS.get(model, "--other"), "symbol": mark, "size": 11}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label_of(model),
        "x": list(xs),
        "y": list(ys),
        "marker": marker,
    }


def errors(scores: Sequence[Mapping[str, Any]], colour: str) -> Figure:
    """Return the intervals of some scores as plotly's error bars."""

    def reach(score: Mapping[str, Any], side: str) -> float:
        bound = score.get(side)
        return 0.0 if bound is None else abs(bound - score["value"])

    return {
        "type": "data",
        "symmetric": False,
        "array": [reach(score, "high") for score in scores],
        "arrayminus": [reach(score, "low") for score in scores],
        "color": colour,
        "thickness": 1.5,
        "width": 4,
    }


def label_of(model: str) -> str:
    """Return what a model is called, safe for plotly."""
    return html.escape(model_label(model), quote=False)


def wrapped(title: str, width: int = 34) -> str:
    """Return a title in lines of about this width, as plotly breaks them."""
    lines, current = [], ""
    for word in title.split():
        if current and len(current) + len(word) >= width:
            lines.append(current)
            current = word
        else:
            current = f"{current} {word}".strip()
    return "<br>".join([*lines, current])


def told(title: str, lines: Sequence[str], *, model: str | None = None) -> dict[str, Any]:
    """Return what a mark says when hovered (`text`, escaped for plotly) and clicked (`title`, `lines`).

    `model` is the one whose sample answers a click shows.
    """
    shown = [html.escape(line, quote=False) for line in (title, *lines)]
    return {
        "text": "<br>".join([f"<b>{shown[0]}</b>", *shown[1:]]),
        "title": title,
        "lines": list(lines),
        "model": model,
    }
