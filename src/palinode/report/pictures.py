"""Pictures as SVG: what a picture shows, as values, and how it is drawn, on a page as in a file.

A colour is the name of a variable of the style sheet ("--target"), so that a page's pictures follow light and
dark; a file has the light colours. Models differ by symbol as well as by colour. Every mark says what it is
when it is pointed at, in SVG's own <title>. Every text is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import groupby
from typing import Any

from palinode.report.words import in_picture

WIDTH, NARROW = 920, 360
"""Of a picture, and of one for a phone."""
LEFT, RIGHT, ABOVE, BELOW = 52, 22, 26, 48
"""What a panel leaves for its title and axes; at the left more where names are long."""
LANE = 36
"""Height of a lane from which a narrow picture writes its name above it."""
LETTER = 6.6
"""Width of a letter."""
DASHES = {"solid": "", "dash": "7 4", "dot": "2 4", "dashdot": "10 3 2 3"}
SHAPES = {
    "circle": "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",
    "square": "M-.9-.9h1.8v1.8h-1.8z",
    "diamond": "M0-1.3L1.3 0L0 1.3L-1.3 0z",
    "plus": "M-1.2-.4h.8v-.8h.8v.8h.8v.8h-.8v.8h-.8v-.8h-.8z",
    "cross": "M-1-1L1 1M-1 1L1-1",
    "star": "M0-1.3L.33-.42L1.24-.4L.53.17L.76 1.05L0 .55L-.76 1.05L-.53.17L-1.24-.4L-.33-.42z",
    "triangle-up": "M0-1.2L1.1.8h-2.2z",
    "triangle-left": "M-1.2 0L.8-1.1v2.2z",
    "triangle-right": "M1.2 0L-.8-1.1v2.2z",
}
"""Symbols with a radius of about 1."""


# What a picture shows


@dataclass(frozen=True, slots=True)
class Mark:
    """A place, and what it says when it is pointed at, line by line; without y a line breaks there."""

    x: float
    y: float | None
    said: Sequence[str] = ()
    across: Sequence[float] = ()
    up: Sequence[float] = ()
    """Ends of its intervals along the axes, where it has them."""
    model: str | None = None
    """Whose sample answers a click on the page shows."""
    symbol: str | None = None
    size: float | None = None
    """Others than those of its trace."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Marks of one kind, and perhaps a line along them; the key has its name."""

    name: str
    marks: Sequence[Mark]
    colour: str
    symbol: str = ""
    """None: what a mark says is said when one points at its place."""
    size: float = 9
    dash: str | None = None
    """Of its line, if it has one."""
    width: float = 1.8
    label: str = ""
    """Stands above its first mark."""


@dataclass(frozen=True, slots=True)
class Ruler:
    """An axis: what it measures, and its names by place or else its numbers."""

    title: str = ""
    names: Mapping[float, str] = field(default_factory=dict)
    reach: tuple[float, float] | None = None
    """Its ends, if they do not follow from the marks."""
    from_zero: bool = False
    downwards: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """Traces under two axes; `band` is an interval of x with its name, `edges` values of x."""

    traces: Sequence[Trace]
    height: float
    x: Ruler
    y: Ruler = Ruler()
    name: str = ""
    band: tuple[float, float, str] | None = None
    edges: Sequence[float] = ()


def interval(score: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the ends of a score's interval that are known, the score itself for one that is not."""
    ends = (score.get("low"), score.get("high"))
    return () if ends == (None, None) else tuple(score["value"] if end is None else end for end in ends)


def names_down(names: Iterable[str]) -> Ruler:
    """Return an axis of names, the first at the top."""
    there = {float(place): name for place, name in enumerate(names)}
    return Ruler(names=there, reach=(-0.5, len(there) - 0.5), downwards=True)


# Drawing


def picture_file(title: str, figures: Iterable[Figure | None]) -> str:
    """Return a whole picture as an SVG file: title, key, and the panels there are."""
    style = files("palinode.report").joinpath("assets", "report.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"(--[\w-]+): ([^;]+);", style.partition("@media")[0]))
    drawn = drawing([found for found in figures if found], title=title)
    return re.sub(r'"var\((--[\w-]+)\)"', lambda found: f'"{light[found[1]]}"', drawn)


def drawing(figures: Sequence[Figure], *, title: str = "", width: float = WIDTH) -> str:
    """Return figures one below the other as an SVG element, in the colours of the style sheet around it."""
    start = 36.0 if title else 14.0
    key, top = _key([trace for panel in figures for trace in panel.traces], start, width)
    parts = [_text(12, 22, title, size=15), *key]
    for panel in figures:
        parts += _panel(panel, top, width)
        top += panel.height
    body = "\n".join(part for part in parts if part)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top:.0f}" font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="var(--page)"/>\n{body}\n</svg>\n'
    )


