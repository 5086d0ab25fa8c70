"""The report of an audit: its sentence, its section, what the terminal shows.

Every number comes from the record (docs/audit.md). The words claim evidence within a stated budget, name
what was not tested, and promise nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from palinode.report.content import (
    SAYS,
    Block,
    Grid,
    GridCell,
    Heading,
    Picture,
    Row,
    Section,
    Tone,
    score_cell,
    section,
)
from palinode.report.pictures import attack_figure, relearning_figure, says_little
from palinode.report.words import LABELS, at, number, told_by_reason

TONES: dict[str, Tone] = {"knows more": "bad", "knows less": "bad", "unclear": "unsure", "within": "good"}
COSTS = {"read": "rows read", "answers": "answers drawn", "trained": "rows trained"}


def audit_headline(record: Mapping[str, Any]) -> str:
    """Return one or two sentences: passed or not, and on what evidence."""
    answer, kind = record["answer"], LABELS["references"][record["reference"]]
    parts = [
        _count(answer["knows_more"], "found that it knows more"),
        _count(answer["knows_less"], "found that it knows less, which is over-forgetting"),
        _count(answer["unclear"], "could not tell"),
        _count(answer["within"], "put it within the margins"),
    ]
    told = "; ".join(part for part in parts if part) or "no test gave a result"
    if answer["required"]:
        told += f"; the policy requires {', '.join(answer['required'])}, which gave nothing"
    word, missing = "Passed" if answer["passed"] else "Failed", len(answer["not_tested"])
    rest = f"Not tested: {missing} (see the reasons)." if missing else "Everything on the list was tested."
    return f"{word}. Beside {kind}: {told}. {rest}"


def audit_plan_blocks(
    models: int, costs: Mapping[str, Mapping[str, int]], untested: Mapping[str, str]
) -> list[Block]:
    """Return what an audit would run: what each attack takes on one model, and why others are left out."""
    rows: list[Row] = [[name, *(f"{cost[kind]:,}" for kind in COSTS)] for name, cost in costs.items()]
    rows.append(["all", *(f"{sum(cost[kind] for cost in costs.values()):,}" for kind in COSTS)])
    return [
        Grid(f"For each of {models} models", ["attack", *COSTS.values()], rows),
        [f"Not tested: {told}" for told in told_by_reason(untested.items())],
        "Dry run: nothing was measured. Training a row takes about three times as long as reading it.",
    ]


def audit_brief(record: Mapping[str, Any]) -> list[Block]:
    """Return what the terminal shows: every test, what was not tested and why, notes, and the headline."""
    models = _models(record)
    rows: list[Row] = [
        [
            f"{attack}\n  {test}",
            *(number(_score_of(entry, model)["value"]) for model in models),
            score_cell(entry["findings"]["audited"]["difference"]),
            _verdict(record, f"{attack}.{test}", entry),
        ]
        for attack, test, entry in _tests(record)
    ]
    untested = record["answer"]["not_tested"].items()
    head = ["test", *models, "difference", "verdict"]
    return [
        Grid("Higher means that it knows more; 95 % intervals", head, rows),
        [f"Not tested: {told}" for told in told_by_reason(untested)],
        [f"Note: {note}" for note in record.get("notes", ())],
        (
            f"This is evidence about these rows and attacks at the {record['policy']['preset']} budget; a "
            "stronger attack may find more."
        ),
        audit_headline(record),
    ]


def audit_section(record: Mapping[str, Any]) -> list[Section]:
    """Return every test with its margins, the relearning curves, and the budget."""
    models = _models(record)
    rows: list[Row] = [
        [
            GridCell(f"{record['attacks'][attack]['title']}: {entry['title']}", _told_right(entry)),
            _verdict(record, f"{attack}.{test}", entry, reason=True),
            *(score_cell(_score_of(entry, model)) for model in models),
            score_cell(entry["findings"]["audited"]["difference"]),
            ", ".join(
                f"{margin:g}" if margin else "not judged"
                for side in ("less", "more")
                for margin in [record["policy"]["margins"][f"{attack}.{test}"][side]]
            ),
        ]
        for attack, test, entry in _tests(record)
    ]
    head = ["test", "verdict", *models, "difference", "margins (less, more)"]
    label = "Difference between model and reference model by test"
    return section(
        "Under attack",
        Picture("attacks", label, attack_figure(record), caption=SAYS["attacks_picture"]),
        Grid("Every test of the audit", head, rows, text_columns=2),
        *_relearning(record),
        SAYS["budget"].format_map(record["policy"]),
        bar="Audit",
        intro=SAYS["attacks"],
    )


def _relearning(record: Mapping[str, Any]) -> Iterator[Block]:
    drawn = relearning_figure(record)
    if drawn is None:
        return
    yield Heading("Relearning: mean answer probability")
    told = "How fast each model learns the forget set again."
    yield Picture("relearning", "Answer probability by step of relearning", drawn, caption=told)
    for attack in record["attacks"].values():
        details = attack.get("details", {})
        curves = {name: found["curve"] for name, found in details.items() if found.get("curve")}
        if not curves:
            continue
        facts = details["audited"]
        origin = f" ({facts['lookalikes']})" if facts.get("lookalikes") else ""
        rows = [[name, *map(number, curve)] for name, curve in curves.items()]
        yield (
            f"{attack['title']}: {facts['learned_rows']} rows learned{origin}, {facts['tested_rows']} rows "
            "measured."
        )
        yield Grid(attack["title"], ["model", *(f"step {step}" for step in facts["steps"])], rows)


def _tests(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield attack, test and entry of each test that gave a figure."""
    for attack, found in record["attacks"].items():
        for test, entry in found.get("tests", {}).items():
            if at(entry, "findings", "audited", "score", "value") is not None:
                yield attack, test, entry


def _models(record: Mapping[str, Any]) -> list[str]:
    return [name for name in ("audited", "reference", "target") if name in record["models"]]


def _score_of(entry: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    findings: Mapping[str, Any] = entry["findings"]
    score = at(findings, "audited", "reference") if model == "reference" else at(findings, model, "score")
    return score or {"value": None}


def _verdict(
    record: Mapping[str, Any], key: str, entry: Mapping[str, Any], *, reason: bool = False
) -> GridCell:
    """Return the verdict; "within" a single margin says which side was judged, and is green only there."""
    margins, finding = record["policy"]["margins"][key], entry["findings"]["audited"]
    shown, told, value = finding["verdict"], finding["reason"], finding["difference"]["value"] or 0
    tone = TONES.get(shown)
    for side, word, there in (("more", "no less", value > 0), ("less", "no more", value < 0)):
        if shown == "within" and margins[side] is False:
            shown, told, tone = word, f"{side} is not judged", None if there else tone
    if says_little(record, key, entry):
        told, tone = "so does the target, so it tells little; not in the picture", None
    return GridCell(shown, told if reason else None, tone)


def _told_right(entry: Mapping[str, Any]) -> str | None:
    """Return how often a test told right where the truth was known; None in records of earlier versions."""
    told = entry.get("told_right")
    if not told:
        return None
    right, every = told["found"] + told["never"] - told["alarms"], told["knowing"] + told["never"]
    return f"told right in {right} of {every} tiny models"


def _count(keys: Sequence[str], what: str) -> str:
    return f"{len(keys)} test{'' if len(keys) == 1 else 's'} {what}" if keys else ""
