"""A comparison in words: its tables as Markdown, and the ranking in plain language.

Everything comes from table.json (docs/compare.md). A figure that could not be computed is a dash with its
reason below the table, never a 0. Differences are called differences only where they are beyond noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from palinode.report.words import DASH, escaped, integer, number

MODELS = {"target": "target", "base": "base checkpoint", "retrained": "retrained"}


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the main table: where its score stands, and what it is called."""

    title: str
    places: tuple[tuple[str, str, str], ...]
    """(group, set, metric), the first that any model has a value for; a benchmark's group is "*"."""


COLUMNS = (
    Column("forget quality (p)", (("*", "forget", "forget_quality"), ("rows", "forget", "forget_quality"))),
    Column("model utility", (("*", "all", "model_utility"),)),
    Column("forget: exact match", (("rows", "forget", "exact_match"),)),
    Column("forget: probability", (("rows", "forget", "answer_probability"),)),
    Column("forget: ROUGE-L", (("rows", "forget", "rouge_l_recall"),)),
    Column("forget: extraction strength", (("rows", "forget", "extraction_strength"),)),
    Column("retain: exact match", (("rows", "retain", "exact_match"),)),
    Column("retain: probability", (("rows", "retain", "answer_probability"),)),
    Column("retain: ROUGE-L", (("rows", "retain", "rouge_l_recall"),)),
    Column("retain: extraction strength", (("rows", "retain", "extraction_strength"),)),
    Column(
        "membership AUC (loss)",
        (
            ("*", "forget", "auc_loss"),
            ("rows", "forget", "auc_loss"),
            ("rows", "forget", "auc_loss_against_retain"),
        ),
    ),
    Column(
        "membership AUC (Min-K)",
        (
            ("*", "forget", "auc_min_k"),
            ("rows", "forget", "auc_min_k"),
            ("rows", "forget", "auc_min_k_against_retain"),
        ),
    ),
    Column("judge: forget", (("rows", "forget", "judge_forget_accuracy"),)),
    Column("judge: recover", (("rows", "forget", "judge_recover_accuracy"),)),
    Column("judge: retain", (("rows", "retain", "judge_retain_accuracy"),)),
    Column("relearning (area)", (("audit", "forget", "relearning"),)),
)

Figures = Mapping[str, Any]


# The ranking in words


def ranking_sentences(table: Figures) -> list[str]:
    """Return the ranking in plain language: who is nearest to the ideal, and whom it cannot be told from."""
    ranking = table["ranking"]
    order = ranking["order"]
    lines = []
    if order:
        first = order[0]
        ties = first["within_noise_of"]
        text = f"Nearest to the ideal is {first['name']} (gap {_gap(first)})"
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


def gap_sentence(table: Figures) -> str:
    """Return what the gap is."""
    ranking = table["ranking"]
    ideal = "the retrained model" if ranking["ideal"] == "retrained" else "the base (forget), target (retain)"
    return (
        f"The gap is |forget − ideal| + max(0, ideal − retain) in {ranking['metric'].replace('_', ' ')} on "
        f"rows that nothing was chosen on; the ideal is {ideal}. Intervals: 95 %, over rows and seeds "
        "resampled alike for all."
    )


def _gap(entry: Figures) -> str:
    return f"{number(entry['gap'])} {_interval(entry)}".strip()


# Tables


def comparison_table(table: Figures) -> Table:
    """Return the ranking and what matters most as a table for the terminal."""
    found = Table(title="Contestants by their gap to the ideal", title_justify="left")
    columns = [column for column in _columns(table) if column.title in _SHORT]
    for title in ("", "gap", "95 %", *(column.title for column in columns)):
        found.add_column(Text(title), justify="left" if title == "" else "right")
    for name in MODELS:
        if name in table["models"]:
            summary = table["models"][name]["summary"]
            found.add_row(MODELS[name], "", "", *(_value(summary, column) for column in columns))
    ranked = {entry["name"]: entry for entry in table["ranking"]["order"]}
    for entry in _in_order(table):
        place = ranked.get(entry["name"])
        gap = (number(place["gap"]), _interval(place)) if place else (DASH, "")
        found.add_row(Text(entry["name"]), *gap, *(_value(entry["summary"], column) for column in columns))
    return found


