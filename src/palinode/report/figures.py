"""What the pictures of a run, an audit and a comparison of methods show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from palinode.report.pictures import Figure, Mark, Ruler, Trace, interval, names_down
from palinode.report.verdicts import YARDSTICKS, overlap, yardstick
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
OTHER_MARKS = ("plus", "cross", "star", "triangle-left")
VERDICTS = {
    "within": ("--green", "circle"),
    "unclear": ("--amber", "diamond"),
    "knows more": ("--red", "triangle-right"),
    "knows less": ("--red", "triangle-left"),
    "not judged": ("--other", "circle-open"),
}
"""Colour and symbol of what a test of an audit found, and of where its policy does not judge."""
PALETTE = ("--unlearned", "--target", "--retrained", "--base", "--amber", "--red", "--other")
SYMBOLS = ("circle", "square", "diamond", "plus", "triangle-up")
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
        flat = bool(points) and all(point.get("retain_probability") is None for point in points)
        retain = "retain_unseen" if at(content, "scores", "unlearned", "retain_unseen") else "retain"
        pairs = {
            model: [
                at(content, "scores", model, name, "answer_probability") or {} for name in ("forget", retain)
            ]
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
        colour, symbol = PALETTE[place % len(PALETTE)], SYMBOLS[place % len(SYMBOLS)]
        marks = [
            Mark(
                point["forget_probability"],
                point["retain_probability"],
                _point_lines(point, entry["name"]),
                symbol=symbol if point["chosen"] else f"{symbol}-open",
                size=16 if point["chosen"] else 8,
            )
            for point in entry["points"]
            if point.get("retain_probability") is not None
        ]
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
        known = {
            name: scores[metric] for name, scores in rows.items() if at(scores, metric, "value") is not None
        }
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
        said = [
            model_label(model),
            f"mean: {mean:.3f}",
            f"median: {quarters[1]:.3f}",
            f"middle half: {quarters[0]:.3f} – {quarters[2]:.3f}",
            f"{len(values)} rows",
        ]
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
            value, *ends = (
                x / (more if x > 0 else less) for x in (difference["value"], *interval(difference))
            )
            if verdict == "within" and value and not sides[value > 0]:
                verdict = "not judged"
            model, beside, apart = (
                number(finding[key]["value"]) for key in ("score", "reference", "difference")
            )
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
