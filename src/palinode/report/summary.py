"""The record of a run in words: one sentence, a table for the terminal, a page of Markdown.

Every number comes from the record (docs/record.md). What the record lacks is left out of the tables and
named under "Not tested"; a missing score is a dash with its reason, never a 0. The words claim evidence
about the examples measured, no more.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

SETS = {
    "forget": "forget set",
    "retain": "retain set",
    "retain_unseen": "unseen retain rows",
}
TRAININGS = {
    "forget": "forget set",
    "retain": "retain set",
    "exposed": "forget set and replay",
    "control": "replay alone",
    "reinforced": "forget set, to reinforce it",
    "method": "what the method trains on",
}
MODELS = {
    "target": "target",
    "unlearned": "unlearned",
    "retrained": "retrained",
    "base": "base checkpoint",
}
METRICS = {
    "answer_probability": "answer probability",
    "rouge_l_recall": "ROUGE-L recall",
    "exact_memorization": "exact memorisation",
    "extraction_strength": "extraction strength",
}
DASH = "—"
FINGERPRINT_LENGTH = 16


def headline(record: Mapping[str, Any]) -> str:
    """Return one sentence: how the answer probability moved on both sets, and what to compare it with."""
    return f"{_forget_clause(record)}; {_retain_clause(record)}."


def terminal_table(record: Mapping[str, Any]) -> Table:
    """Return the scores as a table for the terminal, each with its interval on the line below."""
    metrics = _metrics(record, SETS)
    table = Table(title="Scores and their 95 % intervals", title_justify="left")
    table.add_column("model", no_wrap=True)
    for metric in metrics:
        table.add_column(Text(_metric_label(metric).replace(" ", "\n")), justify="right", no_wrap=True)
    for data_set, label in SETS.items():
        rows = _scores(record, data_set)
        if rows:
            table.add_section()
            table.add_row(Text(label, style="bold"))
        for model, scores in rows.items():
            table.add_row(Text(_model_label(model)), *(_terminal_cell(scores.get(name)) for name in metrics))
    return table


def markdown_report(record: Mapping[str, Any]) -> str:
    """Return the whole report as Markdown; text that comes from the user is escaped."""
    sections = (
        _opening(record),
        _score_section(record),
        _method_section(record),
        _scale_section(record),
        _vector_section(record),
        _cost_section(record),
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
    change = f"the answer probability went from {_number(before)} to {_number(after)}"
    return f"On the forget set {change} ({_comparison(record)})"


def _comparison(record: Mapping[str, Any]) -> str:
    retrained, base = _probabilities(record, "forget", "retrained", "base")
    if retrained is not None:
        return f"a model that never saw it: {_number(retrained)}"
    if base is not None:
        return f"the base checkpoint, which had not seen it: {_number(base)}; no retrained model was given"
    return "no model that never saw it was measured"


def _retain_clause(record: Mapping[str, Any]) -> str:
    if not _scores(record, "retain"):
        return "nothing was measured on a retain set"
    data_set = "retain_unseen" if _scores(record, "retain_unseen") else "retain"
    place = f"on the {SETS[data_set]}"
    before, after = _probabilities(record, data_set, "target", "unlearned")
    if before is None or after is None:
        return f"{place} the change is not known"
    if after <= before:
        return f"{place} it kept {_number(after)} of {_number(before)}"
    return f"{place} it went from {_number(before)} to {_number(after)}"


def _probabilities(record: Mapping[str, Any], data_set: str, *models: str) -> list[float | None]:
    return [_at(record, "scores", model, data_set, "answer_probability", "value") for model in models]


# The sections of the page, each a list of lines, empty where the record has nothing to say


def _opening(record: Mapping[str, Any]) -> list[str]:
    times = [_text(record[key]) for key in ("created", "finished") if record.get(key)]
    origin = [f"palinode {_text(record['palinode'])}"] if record.get("palinode") else []
    origin += [f"run {_text(record['run'])}"] if record.get("run") else []
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


def _score_section(record: Mapping[str, Any]) -> list[str]:
    tables = [line for data_set in SETS for line in _score_table(record, data_set)]
    if not tables:
        return []
    return ["## Scores", "", "In parentheses: the 95 % bootstrap interval over the examples.", "", *tables]


def _score_table(record: Mapping[str, Any], data_set: str) -> list[str]:
    rows = _scores(record, data_set)
    if not rows:
        return []
    metrics = _metrics(record, [data_set])
    return [
        f"### On the {SETS[data_set]}",
        "",
        *_table(
            ["model", "examples", *(_text(_metric_label(metric)) for metric in metrics)],
            (
                [_text(_model_label(model)), _count(scores), *(_cell(scores.get(name)) for name in metrics)]
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
            if reason := _at(scores, metric, "reason"):
                models.setdefault((metric, reason), []).append(_model_label(model))
    lines = [
        f"- {_text(_metric_label(metric))} of {_text(', '.join(names))}: {_text(reason)}."
        for (metric, reason), names in models.items()
    ]
    return [*lines, ""] if lines else []


def _method_section(record: Mapping[str, Any]) -> list[str]:
    method = _at(record, "method")
    if not method:
        return []
    settings = [f"{_text(name)} = {_text(value)}" for name, value in (method.get("settings") or {}).items()]
    source = f" ({_text(method['source'])})" if method.get("source") else ""
    formula = f": {_text(method['formula'])}" if method.get("formula") else ""
    sentences = [f"{_text(method.get('name'))}{source}{formula}."]
    if settings:
        sentences.append(f"Its own settings: {', '.join(settings)}.")
    return ["## Method", "", " ".join(sentences), ""]


def _scale_section(record: Mapping[str, Any]) -> list[str]:
    scales = _at(record, "scales")
    if not scales:
        return []
    alpha, beta = scales.get("forget"), scales.get("retain")
    formula = "unlearned = target − α · forget vector + β · retain vector"
    sentences = [f"{formula}, with α = {_scale(alpha)} and β = {_scale(beta)}."]
    if not beta:
        sentences.append("No retain vector was added.")
    if scales.get("chosen_by") == "grid":
        sentences.append(
            "Chosen from a grid, each point tried in memory on rows of both sets; the retain rows are "
            "ones that the retain vector had not seen, where there were enough."
        )
    if scales.get("rule"):
        sentences.append(f"The rule: {_text(scales['rule']).rstrip('.')}.")
    return ["## Scales", "", " ".join(sentences), "", *_point_table(scales.get("points") or [])]


def _point_table(points: Sequence[Mapping[str, Any]]) -> list[str]:
    if not points:
        return []
    return _table(
        ["α", "β", "forget probability", "retain probability", "allowed", "chosen"],
        (
            [
                _scale(point.get("forget")),
                _scale(point.get("retain")),
                _number(point.get("forget_probability")),
                _number(point.get("retain_probability")),
                "yes" if point.get("allowed") else "no",
                "**chosen**" if point.get("chosen") else "",
            ]
            for point in points
        ),
    )


def _vector_section(record: Mapping[str, Any]) -> list[str]:
    vectors = [name for name in SETS if _at(record, "vectors", name)]
    if not vectors:
        return []
    lines = _table(
        ["vector", "norm", "share that arrived in the saved model"],
        (
            [name, _number(_at(record, "vectors", name, "norm")), _percent(_at(record, "dose", name))]
            for name in vectors
        ),
    )
    facts = {
        "Cosine between the two vectors": _number(_at(record, "vectors", "cosine")),
        "Rounding error, relative to the whole change": _number(_at(record, "dose", "relative_error")),
        "Weights that changed": _percent(_at(record, "dose", "moved_share")),
        "Rounding": _at(record, "dose", "rounding") or DASH,
    }
    known = [f"- {fact}: {value}" for fact, value in facts.items() if value != DASH]
    notes = [f"- Note: {note}" for note in _at(record, "dose", "notes") or ()]
    return ["## Vectors and dose", "", *lines, *known, *notes, ""]


def _cost_section(record: Mapping[str, Any]) -> list[str]:
    runs = {name: run for name in TRAININGS if (run := _at(record, "training", name))}
    if not runs:
        return []
    table = _table(
        ["fine-tuning on", "steps", "tokens", "first loss", "last loss", "seconds"],
        (
            [
                TRAININGS[name],
                _integer(run.get("steps")),
                _integer(run.get("tokens")),
                _number(run.get("first_loss")),
                _number(run.get("last_loss")),
                _integer(run.get("seconds")),
            ]
            for name, run in runs.items()
        ),
    )
    return ["## Cost", "", *table]


def _untested_section(record: Mapping[str, Any]) -> list[str]:
    untested = []
    if not _at(record, "scores", "retrained"):
        untested.append("How a model retrained without the forget set behaves: none was given.")
    if not _scores(record, "retain"):
        untested.append("What changed outside the forget set: no retain set was scored.")
    untested.append("Other wordings of the same facts, membership inference, and relearning.")
    notes = [_text(note) for note in record.get("notes") or []]
    return [
        "## Not tested",
        "",
        *(f"- {line}" for line in untested),
        "",
        *(["## Notes", "", *(f"- {note}" for note in notes), ""] if notes else []),
    ]


def _input_section(record: Mapping[str, Any]) -> list[str]:
    inputs = {
        **{_model_label(name): fact for name, fact in (_at(record, "models") or {}).items()},
        **{SETS.get(name, _words(name)): fact for name, fact in (_at(record, "data") or {}).items()},
    }
    rows = [
        [
            _text(name),
            _text(fact.get("location") or DASH),
            _text(str(fact.get("fingerprint") or DASH)[:FINGERPRINT_LENGTH]),
            _integer(fact.get("rows")),
        ]
        for name, fact in inputs.items()
        if fact
    ]
    if not rows:
        return []
    table = _table(["what", "where", "fingerprint", "rows"], rows, text_columns=3)
    return [
        "## Models and data",
        "",
        *table,
        f"The first {FINGERPRINT_LENGTH} characters of each fingerprint; record.json has the rest.",
        "",
    ]


def _repeat_section(record: Mapping[str, Any]) -> list[str]:
    command, seed = record.get("command"), record.get("seed")
    settings = [f"seed {_text(seed)}"] if seed is not None else []
    environment = _at(record, "environment") or {}
    settings += [f"{_text(name)} {_text(value)}" for name, value in environment.items()]
    if not command and not settings:
        return []
    return [
        "## To repeat it",
        "",
        *(_fenced(str(command)) if command else []),
        *([f"With {', '.join(settings)}.", ""] if settings else []),
    ]


# What the record holds, in the order we show it


def _at(tree: Mapping[str, Any], *keys: str) -> Any:
    """Return what lies at this path of a record, None where the path breaks off."""
    branch: Any = tree
    for key in keys:
        branch = branch.get(key) if isinstance(branch, Mapping) else None
    return branch


def _scores(record: Mapping[str, Any], data_set: str) -> dict[str, Mapping[str, Any]]:
    """Return the scores of each model on one set, the models we know by name first."""
    models = _known_first(_at(record, "scores") or {}, MODELS)
    return {model: scores for model in models if (scores := _at(record, "scores", model, data_set))}


def _metrics(record: Mapping[str, Any], data_sets: Iterable[str]) -> list[str]:
    found = {
        metric: None
        for data_set in data_sets
        for scores in _scores(record, data_set).values()
        for metric in scores
    }
    return _known_first(found, METRICS)


def _known_first(names: Iterable[str], known: Mapping[str, str]) -> list[str]:
    names = list(names)
    return [name for name in known if name in names] + [name for name in names if name not in known]


def _model_label(model: str) -> str:
    return MODELS.get(model, _words(model))


def _metric_label(metric: str) -> str:
    return METRICS.get(metric, _words(metric))


def _words(key: str) -> str:
    return key.replace("_", " ")


# Numbers and text


def _number(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"


def _scale(value: float | None) -> str:
    return DASH if value is None else f"{value:g}"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f} %"


def _integer(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def _interval(score: Mapping[str, Any]) -> str | None:
    low, high = score.get("low"), score.get("high")
    return None if low is None or high is None else f"{_number(low)} – {_number(high)}"


def _cell(score: Mapping[str, Any] | None) -> str:
    score = score or {}
    interval = _interval(score)
    return _number(score.get("value")) + (f" ({interval})" if interval else "")


def _terminal_cell(score: Mapping[str, Any] | None) -> Text:
    score = score or {}
    cell = Text(_number(score.get("value")))
    return (
        cell.append(f"\n{interval.replace(' ', '')}", style="dim") if (interval := _interval(score)) else cell
    )


def _count(scores: Mapping[str, Any]) -> str:
    """Return the number of examples, or its range where metrics could use different numbers of them."""
    counts = sorted({n for score in scores.values() if (n := _at(score, "n")) is not None})
    return "–".join(_integer(n) for n in dict.fromkeys([counts[0], counts[-1]])) if counts else DASH


def _text(value: object) -> str:
    """Return text from outside as one line that Markdown, and HTML within it, shows as it stands."""
    one_line = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", html.escape(one_line, quote=False))


def _fenced(code: str) -> list[str]:
    """Return a code block whose fence is longer than any run of backticks in the code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return [fence, code, fence, ""]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> list[str]:
    """Return a Markdown table of escaped cells and a blank line; columns after the text ones hold numbers."""
    rule = ["---" if column < text_columns else "---:" for column in range(len(header))]
    return [*(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)), ""]
