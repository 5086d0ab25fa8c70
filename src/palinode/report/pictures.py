"""Pictures as SVG: what those of a run, an audit and a comparison show, as values, and how they are drawn.

A colour is the name of a variable of the style sheet ("--target"), so that a page's pictures follow light and
dark; a file has the light colours. Models differ by symbol as well as by colour. Every mark says what it is
when it is pointed at, in SVG's own <title>. Every text is escaped.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from textwrap import fill
from typing import Any

from palinode.records import packaged, packaged_table
from palinode.report.verdicts import YARDSTICKS, overlap, yardstick
from palinode.report.words import (
    METRICS,
    MODELS,
    SETS,
    TRAININGS,
    at,
    in_picture,
    interval_text,
    known_first,
    metric_label,
    metrics_on,
    model_label,
    number,
    scale,
    scores_on,
    words,
)

WIDTH, NARROW = 920, 360
"""Of a picture, and of one for a phone."""
LEFT, RIGHT, ABOVE, BELOW = 52, 22, 26, 48
"""What a panel leaves for its title and axes; at the left more where names are long."""
LANE = 36
"""Height of a lane from which a narrow picture writes its name above it."""
LETTER = 6.6
"""Width of a letter."""
SYMBOLS: Mapping[str, Mapping[str, Any]] = packaged_table("report/assets/symbols.toml")
DASHES, SHAPES, MARKS, VERDICTS = (SYMBOLS[name] for name in ("dashes", "shapes", "models", "verdicts"))
"""How lines are dashed, what symbols look like, and colour and symbol of each model and finding."""


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
    style = packaged("report/assets/report.css").partition("@media")[0]
    light = dict(re.findall(r"(--[\w-]+): ([^;]+);", style))
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
    points: Iterable[tuple[float, float]], colour: str, dash: str = "solid", width: float = 1, said: str = ""
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


OTHER_MARKS = ("plus", "cross", "star", "triangle-left")
"""Symbols of models that have none of their own."""
PALETTE = ("--unlearned", "--target", "--retrained", "--base", "--amber", "--red", "--other")
FORMS = ("circle", "square", "diamond", "plus", "triangle-up")
"""Seven colours and five symbols: thirty-five contestants look different."""
STROKES = ("solid", "dash", "dot", "dashdot")
POINTS_SHOWN = 400
"""Most rows of a set that a distribution shows as dots."""


def _mark_of(model: str) -> tuple[str, str]:
    return MARKS.get(model) or ("--other", OTHER_MARKS[sum(map(ord, model)) % len(OTHER_MARKS)])


# Forgetting against keeping


def tradeoff_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return every point tried, and the models, by forget and retain probability.

    The points are the pairs of scales of a run, or those of every method of a comparison (`table`). Without
    a retain set the height is α, since there is nothing else to show.
    """
    above, band = "answer probability on the retain set", None
    if table := content.get("table"):
        both = ("forget", "retain")
        probes = {model: at(table, "models", model, "probes") for model in MODELS}
        pairs = {model: [{"value": at(probe, name)} for name in both] for model, probe in probes.items()}
        traces = _contestant_traces(table) + _model_traces(pairs, "retain", "--ink", size=14)
    else:
        tried = at(content, "scales", "points") or ()
        points = [point for point in tried if point.get("forget_probability") is not None]
        flat = bool(points) and all(point.get("retain_probability") is None for point in points)
        retain = "retain_unseen" if at(content, "scores", "unlearned", "retain_unseen") else "retain"
        both = ("forget", retain)
        pairs = {
            model: [at(content, "scores", model, name, "answer_probability") or {} for name in both]
            for model in scores_on(content, "forget")
        }
        models = [] if flat else _model_traces(pairs, retain)
        traces = models + _scale_traces(points, "forget" if flat else "retain_probability")
        above, held = "α" if flat else above, yardstick(content)
        low, high = (held[1].get("low"), held[1].get("high")) if held else (None, None)
        band = None if low is None or high is None else (low, high, "yardstick")
    across = Ruler("answer probability on the forget set")
    return Figure(traces, 560, across, Ruler(above), band=band) if traces else None


