"""Requests carried out and undone as an SVG picture: a panel a contestant, three lines each.

SVG written by hand: no plotting library, and it opens in any browser. To the left of the middle line
requests are carried out one by one, to the right undone one by one; up is better known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from palinode.report.requests import on_same_rows
from palinode.report.words import in_picture

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 450, 230, 2
LEFT, RIGHT, TOP, BOTTOM = 44, 16, 30, 40
HEAD = 64
INK, FAINT, GREY = "#1c2733", "#dfe4e8", "#6b7680"
LINES = {
    "done": ("#b23a48", "asked to be erased"),
    "not_done": ("#3b6ea8", "not asked, or undone"),
    "retain": ("#2a7f62", "retain rows"),
}
METRIC, WORDS = "answer_probability", "answer probability"
LETTER = 5.7
"""Width of a letter in the key."""


def requests_picture(table: Mapping[str, Any]) -> str:
    """Return the picture of a requests.json: answer probability after each request and each undoing."""
    entries, count = table["contestants"], len(table["requests"])
    rows = -(-len(entries) // COLUMNS)
    width, height = PANEL_WIDTH * COLUMNS, HEAD + PANEL_HEIGHT * rows
    parts = [*_head(table, count)]
    for place, entry in enumerate(entries):
        across, down = PANEL_WIDTH * (place % COLUMNS), HEAD + PANEL_HEIGHT * (place // COLUMNS)
        parts += _panel(_Frame(across, down, count), table, entry)
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
    sizes = sorted({request["rows"] for request in table["requests"]})
    rows = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
    title = f"{count} requests of {rows} rows one after another, then undone in another order: {WORDS}"
    parts, x = [_text(12, 22, title, size=14)], 12.0
    for colour, name in LINES.values():
        parts += [_line(x, 42, x + 22, 42, colour, width=2.5), _text(x + 28, 46, name, size=11)]
        x += 44 + LETTER * len(name)
    same = "same rows: retrained model" if "retrained" in table["models"] else ""
    for colour, name in ((LINES["done"][0], same), (LINES["not_done"][0], "same rows: target")):
        if name:
            parts += [_line(x, 42, x + 22, 42, colour, dashed=True), _text(x + 28, 46, name, size=11)]
            x += 44 + LETTER * len(name)
    return [
        *parts,
        _dot(x + 4, 42, LINES["done"][0], "all at once"),
        _text(x + 14, 46, "all at once", size=11),
    ]


def _panel(frame: _Frame, table: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    parts = [_text(*_shifted(frame.at(0, 1), 0, -10), entry["name"], size=12)]
    for tenth in (0.0, 0.5, 1.0):
        parts.append(_line(*frame.at(0, tenth), *frame.at(2 * frame.count, tenth), FAINT))
        parts.append(_text(*_shifted(frame.at(0, tenth), -26, 4), f"{tenth:.1f}", size=10, colour=GREY))
    parts.append(_line(*frame.at(frame.count, 0), *frame.at(frame.count, 1), FAINT))
    parts += _ticks(frame)
    states = entry["states"]
    for part, (colour, name) in LINES.items():
        beside = [on_same_rows(table, state, part, METRIC) for state in states]
        parts += _curve(frame, beside, colour, f"{name}, reference", dashed=True)
        parts += _curve(frame, [_value(state, part) for state in states], colour, name)
        joint = _value(entry["joint"], part)
        if joint is not None:
            parts.append(_dot(*frame.at(frame.count, joint), colour, f"all at once, {name}: {joint:.3f}"))
    if not entry["undo"]["possible"]:
        x, y = frame.at(1.5 * frame.count, 0.5)
        parts.append(_text(x, y - 6, "cannot undo", size=12, colour=GREY, middle=True))
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


def _curve(
    frame: _Frame, values: Sequence[float | None], colour: str, name: str, *, dashed: bool = False
) -> list[str]:
    """Return one line over the states; it is broken where there are no such rows."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for place, value in enumerate(values):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((place, value))
    style = 'stroke-width="1" stroke-dasharray="4 3"' if dashed else 'stroke-width="2"'
    found = []
    for piece in pieces:
        points = " ".join(",".join(f"{at:.1f}" for at in frame.at(*one)) for one in piece)
        told = in_picture(f"{name}: " + ", ".join(f"{value:.2f}" for _, value in piece))
        found.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" {style}><title>{told}</title>'
            "</polyline>"
        )
    return [line for line, piece in zip(found, pieces, strict=True) if piece]


def _value(state: Mapping[str, Any], part: str) -> float | None:
    value: float | None = state["scores"][METRIC][part]["value"]
    return value


def _shifted(place: tuple[float, float], across: float, down: float) -> tuple[float, float]:
    return place[0] + across, place[1] + down


def _text(x: float, y: float, text: str, *, size: int = 12, colour: str = INK, middle: bool = False) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    safe = in_picture(text)
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
        f"<title>{in_picture(told)}</title></circle>"
    )
