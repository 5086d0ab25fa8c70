"""A location and a plan in words: sentences, tables for the terminal, a page of Markdown.

Everything comes from the records (`Location.as_record`, `plan_record`); nothing is a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from palinode.report.pictures import MOST_ROWS
from palinode.report.words import escaped

MOST_STEPS = 6
"""Exposures of a row that a table shows."""
DEMO_EVIDENCE = ("log", "order", "behaviour", "all")
COUNTED = ("log", "order")
_TABLE_HEAD = ("row", "first", "exposures", "copies in the corpus")


# Sentences


def location_sentences(record: Mapping[str, Any]) -> list[str]:
    """Return the answer in sentences: the checkpoint to take, the next best, the distances."""
    lines = [_recommendation(record)]
    if record["next_best"]:
        choice = record["next_best"]
        name = "Least contaminated" if record["recommended"] is None else "Next best"
        lines.append(f"{name}: step {choice['step']:,} ({choice['location']}), {choice['reason']}.")
    if record["first"] is not None:
        lines.append(_exposure_sentence(record))
    if record["onset"]:
        lines.append(f"Behaviour: {_onset_sentence(record['onset'])}")
    return lines


def _recommendation(record: Mapping[str, Any]) -> str:
    choice = record["recommended"]
    if choice is None:
        unsure = any(rung["seen"] == 0 and rung["unrecorded"] for rung in record["rungs"])
        return f"No checkpoint of the ladder is {'known to be ' if unsure else ''}clean."
    distance = choice["to_exposure"]
    before = "the first exposure" if _is_counted(record) else "the first checkpoint that knows the rows"
    far = f"; {_distance(distance)} before {before}" if distance else ""
    return f"Take step {choice['step']:,} ({choice['location']}): {choice['reason']}{far}."


def _exposure_sentence(record: Mapping[str, Any]) -> str:
    name = "First exposure" if _is_counted(record) else "First checkpoint looked at that knows them"
    parts = [f"{name}: step {record['first']:,}"]
    if record["first_to_target"]:
        parts.append(f"{_distance(record['first_to_target'])} before the target")
    if record["last"] is not None and record["last"] != record["first"]:
        parts.append(f"last: step {record['last']:,}")
        if record["last_to_target"]:
            parts.append(f"{_distance(record['last_to_target'])} before the target")
    return ", ".join(parts) + "."


def _is_counted(record: Mapping[str, Any]) -> bool:
    """Tell whether exposures were counted, and not only seen to lie before a checkpoint."""
    return any(row["seen"] for row in record["rows"])


def _onset_sentence(onset: Mapping[str, Any]) -> str:
    text: str = onset["conclusion"]
    if onset["interval"] and onset["state"] in ("begins", "gone"):
        low, high = onset["interval"]
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        text += f" 95 % interval of the first checkpoint that shows it: step {span}."
    return text


def _distance(distance: Mapping[str, Any]) -> str:
    steps = f"{distance['steps']:,} step{'' if distance['steps'] == 1 else 's'}"
    return steps if distance["tokens"] is None else f"{steps} ({_tokens(distance['tokens'])} tokens)"


def _tokens(count: float) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,.0f}"


# Tables


def rung_table(record: Mapping[str, Any]) -> Table:
    """Return what is known of each checkpoint as a table for the terminal."""
    table = Table(title="Checkpoints", title_justify="left")
    for heading in ("step", "tokens", "forget rows seen", "gap", "", "checkpoint"):
        justify: JustifyMethod = "left" if heading in ("", "checkpoint") else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for cells in _rung_cells(record):
        table.add_row(*map(Text, cells))
    return table


def row_table(record: Mapping[str, Any]) -> Table:
    """Return first and known exposures of each forget row as a table for the terminal."""
    table = Table(title="Forget rows", title_justify="left")
    for heading in _TABLE_HEAD:
        table.add_column(heading, overflow="fold")
    for cells in _row_cells(record, short=True):
        table.add_row(*map(Text, cells))
    return table


def _rung_cells(record: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    total = len(record["rows"])
    marks = {
        (record[name] or {}).get("step"): name.replace("_", " ") for name in ("next_best", "recommended")
    }
    for rung in record["rungs"]:
        least = "at least " if rung["unrecorded"] and rung["seen"] < total else ""
        seen = "not known" if rung["seen"] is None else f"{least}{rung['seen']} of {total}"
        gap = "" if rung["gap"] is None else f"{rung['gap']:+.2f}{' *' if rung['exposed'] else ''}"
        tokens = "" if rung["tokens"] is None else _tokens(rung["tokens"])
        yield f"{rung['step']:,}", tokens, seen, gap, marks.get(rung["step"], ""), rung["location"]


def _row_cells(record: Mapping[str, Any], *, short: bool = False) -> Iterable[tuple[str, ...]]:
    """Yield the cells of each row; `short` leaves out the folders of the files that rows stand in."""
    rows = record["rows"]
    shown = _without_folders if short else str
    for row in rows[:MOST_ROWS]:
        seen, copies = row["seen"], row["copies"]
        steps = ", ".join(f"{entry['step']:,}{'~' if entry['copy'] else ''}" for entry in seen[:MOST_STEPS])
        more = f", … ({len(seen)} in all)" if len(seen) > MOST_STEPS else ""
        places = "; ".join(
            shown(copy["place"]) + ("" if copy["exact"] else f" (similar, {copy['similarity']:.2f})")
            for copy in copies[:3]
        )
        places += f"; … ({len(copies)})" if len(copies) > 3 else ""
        yield shown(row["place"]), f"{seen[0]['step']:,}" if seen else "not known", steps + more, places
    if len(rows) > MOST_ROWS:
        yield f"… and {len(rows) - MOST_ROWS} more rows", "", "", ""


def _without_folders(place: str) -> str:
    """Return `row 3 of file.jsonl` for `row 3 of folder/file.jsonl`."""
    row, found, path = place.partition(" of ")
    return row + found + path.rpartition("/")[2]


# Markdown


def location_markdown(record: Mapping[str, Any]) -> str:
    """Return the location as a page of Markdown; what comes from the user is escaped."""
    lines = ["# When the forget rows were seen", ""]
    lines += [f"- {escaped(line)}" for line in location_sentences(record)]
    lines += ["", "## Checkpoints", ""]
    lines += _markdown_table(
        ("step", "tokens", "forget rows seen", "gap", "", "checkpoint"), _rung_cells(record)
    )
    if any(rung["gap"] is not None for rung in record["rungs"]):
        lines += ["", "\\* a gap beyond noise; of the earliest checkpoint the plain difference is shown."]
    lines += ["", "## Forget rows", ""]
    lines += _markdown_table(_TABLE_HEAD, _row_cells(record))
    if any(entry["copy"] for row in record["rows"] for entry in row["seen"]):
        lines += ["", "\\~ a similar text, not the row itself."]
    if record["alternatives"]:
        lines += ["", "## What can be done without a clean checkpoint", ""]
        for entry in record["alternatives"]:
            told = {name: escaped(text) for name, text in entry.items()}
            lines.append(f"- **{told['name']}**: {told['what']}")
            lines.append(f"  Cost: {told['cost']} Known: {told['known']} ({told['source']})")
    if record["warnings"]:
        lines += ["", "## What to know", "", *(f"- {escaped(text)}" for text in record["warnings"])]
    return "\n".join(lines) + "\n"


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return lines + [f"| {' | '.join(escaped(cell) for cell in row)} |" for row in rows]


# The plan


def plan_table(record: Mapping[str, Any]) -> Table:
    """Return the schedules as a table for the terminal."""
    table = Table(title="Checkpoints to keep", title_justify="left")
    figures: Mapping[str, Any] = next(
        (schedule["decay"] for schedule in record["schedules"] if schedule["decay"]), {}
    )
    headings = ("schedule", "kept", "expected distance", "worst", "storage", *figures)
    for heading in headings:
        first = heading == "schedule"
        table.add_column(heading, justify="left" if first else "right", no_wrap=first)
    for schedule in record["schedules"]:
        decay = schedule["decay"] or {}
        table.add_row(
            schedule["name"],
            str(len(schedule["kept"])),
            f"{schedule['expected']:,.0f}",
            f"{schedule['worst']:,}",
            _bytes(schedule["bytes"]),
            *("beyond the table" if decay.get(name) is None else f"{decay[name]:.2f}" for name in figures),
        )
    return table


def _bytes(count: float) -> str:
    unit, size = next(
        ((unit, size) for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)) if count >= size),
        ("kB", 1000),
    )
    return f"{count / size:,.3g} {unit}"


def plan_sentences(record: Mapping[str, Any]) -> list[str]:
    """Return what the plan recommends, and where its figures of decay are from."""
    best = record["schedules"][0]
    kept = ", ".join(f"{step:,}" for step in best["kept"][:30]) + (", …" if len(best["kept"]) > 30 else "")
    lines = [f"Keep ({best['name']}): {kept}."]
    lines.append(
        f"An exposure is {best['expected']:,.0f} steps after the last clean checkpoint on average, "
        f"{best['worst']:,} at worst; {best['without']:.1%} of requests are expected to concern steps before "
        "the first of them, for which only the untrained model is clean."
    )
    if record["decay"] and best["decay"]:
        lines.append(f"Decay with distance: {record['decay']['source']}. {record['decay']['note']}".strip())
    return lines


# The demo


def demo_tables(record: Mapping[str, Any]) -> list[Table]:
    """Return the ladder demo's two tables: what each evidence found, and what each rung gives."""
    found = Table(title="The last clean checkpoint of each request", title_justify="left")
    for heading in ("request", "rows", "truth", *DEMO_EVIDENCE):
        found.add_column(heading, justify="left" if heading == "request" else "right")
    for name, request in record["requests"].items():
        cells = [_demo_cell(request["found"][kind]) for kind in DEMO_EVIDENCE]
        found.add_row(name, str(request["rows"]), _step_or_none(request["clean_step"]), *cells)
    rungs = Table(title="Unlearning the main request from each checkpoint: exact match", title_justify="left")
    for heading in ("checkpoint", "seen", "forget people", "others", "α, β", ""):
        rungs.add_column(heading, justify="left" if heading == "" else "right")
    if not all(rung["kept_rule"] for rung in record["rungs"]):
        rungs.caption = "* no pair of scales kept enough of the others; the one that breaks the rule least"
        rungs.caption_justify = "left"
    target = record["rungs"][0]["target"]
    rungs.add_row("(target before)", "", f"{target['forget']:.2f}", f"{target['others']:.2f}", "", "")
    best = record["requests"]["main"]["found"]["all"]["recommended_step"]
    for rung in record["rungs"]:
        after, scales = rung["unlearned"], rung["scales"]
        note = "recommended" if rung["step"] == best else ""
        if rung["method"] == "task_vector":
            note = "the target (task vector)"
        rungs.add_row(
            f"step {rung['step']:,}",
            str(rung["seen"]),
            f"{after['forget']:.2f}",
            f"{after['others']:.2f}",
            f"{scales['forget']:g}, {scales['retain']:g}{'' if rung['kept_rule'] else ' *'}",
            note,
        )
    return [found, rungs]


def demo_sentence(record: Mapping[str, Any]) -> str:
    """Return in a sentence how the evidence agrees with the truth."""
    requests = record["requests"].values()
    right = sum(request["found"]["all"]["right"] for request in requests)
    counts = all(request["found"][kind]["every_exposure_right"] for request in requests for kind in COUNTED)
    off = max(request["found"]["behaviour"]["rungs_off"] for request in requests)
    agree = "agree with the truth in every exposure" if counts else "do NOT agree with the truth"
    return (
        f"The recommended checkpoint is the right one for {right} of {len(requests)} requests; log and "
        f"rebuilt order {agree}, and behaviour alone "
        + (
            f"is at most {off} checkpoint{'' if off == 1 else 's'} off."
            if off
            else "finds the same checkpoint."
        )
    )


def _demo_cell(found: Mapping[str, Any]) -> str:
    return _step_or_none(found["recommended_step"]) + ("" if found["right"] else " (wrong)")


def _step_or_none(step: int | None) -> str:
    return "none" if step is None else f"step {step:,}"