def _point_lines(point: Mapping[str, Any], owner: str | None) -> list[str]:
    """Return what a point says: whose it is, its scales, settings and figures, and what the rule says."""
    kept = "keeps the rule" if point.get("allowed") else "breaks the rule"
    pair = point.get("scales") if owner else (point.get("forget"), point.get("retain"))
    figures = {
        "forget set": point.get("forget_probability"),
        "retain set": point.get("retain_probability"),
        "neutral text": point.get("neutral_probability"),
        "distance to the yardstick": point.get("distance"),
    }
    return [
        *([owner] if owner else []),
        *([f"α = {scale(pair[0])}, β = {scale(pair[1])}"] if pair else []),
        *(f"{key.rpartition('.')[2]}: {value}" for key, value in (point.get("settings") or {}).items()),
        *(f"{name}: {number(value)}" for name, value in figures.items() if value is not None),
        *([f"{point['rows']} probe rows"] if point.get("rows") else []),
        f"chosen; {kept}" if point.get("chosen") else kept,
    ]


def _scale_traces(points: Sequence[Mapping[str, Any]], height: str) -> list[Trace]:
    """Return the pairs of scales in three groups: allowed by the rule, not, and chosen."""
    looks: dict[str, tuple[str, str, int]] = {
        "point tried, allowed": ("--unlearned", "circle-open", 11),
        "point tried, not allowed": ("--other", "cross", 8),
        "point chosen": ("--unlearned", "star", 18),
    }
    groups: dict[str, list[Mark]] = {name: [] for name in looks}
    for point in points:
        tried = "point tried, allowed" if point.get("allowed") else "point tried, not allowed"
        chosen = bool(point.get("chosen"))
        said, model = _point_lines(point, None), "unlearned" if chosen else None
        place = Mark(point["forget_probability"], point[height], said, model=model)
        groups["point chosen" if chosen else tried].append(place)
    return [Trace(name, marks, *looks[name]) for name, marks in groups.items() if marks]


def _contestant_traces(table: Mapping[str, Any]) -> list[Trace]:
    """Return the points of each contestant; the chosen one is filled and larger."""
    traces = []
    for place, entry in enumerate(table.get("contestants") or ()):
        colour, symbol = PALETTE[place % len(PALETTE)], FORMS[place % len(FORMS)]
        marks = []
        for point in entry["points"]:
            if point.get("retain_probability") is not None:
                x, y = point["forget_probability"], point["retain_probability"]
                said = _point_lines(point, entry["name"])
                shape, size = (symbol, 16) if point["chosen"] else (f"{symbol}-open", 8)
                marks.append(Mark(x, y, said, symbol=shape, size=size))
        traces.append(Trace(entry["name"], marks, colour, symbol))
    return traces


def _model_traces(
    pairs: Mapping[str, Sequence[Mapping[str, Any]]], retain: str, colour: str | None = None, size: int = 11
) -> list[Trace]:
    """Return models by their scores on forget and retain set, with intervals both ways.

    In a colour of their own, as in a run, a click shows their sample answers.
    """
    traces = []
    for model, pair in pairs.items():
        if any(score.get("value") is None for score in pair):
            continue
        own, symbol = _mark_of(model)
        x, y = (score["value"] for score in pair)
        said = [model_label(model), f"forget set: {number(x)}", f"{SETS[retain]}: {number(y)}"]
        across, up = map(interval, pair)
        mark = Mark(x, y, said, across, up, None if colour else model)
        traces.append(Trace(model_label(model), [mark], colour or own, symbol, size))
    return traces


# What was measured


def untold(content: Mapping[str, Any], data_set: str) -> dict[str, str]:
    """Return the metrics that say nothing on a set, each with why; no picture shows them."""
    told, rows = {}, scores_on(content, data_set)
    for metric in metrics_on(content, [data_set]):
        known = {name: one[metric] for name, one in rows.items() if at(one, metric, "value") is not None}
        pair = [known[name] for name in ("target", *YARDSTICKS) if name in known][:2]
        if len({score["value"] for score in known.values()}) < min(2, len(rows)):
            told[metric] = "it is the same for all models" if known else "no model has a value"
        elif data_set == "forget" and "target" in known and pair[1:] and overlap(*pair):
            told[metric] = "the intervals of target and yardstick overlap, so it cannot tell"
    return told


