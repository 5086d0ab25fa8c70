"""Reports of comparisons: of methods (table.json), along an axis (axis.json).

A figure that could not be computed is a dash with its reason below the table, never a 0. Differences are
called differences only where they are beyond noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from palinode.report.content import (
    Block,
    Code,
    Grid,
    GridCell,
    Items,
    Paragraph,
    Picture,
    Row,
    Section,
    markdown,
    section,
)
from palinode.report.figures import look, tradeoff_figure
from palinode.report.pictures import Figure, Mark, Ruler, Trace, interval, picture_file
from palinode.report.words import (
    DASH,
    MODELS,
    at,
    bracketed,
    by_reason,
    decimal,
    integer,
    interval_text,
    model_label,
    number,
    scale,
    words,
)

REFERENCE_MODELS = ("target", "base", "retrained")
"""What contestants are compared with."""
COLUMNS = {
    "forget quality (p)": ("*/forget/forget_quality", "rows/forget/forget_quality"),
    "model utility": ("*/all/model_utility",),
    "forget: exact match": ("rows/forget/exact_match",),
    "forget: probability": ("rows/forget/answer_probability",),
    "forget: ROUGE-L": ("rows/forget/rouge_l_recall",),
    "forget: extraction strength": ("rows/forget/extraction_strength",),
    "retain: exact match": ("rows/retain/exact_match",),
    "retain: probability": ("rows/retain/answer_probability",),
    "retain: ROUGE-L": ("rows/retain/rouge_l_recall",),
    "retain: extraction strength": ("rows/retain/extraction_strength",),
    "membership AUC (loss)": (
        "*/forget/auc_loss",
        "rows/forget/auc_loss",
        "rows/forget/auc_loss_against_retain",
    ),
    "membership AUC (Min-K)": (
        "*/forget/auc_min_k",
        "rows/forget/auc_min_k",
        "rows/forget/auc_min_k_against_retain",
    ),
    "judge: forget": ("rows/forget/judge_forget_accuracy",),
    "judge: recover": ("rows/forget/judge_recover_accuracy",),
    "judge: retain": ("rows/retain/judge_retain_accuracy",),
    "relearning (area)": ("audit/forget/relearning",),
}
"""Columns of the main table, each with its places (group/set/metric): the first that has a value is shown.

