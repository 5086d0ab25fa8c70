"""Measure the models that were chosen, once each, on rows that nothing was chosen on.

Every model is asked the test rows and scored like one's own data (`benchmarks/own.py`), asked the recipe's
benchmark if it has one, and relearned if that is asked for. What cannot be computed says why.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from palinode.audit.attack import BUDGETS, Subject
from palinode.audit.material import divide
from palinode.audit.relearning import relearn
from palinode.benchmarks import BENCHMARKS
from palinode.benchmarks.own import OWN, read_questions
from palinode.compare.ground import Shares
from palinode.compare.recipe import RECALL, BenchmarkPart, CompareRecipe
from palinode.data.examples import Example, Question, sample_examples
from palinode.errors import DivergenceError
from palinode.evaluation.ask import Asking
from palinode.evaluation.benchmark import (
    Cell,
    LoadedBenchmark,
    Measured,
    Places,
    QuestionSet,
    Reference,
    attack_cells,
    not_computed,
    score_cell,
)
from palinode.evaluation.judges import open_judge
from palinode.metrics import METRICS
from palinode.metrics.aggregate import mean_score
from palinode.models.loading import load_tokenizer, pick_device
from palinode.pipeline.measure import MeasureSettings, ask_sets, asked_sets, judge_sets, sample_sets
from palinode.pipeline.workspace import Step, fingerprint
from palinode.progress import Listener
from palinode.records import Outcome, Score, read_outcomes, write_outcomes
from palinode.weights import Checkpoint

OWN_ROWS = "rows"
"""What scores of the comparison's own test rows stand under."""
RELEARNED_ROWS = BUDGETS["quick"].max_rows
_WHY = {
    "holdout": "there are no holdout rows; name data.holdout",
    "judge": "there is no judge; name measure.judge",
    "retrained": "there is no retrained model; name models.retrained",
    "itself": "it is the retrained model itself",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """Questions to every model, and the scores that follow."""

    name: str
    cells: Sequence[Cell]
    sets: Mapping[str, QuestionSet]
    missing: Mapping[str, str]
    options: Mapping[str, str]
    split: str = "rows"


@dataclass(frozen=True, slots=True)
class Gauge:
    """What is measured of every model."""

    asked: Sequence[Asked]
    rank_by: str
    judge: str | None
    key_variable: str | None
    relearn: Sequence[Example]
    relearn_rate: float
    device: str
    seed: int

    def key(self) -> str:
        """Return a fingerprint of everything that decides a measurement but the models."""
        return fingerprint(
            asked=[
                {
                    "name": one.name,
                    "cells": [[cell.set, cell.metric] for cell in one.cells],
                    "sets": {name: _set_key(questions) for name, questions in one.sets.items()},
                    "options": dict(one.options),
                }
                for one in self.asked
            ],
            rank_by=self.rank_by,
            judge=self.judge,
            relearn=[[example.source, example.row] for example in self.relearn] if self.relearn else None,
            relearn_rate=self.relearn_rate,
            device=pick_device(self.device).type,
            seed=self.seed,
        )


def make_gauge(recipe: CompareRecipe, shares: Shares, unseen: Sequence[Example] = ()) -> Gauge:
    """Return what is measured in a comparison; raises an InputError where its data cannot be used.

    `unseen` are rows that no model has seen; they are the holdout rows where the recipe names none.
    """
    comparison, measure = recipe.comparison, recipe.comparison.measure
    asked = [_own_rows(recipe, shares, unseen)]
    if comparison.benchmark:
        asked.append(_benchmark(comparison.benchmark, comparison.seed))
    most = min(RELEARNED_ROWS, len(shares.forget))
    relearn_rows = sample_examples(shares.forget, most, seed=comparison.seed) if measure.relearning else []
    return Gauge(
        asked,
        measure.rank_by,
        measure.judge or None,
        measure.key_variable,
        relearn_rows,
        measure.relearn_rate,
        recipe.shared.device,
        comparison.seed,
    )


def measure_model(
    gauge: Gauge,
    step: Step,
    checkpoint: Checkpoint,
    label: str,
    *,
    reference: Step | None,
    itself: bool,
    listener: Listener,
) -> dict[str, Any]:
    """Return the scores of a model and its values on single rows, kept in `step`.

    `reference` is the step of the retrained model's own measurement; `itself` tells that this is it.
    """
    facts = step.facts
    if facts is not None:
        return facts
    step.begin()
    started = time.monotonic()
    scores: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for asked in gauge.asked:
        outcomes = ask_sets(checkpoint, asked.sets, device=gauge.device, label=label, listener=listener)
        for name, found in outcomes.items():
            write_outcomes(step.folder / f"{asked.name}-{name}.jsonl", found)
        theirs = None if reference is None else _read(reference, asked)
        scores[asked.name] = _scores(gauge, asked, outcomes, theirs, itself=itself, listener=listener)
        if asked.name == OWN_ROWS:
            values = {name: row_values(gauge.rank_by, outcomes[name]) for name in ("forget", "retain")}
    if gauge.relearn:
        scores["audit"] = {"forget": {"relearning": asdict(_relearned(gauge, checkpoint, label, listener))}}
    facts = {"scores": scores, "values": values, "seconds": round(time.monotonic() - started, 1)}
    step.finish(facts)
    return facts


def row_values(metric: str, outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the value of each row by a metric, or whether it was answered exactly right."""
    if metric != RECALL:
        return METRICS[metric].per_example(outcomes)
    return [
        None if outcome.generated is None else float(outcome.generated == outcome.expected)
        for outcome in outcomes
    ]


def _own_rows(recipe: CompareRecipe, shares: Shares, unseen: Sequence[Example]) -> Asked:
    data, evaluation = recipe.shared.data, recipe.shared.evaluation
    holdout = _holdout(recipe, unseen)
    asking = Asking(
        max_new_tokens=evaluation.max_new_tokens,
        batch_rows=evaluation.batch_rows,
        max_length=evaluation.max_length,
    )
    style = recipe.shared.prompts.style()
    rows = {"forget": (data.forget, shares.forget_test), "retain": (str(data.retain), shares.retain_test)}
    sets = [
        QuestionSet(name, tuple(_questions(place, examples, data.columns)), asking, style)
        for name, (place, examples) in rows.items()
    ]
    if holdout:
        sets.append(QuestionSet("holdout", holdout, replace(asking, generate=False), style))
    cells = [cell for cell in OWN.cells if not cell.on_request]
    cells += [_recall_cell(name) for name in ("forget", "retain")]
    if not holdout:
        cells += [
            replace(cell, metric=f"{cell.metric}_against_retain")
            for cell in attack_cells("forget", "retain")
            if cell.metric in ("auc_loss", "auc_min_k")
        ]
    missing = {} if holdout else {"holdout": _WHY["holdout"]}
    return Asked(
        OWN_ROWS, cells, asked_sets(LoadedBenchmark(tuple(sets)), cells, MeasureSettings()), missing, {}
    )


def _holdout(recipe: CompareRecipe, unseen: Sequence[Example]) -> tuple[Question, ...]:
    """Return the rows beside which membership is tested: as given, or else those that nobody has seen."""
    data, most = recipe.shared.data, recipe.shared.evaluation.max_rows
    if data.holdout:
        return tuple(read_questions(data.holdout, columns=data.columns or None)[:most])
    return tuple(Question(example) for example in unseen[:most])


def _questions(place: str, examples: Sequence[Example], columns: Mapping[str, str]) -> list[Question]:
    """Return the examples as questions, with the other answers that their file has."""
    wanted = {(example.row, example.key) for example in examples}
    found = read_questions(place, columns=columns or None)
    return [question for question in found if (question.example.row, question.example.key) in wanted]


def _benchmark(part: BenchmarkPart, seed: int) -> Asked:
    benchmark = BENCHMARKS[part.name]
    split, options = benchmark.check_split(part.split), benchmark.check_options(part.options)
    settings = MeasureSettings(max_rows=part.max_rows, max_new_tokens=part.max_new_tokens, seed=seed)
    cells = benchmark.check_metrics(())
    loaded = sample_sets(benchmark.load(Places(part.data), split, options), settings, part.rows)
    return Asked(part.name, cells, asked_sets(loaded, cells, settings), loaded.missing, options, split)


def _recall_cell(name: str) -> Cell:
    def score(measured: Measured) -> Score:
        values = row_values(RECALL, measured.of(name))
        return mean_score(values, seed=measured.seed, missing="nothing was generated")

    what = "share of rows that are answered exactly right"
    return Cell(name, RECALL, what, score, needs=frozenset({"generation"}))


def _scores(
    gauge: Gauge,
    asked: Asked,
    outcomes: Mapping[str, Sequence[Outcome]],
    theirs: Mapping[str, Sequence[Outcome]] | None,
    *,
    itself: bool,
    listener: Listener,
) -> dict[str, dict[str, Any]]:
    """Return the score of each cell by set and metric, as plain values."""
    reference = None if theirs is None else Reference("retrained", theirs)
    name, _, model = (gauge.judge or "").partition("#")
    judge = None
    if name:
        judge = open_judge(name, model=model or None, key_variable=gauge.key_variable, device=gauge.device)
    verdicts = judge_sets(judge, asked.cells, asked.sets, outcomes, reference, gauge.seed, listener)
    measured = Measured(
        split=asked.split,
        sets=asked.sets,
        outcomes=outcomes,
        reference=reference,
        verdicts=verdicts,
        missing=asked.missing,
        options=asked.options,
        seed=gauge.seed,
    )
    found: dict[str, dict[str, Any]] = {}
    for cell in asked.cells:
        if cell.reference and reference is None:
            score = not_computed(_WHY["itself" if itself else "retrained"])
        elif cell.judge and judge is None:
            score = not_computed(_WHY["judge"])
        else:
            score = score_cell(cell, measured)
        found.setdefault(cell.set, {})[cell.metric] = asdict(score)
    return found


def _relearned(gauge: Gauge, checkpoint: Checkpoint, label: str, listener: Listener) -> Score:
    """Return the area under the answer probability of half of the forget set while the other is learned."""
    tokenizer, own = load_tokenizer(checkpoint), gauge.asked[0].sets["forget"]
    subject = Subject(
        label,
        checkpoint,
        tokenizer,
        device=pick_device(gauge.device),
        style=own.style,
        seed=gauge.seed,
        listener=listener,
    )
    learned, held_out = divide(gauge.relearn, seed=gauge.seed)
    budget = BUDGETS["quick"].model_copy(
        update={
            "relearn_rate": gauge.relearn_rate,
            "max_length": own.asking.max_length,
            "batch_rows": own.asking.batch_rows,
        }
    )
    try:
        found = relearn(subject, learned, held_out, budget, label="relearning part of the forget set")
    except DivergenceError as error:
        return not_computed(str(error))
    return mean_score(found.tests["area"]["forget"], seed=gauge.seed, missing="no token was scored")


def _read(step: Step, asked: Asked) -> dict[str, list[Outcome]]:
    return {name: list(read_outcomes(step.folder / f"{asked.name}-{name}.jsonl")) for name in asked.sets}


def _set_key(questions: QuestionSet) -> dict[str, Any]:
    return {
        "questions": fingerprint(
            questions=[
                [asdict(question.example), {k: list(v) for k, v in question.alternatives.items()}]
                for question in questions.questions
            ]
        ),
        "asking": asdict(questions.asking),
        "style": asdict(questions.style) if questions.style else None,
    }
