"""Pictures as plain values, as plotly takes them: what the page draws, and svg.py where there is no page.

A colour is the name of a variable of the style sheet ("--target"); the page's script looks it up, so that
pictures follow light and dark. Models differ by symbol as well as by colour. Names from the data are escaped,
for plotly reads a part of HTML in its texts.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

from palinode.report.content import Figure
from palinode.report.verdicts import YARDSTICKS, yardstick
from palinode.report.words import (
    METRICS,
    MODELS,
    SETS,
    TRAININGS,
    at,
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

MARKS = {
    "target": ("--target", "square"),
    "unlearned": ("--unlearned", "circle"),
    "retrained": ("--retrained", "diamond"),
    "base": ("--base", "triangle-up"),
    "estimate": ("--retrained", "diamond-open"),
}
"""Colour and symbol of each model; one that is not here gets one of the others."""
OTHER_MARKS = ("cross", "x", "star", "pentagon")
VERDICTS = {
    "within": ("--green", "circle"),
    "unclear": ("--amber", "diamond"),
    "knows more": ("--red", "triangle-right"),
    "knows less": ("--red", "triangle-left"),
}
"""Colour and symbol of what a test of an audit found."""
PALETTE = ("--unlearned", "--target", "--retrained", "--base", "--amber", "--red", "--other")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up")
"""Seven colours and five symbols: thirty-five contestants look different."""
DASHES = ("solid", "dash", "dot", "dashdot")
NAMES = {"autorange": "reversed", "automargin": True, "showgrid": False}
"""An axis with names, the first at the top."""
POINTS_SHOWN = 400
"""Rows of a set up to which a distribution shows each as a dot."""


# What all pictures share


def dots(
    name: str,
    points: Sequence[tuple[float, float, Mapping[str, Any]]],
    colour: str,
    symbol: str,
    size: int = 11,
) -> Figure:
    """Return a trace of dots: x, y, and what each says (`told`)."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escaped_name(name),
        "x": [x for x, *_ in points],
        "y": [y for _, y, _ in points],
        "marker": {"color": colour, "symbol": symbol, "size": size},
        "customdata": [said for *_, said in points],
        "hovertemplate": "%{customdata.text}<extra></extra>",
    }


def line(
    name: str, xs: Sequence[Any], ys: Sequence[float | None], colour: str, dash: str = "solid"
) -> Figure:
    """Return a trace of a line, which breaks where there is no figure."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": escaped_name(name),
        "x": list(xs),
        "y": list(ys),
        "line": {"color": colour, "dash": dash},
        "hovertemplate": f"<b>{escaped_name(name)}</b><br>step %{{x}}: %{{y:.3f}}<extra></extra>",
    }


def figure(traces: Sequence[Figure], height: int, x: str, y: str, **layout: Any) -> Figure | None:
    """Return traces under axes with these titles; None without traces."""
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}, "automargin": True}}
    for name in axes:
        axes[name] |= layout.pop(name, {})
    return {"data": list(traces), "layout": {"height": height, **axes, **layout}} if traces else None


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


def escaped_name(text: str) -> str:
    """Return a name, safe for plotly."""
    return html.escape(text, quote=False)


def told(title: str, lines: Sequence[str], *, model: str | None = None) -> dict[str, Any]:
    """Return what a mark says when hovered (`text`, escaped for plotly) and clicked (`title`, `lines`).

    `model` is the one whose sample answers a click shows.
    """
    shown = [escaped_name(text) for text in (title, *lines)]
    return {
        "text": "<br>".join([f"<b>{shown[0]}</b>", *shown[1:]]),
        "title": title,
        "lines": list(lines),
        "model": model,
    }


def _mark(model: str) -> tuple[str, str]:
    return MARKS.get(model) or ("--other", OTHER_MARKS[sum(map(ord, model)) % len(OTHER_MARKS)])


# Forgetting against keeping


def tradeoff_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return every point tried, and the models, by forget and retain probability.

    The points are the pairs of scales of a run, or those of every method of a comparison (`table`). Without
    a retain set the height is α, since there is nothing else to show.
    """
    above, height, layout = "answer probability on the retain set", "retain_probability", {}
    if table := content.get("table"):
        probes = {model: at(table, "models", model, "probes") or {} for model in MODELS}
        pairs = {
            model: [{"value": probe.get(name)} for name in ("forget", "retain")]
            for model, probe in probes.items()
        }
        traces = _contestant_traces(table) + _model_traces(pairs, "retain", "--ink", size=14)
    else:
        points = [
            point
            for point in at(content, "scales", "points") or ()
            if point.get("forget_probability") is not None
        ]
        flat = bool(points) and all(point.get(height) is None for point in points)
        if flat:
            above, height = "α", "forget"
        retain = "retain_unseen" if at(content, "scores", "unlearned", "retain_unseen") else "retain"
        pairs = {
            model: [at(scores, name, "answer_probability") or {} for name in ("forget", retain)]
            for model, scores in (
                (name, at(content, "scores", name) or {}) for name in scores_on(content, "forget")
            )
        }
        models = [] if flat else _model_traces(pairs, retain) + _front_trace(content)
        traces = models + _scale_traces(points, height)
        layout = {"shapes": _yardstick_band(content)}
    return figure(traces, 560, "answer probability on the forget set", above, **layout)