_SHORT = (
    "forget quality (p)",
    "model utility",
    "forget: exact match",
    "forget: probability",
    "retain: exact match",
    "retain: probability",
)


def comparison_markdown(table: Figures) -> str:
    """Return the report; what comes from the user is escaped."""
    sections = (
        ["# Comparison of unlearning methods", ""],
        *([f"- {escaped(line)}"] for line in ranking_sentences(table)),
        ["", escaped(gap_sentence(table)), ""],
        ["## Measured once", "", _measured_note(table), ""],
        _score_table(table),
        _reasons(table),
        ["", "## Ranking", ""],
        _ranking_table(table),
        ["", "## What it cost", "", _cost_note(table), ""],
        _cost_table(table),
        [
            "",
            "## Every point tried",
            "",
            _rule_note(table),
            "",
            "![forget–retain trade-off](tradeoff.svg)",
            "",
        ],
        _point_table(table),
        _setup(table),
    )
    return "\n".join(line for section in sections for line in section).strip() + "\n"


def _score_table(table: Figures) -> list[str]:
    columns = _columns(table)
    rows = [
        (MODELS[name], *(_cell(table["models"][name]["summary"], column) for column in columns))
        for name in MODELS
        if name in table["models"]
    ]
    rows += [
        (entry["name"], *(_cell(entry["summary"], column) for column in columns))
        for entry in _in_order(table)
    ]
    return _markdown(("model", *(column.title for column in columns)), rows)


def _ranking_table(table: Figures) -> list[str]:
    rows = [
        (
            str(entry["place"]),
            entry["name"],
            number(entry["gap"]),
            _interval(entry),
            "; ".join(entry["within_noise_of"]) or "none",
        )
        for entry in table["ranking"]["order"]
    ]
    return _markdown(("place", "method", "gap", "95 %", "within noise of"), rows)


def _cost_table(table: Figures) -> list[str]:
    rows = [
        (
            entry["name"],
            str(cost["epochs"]),
            integer(cost["steps"]),
            integer(cost["tokens"]),
            _decimal(cost["seconds"]),
            _megabytes(cost["peak_bytes"]),
            integer(cost["search_steps"]),
            _decimal(cost["search_seconds"]),
        )
        for entry in _in_order(table)
        for cost in (entry["cost"],)
    ]
    head = ("method", "epochs", "steps", "tokens", "seconds", "peak MB", "steps of the search", "seconds")
    return _markdown(head, rows)


def _point_table(table: Figures) -> list[str]:
    rows = [
        (
            entry["name"],
            _settings_text(point),
            number(point["forget_probability"]),
            number(point["retain_probability"]),
            "yes" if point["allowed"] else "no",
            "**chosen**" if point["chosen"] else "",
        )
        for entry in table["contestants"]
        for point in entry["points"]
    ]
    head = ("method", "point", "forget probability", "retain probability", "keeps the rule", "")
    return _markdown(head, rows, bold=True)


def _settings_text(point: Figures) -> str:
    settings = {key.rpartition(".")[2]: value for key, value in point["settings"].items()}
    if point["scales"]:
        settings |= dict(zip(("forget", "retain"), point["scales"], strict=True))
        settings["α"], settings["β"] = settings.pop("forget"), settings.pop("retain")
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "defaults"


def _columns(table: Figures) -> list[Column]:
    """Return the columns that some model has a value in."""
    summaries = _summaries(table)
    return [
        column
        for column in COLUMNS
        if any((score := _score(summary, column)) and score["value"] is not None for summary in summaries)
    ]


def _summaries(table: Figures) -> list[Figures]:
    return [entry["summary"] for entry in (*table["models"].values(), *table["contestants"])]