A benchmark's group is "*".
"""
GOES_ON = "the same command goes on with"
ONE_SEED = "One seed: how much another seed would change is not known."

Figures = Mapping[str, Any]


# A comparison of methods


def ranking_sentences(table: Figures) -> list[str]:
    """Return the ranking in plain language: who is nearest to the ideal, and whom it cannot be told from."""
    ranking = table["ranking"]
    order = ranking["order"]
    lines = []
    if order:
        first = order[0]
        ties = first["within_noise_of"]
        gap = f"{number(first['gap'])} {bracketed(first)}".strip()
        text = f"Nearest to the ideal is {first['name']} (gap {gap})"
        alone = "" if len(order) == 1 else ", beyond noise"
        lines.append(f"{text}; within noise of it: {'; '.join(ties)}." if ties else f"{text}{alone}.")
        behind = [entry["name"] for entry in order[1:] if first["name"] not in entry["within_noise_of"]]
        if behind:
            lines.append(f"Farther from it beyond noise: {'; '.join(behind)}.")
    lines += [f"{name} is not ranked: {reason}." for name, reason in ranking["left_out"].items()]
    broken = [entry["name"] for entry in table["contestants"] if not entry["chosen"]["kept_rule"]]
    if broken:
        lines.append(
            f"No point of {'; '.join(broken)} kept the rule; the one that breaks it least was measured."
        )
    if len(table["seeds"]) == 1:
        lines.append(ONE_SEED)
    if not table["complete"]:
        lines.append(f"The comparison is not complete; {GOES_ON} it.")
    return lines


def comparison_brief(table: Figures) -> list[Block]:
    """Return what the terminal shows: the ranking with what matters most, and what follows from it."""
    columns = _columns(table)
    gaps = {entry["name"]: entry for entry in table["ranking"]["order"]}
    rows: list[Row] = []
    for name, summary in _summaries(table):
        gap = gaps.get(name, {})
        figures = (number(at(_score(summary, column) or {}, "value")) for column in columns)
        shown = "" if name in MODELS.values() else GridCell(number(gap.get("gap")), interval_text(gap))
        rows.append([name, shown, *figures])
    head = ["", "gap, 95 %", *columns]
    return [Grid("Contestants by their gap to the ideal", head, rows), Items(ranking_sentences(table))]


def comparison_sections(table: Figures) -> list[Section]:
    """Return the ranking, every point tried, the scores on rows that nothing was chosen on, and the cost."""
    parts = (_ranking_section, _point_section, _score_section, _cost_section)
    return [found for part in parts for found in part(table)]


def _ranking_section(table: Figures) -> list[Section]:
    ranking = table["ranking"]
    ideal = "the retrained model" if ranking["ideal"] == "retrained" else "the base (forget), target (retain)"
    rows: list[Row] = [
        [
            f"{entry['place']}. {entry['name']}",
            "; ".join(entry["within_noise_of"]) or "none",
            GridCell(number(entry["gap"]), interval_text(entry)),
        ]
        for entry in ranking["order"]
    ]
    return section(
        "The methods side by side",
        Grid("Methods by their gap to the ideal", ["method", "within noise of", "gap"], rows, text_columns=2),
        bar="Methods",
        intro=f"The gap is |forget − ideal| + max(0, ideal − retain) in {words(ranking['metric'])} on rows "
        f"that nothing was chosen on; the ideal is {ideal}. Intervals: 95 %, over rows and seeds resampled "
        "alike for all.",
    )


def _point_section(table: Figures) -> list[Section]:
    probes, tries = table.get("rows") or {}, (table.get("comparison") or {}).get("tries")
    told = [f"The rule: {table['rule']}."] if table.get("rule") else []
    if probes and tries:
        forget, retain = (probes[f"{name}_probe"]["rows"] for name in ("forget", "retain"))
        told.insert(0, f"{tries} points each, on {forget} forget and {retain} retain rows kept for choosing.")
    rows: list[Row] = [
        [
            entry["name"],
            _settings_text(point["settings"], point["scales"]),
            number(point["forget_probability"]),
            number(point["retain_probability"]),
            "yes" if point["allowed"] else "no",
            GridCell("chosen", tone="chosen") if point["chosen"] else "",
        ]
        for entry in table["contestants"]
        for point in entry["points"]
    ]
    head = ["method", "point", "forget probability", "retain probability", "keeps the rule", ""]
    return section(
        "Every point tried",
        Paragraph(" ".join(told)) if told else None,
        Picture(
            "tradeoff",
            "Forget against retain probability for every point of every method",
            tradeoff_figure({"table": table}),
            caption="Left is less of the forget set, up is more of the rest; the filled mark of each method "
            "is the point chosen for it. Click a mark for its settings.",
            file="tradeoff.svg",
            picks=True,
        ),
        Grid("Every point as a table", head, rows, text_columns=2, folded=True),
        bar="Points",
    )


def _score_section(table: Figures) -> list[Section]:
    columns = _columns(table)
    rows: list[Row] = [
        [name, *(_spread_cell(_score(summary, column)) for column in columns)]
        for name, summary in _summaries(table)
    ]
    return section(
        "Measured once, on other rows",
        Grid("Scores of each method", ["model", *columns], rows) if columns else None,
        Items(_reasons(table)),
        bar="Scores",
        intro=_measured_note(table),
    )


def _cost_section(table: Figures) -> list[Section]:
    budget = (table.get("comparison") or {}).get("budget")
    note = None
    if budget:
        amount = f"{budget['steps']} optimiser steps" if budget["steps"] else f"{budget['seconds']:g} seconds"
        share = (
            "a method that trains two models shares it between them"
            if budget["share"] == "total"
            else "each model of a method that trains two has it"
        )
        note = Paragraph(
            f"The budget of one unlearned model is {amount}; {share}. Epochs are whole, so less may be spent."
        )
    keys = ("epochs", "steps", "tokens", "seconds", "peak_bytes", "search_steps", "search_seconds")
    rows: list[Row] = []
    for entry in _in_order(table):
        cost = {key: entry["cost"].get(key) for key in keys}
        cost["peak_bytes"] = cost["peak_bytes"] and cost["peak_bytes"] / 1e6
        figures = ((decimal if "seconds" in key else integer)(value) for key, value in cost.items())
        rows.append([entry["name"], *figures])
    names = {
        "peak_bytes": "peak MB",
        "search_steps": "steps of the search",
        "search_seconds": "seconds of it",
    }
    head = ["method", *(names.get(key, key) for key in keys)]
    return section("What it cost", note, Grid("Cost of each method", head, rows), bar="Cost")


def tradeoff_picture(table: Figures) -> str:
    """Return the picture of a table.json as a file: every point tried, and the models, as on the page."""
    return picture_file("Forget–retain trade-off of every point tried", [tradeoff_figure({"table": table})])


def _settings_text(settings: Mapping[str, Any], scales: Sequence[float] | None) -> str:
    """Return what was set at a point, its scales last."""
    parts = [f"{key.rpartition('.')[2]} {value}" for key, value in settings.items() if "scales." not in key]
    parts += [f"{name} {scale(value)}" for name, value in zip("αβ", scales, strict=True)] if scales else []
    return ", ".join(parts) or "defaults"


def _columns(table: Figures) -> list[str]:
    """Return the columns that some model has a value in."""
    summaries = [summary for _, summary in _summaries(table)]
    return [
        column
        for column in COLUMNS
        if any((score := _score(summary, column)) and score["value"] is not None for summary in summaries)
    ]


def _summaries(table: Figures) -> list[tuple[str, Figures]]:
    """Return what each model and contestant is called, and its scores, contestants by their place."""
    models = table["models"]
    fixed = [(MODELS[name], models[name]["summary"]) for name in REFERENCE_MODELS if name in models]
    return fixed + [(entry["name"], entry["summary"]) for entry in _in_order(table)]


def _score(summary: Figures, column: str) -> Figures | None:
    """Return the score of a column: the first of its places that has a value, or else one without."""
    found = []
    for place in COLUMNS[column]:
        group, name, metric = place.split("/")
        own = [each for each in summary if each not in ("rows", "audit")] if group == "*" else [group]
        scores = (summary.get(each, {}).get(name, {}).get(metric) for each in own)
        found += [score for score in scores if score]
    return next((score for score in found if score["value"] is not None), found[0] if found else None)


def _spread_cell(score: Figures | None) -> GridCell | str:
    """Return a score with its interval, and the lowest and highest seed in braces."""
    if score is None or score["value"] is None:
        return DASH
    seeds = score.get("seeds") or ()
    spread = f"{{{number(min(seeds))} – {number(max(seeds))}}}" if len(seeds) > 1 else ""
    below = f"{interval_text(score) or ''} {spread}".strip()
    return GridCell(number(score["value"]), below or None)


def _reasons(table: Figures) -> list[str]:
    """Return why scores are missing, and what to know of several, each reason once."""
    summaries = _summaries(table)
    found = by_reason(
        (name, f"{column}: {score['reason']}")
        for column in COLUMNS
        for name, summary in summaries
        if (score := _score(summary, column)) and score.get("reason")
    )
    return [
        f"{reason} ({'all' if len(names) == len(summaries) else '; '.join(names)})"
        for reason, names in found.items()
        if "not computed" in reason or len(names) > 1
    ]


def _in_order(table: Figures) -> Iterator[Figures]:
    """Yield contestants by their place, those without one last."""
    places = {entry["name"]: entry["place"] for entry in table["ranking"]["order"]}
    yield from sorted(table["contestants"], key=lambda entry: places.get(entry["name"], len(places) + 1))


def _measured_note(table: Figures) -> str:
    rows, seeds = table.get("rows"), table["seeds"]
    if not rows:
        return ""
    text = (
        f"{rows['forget_test']['rows']} forget rows and {rows['retain_test']['rows']} retain rows that "
        "nothing was chosen on and, of the retain rows, nothing was trained on. Small figures are 95 % "
        "intervals over rows"
    )
    if len(seeds) > 1:
        text += f", the mean of {len(seeds)} seeds' intervals; in braces the lowest and highest seed"
    return f"{text}."


# A comparison along an axis

SIDES = ("forget", "retain")


def axis_brief(content: Figures) -> list[Block]:
    """Return what the terminal shows: forget and retain figures at every value, and what to know of them."""

    def pair(found: Figures | None) -> str:
        return " / ".join(number(found[side]["value"] if found else None) for side in SIDES)

    fixed, contestants = _along(content)
    rows = [[model_label(name), *map(pair, found)] for name, found in [*fixed.items(), *contestants.items()]]
    told = Paragraph(f"Forget / retain at each value of {content['key']}:")
    grid = Grid(content["title"], ["model", *(str(entry["value"]) for entry in content["values"])], rows)
    return [told, grid, Items(axis_sentences(content))]


def axis_sentences(content: Figures) -> list[str]:
    """Return what a reader must know before looking at the figures."""
    values = content["values"]
    rows = dict.fromkeys(f"{entry['rows']['forget']} and {entry['rows']['retain']}" for entry in values)
    lines = [
        f"{words(content['metric'])} on forget and retain rows that nothing was chosen on "
        f"({' / '.join(rows)} rows); intervals: 95 %, over rows."
    ]
    lines += [ONE_SEED] if len(content["seeds"]) == 1 else []
    for entry in values:
        if broken := [one["name"] for one in entry["contestants"] if not one["kept_rule"]]:
            lines.append(f"At {entry['value']} no point of {'; '.join(broken)} kept the rule.")
    return lines if content["complete"] else [*lines, f"Not all values are through; {GOES_ON} them."]


def axis_markdown(content: Figures) -> str:
    """Return the report of an axis.json."""
    chosen = [
        [
            str(entry["value"]),
            one["name"],
            _settings_text(one["settings"], one["scales"]),
            GridCell(number(one["gap"]["value"]), interval_text(one["gap"])),
        ]
        for entry in content["values"]
        for one in entry["contestants"]
    ]
    head = ["value", "method", "point", "gap to the ideal"]
    sections = [
        *section(
            "",
            Items(axis_sentences(content)),
            *axis_brief(content)[:2],
            Picture("axis", content["title"], None, file="axis.svg"),
        ),
        *section("What was chosen", Grid("", head, chosen, text_columns=3)),
        *section(
            "Each comparison",
            Items([(f"{entry['value']}:", f"{entry['folder']}/report.md") for entry in content["values"]]),
            Code(content["command"]),
        ),
    ]
    return markdown(content["title"], sections)


def _along(content: Figures) -> tuple[dict[str, list[Figures | None]], dict[str, list[Figures | None]]]:
    """Return by name what each value has of the models to compare with, and of the contestants."""
    values = content["values"]
    models = {name: [entry["models"].get(name) for entry in values] for name in REFERENCE_MODELS}
    there = [{one["name"]: one for one in entry["contestants"]} for entry in values]
    names = dict.fromkeys(name for found in there for name in found)
    fixed = {name: found for name, found in models.items() if any(found)}
    return fixed, {name: [found.get(name) for found in there] for name in names}


def axis_picture(content: Figures) -> str:
    """Return the picture of an axis.json: what is left of the forget set, and what is kept of the other.

    Contestants are lines with their 95 % intervals; target, base and retrained model are dashed lines to
    compare with. Where no point kept the rule, the dot is hollow.
    """
    aims = {
        "forget": "lower is more forgotten, the retrained model is the aim",
        "retain": "higher is more kept",
    }
    ticks = {float(place): str(entry["value"]) for place, entry in enumerate(content["values"])}
    fixed, contestants = _along(content)
    panels = []
    for side in SIDES:
        traces = [_axis_reference(name, found, side) for name, found in fixed.items()]
        traces += [
            _axis_contestant(content, name, found, side, place, len(contestants))
            for place, (name, found) in enumerate(contestants.items())
        ]
        across = Ruler(content["key"] if side == SIDES[-1] else "", ticks, (-0.5, len(ticks) - 0.5))
        name = f"{words(content['metric'])} on the {side} set: {aims[side]}"
        panels.append(Figure(traces, 300, across, Ruler(reach=(0.0, 1.0)), name))
    return picture_file(content["title"], panels)


def _axis_reference(name: str, found: Sequence[Figures | None], side: str) -> Trace:
    """Return a dashed line from edge to edge, so that one value is a line too."""
    known = [Mark(place, one[side]["value"]) for place, one in enumerate(found) if one]
    ends = [replace(known[0], x=known[0].x - 0.5), *known, replace(known[-1], x=known[-1].x + 0.5)]
    looks = {"target": ("--ink", "dash"), "base": ("--other", "dot"), "retrained": ("--ink", "dashdot")}
    colour, dash = looks[name]
    return Trace(model_label(name), ends, colour, dash=dash)


def _axis_contestant(
    content: Figures, name: str, found: Sequence[Figures | None], side: str, place: int, count: int
) -> Trace:
    """Return a contestant's line; its place among so many keeps the intervals apart."""
    (colour, symbol), marks = look(place), list[Mark]()
    shift = 0.2 * ((place + 0.5) / count - 0.5)
    for step, (entry, one) in enumerate(zip(content["values"], found, strict=True)):
        if one and one[side]["value"] is not None:
            score, kept = one[side], one["kept_rule"]
            said = [f"{name} at {entry['value']}", f"{number(score['value'])} {bracketed(score)}".strip()]
            said += [] if kept else ["no point kept the rule"]
            shown = symbol if kept else f"{symbol}-open"
            x, up = step + shift, interval(score)
            marks.append(Mark(x, score["value"], said, up=up, symbol=shown))
    return Trace(name, marks, colour, symbol, dash="solid")
