"""Requests in words: what each contestant had forgotten and kept after some of them, and after undoing.

Everything comes from requests.json (docs/requests.md). A figure that there is none of is a dash, never a 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from palinode.report.words import DASH, escaped, integer, number, scale, table_lines

Figures = Mapping[str, Any]

MODELS = {"target": "target", "base": "base checkpoint", "retrained": "retrained without any of them"}
METRICS = {"exact_match": "exact match", "answer_probability": "probability"}
PARTS = {"done": "asked to be erased", "not_done": "not asked, or undone", "retain": "retain rows"}
COLUMNS = [(part, metric) for part in PARTS for metric in METRICS]
SHOWN = (1, 3)
"""Numbers of requests that the tables show beside all of them."""
REFERENCES = {"done": "retrained", "not_done": "target"}
"""Whose figure on the very same rows stands beside a state's."""


def on_same_rows(table: Figures, state: Figures, part: str, metric: str) -> float | None:
    """Return what the reference makes of the rows that a part of a state is made of; None without any.

    For rows asked to be erased it is the retrained model, for the others the target.
    """
    reference = table["models"].get(REFERENCES.get(part, ""))
    if reference is None:
        return None
    scores = reference["scores"][metric]
    wanted = part == "done"
    pairs = [
        (request["rows"], value)
        for request, value in zip(table["requests"], scores["by_request"], strict=True)
        if (request["number"] in state["done"]) == wanted and value is not None
    ]
    if not wanted and scores["others"] is not None:
        pairs.append((table["rows"]["others"], scores["others"]))
    rows = sum(count for count, _ in pairs)
    return sum(count * value for count, value in pairs) / rows if rows else None


def undo_sentences(table: Figures) -> list[str]:
    """Return in plain language whether each contestant could undo, and how exactly."""
    lines = [f"{entry['name']}: {_undo_text(entry['undo'])}." for entry in table["contestants"]]
    if not table["complete"]:
        lines.append("Not all contestants are through; the same command goes on with them.")
    return lines


def _undo_text(undo: Figures) -> str:
    if not undo["possible"]:
        steps = integer(undo["repeat_steps"])
        return f"undoing is {undo['reason']} ({steps} optimiser steps, mean over the requests)"
    equal, compared = undo["states_equal"], undo["states_compared"]
    back = "is the target itself" if undo["target_back"] else "is NOT the target"
    return (
        f"{equal} of {compared} states after undoing are bit for bit the model that never had those "
        f"requests, and the last one {back}"
    )


def shown_states(table: Figures) -> Iterator[tuple[str, str, Figures]]:
    """Yield (model, state in words, state) for the rows of the tables."""
    count = len(table["requests"])
    for name in MODELS:
        if name in table["models"]:
            yield MODELS[name], "all rows of requests", table["models"][name]
    for entry in table["contestants"]:
        states = {len(state["done"]): state for state in entry["states"] if state["undone"] is None}
        for size in sorted({*SHOWN, count} & states.keys()):
            yield entry["name"], f"{size} carried out", states[size]
        yield entry["name"], f"all {count} at once", entry["joint"]
        undone = [state for state in entry["states"] if state["undone"] is not None]
        for place in sorted({count // 2, count}) if undone else ():
            yield entry["name"], f"{place} undone", undone[place - 1]


def requests_table(table: Figures) -> Table:
    """Return the figures of some states as a table for the terminal."""
    found = Table(title="What is still known", title_justify="left")
    for title in ("", "state", *_titles()):
        found.add_column(Text(title), justify="left" if title in ("", "state") else "right")
    for name, what, state in shown_states(table):
        found.add_row(Text(name), what, *_cells(table, state))
    return found


def requests_markdown(table: Figures) -> str:
    """Return the report; what comes from the user is escaped."""
    sizes = [request["rows"] for request in table["requests"]]
    rows = [(escaped(name), what, *_cells(table, state)) for name, what, state in shown_states(table)]
    lines = [
        "# Requests one after another",
        "",
        f"{len(sizes)} requests of {min(sizes)} to {max(sizes)} rows, carried out in order and undone in the "
        f"order {', '.join(map(str, table['undo_order']))}. Measured: all rows of the requests, "
        f"{integer(table['rows']['others'])} rows that nobody asks to erase, and "
        f"{integer(table['rows']['retain'])} retain rows that no method trains on.",
        "",
        *(f"- {escaped(line)}" for line in undo_sentences(table)),
        "",
        "![requests carried out and undone](requests.svg)",
        "",
        *table_lines(("model", "state", *_titles()), rows, text_columns=2),
        "Means over rows. In brackets, for the very same rows: what the retrained model makes of those asked "
        "to be erased, and the target of the others. Intervals, and every state, are in requests.json.",
        "",
        "## What it cost",
        "",
        *table_lines(
            ("model", "α, β", "epochs a request", "steps of all requests", "seconds", "steps at once"),
            [_cost_row(entry) for entry in table["contestants"]],
        ),
    ]
    return "\n".join(lines).strip() + "\n"


def _titles() -> list[str]:
    return [f"{PARTS[part]}: {METRICS[metric]}" for part, metric in COLUMNS]


def _cells(table: Figures, state: Figures) -> list[str]:
    cells = []
    for part, metric in COLUMNS:
        value, beside = state["scores"][metric][part]["value"], on_same_rows(table, state, part, metric)
        known = value is not None and beside is not None
        cells.append(f"{number(value)} ({number(beside)})" if known else number(value))
    return cells


def _cost_row(entry: Figures) -> tuple[str, ...]:
    costs, scales = entry["cost"]["requests"], entry["scales"]
    epochs = sorted({cost["epochs"] for cost in costs})
    return (
        escaped(entry["name"]),
        ", ".join(map(scale, scales)) if scales else DASH,
        " to ".join(map(str, dict.fromkeys((epochs[0], epochs[-1])))),
        integer(sum(cost["steps"] for cost in costs)),
        f"{sum(cost['seconds'] for cost in costs):.1f}",
        integer(entry["cost"]["joint"]["steps"]),
    )