def tradeoff_caption(content: Mapping[str, Any]) -> str:
    """Return what the picture of a run shows, in words."""
    held = yardstick(content)
    goal = f" The band is the interval of {YARDSTICKS[held[0]]}." if held else ""
    return (
        f"Left is less of the forget set, up is more of the rest.{goal} Points were tried on probe rows and "
        "models measured on the evaluation rows, so the chosen point and the unlearned model need not "
        "coincide. Click a mark for its figures."
    )


def _point_told(point: Mapping[str, Any], owner: str | None) -> dict[str, Any]:
    kept = "keeps the rule" if point.get("allowed") else "breaks the rule"
    pair = point.get("scales") if owner else (point.get("forget"), point.get("retain"))
    scales = [f"α = {scale(pair[0])}, β = {scale(pair[1])}"] if pair else []
    figures = {
        "forget set": point.get("forget_probability"),
        "retain set": point.get("retain_probability"),
        "neutral text": point.get("neutral_probability"),
        "distance to the yardstick": point.get("distance"),
    }
    lines = [
        *(f"{key.rpartition('.')[2]}: {value}" for key, value in (point.get("settings") or {}).items()),
        *(f"{name}: {number(value)}" for name, value in figures.items() if value is not None),
        *([f"{point['rows']} probe rows"] if point.get("rows") else []),
        f"chosen; {kept}" if point.get("chosen") else kept,
    ]
    if owner:
        return told(owner, [*scales, *lines])
    return told(scales[0], lines, model="unlearned" if point.get("chosen") else None)


def _scale_traces(points: Sequence[Mapping[str, Any]], height: str) -> list[Figure]:
    """Return the pairs of scales in three groups: allowed by the rule, not, and chosen."""
    looks: dict[str, tuple[str, str, int]] = {
        "point tried, allowed": ("--unlearned", "circle-open", 11),
        "point tried, not allowed": ("--other", "x-thin-open", 9),
        "point chosen": ("--unlearned", "star", 17),
    }
    groups: dict[str, list[Any]] = {name: [] for name in looks}
    for point in points:
        tried = "point tried, allowed" if point.get("allowed") else "point tried, not allowed"
        said = _point_told(point, None)
        group = groups["point chosen" if point.get("chosen") else tried]
        group.append((point["forget_probability"], point[height], said))
    traces = [dots(name, members, *looks[name]) for name, members in groups.items() if members]
    for trace in traces:
        trace["marker"]["line"] = {"width": 2 if trace["marker"]["symbol"].endswith("-open") else 0}
    return traces


def _contestant_traces(table: Mapping[str, Any]) -> list[Figure]:
    """Return the points of each contestant; the chosen one is filled and larger."""
    traces = []
    for place, entry in enumerate(table.get("contestants") or ()):
        points = [point for point in entry["points"] if point.get("retain_probability") is not None]
        colour, symbol = PALETTE[place % len(PALETTE)], SYMBOLS[place % len(SYMBOLS)]
        marks = [
            (point["forget_probability"], point["retain_probability"], _point_told(point, entry["name"]))
            for point in points
        ]
        trace = dots(entry["name"], marks, colour, symbol)
        trace["marker"] |= {
            "symbol": [symbol if point["chosen"] else f"{symbol}-open" for point in points],
            "size": [16 if point["chosen"] else 8 for point in points],
            "line": {"width": 1.5, "color": colour},
            "opacity": 1,
        }
        traces.append(trace)
    return traces


def _model_traces(
    pairs: Mapping[str, Sequence[Mapping[str, Any]]], retain: str, colour: str | None = None, size: int = 11
) -> list[Figure]:
    """Return models by their scores on forget and retain set, with intervals both ways.

    In a colour of their own, as in a run, a click shows their sample answers.
    """
    traces = []
    for model, pair in pairs.items():
        if any(score.get("value") is None for score in pair):
            continue
        own, symbol = _mark(model)
        x, y = (score["value"] for score in pair)
        lines = [f"forget set: {number(x)}", f"{SETS[retain]}: {number(y)}"]
        said = told(model_label(model), lines, model=None if colour else model)
        trace = dots(model_label(model), [(x, y, said)], colour or own, symbol, size)
        bars = {f"error_{axis}": errors([score], own) for axis, score in zip("xy", pair, strict=True)}
        traces.append(trace if colour else trace | bars)
    return traces


