"""Pictures as SVG files, which open in any browser: figures like those of a page, drawn without plotly.

`drawing` understands the part of plotly's figures that ours use: traces of dots, lines and texts with
intervals, and two axes a panel. The builders below make the panels of a comparison, an axis, requests, a
location and a plan; everything comes from their records.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any

from palinode.report.comparison_report import PARTS, SIDES, axis_entry, axis_models, on_same_rows
from palinode.report.content import Figure
from palinode.report.figures import PALETTE, SYMBOLS, dots, errors, figure, line, told, tradeoff_figure
from palinode.report.location_report import MOST_ROWS
from palinode.report.words import bracketed, in_picture, model_label, number, words

WIDTH, LEFT, RIGHT, ABOVE, BELOW = 900, 66, 26, 30, 46
"""Of a whole picture, and what a panel leaves for its title and axes."""
LETTER = 6.2
"""Width of a letter in the key."""
DASH_LENGTHS = {"dash": "7 4", "dot": "2 4", "dashdot": "10 3 2 3"}
SHAPES = {
    "circle": "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",
    "square": "M-.9-.9h1.8v1.8h-1.8z",
    "diamond": "M0-1.3L1.3 0L0 1.3L-1.3 0z",
    "cross": "M-1.2-.4h.8v-.8h.8v.8h.8v.8h-.8v.8h-.8v-.8h-.8z",
    "triangle-up": "M0-1.2L1.1.8h-2.2z",
}
"""Symbols with a radius of about 1."""


# Drawing


def drawing(title: str, figures: Iterable[Figure | None], *, columns: int = 1) -> str:
    """Return a whole picture: title, key, and the panels that there are in so many columns."""
    panels = [panel for panel in figures if panel]
    key, top = _key([trace for panel in panels for trace in panel["data"]])
    parts, width = [_text(12, 22, title, size=14), *key], WIDTH / columns
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        for column, panel in enumerate(row):
            parts += _panel(panel, width * column, top, width)
        top += max(panel["layout"]["height"] for panel in row)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


class _Scale:
    """Values of an axis to places between two ends of a panel."""

    def __init__(self, axis: Mapping[str, Any], values: Iterable[float], start: float, end: float) -> None:
        known = [*values, *axis.get("tickvals", ())] or [0.0]
        low, high = axis.get("range") or (min(known), max(known))
        pad = 0.0 if axis.get("range") else 0.04 * (high - low) or 0.5
        self.low, self.high = low - pad, high + pad
        self.start, self.end = (end, start) if axis.get("autorange") == "reversed" else (start, end)
        self._axis = axis

    def at(self, value: float) -> float:
        """Return the place of a value."""
        share = (value - self.low) / (self.high - self.low)
        return float(self.start + (self.end - self.start) * share)

    def ticks(self) -> list[tuple[float, str]]:
        """Return where something is written along the axis, and what: round numbers if nothing is named."""
        if "tickvals" in self._axis:
            texts = self._axis.get("ticktext") or map(str, self._axis["tickvals"])
            return list(zip(self._axis["tickvals"], texts, strict=True))
        rough = (self.high - self.low) / 6
        size = 10.0 ** math.floor(math.log10(rough))
        step = size * next(by for by in (1, 2, 5, 10) if by * size >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(place * step, f"{place * step:,.{digits}f}") for place in range(first, last + 1)]


def _panel(panel: Figure, left: float, top: float, width: float) -> list[str]:
    layout = panel["layout"]
    first, last = left + layout.get("left", LEFT), left + width - RIGHT
    above, below = top + ABOVE, top + layout["height"] - BELOW
    across = _Scale(layout["xaxis"], _reaches(panel, "x"), first, last)
    up = _Scale(layout["yaxis"], _reaches(panel, "y"), below, above)
    parts = [_text(first, top + 18, layout.get("name", ""))]
    for value, name in across.ticks():
        x = across.at(value)
        parts.append(_line([(x, above), (x, below)], "--grid"))
        parts.append(_text(x, below + 15, name, size=10, colour="--faint", anchor="middle"))
    for value, name in up.ticks():
        y = up.at(value)
        parts.append(_line([(first, y), (last, y)], "--grid"))
        for place, part in enumerate(name.split("<br>")):
            parts.append(_text(first - 8, y + 4 + 13 * place, part, size=10, colour="--faint", anchor="end"))
    below_axis, beside_axis = (layout[axis]["title"]["text"] for axis in ("xaxis", "yaxis"))
    parts.append(
        _text((first + last) / 2, below + 34, below_axis, size=11, colour="--faint", anchor="middle")
    )
    parts.append(_text(first + 4, above - 4, beside_axis, size=10, colour="--faint"))
    return parts + [part for trace in panel["data"] for part in _trace(trace, across, up)]


def _reaches(panel: Figure, axis: str) -> Iterator[float]:
    """Yield every value along an axis, with the ends of its interval."""
    for trace in panel["data"]:
        bars = trace.get(f"error_{axis}") or {
            "array": [0] * len(trace[axis]),
            "arrayminus": [0] * len(trace[axis]),
        }
        for value, above, below in zip(trace[axis], bars["array"], bars["arrayminus"], strict=True):
            if value is not None:
                yield from (value - below, value + above)


def _trace(trace: Figure, across: _Scale, up: _Scale) -> list[str]:
    points = [
        (place, across.at(x), up.at(y))
        for place, (x, y) in enumerate(zip(trace["x"], trace["y"], strict=True))
        if x is not None and y is not None
    ]
    parts = []
    if "lines" in trace["mode"]:
        style = trace["line"]
        for _, piece in groupby(enumerate(points), key=lambda pair: pair[1][0] - pair[0]):  # unbroken pieces
            members = [point for _, point in piece]
            values = ", ".join(f"{trace['y'][place]:.2f}" for place, *_ in members)
            places = [(x, y) for _, x, y in members]
            parts.append(
                _line(
                    places,
                    style["color"],
                    style.get("dash"),
                    style.get("width", 1.8),
                    f"{_name(trace)}: {values}",
                )
            )
    for place, x, y in points:
        if "error_y" in trace:
            bars, value = trace["error_y"], trace["y"][place]
            ends = (value - bars["arrayminus"][place], value + bars["array"][place])
            parts.append(_line([(x, up.at(end)) for end in ends], bars["color"]))
        if "markers" in trace["mode"]:
            said = trace["customdata"][place]
            parts.append(
                _mark(x, y, *_style(trace["marker"], place), ": ".join([said["title"], *said["lines"]]))
            )
        if "text" in trace:
            parts.append(_text(x, y - 10, trace["text"][place], size=11, anchor="middle"))
    return parts


def _style(marker: Mapping[str, Any], place: int) -> tuple[str, float, str]:
    """Return symbol, size and colour of one mark of a trace."""
    symbol, size = (
        value[place] if isinstance(value, list) else value for value in (marker["symbol"], marker["size"])
    )
    return symbol, size, marker["color"]


def _name(trace: Figure) -> str:
    """Return the name of a trace as it was before it was made safe for plotly."""
    return html.unescape(trace["name"])


def _key(traces: Sequence[Figure]) -> tuple[list[str], float]:
    """Return a mark and a name for each kind of trace, and where the panels may begin."""
    named = {_name(trace): trace for trace in reversed(traces) if trace["name"]}
    parts, x, y = list[str](), 12.0, 44.0
    for name, trace in reversed(named.items()):
        space = 44 + LETTER * len(name)
        if x + space > WIDTH:
            x, y = 12.0, y + 20
        if "lines" in trace["mode"]:
            style = trace["line"]
            parts.append(_line([(x, y), (x + 22, y)], style["color"], style.get("dash"), 2))
        if "markers" in trace["mode"]:
            symbol = trace["marker"]["symbol"]
            first = symbol if isinstance(symbol, str) else (symbol or ["circle"])[0]
            parts.append(_mark(x + 11, y, first, 9, trace["marker"]["color"], ""))
        parts.append(_text(x + 28, y + 4, name, size=11))
        x += space
    return parts, y + 12 if named else 30.0


@cache
def _colours() -> dict[str, str]:
    """Return the style sheet's colours for light pages, by variable."""
    style = files("palinode.report").joinpath("assets", "report.css").read_text(encoding="utf-8")
    return dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", style.partition("@media")[0]))


