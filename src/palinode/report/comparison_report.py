"""The report of a comparison of methods, from its table.json.

A figure that could not be computed is a dash with its reason below the table, never a 0. Differences are
called differences only where they are beyond noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from palinode.records import packaged_table
from palinode.report.content import SAYS, Block, Grid, GridCell, Picture, Row, Section, section
from palinode.report.pictures import tradeoff_figure
from palinode.report.words import (
    DASH,
    MODELS,
    at,
    bracketed,
    by_reason,
    decimal,
    integer,
    interval_text,
    number,
    scale,
    words,
)

COLUMNS: Mapping[str, Sequence[str]] = packaged_table("report/assets/columns.toml")
"""Columns of the main table, each with its places; the first that has a value is shown."""

Figures = Mapping[str, Any]


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
        lines.append("One seed: how much another seed would change is not known.")
    if not table["complete"]:
        lines.append("The comparison is not complete; the same command goes on with it.")
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
    return [Grid("Contestants by their gap to the ideal", head, rows), ranking_sentences(table)]


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
        intro=SAYS["ranking"].format(metric=words(ranking["metric"]), ideal=ideal),
    )


def _point_section(table: Figures) -> list[Section]:
    probes, tries = table.get("rows") or {}, (table.get("comparison") or {}).get("tries")
    told = [f"The rule: {table['rule']}."] if table.get("rule") else []
    if probes and tries:
        forget, retain = (probes[f"{name}_probe"]["rows"] for name in ("forget", "retain"))
        told.insert(0, f"{tries} points each, on {forget} forget and {retain} retain rows kept for choosing.")

    def told_of(point: Figures) -> str:
        """Return what was set at a point, its scales last."""
        own, scales = point["settings"], point["scales"]
        parts = [f"{key.rpartition('.')[2]} {value}" for key, value in own.items() if "scales." not in key]
        parts += [f"{name} {scale(it)}" for name, it in zip("αβ", scales, strict=True)] if scales else []
        return ", ".join(parts) or "defaults"

    rows: list[Row] = [
        [
            entry["name"],
            told_of(point),
            number(point["forget_probability"]),
            number(point["retain_probability"]),
            "yes" if point["allowed"] else "no",
            GridCell("chosen", tone="chosen") if point["chosen"] else "",
        ]
        for entry in table["contestants"]
        for point in entry["points"]
    ]
    head = ["method", "point", "forget probability", "retain probability", "keeps the rule", ""]
    label = "Forget against retain probability for every point of every method"
    drawn, caption = tradeoff_figure({"table": table}), SAYS["points_picture"]
    return section(
        "Every point tried",
        " ".join(told) if told else None,
        Picture("tradeoff", label, drawn, caption=caption, file="tradeoff.svg", picks=True),
        Grid("Every point as a table", head, rows, text_columns=2, folded=True),
        bar="Points",
    )


def _score_section(table: Figures) -> list[Section]:
    columns = _columns(table)
    rows: list[Row] = [
        [name, *(_spread_cell(_score(summary, column)) for column in columns)]
        for name, summary in _summaries(table)
    ]
    grid = Grid("Scores of each method", ["model", *columns], rows) if columns else None
    title, told = "Measured once, on other rows", _measured_note(table)
    return section(title, grid, _reasons(table), bar="Scores", intro=told)


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
        note = (
            f"The budget of one unlearned model is {amount}; {share}. Epochs are whole, so less may be spent."
        )
    keys = ("epochs", "steps", "tokens", "seconds", "peak_bytes", "search_steps", "search_seconds")
    rows: list[Row] = []
    for entry in _in_order(table):
        cost = {key: entry["cost"].get(key) for key in keys}
        cost["peak_bytes"] = cost["peak_bytes"] and cost["peak_bytes"] / 1e6
        figures = ((decimal if "seconds" in key else integer)(value) for key, value in cost.items())
        rows.append([entry["name"], *figures])
    names = {"peak_bytes": "peak MB", "search_steps": "search steps", "search_seconds": "search seconds"}
    head = ["method", *(names.get(key, key) for key in keys)]
    return section("What it cost", note, Grid("Cost of each method", head, rows), bar="Cost")


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
    there = [name for name in ("target", "base", "retrained") if name in models]
    fixed = [(MODELS[name], models[name]["summary"]) for name in there]
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
