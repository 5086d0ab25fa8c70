"""The tables of metrics: what each is called, what it says and what it needs.

METRICS      a number per example of one model on one set; the mean is the score
ATTACKS      membership attacks, a number per example whose order counts: higher, less likely a member
COMPARISONS  one number for two sets or two models, or for several answers

To add a metric, write one function, its words in words.toml and its row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from palinode.errors import DataError
from palinode.metrics.aggregate import joined, mean_score
from palinode.metrics.likelihood import (
    alternative_probabilities,
    answer_probabilities,
    forget_truth_ratios,
    normalised_probabilities,
    retain_truth_ratios,
    right_shares,
)
from palinode.metrics.matching import (
    UNREADABLE,
    accepted_values,
    exact_matches,
    left_out_ids,
    rouge_l_recalls,
    rouge_values,
)
from palinode.metrics.membership import (
    ONE_TOKEN,
    exact_memorizations,
    extraction_strengths,
    gradient_norm_values,
    loss_values,
    min_k_plus_values,
    min_k_values,
    reference_values,
    zlib_values,
)
from palinode.records import Outcome, Score, packaged_table

DEFAULT_METRICS = ("answer_probability", "rouge_l_recall", "exact_memorization", "extraction_strength")
"""The metrics that need nothing but a prompt and its answer: those of every run."""

_NONE = "no token was scored"
_NO_TOKEN = "no token but the end token was scored"
_NO_PAIR = "a right answer in other words or wrong answers are missing"
_NO_WRONG = "there are no wrong answers"
_NO_ANSWER = "nothing was generated"


@dataclass(frozen=True, slots=True)
class Metric:
    """A number per example, and the words that go with it."""

    name: str
    """Its key in a record."""
    per_example: Callable[..., list[float | None]]
    """One value per outcome, in the same order; None where it cannot be computed.

    Of an attack that needs the "reference": from a reference model's outcomes, given second.
    """
    description: str
    """One line for readers."""
    missing: str
    """Why an example may have no value."""
    needs: frozenset[str] = frozenset()
    """What outcomes must hold beside the likelihood of the answer: "generated", kinds of alternatives, or
    fields; or "reference"."""


WORDS = packaged_table("metrics/words.toml")
"""What each metric says."""
COMPARISONS: Mapping[str, str] = WORDS["comparisons"]
"""Metrics that are no mean over the examples of one set, and what each says."""


def _table(*rows: tuple[str, Callable[..., list[float | None]], str, *tuple[str, ...]]) -> dict[str, Metric]:
    """Return metrics by name, of rows (name, function, why an example may have no value, *needs)."""
    return {
        name: Metric(name, values, WORDS["metrics"][name], missing, frozenset(needs))
        for name, values, missing, *needs in rows
    }


METRICS = _table(
    ("answer_probability", answer_probabilities, _NONE),
    ("rouge_l_recall", rouge_l_recalls, UNREADABLE, "generated"),
    ("exact_match", exact_matches, _NO_ANSWER, "generated"),
    ("exact_memorization", exact_memorizations, _NO_TOKEN),
    ("extraction_strength", extraction_strengths, f"{_NO_TOKEN}, or {ONE_TOKEN}"),
    ("extraction_strength_strict", partial(extraction_strengths, strict=True), _NO_TOKEN),
    ("normalised_probability", normalised_probabilities, f"{_NONE}, or {_NO_WRONG}", "perturbed"),
    (
        "paraphrased_probability",
        partial(alternative_probabilities, kind="paraphrased"),
        "there is no right answer in other words",
        "paraphrased",
    ),
    ("perturbed_probability", partial(alternative_probabilities, kind="perturbed"), _NO_WRONG, "perturbed"),
    ("forget_truth_ratio", forget_truth_ratios, _NO_PAIR, "paraphrased", "perturbed"),
    ("retain_truth_ratio", retain_truth_ratios, _NO_PAIR, "paraphrased", "perturbed"),
    (
        "answer_truth_ratio",
        partial(retain_truth_ratios, right="expected"),
        f"{_NONE}, or {_NO_WRONG}",
        "perturbed",
    ),
    ("right_share", right_shares, _NO_PAIR, "paraphrased", "perturbed"),
    ("rouge_1_recall", partial(rouge_values, kind="rouge1"), UNREADABLE, "generated"),
    ("rouge_l_f", partial(rouge_values, measure="f"), UNREADABLE, "generated"),
    ("rouge_l_f_unstemmed", partial(rouge_values, measure="f", stemmer=False), UNREADABLE, "generated"),
    ("accepted_answer", accepted_values, f"{_NO_ANSWER}, or no accepted answer is a text", "generated"),
)

ATTACKS = _table(
    ("loss", loss_values, _NONE),
    ("zlib", zlib_values, _NONE),
    ("min_k", min_k_values, _NO_TOKEN),
    (
        "min_k_plus",
        min_k_plus_values,
        "no standardised log-probabilities were asked for, or no token was scored",
        "standardised",
    ),
    ("gradient_norm", gradient_norm_values, "no gradient norm was asked for", "gradient_norm"),
    (
        "reference",
        reference_values,
        "no token was scored, or the reference model was not asked about the row",
        "reference",
    ),
)


def score_outcomes(
    outcomes: Sequence[Outcome], *, names: Iterable[str] = DEFAULT_METRICS, seed: int = 0
) -> dict[str, Score]:
    """Return the score of each named metric over these outcomes, in the order named.

    Raises DataError for a name that is not in METRICS.
    """
    names = tuple(names)
    if unknown := [name for name in names if name not in METRICS]:
        raise DataError(f"there is no metric {', '.join(unknown)}; the metrics are {', '.join(METRICS)}")
    return {name: _score(METRICS[name], outcomes, seed) for name in names}


def _score(metric: Metric, outcomes: Sequence[Outcome], seed: int) -> Score:
    score = mean_score(metric.per_example(outcomes), seed=seed, missing=metric.missing)
    caveat = left_out_ids(outcomes) if metric.name == "accepted_answer" else None
    return replace(score, reason=joined(score.reason, caveat))