def glance_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return what the model knew, what it knows now, and what one knows that never saw the forget set."""
    retain = "retain_unseen" if at(content, "scores", "unlearned", "retain_unseen") else "retain"
    sets = {"forget": "rows to be forgotten", retain: "rows to be kept"}
    lanes = {label: (name, "answer_probability") for name, label in sets.items() if scores_on(content, name)}
    never = (yardstick(content) or ("",))[0]
    how = {"estimate": " (estimated)", "base": " (an earlier one)"}.get(never, "")
    names = {"target": "before", "unlearned": "now", never: f"a model that never saw them{how}"}
    return _dots(content, names, lanes, "how likely the right answer is: 0 never, 1 surely", apart=0.0)


def score_figure(content: Mapping[str, Any], data_set: str) -> Figure | None:
    """Return each model's scores on a set as dots with their intervals, a lane of dots a metric."""
    names = {model: model_label(model) for model in scores_on(content, data_set)}
    silent = untold(content, data_set)
    told = [name for name in metrics_on(content, [data_set]) if name in METRICS and name not in silent]
    return _dots(content, names, {metric_label(name): (data_set, name) for name in told}, "score")


def _dots(
    content: Mapping[str, Any],
    names: Mapping[str, str],
    lanes: Mapping[str, tuple[str, str]],
    title: str,
    apart: float = 0.16,
) -> Figure | None:
    """Return scores as dots with their intervals: a lane for each set and metric, a trace for each model."""
    traces = []
    for place, (model, name) in enumerate(names.items()):
        offset, marks = apart * (place - (len(names) - 1) / 2), []
        for height, (lane, (data_set, metric)) in enumerate(lanes.items()):
            score = at(content, "scores", model, data_set, metric) or {}
            if score.get("value") is not None:
                reach = f"interval {interval_text(score) or 'not known'}, {score.get('n')} examples"
                said = [name, f"{lane}: {number(score['value'])}", reach]
                marks.append(Mark(score["value"], height + offset, said, interval(score)))
        traces.append(Trace(name, marks, *_mark_of(model)))
    across, down = Ruler(title, reach=(-0.04, 1.04)), names_down(lanes)
    return Figure(traces, 110 + 60 * len(lanes), across, down) if lanes else None


def likelihood_figure(content: Mapping[str, Any], data_set: str) -> Figure | None:
    """Return how each model's log-probability of the right answer is spread over the rows of a set.

    A dot is a row (of many, every second or third, …, so that the spread stays), a thick line the middle half
    of them, a mark the mean.
    """
    rows = at(content, "log_probabilities", data_set) or {}
    traces, models = [], [model for model in known_first(rows, MODELS) if rows[model]]
    for place, model in enumerate(models):
        values, (colour, symbol) = sorted(rows[model]), _mark_of(model)
        quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        mean = statistics.fmean(values)
        figures = [f"mean: {mean:.3f}", f"median: {quarters[1]:.3f}"]
        half = f"middle half: {quarters[0]:.3f} – {quarters[2]:.3f}"
        said = [model_label(model), *figures, half, f"{len(values)} rows"]
        shown = values[:: math.ceil(len(values) / POINTS_SHOWN)]
        dots = [Mark(x, place + 0.3 * math.sin(2.4 * row), [f"{x:.3f}"]) for row, x in enumerate(shown)]
        middle = [Mark(end, place) for end in (quarters[0], quarters[2])]
        traces += [
            Trace("", dots, colour, "circle", 3.5),
            Trace("", middle, colour, dash="solid", width=5),
            Trace("", [Mark(mean, place, said)], colour, f"{symbol.removesuffix('-open')}-open", 11),
        ]
    across = Ruler("mean log-probability a token, in nats")
    down = names_down(map(model_label, models))
    return Figure(traces, 90 + 80 * len(models), across, down) if models else None


