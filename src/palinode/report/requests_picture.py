"""Requests carried out and undone as an SVG picture: a panel a contestant, three lines each.

SVG written by hand: no plotting library, and it opens in any browser. To the left of the middle line
requests are carried out one by one, to the right undone one by one; up is better known.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 450, 230, 2
LEFT, RIGHT, TOP, BOTTOM = 44, 16, 30, 40
HEAD = 64
INK, FAINT, GREY = "#1c2733", "#dfe4e8", "#6b7680"
LINES = {
    "done": ("#b23a48", "asked to be erased"),
    "not_done": ("#3b6ea8", "not asked, or undone"),
    "retain": ("#2a7f62", "retain rows"),
}
METRIC = "answer_probability"


def requests_picture(table: Mapping[str, Any]) -> str:
    """Return the picture of a requests.json: answer probability after each request and each undoing."""
    entries, count = table["contestants"], len(table["requests"])
    rows = -(-len(entries) // COLUMNS)
    width, height = PANEL_WIDTH * COLUMNS, HEAD + PANEL_HEIGHT * rows
    parts = [*_head(table, count)]
    for place, entry in enumerate(entries):
        across, down = PANEL_WIDTH * (place % COLUMNS), HEAD + PANEL_HEIGHT * (place // COLUMNS)
        parts += _panel(_Frame(across, down, count), entry, table["models"])
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


class _Frame:
    """Places in one panel: states along the width, probability from 0 to 1 upwards."""

    def __init__(self, across: float, down: float, count: int) -> None:
        self.across = across
        self.down = down
        self.count = count
        """Requests."""

    def at(self, state: float, value: float) -> tuple[float, float]:
        """Return x and y; state 0 is the target, `count` all carried out, 2 · count all undone."""
        x = self.across + LEFT + (PANEL_WIDTH - LEFT - RIGHT) * state / (2 * self.count)
        y = self.down + TOP + (PANEL_HEIGHT - TOP - BOTTOM) * (1 - value)
        return float(x), float(y)


def _head(table: Mapping[str, Any], count: int) -> list[str]:
    size = table["requests"][0]["rows"]
    title = f"{count} requests one after another, then undone in another order (the first has {size} rows)"
    parts = [_text(12, 22, title, size=14)]
    x = 12.0
    for colour, name in LINES.values():
        parts += [_line(x, 42, x + 22, 42, colour, width=2.5), _text(x + 28, 46, name, size=11)]
        x += 46 + 6.2 * len(name)
    if "retrained" in table["models"]:
        parts += [_line(x, 42, x + 22, 42, GREY, dashed=True)]
        parts.append(_text(x + 28, 46, "the same rows in the retrained model", size=11))
        x += 46 + 6.2 * len("the same rows in the retrained model")
    parts += [_dot(x + 6, 42, LINES["done"][0], "all at once"), _text(x + 16, 46, "all at once", size=11)]
    return parts


def _panel(frame: _Frame, entry: Mapping[str, Any], models: Mapping[str, Any]) -> list[str]:
    parts = [_text(*_shifted(frame.at(0, 1), 0, -10), entry["name"], size=12)]
    for tenth in (0.0, 0.5, 1.0):
        parts.append(_line(*frame.at(0, tenth), *frame.at(2 * frame.count, tenth), FAINT))
        parts.append(_text(*_shifted(frame.at(0, tenth), -26, 4), f"{tenth:.1f}", size=10, colour=GREY))
    parts.append(_line(*frame.at(frame.count, 0), *frame.at(frame.count, 1), FAINT))
    parts += _ticks(frame)
    for name, part in (("retrained", "done"), ("retrained", "retain")):
        value = _value(models[name], part) if name in models else None
        if value is not None:
            ends = (*frame.at(0, value), *frame.at(2 * frame.count, value))
            parts.append(_line(*ends, LINES[part][0], dashed=True))
    for part, (colour, _) in LINES.items():
        parts += _curve(frame, entry["states"], part, colour)
        joint = _value(entry["joint"], part)
        if joint is not None:
            told = f"all at once, {part}: {joint:.3f}"
            parts.append(_dot(*frame.at(frame.count, joint), colour, told))
    if not entry["undo"]["possible"]:
        x, y = frame.at(1.5 * frame.count, 0.5)
        parts.append(_text(x, y + 4, "cannot undo", size=12, colour=GREY, middle=True))
    return parts


def _ticks(frame: _Frame) -> list[str]:
    """Return what is written below a panel: requests carried out, and undone."""
    parts = []
    for state in dict.fromkeys((0, 1, frame.count // 2, frame.count)):
        for shown in dict.fromkeys((state, frame.count + state)):
            told = str(state if shown == state else shown - frame.count)
            if shown != frame.count or state:  # one number in the middle
                parts.append(
                    _text(*_shifted(frame.at(shown, 0), 0, 14), told, size=10, colour=GREY, middle=True)
                )
    for place, words in ((0.5, "requests carried out →"), (1.5, "undone →")):
        x, y = frame.at(place * frame.count, 0)
        parts.append(_text(x, y + 28, words, size=10, colour=GREY, middle=True))
    return parts


def _curve(frame: _Frame, states: Sequence[Mapping[str, Any]], part: str, colour: str) -> list[str]:
    """Return one line; it is not drawn where there are no such rows, as none that are done at first."""
    values = [_value(state, part) for state in states]
    found = [(place, value) for place, value in enumerate(values) if value is not None]
    points = " ".join(",".join(f"{value:.1f}" for value in frame.at(*one)) for one in found)
    told = html.escape(f"{LINES[part][1]}: " + ", ".join(f"{value:.2f}" for _, value in found))
    return [
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"><title>{told}</title>'
        "</polyline>"
    ]


def _value(state: Mapping[str, Any], part: str) -> float | None:
    value: float | None = state["scores"][METRIC][part]["value"]
    return value


def _shifted(place: tuple[float, float], across: float, down: float) -> tuple[float, float]:
    return place[0] + across, place[1] + down


def _text(x: float, y: float, text: str, *, size: int = 12, colour: str = INK, middle: bool = False) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    safe = html.escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}"{anchor}>{safe}</text>'


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, *, dashed: bool = False, width: float = 1
) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width:g}"{dash}/>'
    )


def _dot(x: float, y: float, colour: str, told: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="white" stroke="{colour}" stroke-width="1.5">'
        f"<title>{html.escape(told)}</title></circle>"
    )
