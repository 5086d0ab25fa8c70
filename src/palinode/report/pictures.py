"""A location and a plan in pictures: SVG written by hand, which opens in any browser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from palinode.report.words import in_picture

MOST_ROWS = 40
"""Rows of the forget set that a table or a picture shows one by one."""
WIDTH, MARGIN, LANE = 900, 170, 14
STEP_WIDTH = 60
"""Steps are written at least so far apart in a picture."""

COLOURS = {
    "ink": "#1c2733",
    "faint": "#c9d1d9",
    "clean": "#2a7f62",
    "seen": "#b23a48",
    "unknown": "#8a949e",
    "near": "#d08c2f",
    "gap": "#3b6ea8",
}


def location_picture(record: Mapping[str, Any]) -> str:
    """Return an SVG: checkpoints along the steps, a lane a row with its exposures, and the gap below."""
    last = max([rung["step"] for rung in record["rungs"]] + [record["target_step"] or 0, record["last"] or 0])
    axis = _Axis(last)
    shown = record["rows"][:MOST_ROWS]
    top = 70
    bottom = top + LANE * len(shown) + 10
    has_gap = any(rung["gap"] is not None for rung in record["rungs"])
    height = bottom + (150 if has_gap else 40)
    parts = [*_ladder_marks(record, axis, bottom), *_lanes(shown, axis, top)]
    if len(record["rows"]) > len(shown):
        parts.append(_text(10, bottom + 12, f"and {len(record['rows']) - len(shown)} more rows", size=10))
    if has_gap:
        parts += _gap_curve(record, axis, bottom + 30)
    best = record["recommended"]
    title = "No checkpoint is clean" if best is None else f"Recommended: step {best['step']:,}"
    return _svg(height, [_text(10, 20, title, size=13), *_legend(), *parts])


def plan_picture(record: Mapping[str, Any]) -> str:
    """Return an SVG: a lane a schedule, with a mark for each checkpoint that it keeps."""
    axis = _Axis(record["wish"]["steps"])
    parts = [_text(10, 20, f"Checkpoints to keep in {record['wish']['steps']:,} steps", size=13)]
    for number, schedule in enumerate(record["schedules"]):
        y = 50 + 40 * number
        colour = COLOURS["clean" if schedule["name"] == record["recommended"] else "unknown"]
        parts.append(_text(10, y + 4, schedule["name"]))
        parts.append(_line(axis.at(0), y, axis.at(axis.last), y, COLOURS["faint"]))
        parts += [_dot(axis.at(step), y, 4, colour, f"step {step:,}") for step in schedule["kept"]]
        told = f"expected {schedule['expected']:,.0f}, worst {schedule['worst']:,} steps"
        parts.append(_text(axis.at(0), y + 18, told, size=10, colour=COLOURS["unknown"]))
    return _svg(60 + 40 * len(record["schedules"]), parts)


class _Axis:
    """Steps along the width of a picture."""

    def __init__(self, last: int) -> None:
        self.last = max(1, last)

    def at(self, step: float) -> float:
        """Return the x of a step."""
        return float(MARGIN + (WIDTH - MARGIN - 30) * step / self.last)


def _legend() -> list[str]:
    parts = []
    told = {"clean": "clean", "seen": "has seen forget rows", "near": "similar text", "unknown": "not known"}
    for number, (name, text) in enumerate(told.items()):
        x = WIDTH - 520 + 130 * number
        parts += [_dot(x, 16, 4, COLOURS[name], text), _text(x + 8, 20, text, size=10)]
    return parts


def _ladder_marks(record: Mapping[str, Any], axis: _Axis, bottom: int) -> list[str]:
    parts = [_text(10, 54, "checkpoints"), _line(axis.at(0), 50, axis.at(axis.last), 50, COLOURS["faint"])]
    best = (record["recommended"] or {}).get("step")
    told = -float(MARGIN)  # x of the last step that was written below
    for rung in record["rungs"]:
        x, step = axis.at(rung["step"]), rung["step"]
        if x - told > STEP_WIDTH:
            parts.append(_text(x, bottom + 12, f"{step:,}", size=9, colour=COLOURS["unknown"], middle=True))
            told = x
        dirty = rung["exposed"] if rung["seen"] is None else rung["seen"] > 0
        if rung["unrecorded"] and not rung["seen"]:  # what the missing steps held is not known
            dirty = rung["exposed"]
        colour = COLOURS["unknown" if dirty is None else "seen" if dirty else "clean"]
        parts.append(_line(x, 50, x, bottom, COLOURS["faint"]))
        parts.append(_dot(x, 50, 8 if step == best else 5, colour, f"step {step:,}: {rung['location']}"))
        if step == best:
            parts.append(_text(x, 38, f"{step:,}", size=11, colour=colour, middle=True))
    if record["target_step"] is not None:
        x = axis.at(record["target_step"])
        parts.append(f'<rect x="{x - 4:.1f}" y="46" width="8" height="8" fill="{COLOURS["ink"]}"/>')
        parts.append(_text(x, 38, "target", size=11, middle=True))
    return parts


def _lanes(rows: Sequence[Mapping[str, Any]], axis: _Axis, top: int) -> list[str]:
    parts = []
    for number, row in enumerate(rows):
        y = top + LANE * number + LANE / 2
        parts.append(_text(10, y + 3, f"row {row['row'] + 1}", size=9, colour=COLOURS["unknown"]))
        for entry in row["seen"]:
            colour = COLOURS["near" if entry["copy"] else "seen"]
            told = f"step {entry['step']:,}" + (f": {entry['copy']}" if entry["copy"] else "")
            parts.append(_dot(axis.at(entry["step"]), y, 2, colour, told))
    return parts


def _gap_curve(record: Mapping[str, Any], axis: _Axis, top: int) -> list[str]:
    """Return the gap of the checkpoints that were looked at, with their intervals."""
    onset = record["onset"]
    values = [(gap["step"], *gap["values"][onset["measure"]], gap["exposed"]) for gap in onset["gaps"]]
    low, high = min(0.0, *(value[2] for value in values)), max(1e-9, *(value[3] for value in values))

    def level(value: float) -> float:
        return float(top + 90 - 80 * (value - low) / (high - low))

    parts = [_text(10, top + 14, "gap"), _text(10, top + 28, onset["measure"].replace("_", " "), size=10)]
    parts.append(_line(axis.at(0), level(0), axis.at(axis.last), level(0), COLOURS["faint"]))
    top_value = max(value[1] for value in values)
    for mark in {0.0, top_value}:
        parts.append(_text(MARGIN - 36, level(mark) + 3, f"{mark:+.2f}", size=9, colour=COLOURS["unknown"]))
    points = " ".join(f"{axis.at(step):.1f},{level(value):.1f}" for step, value, *_ in values)
    parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS["gap"]}" stroke-width="1.5"/>')
    for step, value, least, most, exposed in values:
        parts.append(_line(axis.at(step), level(least), axis.at(step), level(most), COLOURS["gap"]))
        colour = COLOURS["seen" if exposed else "clean"]
        parts.append(_dot(axis.at(step), level(value), 4, colour, f"step {step:,}: {value:+.3f}"))
    return parts


def _svg(height: float, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-family="sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _text(
    x: float, y: float, text: str, *, size: int = 12, colour: str = COLOURS["ink"], middle: bool = False
) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}"{anchor}>{in_picture(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _dot(x: float, y: float, radius: float, colour: str, told: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"><title>{in_picture(told)}</title>'
        "</circle>"
    )
