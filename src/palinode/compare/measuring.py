"""Measure the models that were chosen, once each, on rows that nothing was chosen on.

Every model is asked the test rows and scored like one's own data (benchmark `own`), asked the recipe's
benchmark if it has one, and relearned if that is asked for. What cannot be computed says why.

How far each contestant ends from the ideal, and which differences are more than noise.

    gap(model) = |f(model) − f(ideal)| + max(0, r(ideal) − r(model))

f and r are means of one metric over the forget and retain rows that were measured. The ideal is the
retrained model; without one, the base's f and the target's r. Forgetting too much counts as forgetting too
little does. Two gaps differ if the middle 95 % of their difference, over resampled rows and seeds that both
share, leaves out 0 (a paired bootstrap).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palinode.audit.attack import BUDGETS, Subject
from palinode.audit.attacks import relearn
from palinode.audit.material import divide
from palinode.benchmarks import BENCHMARKS, OWN
from palinode.compare.comparison_recipe import CompareRecipe, Measures
from palinode.data.examples import Example, Question, at_most, read_questions
from palinode.data.tokenize import PromptStyle
from palinode.errors import DivergenceError
from palinode.evaluation.benchmark import (
    Exam,
    LoadedBenchmark,
    Measured,
    Places,
    QuestionSet,
    Reference,
    attack_cells,
    metric_cells,
    not_computed,
    score_cells,
)
from palinode.evaluation.evaluate import ask_sets, judged, make_exam, open_benchmark
from palinode.evaluation.judges import named_judge
from palinode.metrics.aggregate import mean_score, percentile_interval
from palinode.metrics.table import METRICS
from palinode.models.loading import load_tokenizer, pick_device
from palinode.pipeline.inputs import InputRows
from palinode.pipeline.workspace import Step, fingerprint
from palinode.progress import Listener
from palinode.records import Score, plain_scores, read_outcomes, write_outcomes
from palinode.settings import EvaluationSettings
from palinode.weights import Checkpoint

OWN_ROWS = "rows"
"""What scores of the comparison's own test rows stand under."""
_WITHOUT = {
    "retrained": "there is no retrained model; name models.retrained",
    "judge": "there is no judge; name measure.judge",
}


@dataclass(frozen=True, slots=True)
class Gauge:
    """What is measured of every model."""

    exams: Sequence[Exam]
    """The comparison's own test rows, and a benchmark where the recipe has one."""
    measure: Measures
    relearn: Sequence[Example]
    """Rows of which half are relearned; none where that is not asked for."""
    device: str
    seed: int

    def key(self) -> str:
        """Return a fingerprint of everything that decides a measurement but the models."""
        return fingerprint(
            asked=[
                {
                    "name": exam.name,
                    "cells": [[cell.set, cell.metric] for cell in exam.cells],
                    "sets": {
                        name: {
                            "questions": fingerprint(
                                questions=[
                                    [
                                        {k: v for k, v in asdict(one.example).items() if k != "matched"},
                                        {k: list(v) for k, v in one.alternatives.items()},
                                    ]
                                    for one in questions.questions
                                ]
                            ),
                            "asking": asdict(questions.asking),
                            "style": asdict(questions.style) if questions.style else None,
                        }
                        for name, questions in exam.sets.items()
                    },
                    "options": dict(exam.options),
                }
                for exam in self.exams
            ],
            rank_by=self.measure.rank_by,
            judge=self.measure.judge or None,
            relearn=[[example.source, example.row] for example in self.relearn] if self.relearn else None,
            relearn_rate=self.measure.relearn_rate,
            device=pick_device(self.device).type,
            seed=self.seed,
        )