# Fine-tunings


def training_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return the loss of each fine-tuning by step."""
    colours = ("--target", "--retrained", "--base", "--other")
    traces = []
    for place, (name, run) in enumerate((content.get("training") or {}).items()):
        curve = at(run, "curve") or {}
        if curve.get("losses"):
            label = TRAININGS.get(name, words(name))
            marks = [
                Mark(step, loss, [label, f"step {step}: {loss:.3f}"])
                for step, loss in zip(curve["steps"], curve["losses"], strict=True)
            ]
            traces.append(Trace(label, marks, colours[place % 4], dash=STROKES[place % 4]))
    return Figure(traces, 340, Ruler("step"), Ruler("loss", from_zero=True)) if traces else None


# An audit


def attack_figure(audit: Mapping[str, Any]) -> Figure | None:
    """Return by how many margins the model differs from the reference model in each test of an audit.

    Each side is measured by its own margin; a difference on a side without one is not judged. Tests that the
    target passes as well are left out: they cannot tell.
    """
    titles: list[str] = []
    marks: dict[str, list[Mark]] = {verdict: [] for verdict in VERDICTS}
    for name, attack in audit["attacks"].items():
        for test, entry in (attack.get("tests") or {}).items():
            finding = entry["findings"]["audited"]
            verdict, difference = finding["verdict"], finding["difference"]
            key = f"{name}.{test}"
            if verdict not in VERDICTS or difference["value"] is None or says_little(audit, key, entry):
                continue
            sides = [at(audit, "policy", "margins", key, side) or 0 for side in ("less", "more")]
            less, more = (side or max(sides) or 1 for side in sides)
            measured = (difference["value"], *interval(difference))
            value, *ends = (x / (more if x > 0 else less) for x in measured)
            if verdict == "within" and value and not sides[value > 0]:
                verdict = "not judged"
            parts = ("score", "reference", "difference")
            model, beside, apart = (number(finding[part]["value"]) for part in parts)
            said = [verdict, f"model {model}, reference {beside}", f"difference {apart}"]
            marks[verdict].append(Mark(value, len(titles), said, ends))
            titles.append(fill(f"{attack['title']}: {entry['title']}", 34))
    traces = [Trace(verdict, marks[verdict], *looks) for verdict, looks in VERDICTS.items() if marks[verdict]]
    across = Ruler("knows less  ←  difference, in margins  →  knows more")
    down = names_down(titles)
    return Figure(traces, 130 + 44 * len(titles), across, down, edges=(-1, 1)) if traces else None


def says_little(audit: Mapping[str, Any], key: str, entry: Mapping[str, Any]) -> bool:
    """Tell whether a test for knowing more cannot tell: the model passes, and so does the target."""
    verdicts = [at(entry, "findings", model, "verdict") for model in ("audited", "target")]
    judged = at(audit, "policy", "margins", key, "more")
    return bool(judged) and verdicts[0] in ("within", "unclear") and verdicts[1] == "within"


def relearning_figure(audit: Mapping[str, Any]) -> Figure | None:
    """Return how fast each model learns the forget set again, a line an attack and model."""
    roles = {"audited": "unlearned", "reference": "retrained"}
    curves = [
        attack
        for attack in audit["attacks"].values()
        if any(found.get("curve") for found in (attack.get("details") or {}).values())
    ]
    traces = []
    for place, attack in enumerate(curves):
        for model, found in attack["details"].items():
            label = f"{model}, {attack['title']}"
            marks = [
                Mark(step, value, [label, f"step {step}: {value:.3f}"])
                for step, value in zip(found["steps"], found["curve"], strict=True)
            ]
            traces.append(Trace(label, marks, *_mark_of(roles.get(model, model)), 8, STROKES[place % 3]))
    up = Ruler("mean answer probability", from_zero=True)
    return Figure(traces, 380, Ruler("step of relearning"), up) if traces else None
