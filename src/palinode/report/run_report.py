"""The report of an unlearning run (and of the demo): its sentence, its sections, the model's card.

Every number comes from the record (docs/record.md). What the record lacks is left out of the tables and
named under "What was not tested"; a missing score is a dash with its reason, never a 0. The words claim
evidence about the examples measured, no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from palinode.report.audit_report import audit_section
from palinode.report.content import (
    SAYS,
    Block,
    Cases,
    Code,
    Grid,
    GridCell,
    Heading,
    Lights,
    Picture,
    Row,
    Section,
    Strong,
    markdown,
    score_cell,
    section,
)
from palinode.report.location_report import influence_section
from palinode.report.pictures import likelihood_figure, score_figure, tradeoff_figure, training_figure, untold
from palinode.report.verdicts import YARDSTICKS, run_verdict, unmade, yardstick
from palinode.report.words import (
    DASH,
    SETS,
    TRAININGS,
    at,
    by_reason,
    escaped,
    integer,
    interval_text,
    metric_label,
    metrics_on,
    model_label,
    number,
    percent,
    scale,
    scores_on,
    signed,
    words,
)

FORMULA = "unlearned = target − α · forget vector + β · retain vector"
CAUTION = SAYS["caution"]


def headline(record: Mapping[str, Any]) -> str:
    """Return one sentence: how the answer probability moved on both sets, and what to compare it with."""
    if unmade(record):
        (before,) = _probabilities(record, "forget", "target")
        return f"The target's answer probability on the forget set: {number(before)} ({_beside(record)})."
    return f"{_forget_clause(record)}; {_retain_clause(record)}."


def marked(content: Mapping[str, Any]) -> str:
    """Return the outcome of a report behind the symbol of its verdict, where it has one."""
    symbol = at(content, "verdict", "symbol")
    return f"{symbol} {content['outcome']}" if symbol else str(content["outcome"])


def strength(record: Mapping[str, Any]) -> str:
    """Return how far the run went: α and β and what was done to the vector, or how long a method trained."""
    alpha, beta = at(record, "scales", "forget"), at(record, "scales", "retain")
    if alpha is None:
        runs = (record.get("training") or {}).values()
        steps = sum(run.get("steps") or 0 for run in runs)
        trained = f"{at(record, 'method', 'name')} trained the model itself, for {integer(steps)} steps"
        return f"{trained}: there is no α and no β" if steps else "no vector was made: there is no α and no β"
    told = at(record, "vectors", "transforms") or ()
    mu = [at(one, "settings", "mu") for one in told]
    changed = [
        f"{words(str(one.get('name')))}{f' ({_mu(weight)})' if weight is not None else ''}"
        for one, weight in zip(told, mu, strict=True)
    ]
    by = f"; the forget vector went through {', '.join(changed)} first" if changed else ""
    return f"α = {scale(alpha)}, β = {scale(beta)}{by}"


def _mu(weight: Any) -> str:
    return f"μ = {scale(weight)}{', projection' if weight == 0 else ''}"


def run_brief(record: Mapping[str, Any]) -> list[Block]:
    """Return what the terminal shows of a run: the scores with their intervals, and the headline."""
    metrics = metrics_on(record, SETS)
    rows: list[Row] = []
    for data_set, label in SETS.items():
        found = scores_on(record, data_set)
        rows += [[GridCell(label, tone="chosen")]] if found else []
        rows += [
            [model_label(model), *(score_cell(one.get(name)) for name in metrics)]
            for model, one in found.items()
        ]
    head = ["model", *map(metric_label, metrics)]
    scores = Grid("Scores and their 95 % intervals", head, rows)
    return [scores, run_verdict(record).remarks, headline(record)]


def run_sections(content: Mapping[str, Any]) -> list[Section]:
    """Return what a report tells of a run or of the demo."""
    audit, demo, traced = (content.get(name) for name in ("audit", "demo", "influence"))
    first = (_score_section, _method_section, _scale_section, _answer_section, _likelihood_section)
    return [
        *(_demo_section(demo) if demo else ()),
        *(found for part in first for found in part(content)),
        *(influence_section(traced) if traced else ()),
        *(audit_section(audit) if audit else ()),
        *_vector_section(content),
        *_cost_section(content),
    ]


# The sentence


def _forget_clause(record: Mapping[str, Any]) -> str:
    before, after = _probabilities(record, "forget", "target", "unlearned")
    if before is None or after is None:
        return "On the forget set the change in answer probability is not known"
    change = f"the answer probability went from {number(before)} to {number(after)}"
    return f"On the forget set {change} ({_beside(record)})"


def _beside(record: Mapping[str, Any]) -> str:
    held = yardstick(record)
    return f"{YARDSTICKS[held[0]]}: {number(held[1]['value'])}" if held else "no yardstick was measured"


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


# The sections


def demo_grid(demo: Mapping[str, Any]) -> Grid:
    """Return the demo's exact match by model."""
    people = demo.get("people") or {}
    rows: list[Row] = [
        [
            model_label(name),
            *(f"{recall[part]:.2f}" for part in ("forget", "others", "general")),
            f"{pair['forget']:g}, {pair['retain']:g}" if (pair := at(demo, "scales", name)) else "",
        ]
        for name, recall in (demo.get("recall") or {}).items()
    ]
    forget, others = (people.get(name) for name in ("forget", "others"))
    head = ["model", f"{forget} forget people", f"{others} others", "general facts", "α, β"]
    return Grid("Exact match: share of questions answered exactly right", head, rows)


