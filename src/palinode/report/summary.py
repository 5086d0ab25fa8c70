"""The record of a run in words: one sentence, a table for the terminal, a page of Markdown.

Every number comes from the record (docs/record.md). What the record lacks is left out of the tables and
named under "Not tested"; a missing score is a dash with its reason, never a 0. The words claim evidence
about the examples measured, no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from palinode.report.verdicts import claims, untested
from palinode.report.words import (
    DASH,
    SETS,
    TRAININGS,
    at,
    escaped,
    fenced,
    integer,
    interval_text,
    metric_label,
    metrics_on,
    model_label,
    number,
    percent,
    scale,
    scores_on,
    table_lines,
    words,
)

FINGERPRINT_LENGTH = 16
MOST_CASES, MOST_LETTERS = 10, 400
"""Cases of a set, and letters of an answer, that the Markdown shows; the page has all."""


def headline(record: Mapping[str, Any]) -> str:
    """Return one sentence: how the answer probability moved on both sets, and what to compare it with."""
    return f"{_forget_clause(record)}; {_retain_clause(record)}."


def terminal_table(record: Mapping[str, Any]) -> Table:
    """Return the scores as a table for the terminal, each with its interval on the line below."""
    metrics = metrics_on(record, SETS)
    table = Table(title="Scores and their 95 % intervals", title_justify="left")
    table.add_column("model", no_wrap=True)
    for metric in metrics:
        table.add_column(Text(metric_label(metric).replace(" ", "\n")), justify="right", no_wrap=True)
    for data_set, label in SETS.items():
        rows = scores_on(record, data_set)
        if rows:
            table.add_section()
            table.add_row(Text(label, style="bold"))
        for model, scores in rows.items():
            table.add_row(Text(model_label(model)), *(_terminal_cell(scores.get(name)) for name in metrics))
    return table


def markdown_report(record: Mapping[str, Any]) -> str:
    """Return the whole report as Markdown; text that comes from the user is escaped.

    `record` is a run's record, or the content of a report (`report_content`), which may hold answers too.
    """
    sections = (
        _opening(record),
        _claim_section(record),
        _score_section(record),
        _method_section(record),
        _scale_section(record),
        _vector_section(record),
        _cost_section(record),
        _answer_section(record),
        _untested_section(record),
        _input_section(record),
        _repeat_section(record),
    )
    return "\n".join(line for section in sections for line in section).strip() + "\n"


# The sentence


def _forget_clause(record: Mapping[str, Any]) -> str:
    before, after = _probabilities(record, "forget", "target", "unlearned")
    if before is None or after is None:
        return "On the forget set the change in answer probability is not known"
    change = f"the answer probability went from {number(before)} to {number(after)}"
    return f"On the forget set {change} ({_comparison(record)})"


def _comparison(record: Mapping[str, Any]) -> str:
    retrained, base = _probabilities(record, "forget", "retrained", "base")
    if retrained is not None:
        return f"a model that never saw it: {number(retrained)}"
    if base is not None:
        return f"the base checkpoint, which had not seen it: {number(base)}; no retrained model was given"
    return "no model that never saw it was measured"


def _retain_clause(record: Mapping[str, Any]) -> str:
    if not scores_on(record, "retain"):
        return "nothing was measured on a retain set"
    data_set = "retain_unseen" if scores_on(record, "retain_unseen") else "retain"
    place = f"on the {SETS[data_set]}"
    before, after = _probabilities(record, data_set, "target", "unlearned")
    if before is None or after is None:
        return f"{place} the change is not known"
    if after <= before:
        return f"{place} it kept {number(after)} of {number(before)}"
    return f"{place} it went from {number(before)} to {number(after)}"


def _probabilities(record: Mapping[str, Any], data_set: str, *models: str) -> list[float | None]:
    return [at(record, "scores", model, data_set, "answer_probability", "value") for model in models]


# The sections of the page, each a list of lines, empty where the record has nothing to say


def _opening(record: Mapping[str, Any]) -> list[str]:
    times = [escaped(record[key]) for key in ("created", "finished") if record.get(key)]
    origin = [f"palinode {escaped(record['palinode'])}"] if record.get("palinode") else []
    origin += [f"run {escaped(record['run'])}"] if record.get("run") else []
    origin += [" to ".join(times)] if times else []
    return [
        "# Unlearning report",
        "",
        f"**{headline(record)}**",
        "",
        "This is evidence about the examples measured here, not proof that nothing of the forget set is "
        "left. On the forget set the aim is the row of a model that never saw it (retrained, else the base "
        "checkpoint): an unlearned model well above it has forgotten too little, one well below it too much.",
        "",
        *([", ".join(origin) + ".", ""] if origin else []),
    ]


def _claim_section(record: Mapping[str, Any]) -> list[str]:
    found = record.get("claims") or [claim.as_json() for claim in claims(record)]
    lines = (
        f"- **{claim['question']}** {claim['symbol']} {claim['word']}. {escaped(claim['sentence'])}"
        for claim in found
    )
    return ["## In short", "", *lines, ""]


def _score_section(record: Mapping[str, Any]) -> list[str]:
    tables = [line for data_set in SETS for line in _score_table(record, data_set)]
    if not tables:
        return []
    return ["## Scores", "", "In parentheses: the 95 % bootstrap interval over the examples.", "", *tables]


def _score_table(record: Mapping[str, Any], data_set: str) -> list[str]:
    rows = scores_on(record, data_set)
    if not rows:
        return []
    metrics = metrics_on(record, [data_set])
    return [
        f"### On the {SETS[data_set]}",
        "",
        *table_lines(
            ["model", "examples", *(escaped(metric_label(metric)) for metric in metrics)],
            (
                [escaped(model_label(model)), _count(scores), *(_cell(scores.get(name)) for name in metrics)]
                for model, scores in rows.items()
            ),
        ),
        *_reasons(rows, metrics),
    ]


def _reasons(rows: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> list[str]:
    """List what is said about values (why one is missing, a caveat), like remarks of models together."""
    models: dict[tuple[str, str], list[str]] = {}
    for metric in metrics:
        for model, scores in rows.items():
            if reason := at(scores, metric, "reason"):
                models.setdefault((metric, reason), []).append(model_label(model))
    lines = [
        f"- {escaped(metric_label(metric))} of {escaped(', '.join(names))}: {escaped(reason)}."
        for (metric, reason), names in models.items()
    ]
    return [*lines, ""] if lines else []


def _method_section(record: Mapping[str, Any]) -> list[str]:
    method = at(record, "method")
    if not method:
        return []
    settings = [
        f"{escaped(name)} = {escaped(value)}" for name, value in (method.get("settings") or {}).items()
    ]
    source = f" ({escaped(method['source'])})" if method.get("source") else ""
    formula = f": {escaped(method['formula'])}" if method.get("formula") else ""
    sentences = [f"{escaped(method.get('name'))}{source}{formula}."]
    if settings:
        sentences.append(f"Its own settings: {', '.join(settings)}.")
    return ["## Method", "", " ".join(sentences), ""]


def _scale_section(record: Mapping[str, Any]) -> list[str]:
    scales = at(record, "scales")
    if not scales:
        return []
    alpha, beta = scales.get("forget"), scales.get("retain")
    formula = "unlearned = target − α · forget vector + β · retain vector"
    sentences = [f"{formula}, with α = {scale(alpha)} and β = {scale(beta)}."]
    if not beta:
        sentences.append("No retain vector was added.")
    if scales.get("chosen_by") == "grid":
        sentences.append(
            "Chosen from a grid, each point tried in memory on rows of both sets; the retain rows are "
            "ones that the retain vector had not seen, where there were enough."
        )
    if scales.get("rule"):
        sentences.append(f"The rule: {escaped(scales['rule']).rstrip('.')}.")
    sentences += _yardstick_sentences(scales)
    return ["## Scales", "", " ".join(sentences), "", *_point_table(scales.get("points") or [])]


def _yardstick_sentences(scales: Mapping[str, Any]) -> list[str]:
    """Say where a search for the scales wanted to go, on what evidence, and how much hangs on its choice."""
    yardstick = scales.get("yardstick")
    if not yardstick:
        return []
    wanted = at(yardstick, "answer_probability") or {}
    interval = f" ({interval_text(wanted)})" if interval_text(wanted) else ""
    sentences = [
        f"A model that never saw the forget set would give it an answer probability of "
        f"{number(wanted.get('value'))}{interval}, estimated on the assumption that "
        f"{escaped(yardstick.get('assumes'))}."
    ]
    if yardstick.get("warning"):
        sentences.append(f"**{escaped(yardstick['warning'])}**")
    changes = [abs(step["distance_change"]) for step in scales.get("sensitivity") or []]
    if changes:
        sentences.append(
            f"Steps of about a tenth around these scales move that distance by up to {number(max(changes))}."
        )
    return sentences


def _point_table(points: Sequence[Mapping[str, Any]]) -> list[str]:
    if not points:
        return []
    return table_lines(
        ["α", "β", "forget probability", "retain probability", "allowed", "chosen"],
        (
            [
                scale(point.get("forget")),
                scale(point.get("retain")),
                number(point.get("forget_probability")),
                number(point.get("retain_probability")),
                "yes" if point.get("allowed") else "no",
                "**chosen**" if point.get("chosen") else "",
            ]
            for point in points
        ),
    )


def _vector_section(record: Mapping[str, Any]) -> list[str]:
    vectors = [name for name in SETS if at(record, "vectors", name)]
    if not vectors:
        return []
    lines = table_lines(
        ["vector", "norm", "share that arrived in the saved model"],
        (
            [name, number(at(record, "vectors", name, "norm")), percent(at(record, "dose", name))]
            for name in vectors
        ),
    )
    facts = {
        "Cosine between the two vectors": number(at(record, "vectors", "cosine")),
        "Rounding error, relative to the whole change": number(at(record, "dose", "relative_error")),
        "Weights that changed": percent(at(record, "dose", "moved_share")),
        "Numbers that no sum reaches": percent(at(record, "dose", "unreached_share")),
        "Rounding": at(record, "dose", "rounding") or DASH,
    }
    known = [f"- {fact}: {value}" for fact, value in facts.items() if value != DASH]
    notes = [f"- Note: {note}" for note in at(record, "dose", "notes") or ()]
    return ["## Vectors and dose", "", *lines, *known, *notes, ""]


def _cost_section(record: Mapping[str, Any]) -> list[str]:
    runs = {name: run for name, run in (record.get("training") or {}).items() if run}
    if not runs:
        return []
    table = table_lines(
        ["fine-tuning on", "steps", "tokens", "first loss", "last loss", "seconds"],
        (
            [
                TRAININGS.get(name, words(name)),
                integer(run.get("steps")),
                integer(run.get("tokens")),
                number(run.get("first_loss")),
                number(run.get("last_loss")),
                integer(run.get("seconds")),
            ]
            for name, run in runs.items()
        ),
    )
    return ["## Cost", "", *table]


def _answer_section(record: Mapping[str, Any]) -> list[str]:
    """Return the worst cases of each set; the page has the others."""
    lines: list[str] = []
    for name, part in (record.get("answers") or {}).items():
        lines += [f"### On the {SETS.get(name, words(name))}, the worst first", ""]
        for case in part["rows"][:MOST_CASES]:
            lines += [f"- Row {case['row']}: **{_cut(case['prompt'])}**"]
            lines += [f"  - in the data: {_cut(case['expected'])}"]
            lines += [
                f"  - {escaped(model_label(model))} ({number(case['probabilities'][model])}): {_cut(answer)}"
                for model, answer in case["answers"].items()
            ]
        lines += [""]
    note = "In parentheses: the probability of the right answer, not of the one given."
    return ["## Answers", "", note, "", *lines] if lines else []


def _cut(answer: str | None) -> str:
    """Return an answer in Markdown, cut where it is long."""
    if answer is None:
        return DASH
    return escaped(answer if len(answer) <= MOST_LETTERS else f"{answer[:MOST_LETTERS]} …")


def _untested_section(record: Mapping[str, Any]) -> list[str]:
    lacking = record.get("untested") or untested(record)
    notes = [escaped(note) for note in record.get("notes") or []]
    return [
        "## Not tested",
        "",
        *(f"- {escaped(line)}" for line in lacking),
        "",
        *(["## Notes", "", *(f"- {note}" for note in notes), ""] if notes else []),
    ]


def _input_section(record: Mapping[str, Any]) -> list[str]:
    inputs = {
        **{model_label(name): fact for name, fact in (at(record, "models") or {}).items()},
        **{SETS.get(name, words(name)): fact for name, fact in (at(record, "data") or {}).items()},
    }
    rows = [
        [
            escaped(name),
            escaped(fact.get("location") or DASH),
            escaped(str(fact.get("fingerprint") or DASH)[:FINGERPRINT_LENGTH]),
            integer(fact.get("rows")),
        ]
        for name, fact in inputs.items()
        if fact
    ]
    if not rows:
        return []
    table = table_lines(["what", "where", "fingerprint", "rows"], rows, text_columns=3)
    return [
        "## Models and data",
        "",
        *table,
        f"The first {FINGERPRINT_LENGTH} characters of each fingerprint; record.json has the rest.",
        "",
    ]


def _repeat_section(record: Mapping[str, Any]) -> list[str]:
    command, seed = record.get("command"), record.get("seed")
    settings = [f"seed {escaped(seed)}"] if seed is not None else []
    environment = at(record, "environment") or {}
    settings += [f"{escaped(name)} {escaped(value)}" for name, value in environment.items()]
    if not command and not settings:
        return []
    return [
        "## To repeat it",
        "",
        *(fenced(str(command)) if command else []),
        *([f"With {', '.join(settings)}.", ""] if settings else []),
    ]


# Numbers and text


def _cell(score: Mapping[str, Any] | None) -> str:
    score = score or {}
    interval = interval_text(score)
    return number(score.get("value")) + (f" ({interval})" if interval else "")


def _terminal_cell(score: Mapping[str, Any] | None) -> Text:
    score = score or {}
    cell = Text(number(score.get("value")))
    return (
        cell.append(f"\n{interval.replace(' ', '')}", style="dim")
        if (interval := interval_text(score))
        else cell
    )


def _count(scores: Mapping[str, Any]) -> str:
    """Return the number of examples, or its range where metrics could use different numbers of them."""
    counts = sorted({n for score in scores.values() if (n := at(score, "n")) is not None})
    return "–".join(integer(n) for n in dict.fromkeys([counts[0], counts[-1]])) if counts else DASH