def _front_trace(content: Mapping[str, Any]) -> list[Figure]:
    """Return a line along the points that no other one beats on both sides."""
    front = sorted(
        (point["forget_probability"], point["retain_probability"])
        for point in at(content, "scales", "front") or ()
        if point.get("forget_probability") is not None and point.get("retain_probability") is not None
    )
    if len(front) < 2:
        return []
    xs, ys = zip(*front, strict=True)
    trace = line("front", xs, ys, "--unlearned", "dot")
    return [{**trace, "line": {**trace["line"], "width": 1}, "hoverinfo": "skip"}]


def _yardstick_band(content: Mapping[str, Any]) -> list[Figure]:
    """Return the yardstick's interval as a band across the picture."""
    held = yardstick(content)
    if held is None or held[1].get("low") is None or held[1].get("high") is None:
        return []
    band = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "x0": held[1]["low"], "x1": held[1]["high"]}
    label = {"text": "yardstick", "textposition": "top left", "font": {"size": 12, "color": "--faint"}}
    return [{**band, "fillcolor": "--band", "line": {"width": 0}, "layer": "below", "label": label}]


# What was measured


def score_figure(content: Mapping[str, Any], data_set: str) -> Figure | None:
    """Return each model's scores on a set as dots with their intervals, a line of dots a metric."""
    rows = scores_on(content, data_set)
    metrics = [name for name in metrics_on(content, [data_set]) if name in METRICS]
    if not metrics:
        return None
    traces = []
    for place, (model, scores) in enumerate(rows.items()):
        found, points = [], []
        for height, name in enumerate(metrics):
            score = scores.get(name) or {}
            if score.get("value") is not None:
                reach = interval_text(score) or "not known"
                said = [
                    f"{metric_label(name)}: {number(score['value'])}",
                    f"interval {reach}, {score.get('n')} examples",
                ]
                offset = 0.16 * (place - (len(rows) - 1) / 2)
                points.append((score["value"], height + offset, told(model_label(model), said)))
                found.append(score)
        colour, symbol = _mark(model)
        trace = dots(model_label(model), points, colour, symbol)
        traces.append(trace | {"error_x": errors(found, colour)})
    ticks = {"tickvals": list(range(len(metrics))), "ticktext": [metric_label(name) for name in metrics]}
    across = {"range": [-0.04, 1.04]}
    return figure(traces, 130 + 70 * len(metrics), "score", "", xaxis=across, yaxis={**ticks, **NAMES})


def likelihood_figure(content: Mapping[str, Any], data_set: str) -> Figure | None:
    """Return how each model's log-probability of the right answer is spread over the rows of a set."""
    rows = at(content, "log_probabilities", data_set) or {}
    traces = []
    for model in known_first(rows, MODELS):
        values, colour, label = rows[model], _mark(model)[0], escaped_name(model_label(model))
        few = len(values) <= POINTS_SHOWN
        traces.append(
            {
                "type": "violin",
                "name": label,
                "x": values,
                "y0": label,
                "orientation": "h",
                "points": "all" if few else False,
                "jitter": 0.5,
                "pointpos": 0,
                "marker": {"size": 3.5, "color": colour, "opacity": 0.7},
                "line": {"color": colour, "width": 1.5},
                "meanline": {"visible": True},
                "box": {"visible": True, "width": 0.18},
                "spanmode": "hard",
                "hoveron": "points+kde" if few else "violins",
                "hovertemplate": f"<b>{label}</b><br>%{{x:.3f}}<extra></extra>",
                "showlegend": False,
            }
        )
    return figure(traces, 110 + 90 * len(traces), "mean log-probability a token, in nats", "", yaxis=NAMES)


# Vectors, dose and fine-tunings


def norm_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return the length of each vector by part of the model."""
    parts = at(content, "vectors", "parts") or {}
    lengths = {name: [at(part, name, "norm") for part in parts.values()] for name in ("forget", "retain")}
    return _by_part(parts, {f"{name} vector": found for name, found in lengths.items()}, "length")


def cosine_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return the cosine between the vectors by part of the model."""
    parts = at(content, "vectors", "parts") or {}
    cosines = {"cosine": [at(part, "cosine") for part in parts.values()]}
    return _by_part(parts, cosines, "cosine of the two vectors", ("--unlearned",))