def _demo_section(demo: Mapping[str, Any]) -> list[Section]:
    return section("The demo's world", demo_grid(demo), bar="Demo", intro=SAYS["demo"])


def _score_section(content: Mapping[str, Any]) -> list[Section]:
    blocks: list[Block] = []
    for name, label in SETS.items():
        found, metrics, silent = scores_on(content, name), metrics_on(content, [name]), untold(content, name)
        if not found:
            continue
        rows: list[Row] = [
            [model_label(model), _count(scores), *(score_cell(scores.get(metric)) for metric in metrics)]
            for model, scores in found.items()
        ]
        head = ["model", "examples", *map(metric_label, metrics)]
        blocks += [
            Heading(f"On the {label}"),
            Picture(f"scores-{name}", f"Scores on the {label}", score_figure(content, name)),
            Grid(f"Scores on the {label}", head, rows),
            [
                *_score_notes(found),
                *(f"{metric_label(one)} is not in the picture: {why}." for one, why in silent.items()),
            ],
        ]
    return section("Before, after, yardstick", *blocks, bar="Scores", intro=SAYS["scores"])


def _count(scores: Mapping[str, Any]) -> str:
    """Return the number of examples, or its range where metrics could use different numbers of them."""
    counts = sorted({n for score in scores.values() if (n := at(score, "n")) is not None})
    return "–".join(integer(n) for n in dict.fromkeys([counts[0], counts[-1]])) if counts else DASH


