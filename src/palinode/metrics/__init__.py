"""Metrics: outcomes in, scores out.

A metric gives every example a value (None where it cannot be computed); `mean_score` averages them and
adds n and an interval. To add a metric, write one function and one line of the table. No files, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from palinode.metrics.aggregate import mean_score
from palinode.metrics.likelihood import answer_probabilities
from palinode.metrics.memorization import exact_memorizations, extraction_strengths, one_token_answers
from palinode.metrics.overlap import rouge_l_recalls
from palinode.records import Outcome, Score

__all__ = [
    "METRICS",
    "Metric",
    "answer_probabilities",
    "exact_memorizations",
    "extraction_strengths",
    "mean_score",
    "rouge_l_recalls",
    "score_outcomes",
]


@dataclass(frozen=True, slots=True)
class Metric:
    """A number per example, and the words that go with it."""

    name: str
    """Its key in a record."""
    per_example: Callable[[Sequence[Outcome]], list[float | None]]
    """One value per outcome, in the same order; None where it cannot be computed."""
    description: str
    """One line for readers."""
    missing: str
    """Why an example may have no value."""
    needs_generation: bool = False
    """Whether the model has to write an answer first."""
    caveat: Callable[[Sequence[Outcome]], str | None] = lambda outcomes: None  # noqa: ARG005
    """What a reader of the score should know about these very examples, if anything."""


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="answer_probability",
            per_example=answer_probabilities,
            description="length-normalised probability of the answer in the data",
            missing="no token was scored",
        ),
        Metric(
            name="rouge_l_recall",
            per_example=rouge_l_recalls,
            description="share of the answer's words that the generated answer has in the same order",
            missing="nothing was generated, or ROUGE reads no word of the answer in the data",
            needs_generation=True,
        ),
        Metric(
            name="exact_memorization",
            per_example=exact_memorizations,
            description="share of the answer's tokens that the model ranks first",
            missing="no token but the end token was scored",
        ),
        Metric(
            name="extraction_strength",
            per_example=extraction_strengths,
            description="share of the answer that the model completes once it has seen the rest",
            missing="no token but the end token was scored",
            caveat=one_token_answers,
        ),
    )
}


def score_outcomes(outcomes: Sequence[Outcome], *, seed: int = 0) -> dict[str, Score]:
    """Return the score of every metric in the table over these outcomes."""
    return {name: _score(metric, outcomes, seed) for name, metric in METRICS.items()}


def _score(metric: Metric, outcomes: Sequence[Outcome], seed: int) -> Score:
    score = mean_score(metric.per_example(outcomes), seed=seed, missing=metric.missing)
    return replace(score, reason=score.reason or metric.caveat(outcomes))
