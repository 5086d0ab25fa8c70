"""A location and a plan in words: sentences, tables, a page of Markdown.

Everything comes from the records (`Location.as_record`, `plan_record`); nothing is a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from palinode.records import Outcome
from palinode.report.content import SAYS, Block, Grid, GridCell, Heading, Picture, Row, Section, section
from palinode.report.pictures import Figure, Mark, Ruler, Trace, interval, names_down, picture_file
from palinode.report.words import DASH, number, words

MOST_ROWS = 40
"""Rows of the forget set that a table or a picture shows one by one."""
MOST_STEPS = 6
"""Exposures of a row that a table shows."""
DEMO_EVIDENCE = ("log", "order", "behaviour", "all")
WITHOUT = "What can be done without a clean checkpoint"
COLOURS = {"clean": "green", "has seen forget rows": "red", "similar text": "amber", "not known": "other"}
"""That of what may be known of a checkpoint or a row."""


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
        unsure = any(point["seen"] == 0 and point["unrecorded"] for point in record["rungs"])
        return f"No checkpoint of the series is {'known to be ' if unsure else ''}clean."
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


def _short(count: float, units: Sequence[str], least: str) -> str:
    """Return a count with its unit (of 10^12, 10^9 and 10^6), in three digits; `least` is for fewer."""
    for unit, size in zip(units, (10**12, 10**9, 10**6), strict=True):
        if count >= size:
            return f"{count / size:,.3g}{unit}"
    return least


def _tokens(count: float) -> str:
    return _short(count, ("T", "B", "M"), f"{count:,.0f}")


# Tables and the page


def location_brief(record: Mapping[str, Any]) -> list[Block]:
    """Return what the terminal shows: rows, checkpoints, the answer, and what to do without a clean one."""
    told = [f"{entry['name']}: {entry['what']} Cost: {entry['cost']}" for entry in record["alternatives"]]
    rest: list[Block] = [f"{WITHOUT}:", told] if told else []
    return [_row_grid(record, short=True), _checkpoint_grid(record), location_sentences(record), *rest]


def location_sections(record: Mapping[str, Any]) -> list[Section]:
    """Return what a report tells of a location."""
    alternatives = [
        (f"{one['name']}:", f"{one['what']} Cost: {one['cost']} Known: {one['known']} ({one['source']})")
        for one in record["alternatives"]
    ]
    pictures = [
        Picture(f"location-{place}", figure.name or "Checkpoints and rows by step", figure)
        for place, figure in enumerate(location_figures(record))
    ]
    gap = "A gap with * is beyond noise; that of the earliest checkpoint is the plain difference."
    similar = "A step with ~ is of a similar text, not of the row itself."
    return [
        *section("Checkpoints", *pictures, _checkpoint_grid(record), bar="Checkpoints", intro=gap),
        *section("Forget rows", _row_grid(record), bar="Rows", intro=similar),
        *section(WITHOUT, alternatives, bar="Alternatives"),
    ]


def _checkpoint_grid(record: Mapping[str, Any]) -> Grid:
    total = len(record["rows"])
    marks = {(record[name] or {}).get("step"): words(name) for name in ("next_best", "recommended")}
    rows = []
    for point in record["rungs"]:
        least = "at least " if point["unrecorded"] and point["seen"] < total else ""
        seen = "not known" if point["seen"] is None else f"{least}{point['seen']} of {total}"
        gap = "" if point["gap"] is None else f"{point['gap']:+.2f}{' *' if point['exposed'] else ''}"
        tokens = "" if point["tokens"] is None else _tokens(point["tokens"])
        rows.append(
            [f"{point['step']:,}", tokens, seen, gap, marks.get(point["step"], ""), point["location"]]
        )
    head = ["step", "tokens", "forget rows seen", "gap", "", "checkpoint"]
    return Grid("Checkpoints", head, rows, text_columns=len(head))


def _row_grid(record: Mapping[str, Any], *, short: bool = False) -> Grid:
    """Return the exposures of each row; `short` leaves out the folders of the files that rows stand in."""
    rows, cells = record["rows"], []

    def shown(place: str) -> str:
        return re.sub(" of .*/", " of ", place) if short else place

    for row in rows[:MOST_ROWS]:
        seen, copies = row["seen"], row["copies"]
        steps = ", ".join(f"{entry['step']:,}{'~' if entry['copy'] else ''}" for entry in seen[:MOST_STEPS])
        more = f" and {len(seen) - MOST_STEPS} more" if len(seen) > MOST_STEPS else ""
        places = "; ".join(
            shown(copy["place"]) + ("" if copy["exact"] else f" (similar, {copy['similarity']:.2f})")
            for copy in copies[:3]
        )
        places += f" and {len(copies) - 3} more" if len(copies) > 3 else ""
        first = f"{seen[0]['step']:,}" if seen else "not known"
        cells.append([shown(row["place"]), first, steps + more, places])
    if len(rows) > MOST_ROWS:
        cells.append([f"and {len(rows) - MOST_ROWS} more", "", "", ""])
    return Grid("Forget rows", ["row", "first", "exposures", "copies in the corpus"], cells, text_columns=4)


def location_picture(record: Mapping[str, Any]) -> str:
    """Return the picture of a location as a file."""
    best = record["recommended"]
    title = f"Recommended: step {best['step']:,}" if best else "No checkpoint is clean"
    return picture_file(title, location_figures(record))


def location_figures(record: Mapping[str, Any]) -> list[Figure]:
    """Return checkpoints along the steps with a lane a row, and the gap below."""
    series, shown = record["rungs"], record["rows"][:MOST_ROWS]
    best, target = record["recommended"] or {}, record["target_step"]
    last = max([one["step"] for one in series] + [target or 0, record["last"] or 0, 1])
    marks: dict[str, list[Mark]] = {name: [] for name in COLOURS}
    for one in series:
        marks[_state_of(one)].append(
            Mark(one["step"], 0, [f"step {one['step']:,}", one["location"]], size=10)
        )
    for lane, row in enumerate(shown, start=1):
        for seen in row["seen"]:
            name = "similar text" if seen["copy"] else "has seen forget rows"
            said = [f"step {seen['step']:,}", *([seen["copy"]] if seen["copy"] else [])]
            marks[name].append(Mark(seen["step"], lane, said, size=5))
    traces = [Trace(name, found, f"--{COLOURS[name]}", "circle") for name, found in marks.items()]
    if best:
        mark = Mark(best["step"], 0, [f"step {best['step']:,}", best["location"], "recommended"])
        traces.append(Trace("", [mark], "--green", "circle", 16, label=f"{best['step']:,}"))
    if target is not None:
        traces.append(Trace("", [Mark(target, 0, ["target"])], "--ink", "square", label="target"))
    down = names_down(["checkpoints", *(f"row {row['row'] + 1}" for row in shown)])
    more = len(record["rows"]) - len(shown)
    across, told = Ruler("step", reach=(0, last)), f"and {more} more rows" if more else ""
    panels = [Figure(traces, 90 + 15 * len(down.names), across, down, told)]
    if record["onset"] and any(one["gap"] is not None for one in series):
        panels.append(_gap_panel(record["onset"], across))
    return panels


def _state_of(one: Mapping[str, Any]) -> str:
    """Return what is known of a checkpoint; what missing steps held is not known."""
    dirty = (
        one["exposed"] if one["seen"] is None or (one["unrecorded"] and not one["seen"]) else one["seen"] > 0
    )
    return "not known" if dirty is None else "has seen forget rows" if dirty else "clean"


def _gap_panel(onset: Mapping[str, Any], across: Ruler) -> Figure:
    """Return the gap of the checkpoints that were looked at, with their intervals."""
    marks = []
    for gap in onset["gaps"]:
        value, low, high = gap["values"][onset["measure"]]
        said = [f"step {gap['step']:,}", f"{value:+.3f}"]
        symbol = "circle" if gap["exposed"] else "circle-open"
        up = interval({"value": value, "low": low, "high": high})
        marks.append(Mark(gap["step"], value, said, up=up, symbol=symbol))
    trace = Trace("", marks, "--unlearned", "circle", dash="solid")
    name = f"gap, {words(onset['measure'])}: filled where it is beyond noise"
    return Figure([trace], 180, across, name=name)


# The plan


def plan_brief(record: Mapping[str, Any]) -> list[Block]:
    """Return what the terminal shows: the schedules, and what is recommended."""
    schedules = record["schedules"]
    rows = []
    for one in schedules:
        size = _short(one["bytes"], (" TB", " GB", " MB"), f"{one['bytes'] / 1000:,.3g} kB")
        distances = (f"{one['expected']:,.0f}", f"{one['worst']:,}")
        rows.append([one["name"], str(len(one["kept"])), *distances, size])
    head = ["schedule", "kept", "expected distance", "worst", "storage"]
    best = schedules[0]
    kept = ", ".join(f"{step:,}" for step in best["kept"])
    lines = [
        f"Keep ({best['name']}): {kept}.",
        f"An exposure is {best['expected']:,.0f} steps after the last clean checkpoint on average, "
        f"{best['worst']:,} at worst; {best['without']:.1%} of requests are expected to concern steps before "
        "the first of them, for which only the untrained model is clean.",
    ]
    return [Grid("Checkpoints to keep", head, rows), lines]


def plan_picture(record: Mapping[str, Any]) -> str:
    """Return the picture of a plan: a lane a schedule, with a mark for each checkpoint that it keeps."""
    traces, names = [], []
    for lane, schedule in enumerate(record["schedules"]):
        colour = "--green" if schedule["name"] == record["recommended"] else "--other"
        marks = [Mark(step, lane, [f"step {step:,}"]) for step in schedule["kept"]]
        traces.append(Trace("", marks, colour, "circle", 11))
        told = f"expected {schedule['expected']:,.0f}, worst {schedule['worst']:,}"
        names.append(f"{schedule['name']}\n{told}")
    steps = record["wish"]["steps"]
    panel = Figure(traces, 90 + 44 * len(names), Ruler("step", reach=(0, steps)), names_down(names))
    return picture_file(f"Checkpoints to keep in {steps:,} steps", [panel])


# The demo


def demo_brief(record: Mapping[str, Any]) -> list[Block]:
    """Return what the terminal shows of the demo: what evidence found, and what each checkpoint gives."""

    def told(one: Mapping[str, Any]) -> str:
        return _step_or_none(one["recommended_step"]) + ("" if one["right"] else " (wrong)")

    found = []
    for name, one in record["requests"].items():
        steps = [told(one["found"][kind]) for kind in DEMO_EVIDENCE]
        found.append([name, str(one["rows"]), _step_or_none(one["clean_step"]), *steps])
    target = record["rungs"][0]["target"]
    tried = [["(target before)", "", f"{target['forget']:.2f}", f"{target['others']:.2f}", "", ""]]
    best = record["requests"]["main"]["found"]["all"]["recommended_step"]
    for point in record["rungs"]:
        after, scales = point["unlearned"], point["scales"]
        note = "recommended" if point["step"] == best else ""
        if point["method"] == "task_vector":
            note = "the target (task vector)"
        matched = (f"{after['forget']:.2f}", f"{after['others']:.2f}")
        pair = f"{scales['forget']:g}, {scales['retain']:g}{'' if point['kept_rule'] else ' *'}"
        tried.append([f"step {point['step']:,}", str(point["seen"]), *matched, pair, note])
    kept = all(point["kept_rule"] for point in record["rungs"])
    broken = "* no pair of scales kept enough of the others; the one that breaks the rule least"
    head = ["checkpoint", "seen", "forget people", "others", "α, β", ""]
    requests = ["request", "rows", "truth", *DEMO_EVIDENCE]
    return [
        Grid("The last clean checkpoint of each request", requests, found),
        Grid("Unlearning the main request from each checkpoint: exact match", head, tried),
        [*([] if kept else [broken]), demo_sentence(record)],
    ]


def demo_sentence(record: Mapping[str, Any]) -> str:
    """Return in a sentence how the evidence agrees with the truth."""
    requests = record["requests"].values()
    right = sum(request["found"]["all"]["right"] for request in requests)
    found = [request["found"][kind] for request in requests for kind in ("log", "order")]
    counts = all(one["every_exposure_right"] for one in found)
    off = max(request["found"]["behaviour"]["rungs_off"] for request in requests)
    agree = "agree with the truth in every exposure" if counts else "do NOT agree with the truth"
    alone = (
        f"is at most {off} checkpoint{'' if off == 1 else 's'} off" if off else "finds the same checkpoint"
    )
    return (
        f"The recommended checkpoint is the right one for {right} of {len(requests)} requests; log and "
        f"rebuilt order {agree}, and behaviour alone {alone}."
    )


def _step_or_none(step: int | None) -> str:
    return "none" if step is None else f"step {step:,}"


# Influence


def influence_brief(record: Mapping[str, Any]) -> list[Block]:
    """Return what the terminal shows of influence: each answer with the set and without it, and rows."""
    blocks: list[Block] = [] if record["set"] is None else _set_blocks(record["set"])
    told = record["ranking"] or {"answers": (), "top": ()}
    for (question, answer), top in zip(told["answers"], told["top"], strict=True):
        rows = [[one["place"], one["prompt"], one["answer"], _score(one)] for one in top]
        title = f"Of {told['rows']} rows, those behind {question!r} → {answer!r} ({told['measure']})"
        blocks.append(Grid(title, ["row", "prompt", "answer", "score"], rows, text_columns=3))
        parts = [(f"{one['place']}:", _parts(one["tokens"])) for one in top if "tokens" in one]
        blocks += [parts] if parts else []
    return [*blocks, *([f"Weighed: {told['weighed']}."] if record["ranking"] else ())]


def _score(one: Mapping[str, Any]) -> GridCell:
    """Return a score with half the width of its interval, where it has one."""
    low, high = one.get("interval") or (None, None)
    return GridCell(f"{one['score']:+.3g}", None if low is None else f"± {(high - low) / 2:.2g}")


def _parts(tokens: Sequence[Sequence[Any]], form: str = "+.2g") -> str:
    """Return tokens with their parts of a figure."""
    return "  ".join(f"{token.strip() or repr(token)} {value:{form}}" for token, value in tokens)


def answers_brief(told: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[Block]:
    """Return what the terminal shows of answers before and after the rows behind them were taken back."""
    rows = [
        [one.prompt, one.expected, *map(number, entry["probability"]), one.generated or DASH]
        for entry, one in zip(told["answers"], outcomes, strict=True)
    ]
    head = ["question", "answer asked about", "before", "after", "answer now"]
    return [Grid("Probability of the answer per token, before and after", head, rows, text_columns=2)]


def influence_section(told: Mapping[str, Any]) -> list[Section]:
    """Return what a run's report tells of the rows that it took back, and of the answers; no texts."""
    grids = [
        block
        for one in told["answers"]
        for block in (
            Heading(f"Answer {one['place']}"),
            "Probability per token: {} before, {} after.".format(*map(number, one["probability"])),
            Grid("Its rows", ["row", "score"], [[row["place"], _score(row)] for row in one["rows"]]),
        )
    ]
    return section("Rows behind an answer", *grids, bar="Rows", intro=SAYS["influence"].format_map(told))


def _set_blocks(told: Mapping[str, Any]) -> list[Block]:
    blocks = list[Block]()
    rows: list[Row] = []
    for one in told["answers"]:
        before, after = one["probability"]
        off = "" if one["curvature"] is None else f"{one['curvature']:.0%} off"
        own = GridCell(one["answer"], "the target's own" if one["own"] else None)
        straight = GridCell(f"{one['first_order']:+.2f}", off)
        rows.append([one["question"], own, number(before), number(after), f"{one['nats']:+.2f}", straight])
        changed = f"{number(before)} → {number(after)}"
        blocks += [
            [(f"{one['answer']}:", f"nats by token: {_parts(one['tokens'], '+.2f')}")],
            f"Without these {told['rows']} rows {one['answer']!r} would be {changed} as probable.",
        ]
    head = ["question", "answer", "with", "without", "nats", "first order"]
    alpha = f"α = {told['alpha']:.3g} ({told['chosen_by']})"
    title = f"Without these {told['rows']} rows, {alpha}: probability of the answer per token"
    return [Grid(title, head, rows, text_columns=2), *blocks]
