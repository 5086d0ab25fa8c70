"""The forget–retain trade-off of every point of a comparison as an SVG picture.

SVG written by hand: no plotting library, and it opens in any browser. To the right is more forgotten, up
is more kept; filled dots are the points that were chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from palinode.report.svg import COLOURS, FAINT, GREY, INK, dot, line, svg, text

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, KEY = 900, 520, 70, 64, 60, 210


def tradeoff_picture(table: Mapping[str, Any]) -> str:
    """Return the picture of a table.json: probe probabilities of all points, and of the fixed models."""
    fixed = {name: entry["probes"] for name, entry in table["models"].items()}
    points = [point for entry in table["contestants"] for point in entry["points"]]
    most = _nice(
        [probe["forget"] for probe in fixed.values()] + [point["forget_probability"] for point in points]
    )
    kept = [probe["retain"] for probe in fixed.values()] + [point["retain_probability"] for point in points]
    frame = _Frame(most, int(10 * min(kept)) / 10, _nice(kept))
    parts = [text(LEFT, 24, "Forget–retain trade-off of every point tried", size=14), *_axes(frame)]
    for number, entry in enumerate(table["contestants"]):
        colour = COLOURS[number % len(COLOURS)]
        parts += _dots(frame, entry, colour)
        row = TOP + 20 * number
        parts.append(dot(WIDTH - KEY + 10, row, 5, colour, filled=True, told=entry["name"]))
        parts.append(text(WIDTH - KEY + 22, row + 4, entry["name"]))
    for name, probe in fixed.items():
        x, y = frame.at(probe["forget"], probe["retain"])
        parts.append(f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{INK}"/>')
        parts.append(text(x + 9, y - 7, name, size=11))
    return svg(WIDTH, HEIGHT, parts)


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
        parts.append(line(x, TOP, x, low, FAINT))
        parts.append(text(x, low + 16, f"{share * frame.most:.2f}", size=10, colour=GREY, middle=True))
        left, y = frame.at(frame.most, level)
        right, _ = frame.at(0, level)
        parts.append(line(left, y, right, y, FAINT))
        parts.append(text(left - 34, y + 4, f"{level:.2f}", size=10, colour=GREY))
    parts.append(text(LEFT, HEIGHT - 16, "forget-set answer probability (probe rows) → more forgotten"))
    parts.append(text(LEFT, 40, "upwards: retain answer probability (probe rows)", size=11, colour=GREY))
    return parts


def _dots(frame: _Frame, entry: Mapping[str, Any], colour: str) -> list[str]:
    parts = []
    for point in entry["points"]:
        x, y = frame.at(point["forget_probability"], point["retain_probability"])
        settings = ", ".join(f"{key} {value}" for key, value in point["settings"].items())
        told = f"{entry['name']}: {settings or 'defaults'}"
        parts.append(dot(x, y, 6 if point["chosen"] else 4, colour, filled=point["chosen"], told=told))
    return parts


def _nice(values: Iterable[float]) -> float:
    """Return the end of an axis for these values: the next tenth, at most 1."""
    return min(1.0, max(0.1, (int(10 * max(values)) + 1) / 10))