def dose_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return the scale found in the stored weights by part of the model, as a share of the one asked for."""
    parts = at(content, "dose", "parts") or {}
    shares = {}
    for name in ("forget", "retain"):
        if asked := at(content, "scales", name):
            found = [at(part, "effective", name) for part in parts.values()]
            shares[f"{name} vector"] = [None if one is None else one / asked for one in found]
    return _by_part(parts, shares, "stored / asked scale")


def _by_part(
    parts: Iterable[str],
    lines: Mapping[str, Sequence[float | None]],
    title: str,
    colours: Sequence[str] = ("--target", "--retrained"),
) -> Figure | None:
    """Return a line a name over the parts of the model."""
    labels, traces = [escaped_name(part) for part in parts], []
    for place, (name, values) in enumerate(lines.items()):
        if any(value is not None for value in values):
            xs = [label.removeprefix("layer ") for label in labels]
            trace = line(name, xs, values, colours[place], ("solid", "dot")[place])
            symbol = ("circle", "diamond")[place]
            trace |= {
                "mode": "lines+markers",
                "marker": {"color": colours[place], "symbol": symbol, "size": 7},
                "hovertext": labels,
                "hovertemplate": f"<b>%{{hovertext}}</b><br>{name}: %{{y:.4g}}<extra></extra>",
            }
            traces.append(trace)
    across, up = {"type": "category", "automargin": True}, {"rangemode": "tozero"}
    return figure(traces, 340, "part, or number of the layer", title, xaxis=across, yaxis=up)


def training_figure(content: Mapping[str, Any]) -> Figure | None:
    """Return the loss of each fine-tuning by step."""
    colours = ("--target", "--retrained", "--base", "--other")
    traces = []
    for place, (name, run) in enumerate((content.get("training") or {}).items()):
        curve = at(run, "curve") or {}
        if curve.get("losses"):
            label = TRAININGS.get(name, words(name))
            traces.append(line(label, curve["steps"], curve["losses"], colours[place % 4], DASHES[place % 4]))
    return figure(traces, 360, "step", "loss", yaxis={"rangemode": "tozero"})


# An audit


def attack_figure(audit: Mapping[str, Any]) -> Figure | None:
    """Return by how many margins the model differs from the reference model in each test of an audit."""
    titles: list[str] = []
    points: dict[str, list[Any]] = {verdict: [] for verdict in VERDICTS}
    scores: dict[str, list[Any]] = {verdict: [] for verdict in VERDICTS}
    for name, attack in audit["attacks"].items():
        for test, entry in (attack.get("tests") or {}).items():
            finding = entry["findings"]["audited"]
            verdict, difference = finding["verdict"], finding["difference"]
            if verdict not in VERDICTS or difference["value"] is None:
                continue
            margin = _margin(audit, f"{name}.{test}")
            known = {
                side: difference[side] / margin
                for side in ("value", "low", "high")
                if difference.get(side) is not None
            }
            model, beside, apart = (
                number(finding[key]["value"]) for key in ("score", "reference", "difference")
            )
            said = [f"model {model}, reference {beside}", f"difference {apart}, margin {margin:g}"]
            points[verdict].append((known["value"], len(titles), told(verdict, said)))
            scores[verdict].append(known)
            titles.append("<br>".join(wrap(escaped_name(f"{attack['title']}: {entry['title']}"), 34)))
    traces = [
        dots(verdict, points[verdict], *look) | {"error_x": errors(scores[verdict], look[0])}
        for verdict, look in VERDICTS.items()
        if points[verdict]
    ]
    edge = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "--other", "dash": "dot"}}
    return figure(
        traces,
        150 + 44 * len(titles),
        "difference, in margins",
        "",
        xaxis={"zeroline": True},
        yaxis={"tickvals": list(range(len(titles))), "ticktext": titles, **NAMES},
        shapes=[{**edge, "x0": place, "x1": place} for place in (-1, 1)],
    )


def _margin(audit: Mapping[str, Any], key: str) -> float:
    """Return the margin for knowing more, else the one for knowing less; 1 where there is none."""
    sides = (at(audit, "policy", "margins", key, side) for side in ("more", "less"))
    return float(next((side for side in sides if side), 1.0))


def relearning_figure(audit: Mapping[str, Any]) -> Figure | None:
    """Return how fast each model learns the forget set again, a line an attack and model."""
    roles = {
        "audited": ("--unlearned", "circle"),
        "reference": ("--retrained", "diamond"),
        "target": ("--target", "square"),
    }
    curves = [
        attack
        for attack in audit["attacks"].values()
        if any(found.get("curve") for found in (attack.get("details") or {}).values())
    ]
    traces = []
    for place, attack in enumerate(curves):
        for model, found in attack["details"].items():
            colour, symbol = roles.get(model, ("--other", "x"))
            label = f"{model}, {attack['title']}"
            trace = line(label, found["steps"], found["curve"], colour, DASHES[place % 3])
            marker = {"color": colour, "symbol": symbol, "size": 8}
            traces.append({**trace, "mode": "lines+markers", "marker": marker})
    up = {"rangemode": "tozero"}
    return figure(traces, 400, "step of relearning", "mean answer probability", yaxis=up)
