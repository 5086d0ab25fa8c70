"""A location and a plan in words and pictures: tables for the terminal, a page of Markdown, SVG.

Everything comes from the records (`Location.as_record`, `plan_record`); nothing is a guess. The pictures
are SVG written by hand: no plotting library, and they open in any browser.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

MOST_ROWS = 40
"""Rows of the forget set that a table or a picture shows one by one."""
MOST_STEPS = 6
"""Exposures of a row that a table shows."""
WIDTH, MARGIN, LANE = 900, 170, 14
STEP_WIDTH = 60
"""Steps are written at least so far apart in a picture."""

COLOURS = {
    "ink": "#1c2733",
    "faint": "#c9d1d9",
    "clean": "#2a7f62",
    "seen": "#b23a48",
    "unknown": "#8a949e",
    "near": "#d08c2f",
    "gap": "#3b6ea8",
}
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
    lines += [f"- {_escape(line)}" for line in location_sentences(record)]
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
            told = {name: _escape(text) for name, text in entry.items()}
            lines.append(f"- **{told['name']}**: {told['what']}")
            lines.append(f"  Cost: {told['cost']} Known: {told['known']} ({told['source']})")
    if record["warnings"]:
        lines += ["", "## What to know", "", *(f"- {_escape(text)}" for text in record["warnings"])]
    return "\n".join(lines) + "\n"


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return lines + [f"| {' | '.join(_escape(cell) for cell in row)} |" for row in rows]


def _escape(text: str) -> str:
    safe = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#~" else letter for letter in safe)


# Pictures


def location_picture(record: Mapping[str, Any]) -> str:
    """Return an SVG: checkpoints along the steps, a lane a row with its exposures, and the gap below."""
    last = max([rung["step"] for rung in record["rungs"]] + [record["target_step"] or 0, record["last"] or 0])
    axis = _Axis(last)
    shown = record["rows"][:MOST_ROWS]
    top = 70
    bottom = top + LANE * len(shown) + 10
    has_gap = any(rung["gap"] is not None for rung in record["rungs"])
    height = bottom + (150 if has_gap else 40)
    parts = [*_ladder_marks(record, axis, bottom), *_lanes(shown, axis, top)]
    if len(record["rows"]) > len(shown):
        parts.append(_text(10, bottom + 12, f"and {len(record['rows']) - len(shown)} more rows", size=10))
    if has_gap:
        parts += _gap_curve(record, axis, bottom + 30)
    best = record["recommended"]
    title = "No checkpoint is clean" if best is None else f"Recommended: step {best['step']:,}"
    return _svg(height, [_text(10, 20, title, size=13), *_legend(), *parts])


def plan_picture(record: Mapping[str, Any]) -> str:
    """Return an SVG: a lane a schedule, with a mark for each checkpoint that it keeps."""
    axis = _Axis(record["wish"]["steps"])
    parts = [_text(10, 20, f"Checkpoints to keep in {record['wish']['steps']:,} steps", size=13)]
    for number, schedule in enumerate(record["schedules"]):
        y = 50 + 40 * number
        colour = COLOURS["clean" if schedule["name"] == record["recommended"] else "unknown"]
        parts.append(_text(10, y + 4, schedule["name"]))
        parts.append(_line(axis.at(0), y, axis.at(axis.last), y, COLOURS["faint"]))
        parts += [_dot(axis.at(step), y, 4, colour, f"step {step:,}") for step in schedule["kept"]]
        told = f"expected {schedule['expected']:,.0f}, worst {schedule['worst']:,} steps"
        parts.append(_text(axis.at(0), y + 18, told, size=10, colour=COLOURS["unknown"]))
    return _svg(60 + 40 * len(record["schedules"]), parts)


class _Axis:
    """Steps along the width of a picture."""

    def __init__(self, last: int) -> None:
        self.last = max(1, last)

    def at(self, step: float) -> float:
        """Return the x of a step."""
        return float(MARGIN + (WIDTH - MARGIN - 30) * step / self.last)


def _legend() -> list[str]:
    parts = []
    told = {"clean": "clean", "seen": "has seen forget rows", "near": "similar text", "unknown": "not known"}
    for number, (name, text) in enumerate(told.items()):
        x = WIDTH - 520 + 130 * number
        parts += [_dot(x, 16, 4, COLOURS[name], text), _text(x + 8, 20, text, size=10)]
    return parts


def _ladder_marks(record: Mapping[str, Any], axis: _Axis, bottom: int) -> list[str]:
    parts = [_text(10, 54, "checkpoints"), _line(axis.at(0), 50, axis.at(axis.last), 50, COLOURS["faint"])]
    best = (record["recommended"] or {}).get("step")
    told = -float(MARGIN)  # x of the last step that was written below
    for rung in record["rungs"]:
        x, step = axis.at(rung["step"]), rung["step"]
        if x - told > STEP_WIDTH:
            parts.append(_text(x, bottom + 12, f"{step:,}", size=9, colour=COLOURS["unknown"], middle=True))
            told = x
        dirty = rung["exposed"] if rung["seen"] is None else rung["seen"] > 0
        if rung["unrecorded"] and not rung["seen"]:  # what the missing steps held is not known
            dirty = rung["exposed"]
        colour = COLOURS["unknown" if dirty is None else "seen" if dirty else "clean"]
        parts.append(_line(x, 50, x, bottom, COLOURS["faint"]))
        parts.append(_dot(x, 50, 8 if step == best else 5, colour, f"step {step:,}: {rung['location']}"))
        if step == best:
            parts.append(_text(x, 38, f"{step:,}", size=11, colour=colour, middle=True))
    if record["target_step"] is not None:
        x = axis.at(record["target_step"])
        parts.append(f'<rect x="{x - 4:.1f}" y="46" width="8" height="8" fill="{COLOURS["ink"]}"/>')
        parts.append(_text(x, 38, "target", size=11, middle=True))
    return parts


def _lanes(rows: Sequence[Mapping[str, Any]], axis: _Axis, top: int) -> list[str]:
    parts = []
    for number, row in enumerate(rows):
        y = top + LANE * number + LANE / 2
        parts.append(_text(10, y + 3, f"row {row['row'] + 1}", size=9, colour=COLOURS["unknown"]))
        for entry in row["seen"]:
            colour = COLOURS["near" if entry["copy"] else "seen"]
            told = f"step {entry['step']:,}" + (f": {entry['copy']}" if entry["copy"] else "")
            parts.append(_dot(axis.at(entry["step"]), y, 2, colour, told))
    return parts


def _gap_curve(record: Mapping[str, Any], axis: _Axis, top: int) -> list[str]:
    """Return the gap of the checkpoints that were looked at, with their intervals."""
    onset = record["onset"]
    values = [(gap["step"], *gap["values"][onset["measure"]], gap["exposed"]) for gap in onset["gaps"]]
    low, high = min(0.0, *(value[2] for value in values)), max(1e-9, *(value[3] for value in values))

    def level(value: float) -> float:
        return float(top + 90 - 80 * (value - low) / (high - low))

    parts = [_text(10, top + 14, "gap"), _text(10, top + 28, onset["measure"].replace("_", " "), size=10)]
    parts.append(_line(axis.at(0), level(0), axis.at(axis.last), level(0), COLOURS["faint"]))
    top_value = max(value[1] for value in values)
    for mark in {0.0, top_value}:
        parts.append(_text(MARGIN - 36, level(mark) + 3, f"{mark:+.2f}", size=9, colour=COLOURS["unknown"]))
    points = " ".join(f"{axis.at(step):.1f},{level(value):.1f}" for step, value, *_ in values)
    parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS["gap"]}" stroke-width="1.5"/>')
    for step, value, least, most, exposed in values:
        parts.append(_line(axis.at(step), level(least), axis.at(step), level(most), COLOURS["gap"]))
        colour = COLOURS["seen" if exposed else "clean"]
        parts.append(_dot(axis.at(step), level(value), 4, colour, f"step {step:,}: {value:+.3f}"))
    return parts


def _svg(height: float, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-family="sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _text(
    x: float, y: float, text: str, *, size: int = 12, colour: str = COLOURS["ink"], middle: bool = False
) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}"{anchor}>{html.escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _dot(x: float, y: float, radius: float, colour: str, told: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"><title>{html.escape(told)}</title>'
        "</circle>"
    )


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
    rungs = Table(title="Unlearning the main request from each checkpoint: recall", title_justify="left")
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