def make_gauge(recipe: CompareRecipe, shares: InputRows, unseen: Sequence[Example] = ()) -> Gauge:
    """Return what is measured in a comparison; raises an InputError where its data cannot be used.

    `unseen` are rows that no model has seen; they are the holdout rows where the recipe names none.
    """
    measure, part, seed = recipe.comparison.measure, recipe.comparison.benchmark, recipe.comparison.seed
    exams = [_own_rows(recipe, shares, unseen)]
    if part:
        limits = part.model_dump(include={"max_rows", "max_new_tokens"}, exclude_none=True)
        settings = EvaluationSettings(split=part.split, options=part.options, seed=seed, **limits)
        exams.append(open_benchmark(BENCHMARKS[part.name], Places(part.data), settings, part.rows))
    exams = [replace(exam, without=_WITHOUT) for exam in exams]
    learned = at_most(shares.forget, BUDGETS["quick"].max_rows, seed=seed) if measure.relearning else []
    return Gauge(exams, measure, learned, recipe.shared.device, seed)


def measure_model(
    gauge: Gauge,
    step: Step,
    checkpoint: Checkpoint,
    label: str,
    reference: Step | None,
    *,
    itself: bool = False,
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
    judge = named_judge(gauge.measure.judge, gauge.measure.key_variable, gauge.device)
    for exam in gauge.exams:
        outcomes = ask_sets(checkpoint, exam.sets, device=gauge.device, label=label, listener=listener)
        for name, found in outcomes.items():
            write_outcomes(step.folder / f"{exam.name}-{name}.jsonl", found)
        if itself:
            exam = replace(exam, without=_WITHOUT | {"retrained": "it is the retrained model itself"})
        theirs = None
        if reference is not None:  # what the retrained model did, read back from its step
            files = {name: reference.folder / f"{exam.name}-{name}.jsonl" for name in exam.sets}
            kept = {name: list(read_outcomes(file)) for name, file in files.items()}
            theirs = Reference("retrained", kept)
        measured = judged(judge, Measured(exam, outcomes, theirs), listener)
        scores[exam.name] = plain_scores(score_cells(measured))
        if exam.name == OWN_ROWS:
            by_row = METRICS[gauge.measure.rank_by].per_example
            values = {name: by_row(outcomes[name]) for name in ("forget", "retain")}
    if gauge.relearn:
        scores["audit"] = {"forget": {"relearning": asdict(_relearned(gauge, checkpoint, label, listener))}}
    facts = {"scores": scores, "values": values, "seconds": round(time.monotonic() - started, 1)}
    step.finish(facts)
    return facts


def _own_rows(recipe: CompareRecipe, shares: InputRows, unseen: Sequence[Example]) -> Exam:
    data, limits, style = recipe.shared.data, recipe.shared.evaluation, recipe.shared.prompts.style()
    sets, read = {}, partial(read_questions, columns=data.columns)
    for name, place, tested in (
        ("forget", data.forget, shares.forget_test),
        ("retain", str(data.retain), shares.retain_test),
    ):
        wanted = {(example.row, example.key) for example in tested}
        found = read(place, beside=name != "forget")
        sets[name] = [one for one in found if (one.example.row, one.example.key) in wanted]
    holdout = read(data.holdout, beside=True) if data.holdout else [*map(Question, unseen)]
    cells = [cell for cell in OWN.cells if not cell.on_request]
    cells += [cell for name in sets for cell in metric_cells(name, "exact_match")]
    if holdout:
        sets["holdout"] = holdout[: limits.max_rows]
    else:
        cells += [
            replace(cell, metric=f"{cell.metric}_against_retain")
            for cell in attack_cells("forget", "retain")
            if cell.metric in ("auc_loss", "auc_min_k")
        ]
    asked = tuple(
        QuestionSet(name, tuple(questions), replace(limits.asking, generate=name != "holdout"), style)
        for name, questions in sets.items()
    )
    missing = {} if holdout else {"holdout": "there are no holdout rows; name data.holdout"}
    settings = EvaluationSettings(seed=recipe.comparison.seed)
    return make_exam(OWN_ROWS, LoadedBenchmark(asked, missing), cells, settings)


def _relearned(gauge: Gauge, checkpoint: Checkpoint, label: str, listener: Listener) -> Score:
    """Return the area under the answer probability of half of the forget set while the other is learned."""
    tokenizer, own = load_tokenizer(checkpoint), gauge.exams[0].sets["forget"]
    subject = Subject(
        label,
        checkpoint,
        tokenizer,
        device=pick_device(gauge.device),
        style=own.style or PromptStyle(),
        seed=gauge.seed,
        listener=listener,
    )
    learned, held_out = divide(gauge.relearn, seed=gauge.seed)
    limits = {"max_length": own.asking.max_length, "batch_rows": own.asking.batch_rows}
    budget = BUDGETS["quick"].model_copy(update={**limits, "relearn_rate": gauge.measure.relearn_rate})
    try:
        found = relearn(subject, learned, held_out, budget, label="relearning part of the forget set")
    except DivergenceError as error:
        return not_computed(str(error))
    return mean_score(found.tests["area"]["forget"], seed=gauge.seed, missing="no token was scored")


RESAMPLES = 4000
Rows = NDArray[np.float64]
"""Values of seeds × rows."""


@dataclass(frozen=True, slots=True)
class Values:
    """What one model did on each measured row, by seed: [seeds, rows]."""

    forget: Rows
    retain: Rows


def rank(contestants: Mapping[str, Values], ideal: Values, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return contestants by their gap, the least first, each with its interval and its equals within noise.

    All models have values of the same rows, and all contestants of the same seeds; the ideal has one.
    """
    random = np.random.default_rng(seed)
    names = list(contestants)
    if not names:
        return []
    counts = {
        "forget": _resampled(ideal.forget.shape[1], random),
        "retain": _resampled(ideal.retain.shape[1], random),
        "seeds": _resampled(next(iter(contestants.values())).forget.shape[0], random),
    }
    best = {name: _gaps(contestants[name], ideal, None)[0] for name in names}
    spread = {name: _gaps(contestants[name], ideal, counts) for name in names}
    order = sorted(names, key=lambda name: (best[name], name))
    found = []
    for place, name in enumerate(order):
        differences = {
            other: percentile_interval(spread[name] - spread[other]) for other in order if other != name
        }
        low, high = percentile_interval(spread[name])
        found.append(
            {
                "name": name,
                "place": place + 1,
                "gap": best[name],
                "low": low,
                "high": high,
                "differences": {
                    other: {"value": best[name] - best[other], "low": ends[0], "high": ends[1]}
                    for other, ends in differences.items()
                },
                "within_noise_of": [other for other, ends in differences.items() if ends[0] <= 0 <= ends[1]],
            }
        )
    return found


def values_of(seeds: Sequence[Mapping[str, Sequence[float | None]]]) -> Values | None:
    """Return the values of a model's seeds; None where a set has none."""
    parts = {
        name: np.array([[np.nan if value is None else value for value in one[name]] for one in seeds], float)
        for name in ("forget", "retain")
    }
    if any(part.size == 0 or np.isnan(part).all() for part in parts.values()):
        return None
    return Values(parts["forget"], parts["retain"])


def _resampled(count: int, random: np.random.Generator) -> Rows:
    """Return how often each of `count` things is drawn, in each resample: [resamples, count]."""
    return random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)


def _gaps(model: Values, ideal: Values, counts: Mapping[str, Rows] | None) -> Rows:
    """Return the gap as it is, or in every resample."""
    forget = _mean(model.forget, counts, "forget") - _mean(ideal.forget, counts, "forget")
    retain = _mean(ideal.retain, counts, "retain") - _mean(model.retain, counts, "retain")
    found: Rows = np.abs(forget) + np.maximum(0.0, retain)
    return found


def _mean(values: Rows, counts: Mapping[str, Rows] | None, name: str) -> Rows:
    """Return the mean over seeds and rows; of resampled ones, one mean for each resample."""
    with_value = ~np.isnan(values)
    filled = np.where(with_value, values, 0.0)
    if counts is None:
        return np.array([filled.sum() / with_value.sum()])
    seeds = counts["seeds"] if values.shape[0] > 1 else np.ones((len(counts[name]), 1))
    total = np.einsum("bs,sr,br->b", seeds, filled, counts[name], optimize=True)
    weight = np.einsum("bs,sr,br->b", seeds, with_value.astype(float), counts[name], optimize=True)
    found: Rows = total / np.maximum(weight, 1e-9)
    return found