def _score(summary: Figures, column: Column) -> Figures | None:
    """Return the score of a column: the first of its places that has a value, or else one without."""
    found = [
        score
        for group, name, metric in column.places
        for own in ([each for each in summary if each not in ("rows", "audit")] if group == "*" else [group])
        if (score := summary.get(own, {}).get(name, {}).get(metric))
    ]
    return next((score for score in found if score["value"] is not None), found[0] if found else None)


def _cell(summary: Figures, column: Column) -> str:
    score = _score(summary, column)
    if score is None or score["value"] is None:
        return DASH
    spread = ""
    if len(score["seeds"]) > 1:
        spread = f" {{{number(min(score['seeds']))}…{number(max(score['seeds']))}}}"
    return f"{number(score['value'])} {_interval(score)}{spread}".strip()


def _value(summary: Figures, column: Column) -> str:
    score = _score(summary, column)
    return DASH if score is None else number(score["value"])


def _reasons(table: Figures) -> list[str]:
    """Return why scores are missing, and what to know of several, each reason once."""
    found: dict[str, list[str]] = {}
    summaries = {
        **{MODELS[name]: entry["summary"] for name, entry in table["models"].items()},
        **{entry["name"]: entry["summary"] for entry in table["contestants"]},
    }
    for column in COLUMNS:
        for name, summary in summaries.items():
            score = _score(summary, column)
            if score is not None and score["reason"]:
                found.setdefault(f"{column.title}: {score['reason']}", []).append(name)
    found = {reason: names for reason, names in found.items() if "not computed" in reason or len(names) > 1}
    lines = [
        f"- {escaped(reason)} ({'all' if len(names) == len(summaries) else escaped('; '.join(names))})"
        for reason, names in found.items()
    ]
    return ["", "To know:", "", *lines] if lines else []


def _in_order(table: Figures) -> Iterator[Figures]:
    """Yield contestants by their place, those without one last."""
    places = {entry["name"]: entry["place"] for entry in table["ranking"]["order"]}
    yield from sorted(table["contestants"], key=lambda entry: places.get(entry["name"], len(places) + 1))


# Notes


def _measured_note(table: Figures) -> str:
    rows, seeds = table["rows"], table["seeds"]
    text = (
        f"{rows['forget_test']['rows']} forget rows and {rows['retain_test']['rows']} retain rows that "
        "nothing was chosen on and, of the retain rows, nothing was trained on. In brackets 95 % "
        "intervals over rows"
    )
    if len(seeds) > 1:
        text += f", the mean of {len(seeds)} seeds' intervals; in braces the lowest and highest seed"
    return f"{text}."


def _rule_note(table: Figures) -> str:
    rows, tries = table["rows"], table["comparison"]["tries"]
    return escaped(
        f"{tries} points each, on {rows['forget_probe']['rows']} forget and {rows['retain_probe']['rows']} "
        f"retain rows kept for choosing. The rule: {table['rule']}."
    )


def _cost_note(table: Figures) -> str:
    budget = table["comparison"]["budget"]
    amount = f"{budget['steps']} optimiser steps" if budget["steps"] else f"{budget['seconds']:g} seconds"
    share = (
        "a method that trains two models shares it between them"
        if budget["share"] == "total"
        else "each model of a method that trains two has it"
    )
    return f"The budget of one unlearned model is {amount}; {share}. Epochs are whole, so less may be spent."


def _setup(table: Figures) -> list[str]:
    environment = table["environment"]
    lines = ["", "## How to repeat it", "", f"`{table['command']}`", ""]
    lines.append(f"Seeds {', '.join(map(str, table['seeds']))}; device {environment['device']}.")
    lines += [f"- {escaped(note)}" for note in table["notes"]]
    return lines


# Small things


def _interval(score: Figures) -> str:
    low, high = score.get("low"), score.get("high")
    return "" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def _decimal(value: float | None) -> str:
    return DASH if value is None else f"{value:,.1f}"


def _megabytes(value: float | None) -> str:
    return DASH if value is None else f"{value / 1e6:,.0f}"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]], *, bold: bool = False) -> list[str]:
    def cell(text: str) -> str:
        return text if bold and text.startswith("**") else escaped(text)

    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(map(cell, row))} |" for row in rows]