def _score_notes(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what is said about scores (why one is missing, a caveat), like remarks of models together."""
    models = by_reason(
        (model_label(model), (metric_label(metric), score["reason"]))
        for model, scores in found.items()
        for metric, score in scores.items()
        if at(score, "reason")
    )
    return [f"{metric} of {', '.join(names)}: {reason}." for (metric, reason), names in models.items()]


def _method_section(content: Mapping[str, Any]) -> list[Section]:
    method = content.get("method")
    if not method:
        return []
    source = f" ({method['source']})" if method.get("source") else ""
    formula = f": {method['formula']}" if method.get("formula") else ""
    settings = ", ".join(f"{name} = {value}" for name, value in (method.get("settings") or {}).items())
    own = f" Its own settings: {settings}." if settings else ""
    return section("Method", f"{method.get('name')}{source}{formula}.{own}")


def _scale_section(content: Mapping[str, Any]) -> list[Section]:
    scales = content.get("scales") or {}
    label = "Forget against retain probability, for every pair of scales and every model"
    return section(
        "Forgetting against keeping",
        Picture("tradeoff", label, tradeoff_figure(content), caption=SAYS["tradeoff"], picks=True),
        " ".join([*_scale_sentences(scales), *changes_told(content)]) if scales else None,
        Strong(warning) if (warning := at(scales, "yardstick", "warning")) else None,
        _scale_grid(
            "What a step away from the chosen scales changes", scales.get("sensitivity") or (), change=True
        ),
        _scale_grid("Every pair of scales tried", scales.get("points") or ()),
        bar="Trade-off",
    )


def changes_told(record: Mapping[str, Any]) -> Iterator[str]:
    """Say what was done to the forget vector before it was subtracted, and what was foretold of it."""
    for told in at(record, "vectors", "transforms") or ():
        name, settings = str(told.get("name")).replace("_", " "), told.get("settings") or {}
        if told.get("survives") is None:
            yield f"The forget vector was changed by {name} first."
            continue
        arrival = at(record, "scales", "filter", "arrival")
        there = ", and again by what the layers read where the model arrives" if arrival else ""
        yield (
            f"The forget vector was filtered by {name} first ({_mu(settings.get('mu'))}){there}: "
            f"{percent(told['survives'])} of what it does to the forget rows' inputs survived, and was "
            "scaled up to what it had been."
        )
    if told := record.get("foretold"):
        pairs = [(told[name], at(told, "found", name)) for name in ("alpha", "lost")]
        alpha, lost = (f"{number(own)} (found: {number(found)})" for own, found in pairs)
        yield f"Foretold before that: α {alpha}, lost on retain rows {lost}; advice: {told['advice']}."


def _scale_sentences(scales: Mapping[str, Any]) -> Iterator[str]:
    """Say what the scales are, who chose them, and on what evidence."""
    yield f"{FORMULA}, with α = {scale(scales.get('forget'))} and β = {scale(scales.get('retain'))}."
    if not scales.get("retain"):
        yield "No retain vector was added."
    if scales.get("chosen_by") == "grid":
        yield (
            "Chosen from a grid, each point tried in memory on rows of both sets; the retain rows are ones "
            "that the retain vector had not seen, where there were enough."
        )
    elif scales.get("chosen_by"):
        yield f"Chosen by: {scales['chosen_by']}."
    if scales.get("rule"):
        yield f"The rule: {str(scales['rule']).rstrip('.')}."
    if yardstick := scales.get("yardstick"):
        wanted = at(yardstick, "answer_probability") or {}
        interval = f" ({interval_text(wanted)})" if interval_text(wanted) else ""
        source = f" from {yardstick['source']}" if yardstick.get("source") else ""
        rows = f" ({yardstick['unseen_rows']} rows)" if yardstick.get("unseen_rows") else ""
        figures = f"an answer probability of {number(wanted.get('value'))}{interval}"
        if yardstick.get("source") == "unfiltered":
            told = (
                f"Before its change was filtered, the model gave the forget set {figures}; that was the aim,"
            )
        else:
            told = f"A model that never saw the forget set would give it {figures}, estimated{source}{rows}"
        yield f"{told} on the assumption that {yardstick.get('assumes')}."
    changes = [abs(step.get("distance_change") or 0) for step in scales.get("sensitivity") or ()]
    if yardstick and changes:
        most = number(max(changes))
        yield f"Steps of about a tenth around these scales move that distance by up to {most}."


def _scale_grid(title: str, points: Sequence[Mapping[str, Any]], *, change: bool = False) -> Grid:
    """Return pairs of scales with what was measured there, or how that differs from the chosen pair."""
    end, shown = ("_change", signed) if change else ("", number)
    keys = [key for key in _MEASURED if any(point.get(key + end) is not None for point in points)]
    rows: list[Row] = [
        [
            *(scale(point.get(key)) for key in ("forget", "retain")),
            *(shown(point.get(key + end)) for key in keys),
            "yes" if point.get("allowed") else "no",
            GridCell("chosen", tone="chosen") if point.get("chosen") else "",
        ]
        for point in points
    ]
    head = ["α", "β", *(_MEASURED[key] for key in keys), "keeps the rule", ""]
    return Grid(title, head, rows, text_columns=0, folded=True)


_MEASURED = {
    "forget_probability": "forget probability",
    "retain_probability": "retain probability",
    "neutral_probability": "neutral text",
    "distance": "distance to the yardstick",
}


def _answer_section(content: Mapping[str, Any]) -> list[Section]:
    title, bar = "Answers side by side", "Answers"
    if elsewhere := content.get("answers_elsewhere"):
        return section(title, SAYS["answers_elsewhere"], Code(elsewhere), bar=bar)
    parts = [
        {
            "name": name,
            "label": SETS.get(name, words(name)),
            "against": model_label(at(content, "held_against", name) or ""),
            **part,
        }
        for name, part in (content.get("answers") or {}).items()
    ]
    goal = "a model that never saw them" if at(content, "held_against", "forget") else "its yardstick"
    return section(title, Cases(parts), bar=bar, intro=SAYS["answers"].format(goal=goal))


def _likelihood_section(content: Mapping[str, Any]) -> list[Section]:
    pictures = [
        Picture(f"likelihood-{name}", label, drawn, caption=f"On the {label}:")
        for name, label in SETS.items()
        if (drawn := likelihood_figure(content, name))
    ]
    return section("How sure of each right answer", *pictures, bar="Row by row", intro=SAYS["likelihoods"])


def _vector_section(content: Mapping[str, Any]) -> list[Section]:
    rows: list[Row] = [
        [f"{name} vector", number(at(content, "vectors", name, "norm")), percent(at(content, "dose", name))]
        for name in SETS
        if at(content, "vectors", name)
    ]
    facts = {
        "Cosine between the two vectors": number(at(content, "vectors", "cosine")),
        "Rounding error, relative to the whole change": number(at(content, "dose", "relative_error")),
        "Weights that changed": percent(at(content, "dose", "moved_share")),
        "Numbers that no sum reaches": percent(at(content, "dose", "unreached_share")),
        "Rounding": at(content, "dose", "rounding") or DASH,
    }
    known = {name: value for name, value in facts.items() if value != DASH}
    return section(
        "Vectors and dose",
        Grid("Vectors", ["", "length", "share that arrived in the saved model"], rows),
        known,
        at(content, "dose", "notes") or () if rows or known else None,
        _part_grid(content),
        bar="Vectors",
        intro=SAYS["vectors"],
    )


def _part_grid(content: Mapping[str, Any]) -> Grid:
    """Return lengths, cosine, and the scales found in the stored weights as shares of those asked for."""
    vectors, stored = (at(content, name, "parts") or {} for name in ("vectors", "dose"))
    names = [name for name in SETS if at(content, "vectors", name)]

    def share(part: str, name: str) -> str:
        found, asked = at(stored, part, "effective", name), at(content, "scales", name)
        return percent(found / asked if found is not None and asked else None)

    rows: list[Row] = []
    for part, found in vectors.items():
        lengths = [number(at(found, name, "norm")) for name in names]
        shares = [share(part, name) for name in names]
        rows.append([part, *lengths, number(at(found, "cosine")), *shares])
    head = ["part", *(f"{name} length" for name in names), "cosine", *(f"{name} arrived" for name in names)]
    return Grid("By part of the model", head, rows, folded=True)


def _cost_section(content: Mapping[str, Any]) -> list[Section]:
    rows: list[Row] = []
    for name, run in (content.get("training") or {}).items():
        if run:
            counts = [integer(run.get(key)) for key in ("rows", "steps", "tokens")]
            losses = [number(run.get(key)) for key in ("first_loss", "last_loss")]
            rows.append([TRAININGS.get(name, words(name)), *counts, *losses, integer(run.get("seconds"))])
    head = ["fine-tuning on", "rows", "steps", "tokens", "first loss", "last loss", "seconds"]
    peak = at(content, "environment", "peak_memory_bytes")
    return section(
        "Training and cost",
        Picture("training", "Loss by step of each fine-tuning", training_figure(content)),
        Grid("Cost of each fine-tuning", head, rows),
        f"Most memory held by the process: {peak / 1e9:.1f} GB." if rows and peak else None,
        bar="Training",
    )


# The card


def model_card(content: Mapping[str, Any], *, base: str | None = None, original: bool = False) -> str:
    """Return the model's README.md: the hub's front matter and what the report says first.

    `base` is the target's id on the hub, if it came from there; `original` tells whether it has a card.
    Licence and intended use are in that one.
    """
    # a folder's own name: where it lies on the writer's machine is nobody's business
    target = base or Path(str(at(content, "models", "target", "location") or "a model")).name
    name = Path(str(at(content, "models", "unlearned", "location") or "An unlearned model")).name
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base} if base else {}),
        "tags": ["machine-unlearning", "palinode"],
        "palinode_verdict": content["outcome"],
    }  # JSON's strings are YAML's too
    card = f"{target} has a card of its own" if original else f"{target} came without a card"
    of = "what it says of licence and use holds" if original else "what holds for its licence and use holds"
    more = (
        "`report.html` has every figure with its interval, and `record.json` the recipe, versions and "
        "fingerprints for programs; `palinode verify` tells whether the weights are as they were written."
    )
    sections = [
        *section("", Strong(marked(content)), content["headline"]),
        *section("", _card_origin(content, target)),
        *section("In short", Lights(content["claims"]), CAUTION),
        *section("Notes", content["notes"]),
        *section("Not tested", content["untested"]),
    ]
    lines = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
    last = f"{more}\n\n{escaped(f'{card}; {of} here too')}."
    return f"---\n{lines}\n---\n\n{markdown(name, sections)}\n## More\n\n{last}\n"


def _card_origin(content: Mapping[str, Any], target: str) -> str:
    forget, retain = (at(content, "data", name, "rows") for name in ("forget", "retain"))
    kept = f" and to keep what {integer(retain)} others taught it" if retain else ""
    formula = f": {FORMULA}" if at(content, "scales", "forget") is not None else ""
    made = (
        f"Made from {target} by Palinode {content.get('palinode')}, to behave as if it had never seen "
        f"{integer(forget)} rows{kept}. Method: {at(content, 'method', 'name')}{formula}. Strength: "
        f"{strength(content).partition(';')[0]}."
    )
    return " ".join([made, *changes_told(content)])