def _text(
    x: float, y: float, said: str, *, size: int = 12, colour: str = "--ink", anchor: str = "start"
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{_colours()[colour]}" text-anchor="{anchor}"'
    return f"<text {place}>{in_picture(said)}</text>" if said else ""


def _line(
    points: Iterable[tuple[float, float]],
    colour: str,
    dash: str | None = None,
    width: float = 1,
    said: str = "",
) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{DASH_LENGTHS[dash]}"' if dash in DASH_LENGTHS else ""
    style = f'fill="none" stroke="{_colours()[colour]}" stroke-width="{width:g}"{dashes}'
    return f'<polyline points="{places}" {style}><title>{in_picture(said)}</title></polyline>'


def _mark(x: float, y: float, symbol: str, size: float, colour: str, said: str) -> str:
    inside = "white" if symbol.endswith("-open") else _colours()[colour]
    shape, place = SHAPES[symbol.removesuffix("-open")], f"translate({x:.1f} {y:.1f}) scale({size / 2:g})"
    style = (
        f'fill="{inside}" stroke="{_colours()[colour]}" stroke-width="1.5" vector-effect="non-scaling-stroke"'
    )
    title = f"<title>{in_picture(said)}</title>"
    return f'<path class="mark" transform="{place}" d="{shape}" {style}>{title}</path>'


# The pictures


def tradeoff_picture(table: Mapping[str, Any]) -> str:
    """Return the picture of a table.json: every point tried, and the models, as on the page."""
    return drawing("Forget–retain trade-off of every point tried", [tradeoff_figure({"table": table})])


def axis_picture(content: Mapping[str, Any]) -> str:
    """Return the picture of an axis.json: what is left of the forget set, and what is kept of the other.

    Contestants are lines with their 95 % intervals; target, base and retrained model are dashed lines to
    compare with. Where no point kept the rule, the dot is hollow.
    """
    aims = {
        "forget": "lower is more forgotten, the retrained model is the aim",
        "retain": "higher is more kept",
    }
    ticks = [str(entry["value"]) for entry in content["values"]]
    across = {"tickvals": list(range(len(ticks))), "ticktext": ticks, "range": (-0.5, len(ticks) - 0.5)}
    panels = []
    for side in SIDES:
        fixed, contestants = axis_models(content)
        traces = [_axis_reference(content, name, side) for name in fixed]
        traces += [
            _axis_contestant(content, name, side, (place + 0.5) / len(contestants) - 0.5)
            for place, name in enumerate(contestants)
        ]
        key = content["key"] if side == SIDES[-1] else ""
        layout = {"xaxis": across, "yaxis": {"range": (0.0, _highest(content, side))}}
        name = f"{words(content['metric'])} on the {side} set: {aims[side]}"
        panels.append(figure(traces, 300, key, "", name=name, **layout))
    return drawing(content["title"], panels)


def _axis_reference(content: Mapping[str, Any], name: str, side: str) -> Figure:
    """Return a dashed line from edge to edge, so that one value is a line too."""
    found = [axis_entry(entry, name) for entry in content["values"]]
    known = [(place, one[side]["value"]) for place, one in enumerate(found) if one]
    ends = [(known[0][0] - 0.5, known[0][1]), *known, (known[-1][0] + 0.5, known[-1][1])]
    xs, ys = zip(*ends, strict=True)
    looks = {"target": ("--ink", "dash"), "base": ("--other", "dot"), "retrained": ("--ink", "dashdot")}
    return line(model_label(name), xs, ys, *looks[name])


def _axis_contestant(content: Mapping[str, Any], name: str, side: str, shift: float) -> Figure:
    """Return a contestant's line; `shift` from -0.5 to 0.5 keeps intervals apart."""
    place = axis_models(content)[1].index(name)
    colour, symbol = PALETTE[place % len(PALETTE)], SYMBOLS[place % len(SYMBOLS)]
    points, scores, symbols = list[Any](), [], []
    for step, entry in enumerate(content["values"]):
        one = axis_entry(entry, name)
        if one and one[side]["value"] is not None:
            score, kept = one[side], one["kept_rule"]
            said = [f"{number(score['value'])} {bracketed(score)}".strip()]
            said += [] if kept else ["no point kept the rule"]
            points.append((step + 0.2 * shift, score["value"], told(f"{name} at {entry['value']}", said)))
            scores.append(score)
            symbols.append(symbol if kept else f"{symbol}-open")
    trace = dots(name, points, colour, symbol, 9)
    trace["marker"]["symbol"] = symbols
    lines = {"mode": "lines+markers", "line": {"color": colour}, "error_y": errors(scores, colour)}
    return trace | lines


def _highest(content: Mapping[str, Any], side: str) -> float:
    """Return the end of a panel's scale: the next tenth above everything drawn, at most 1."""
    values = content["values"]
    scores = [one[side] for entry in values for one in (*entry["models"].values(), *entry["contestants"])]
    ends = [score[end] for score in scores for end in ("value", "high") if score[end] is not None]
    return min(1.0, (int(10 * max(ends, default=1.0)) + 1) / 10)


def requests_picture(table: Mapping[str, Any]) -> str:
    """Return the picture of a requests.json: answer probability after each request and each undoing.

    A panel a contestant; to the left of the middle requests are carried out one by one, to the right undone
    one by one. Dashed lines are references on the same rows: the retrained model, and the target.
    """
    sizes = sorted({request["rows"] for request in table["requests"]})
    rows = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
    title = (
        f"{len(table['requests'])} requests of {rows} rows one after another, then undone in another order: "
        "answer probability"
    )
    return drawing(title, [_request_panel(table, entry) for entry in table["contestants"]], columns=2)


def _request_panel(table: Mapping[str, Any], entry: Mapping[str, Any]) -> Figure | None:
    metric, count, traces = "answer_probability", len(table["requests"]), list[Figure]()
    colours = {"done": "--red", "not_done": "--unlearned", "retain": "--green"}
    for part, label in PARTS.items():
        places = list(range(len(entry["states"])))
        beside = [on_same_rows(table, state, part, metric) for state in entry["states"]]
        values = [state["scores"][metric][part]["value"] for state in entry["states"]]
        if any(value is not None for value in beside):
            reference = {"done": "retrained model", "not_done": "target"}[part]
            traces.append(line(f"same rows: {reference}", places, beside, colours[part], "dash"))
        traces.append(line(label, places, values, colours[part]))
        joint = entry["joint"]["scores"][metric][part]["value"]
        said = told("all at once", [f"{label}: {number(joint)}"])
        traces.append(dots("all at once", [(count, joint, said)], colours[part], "circle-open"))
    if not entry["undo"]["possible"]:
        note = dots("", [(1.5 * count, 0.5, {})], "--faint", "circle")
        traces.append(note | {"mode": "text", "text": ["cannot undo"]})
    shown = sorted({0, 1, count // 2, count, count + 1, count + count // 2, 2 * count})
    ticks = [str(place if place <= count else place - count) for place in shown]
    across = {"tickvals": shown, "ticktext": ticks, "range": (0, 2 * count)}
    title, name = "requests carried out → then undone →", {"name": entry["name"]}
    return figure(traces, 250, title, "", xaxis=across, yaxis={"range": (0.0, 1.0)}, **name)


def location_picture(record: Mapping[str, Any]) -> str:
    """Return the picture of a location: checkpoints along the steps, a lane a row, and the gap below."""
    series, shown = record["rungs"], record["rows"][:MOST_ROWS]
    best, target = (record["recommended"] or {}).get("step"), record["target_step"]
    last = max([one["step"] for one in series] + [target or 0, record["last"] or 0, 1])
    marks: dict[str, list[Any]] = {name: [] for name in STATES}
    for one in series:
        marks[_state_of(one)].append((one["step"], 0, 10, told(f"step {one['step']:,}", [one["location"]])))
    for lane, row in enumerate(shown, start=1):
        for seen in row["seen"]:
            name = "similar text" if seen["copy"] else "has seen forget rows"
            said = told(f"step {seen['step']:,}", [seen["copy"]] if seen["copy"] else [])
            marks[name].append((seen["step"], lane, 5, said))
    traces = []
    for name, found in marks.items():
        trace = dots(name, [(x, y, said) for x, y, _, said in found], STATES[name], "circle", 9)
        trace["marker"] |= {"size": [size for *_, size, _ in found]}
        traces.append(trace)
    if best is not None:
        said = told(f"step {best:,}", [record["recommended"]["location"], "recommended"])
        trace = dots("", [(best, 0, said)], STATES["clean"], "circle", 16)
        traces.append(trace | {"text": [f"{best:,}"]})
    if target is not None:
        traces.append(
            dots("", [(target, 0, told("target", []))], "--ink", "square", 9) | {"text": ["target"]}
        )
    lanes = ["checkpoints", *(f"row {row['row'] + 1}" for row in shown)]
    up = {"tickvals": list(range(len(lanes))), "ticktext": lanes, "autorange": "reversed"}
    more = len(record["rows"]) - len(shown)
    layout = {"xaxis": {"range": (0, last)}, "name": f"and {more} more rows" if more else "", "left": 90}
    panels = [figure(traces, 90 + 15 * len(lanes), "step", "", yaxis=up, **layout)]
    if record["onset"] and any(one["gap"] is not None for one in series):
        panels.append(_gap_panel(record["onset"], last))
    title = "No checkpoint is clean" if best is None else f"Recommended: step {best:,}"
    return drawing(title, panels)


STATES = {
    "clean": "--green",
    "has seen forget rows": "--red",
    "similar text": "--amber",
    "not known": "--other",
}
"""What may be known of a checkpoint or a row, and its colour."""


def _state_of(one: Mapping[str, Any]) -> str:
    """Return what is known of a checkpoint; what missing steps held is not known."""
    dirty = (
        one["exposed"] if one["seen"] is None or (one["unrecorded"] and not one["seen"]) else one["seen"] > 0
    )
    return "not known" if dirty is None else "has seen forget rows" if dirty else "clean"


def _gap_panel(onset: Mapping[str, Any], last: int) -> Figure | None:
    """Return the gap of the checkpoints that were looked at, with their intervals."""
    found = [(gap["step"], *gap["values"][onset["measure"]]) for gap in onset["gaps"]]
    points = [(step, value, told(f"step {step:,}", [f"{value:+.3f}"])) for step, value, *_ in found]
    trace = dots("", points, "--unlearned", "circle", 9)
    trace["marker"]["symbol"] = ["circle" if gap["exposed"] else "circle-open" for gap in onset["gaps"]]
    bars = errors(
        [{"value": value, "low": low, "high": high} for _, value, low, high in found], "--unlearned"
    )
    trace |= {"mode": "lines+markers", "line": {"color": "--unlearned"}, "error_y": bars}
    name = f"gap, {words(onset['measure'])}: filled where it is beyond noise"
    return figure([trace], 180, "step", "", xaxis={"range": (0, last)}, name=name, left=90)


def plan_picture(record: Mapping[str, Any]) -> str:
    """Return the picture of a plan: a lane a schedule, with a mark for each checkpoint that it keeps."""
    traces, names = [], []
    for lane, schedule in enumerate(record["schedules"]):
        colour = "--green" if schedule["name"] == record["recommended"] else "--other"
        points = [(step, lane, told(f"step {step:,}", [])) for step in schedule["kept"]]
        traces.append(dots("", points, colour, "circle"))
        names.append(
            f"{schedule['name']}<br>expected {schedule['expected']:,.0f}, worst {schedule['worst']:,}"
        )
    up = {"tickvals": list(range(len(names))), "ticktext": names, "autorange": "reversed"}
    steps = record["wish"]["steps"]
    panel = figure(traces, 90 + 44 * len(names), "step", "", xaxis={"range": (0, steps)}, yaxis=up, left=190)
    return drawing(f"Checkpoints to keep in {steps:,} steps", [panel])
