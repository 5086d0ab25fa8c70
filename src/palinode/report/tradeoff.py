"""The forget–retain trade-off of every point of a comparison as an SVG picture.

SVG written by hand: no plotting library, and it opens in any browser. To the right is more forgotten, up
is more kept; filled dots are the points that were chosen.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, KEY = 900, 520, 70, 64, 60, 210
INK, FAINT, GREY = "#1c2733", "#c9d1d9", "#8a949e"
COLOURS = (
    "#2a7f62",
    "#3b6ea8",
    "#b23a48",
    "#d08c2f",
    "#7a4f9a",
    "#3f9bb0",
    "#8c6d46",
    "#c2598f",
    "#6a8f2f",
    "#555b8f",
    "#a0522d",
    "#2f4f4f",
)


def tradeoff_picture(table: Mapping[str, Any]) -> str:
    """Return the picture of a table.json: probe probabilities of all points, and of the fixed models."""
    fixed = {name: entry["probes"] for name, entry in table["models"].items()}
    points = [point for entry in table["contestants"] for point in entry["points"]]
    most = _nice(
        [probe["forget"] for probe in fixed.values()] + [point["forget_probability"] for point in points]
    )
    kept = [probe["retain"] for probe in fixed.values()] + [point["retain_probability"] for point in points]
    frame = _Frame(most, int(10 * min(kept)) / 10, _nice(kept))
    parts = [_text(LEFT, 24, "Forget–retain trade-off of every point tried", size=14), *_axes(frame)]
    for number, entry in enumerate(table["contestants"]):
        colour = COLOURS[number % len(COLOURS)]
        parts += _dots(frame, entry, colour)
        row = TOP + 20 * number
        parts.append(_dot(WIDTH - KEY + 10, row, 5, colour, filled=True, told=entry["name"]))
        parts.append(_text(WIDTH - KEY + 22, row + 4, entry["name"]))
    for name, probe in fixed.items():
        x, y = frame.at(probe["forget"], probe["retain"])
        parts.append(f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{INK}"/>')
        parts.append(_text(x + 9, y - 7, name, size=11))
    return _svg(parts)


class _Frame:
    """Probabilities to places in the picture; the forget axis runs from much to little."""

    def __init__(self, most: float, low: float, top: float) -> None:
        self.most = most
        self.low = low
        self.top = top

    def at(self, forget: float, retain: float) -> tuple[float, float]:
        """Return x and y."""
        x = LEFT + (WIDTH - KEY - LEFT - 20) * (1 - forget / self.most)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (self.top - retain) / max(self.top - self.low, 0.01)
        return float(x), float(y)


def _axes(frame: _Frame) -> list[str]:
    parts = []
    for step in range(6):
        share = step / 5
        level = frame.low + share * (frame.top - frame.low)
        x, low = frame.at(share * frame.most, frame.low)
        parts.append(_line(x, TOP, x, low, FAINT))
        parts.append(_text(x, low + 16, f"{share * frame.most:.2f}", size=10, colour=GREY, middle=True))
        left, y = frame.at(frame.most, level)
        right, _ = frame.at(0, level)
        parts.append(_line(left, y, right, y, FAINT))
        parts.append(_text(left - 34, y + 4, f"{level:.2f}", size=10, colour=GREY))
    parts.append(_text(LEFT, HEIGHT - 16, "forget-set answer probability (probe rows) → more forgotten"))
    parts.append(_text(LEFT, 40, "upwards: retain answer probability (probe rows)", size=11, colour=GREY))
    return parts


def _dots(frame: _Frame, entry: Mapping[str, Any], colour: str) -> list[str]:
    parts = []
    for point in entry["points"]:
        x, y = frame.at(point["forget_probability"], point["retain_probability"])
        settings = ", ".join(f"{key} {value}" for key, value in point["settings"].items())
        told = f"{entry['name']}: {settings or 'defaults'}"
        parts.append(_dot(x, y, 6 if point["chosen"] else 4, colour, filled=point["chosen"], told=told))
    return parts


def _nice(values: Iterable[float]) -> float:
    """Return the end of an axis for these values: the next tenth, at most 1."""
    return min(1.0, max(0.1, (int(10 * max(values)) + 1) / 10))


def _svg(parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, *, size: int = 12, colour: str = INK, middle: bool = False) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    safe = html.escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}"{anchor}>{safe}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _dot(x: float, y: float, radius: float, colour: str, *, filled: bool, told: str) -> str:
    inside = colour if filled else "white"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{inside}" stroke="{colour}" '
        f'stroke-width="1.5">'
        f"<title>{html.escape(told)}</title></circle>"
    )