class _Scale:
    """Values of an axis to places between two ends of a panel."""

    def __init__(
        self, axis: Ruler, values: Iterable[float], start: float, end: float, *, headed: bool = False
    ) -> None:
        known = [*values, *axis.names, *([0.0] if axis.from_zero else [])] or [0.0]
        low, high = axis.reach or (min(known), max(known))
        pad = 0.0 if axis.reach else 0.04 * (high - low) or 0.5
        self.low, self.high = low if axis.from_zero and low == 0 else low - pad, high + pad
        self.start, self.end = (end, start) if axis.downwards else (start, end)
        self._names, self._headed = axis.names, headed

    def at(self, value: float) -> float:
        """Return the place of a value; below its name, where names stand above their lanes."""
        if self._headed:
            value = round(value) + 0.14 + 0.72 * (value - round(value))
        share = (value - self.low) / (self.high - self.low)
        return float(self.start + (self.end - self.start) * share)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Return where something is written along the axis, and what: names if there are any, or numbers."""
        if self._names:
            every = math.ceil(len(self._names) / most)
            return list(self._names.items())[::every]
        rough = (self.high - self.low) / most
        size = 10.0 ** math.floor(math.log10(rough))
        step = size * next(by for by in (1, 2, 5, 10) if by * size >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(place * step, f"{place * step:,.{digits}f}") for place in range(first, last + 1)]


def _panel(panel: Figure, top: float, width: float) -> Iterator[str]:
    last, above, below = width - RIGHT, top + ABOVE, top + panel.height - BELOW
    lane = (below - above) / max(1, len(panel.y.names))
    headed = width <= NARROW and bool(panel.y.names) and lane >= LANE
    beside = [line for name in panel.y.names.values() for line in name.split("\n")]
    first = 12 if headed else max(LEFT, 20 + LETTER * max(map(len, beside), default=0))
    marks = [mark for trace in panel.traces for mark in trace.marks if mark.y is not None]
    shown = [*panel.edges, *(panel.band[:2] if panel.band else ())]
    across = _Scale(panel.x, [*shown, *(x for mark in marks for x in (mark.x, *mark.across))], first, last)
    heights = (y for mark in marks for y in (mark.y or 0.0, *mark.up))
    up = _Scale(panel.y, heights, below, above, headed=headed)
    yield _text(first, top + 16, panel.name, size=13)
    longest = max((len(name) for name in panel.x.names.values()), default=8)
    for value, name in across.ticks(max(2, int((last - first) / (LETTER * longest + 14)))):
        x = across.at(value)
        yield _line([(x, above), (x, below)], "--grid")
        yield _text(x, below + 17, name, colour="--faint", anchor="middle", kind="tick")
    for value, name in up.ticks(len(panel.y.names) or max(2, int((below - above) / 30))):
        y, lines = up.at(value), name.split("\n")
        yield _line([(first, y), (last, y)], "--grid")
        if headed:
            yield _text(first, y - 0.64 * lane + 12, " ".join(lines), colour="--faint", kind="tick")
            continue
        for place, part in enumerate(lines):
            height = y + 4 + 14 * (place - (len(lines) - 1) / 2)
            yield _text(first - 8, height, part, colour="--faint", anchor="end", kind="tick")
    yield _text((first + last) / 2, below + 37, panel.x.title, colour="--faint", anchor="middle")
    yield _text(first + 4, above - 6, panel.y.title, colour="--faint")
    if panel.band:
        start, end = (across.at(value) for value in panel.band[:2])
        area = f'x="{start:.1f}" y="{above:.1f}" width="{end - start:.1f}" height="{below - above:.1f}"'
        yield f'<rect class="band" {area} fill="var(--band)"/>'
        yield _text(start + 4, above + 14, panel.band[2], colour="--faint")
    for edge in panel.edges:
        yield _line([(across.at(edge), above), (across.at(edge), below)], "--other", "dot")
    for trace in panel.traces:
        yield from _trace(trace, across, up)


def _trace(trace: Trace, across: _Scale, up: _Scale) -> Iterator[str]:
    places = [(mark, across.at(mark.x), mark.y) for mark in trace.marks]
    if trace.dash is not None:
        for known, piece in groupby(places, key=lambda place: place[2] is not None):
            ends = [(x, up.at(y)) for _, x, y in piece if y is not None]
            if known:
                yield _line(ends, trace.colour, trace.dash, trace.width, trace.name)
    for mark, x, value in places:
        if value is None:
            continue
        y = up.at(value)
        if mark.across:
            yield _line([(across.at(end), y) for end in mark.across], trace.colour)
        if mark.up:
            yield _line([(x, up.at(end)) for end in mark.up], trace.colour)
        if trace.symbol or mark.said:
            yield _mark(replace(mark, x=x, y=y), trace)
        if trace.label and mark is trace.marks[0]:
            yield _text(x, y - 10, trace.label, anchor="middle")


def _key(traces: Sequence[Trace], start: float, width: float) -> tuple[list[str], float]:
    """Return a mark and a name for each kind of trace, and where the panels may begin."""
    named = {trace.name: trace for trace in reversed(traces) if trace.name}
    parts, x, y = list[str](), 12.0, start + 8
    if len(named) < 2:
        return parts, start - 6
    for name in dict.fromkeys(trace.name for trace in traces if trace.name):
        trace = named[name]
        space = 44 + LETTER * len(name)
        if x > 12 and x + space > width:
            x, y = 12.0, y + 20
        if trace.dash is not None:
            parts.append(_line([(x, y), (x + 22, y)], trace.colour, trace.dash, 2))
        if trace.symbol:
            parts.append(_mark(Mark(x + 11, y, size=9), trace))
        parts.append(_text(x + 28, y + 4, name))
        x += space
    return parts, y + 12


def _text(
    x: float,
    y: float,
    said: str,
    *,
    size: float = 12,
    colour: str = "--ink",
    anchor: str = "start",
    kind: str = "",
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="var({colour})" text-anchor="{anchor}"'
    of = f' class="{kind}"' if kind else ""
    return f"<text{of} {place}>{in_picture(said)}</text>" if said else ""


def _line(
    points: Iterable[tuple[float, float]],
    colour: str,
    dash: str = "solid",
    width: float = 1,
    said: str = "",
) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{DASHES[dash]}"' if DASHES[dash] else ""
    style = f'fill="none" stroke="var({colour})" stroke-width="{width:g}"{dashes}'
    return f'<polyline points="{places}" {style}>{_title([said])}</polyline>'


def _mark(mark: Mark, trace: Trace) -> str:
    symbol, size = mark.symbol or trace.symbol, mark.size or trace.size
    place = f'transform="translate({mark.x:.1f} {mark.y:.1f}) scale({size / 2:g})"'
    said = _title(mark.said)
    if not symbol:
        return f'<path class="place" {place} d="{SHAPES["circle"]}" fill="transparent">{said}</path>'
    inside = "--page" if symbol.endswith("-open") else trace.colour
    style = f'd="{SHAPES[symbol.removesuffix("-open")]}" fill="var({inside})" stroke="var({trace.colour})"'
    edge = 'stroke-width="1.5" vector-effect="non-scaling-stroke"'
    shown = f' data-shown="{in_picture(mark.model)}"' if mark.model else ""
    return f'<path class="mark"{shown} {place} {style} {edge}>{said}</path>'


def _title(lines: Sequence[str]) -> str:
    said = "\n".join(line for line in lines if line)
    return f"<title>{in_picture(said)}</title>" if said else ""
