"""The tables of metrics: what each is called, what it says and what it needs.

METRICS      a number per example of one model on one set; the mean is the score
ATTACKS      membership attacks, a number per example whose order counts: higher, less likely a member
COMPARISONS  one number for two sets or two models, or for several answers

To add a metric, write one function and one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from palinode.records import Outcome, Score

DEFAULT_METRICS = ("answer_probability", "rouge_l_recall", "exact_memorization", "extraction_strength")
"""The metrics that need nothing but a prompt and its answer: those of every run."""

_NO_TOKEN = "no token but the end token was scored"
_NO_PAIR = "a right answer in other words or wrong answers are missing"
_NO_WRONG = "there are no wrong answers"


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
            missing=UNREADABLE,
            needs=frozenset({"generated"}),
        ),
        Metric(
            name="exact_match",
            per_example=exact_matches,
            description="share of generated answers that are exactly the one in the data; for short answers",
            missing="nothing was generated",
            needs=frozenset({"generated"}),
        ),
        Metric(
            name="exact_memorization",
            per_example=exact_memorizations,
            description="share of the answer's tokens that the model ranks first",
            missing=_NO_TOKEN,
        ),
        Metric(
            name="extraction_strength",
            per_example=extraction_strengths,
            description="share of the answer that the model completes once it has seen the rest",
            missing=f"{_NO_TOKEN}, or {ONE_TOKEN}",
        ),
        Metric(
            name="extraction_strength_strict",
            per_example=partial(extraction_strengths, strict=True),
            description="extraction strength that is 0 when the last token is wrong",
            missing=_NO_TOKEN,
        ),
        Metric(
            name="normalised_probability",
            per_example=normalised_probabilities,
            description="probability of the answer among itself and the wrong answers",
            missing=f"no token was scored, or {_NO_WRONG}",
            needs=frozenset({"perturbed"}),
        ),
        Metric(
            name="paraphrased_probability",
            per_example=partial(alternative_probabilities, kind="paraphrased"),
            description="length-normalised probability of the right answer in other words",
            missing="there is no right answer in other words",
            needs=frozenset({"paraphrased"}),
        ),
        Metric(
            name="perturbed_probability",
            per_example=partial(alternative_probabilities, kind="perturbed"),
            description="mean length-normalised probability of the wrong answers",
            missing=_NO_WRONG,
            needs=frozenset({"perturbed"}),
        ),
        Metric(
            name="forget_truth_ratio",
            per_example=forget_truth_ratios,
            description="min(R, 1/R), R = wrong over right: 1 when the model cannot tell them apart",
            missing=_NO_PAIR,
            needs=frozenset({"paraphrased", "perturbed"}),
        ),
        Metric(
            name="retain_truth_ratio",
            per_example=retain_truth_ratios,
            description="max(0, 1 − R), R = wrong over right: 1 when the model is sure of the right answer",
            missing=_NO_PAIR,
            needs=frozenset({"paraphrased", "perturbed"}),
        ),
        Metric(
            name="answer_truth_ratio",
            per_example=partial(retain_truth_ratios, right="expected"),
            description="max(0, 1 − R) against the answer in the data (real authors, world facts)",
            missing=f"no token was scored, or {_NO_WRONG}",
            needs=frozenset({"perturbed"}),
        ),
        Metric(
            name="right_share",
            per_example=right_shares,
            description="right answer's part of its and the wrong answers' probability (\"prob_mean\")",
            missing=_NO_PAIR,
            needs=frozenset({"paraphrased", "perturbed"}),
        ),
        Metric(
            name="rouge_1_recall",
            per_example=partial(rouge_values, kind="rouge1"),
            description="share of the answer's words that the generated answer has in any order",
            missing=UNREADABLE,
            needs=frozenset({"generated"}),
        ),
        Metric(
            name="rouge_l_f",
            per_example=partial(rouge_values, measure="f"),
            description="common words in order over the words of both, stemmed (open-unlearning's MUSE)",
            missing=UNREADABLE,
            needs=frozenset({"generated"}),
        ),
        Metric(
            name="rouge_l_f_unstemmed",
            per_example=partial(rouge_values, measure="f", stemmer=False),
            description="common words in order over the words of both, as written (MUSE)",
            missing=UNREADABLE,
            needs=frozenset({"generated"}),
        ),
        Metric(
            name="accepted_answer",
            per_example=accepted_values,
            description="share of generated answers that hold an accepted answer, without a judge (RESTOR)",
            missing="nothing was generated, or no accepted answer is a text",
            needs=frozenset({"generated"}),
            caveat=left_out_ids,
        ),
    )
}

ATTACKS: dict[str, Metric] = {
    attack.name: attack
    for attack in (
        Metric(
            name="loss",
            per_example=loss_values,
            description="LOSS: mean loss of the answer's tokens",
            missing="no token was scored",
        ),
        Metric(
            name="zlib",
            per_example=zlib_values,
            description="ZLib: mean loss over the bytes that zlib makes of the answer",
            missing="no token was scored",
        ),
        Metric(
            name="min_k",
            per_example=min_k_values,
            description="Min-K%: mean loss of the 40 % least likely tokens",
            missing="no token but the end token was scored",
        ),
        Metric(
            name="min_k_plus",
            per_example=min_k_plus_values,
            description="Min-K%++: the same on log-probabilities standardised over the vocabulary",
            missing="no standardised log-probabilities were asked for, or no token was scored",
            needs=frozenset({"standardised"}),
        ),
        Metric(
            name="gradient_norm",
            per_example=gradient_norm_values,
            description="GradNorm: mean norm of the loss's gradient over parameter tensors",
            missing="no gradient norm was asked for",
            needs=frozenset({"gradient_norm"}),
        ),
        Metric(
            name="reference",
            per_example=reference_values,
            description="Reference: mean loss minus that of a reference model, usually the retrained one",
            missing="no token was scored, or the reference model was not asked about the row",
            needs=frozenset({"reference"}),
        ),
    )
}

COMPARISONS = {
    "model_utility": "harmonic mean of probability, ROUGE-L recall, truth ratio on three kept sets (TOFU)",
    "forget_quality": "p-value of the KS test between the truth ratios of this and the retrained model",
    "membership_auc": "for each attack: 1 forget rows look trained on, ½ unseen, 0 stranger than unseen",
    "membership_tpr": "for each attack: share of forget rows told from holdout rows at 1 % false positives",
    "privleak": "Min-K% leak against the retrained model: 0 ideal, −100 full, above 0 over-forgotten",
    "judge_forget_accuracy": (
        "Acc_forget: share of forget rows where the judge does not pick the ground truth"
    ),
    "judge_recover_accuracy": (
        "Acc_recover: share of forget rows where the judge picks the ideal model's answer"
    ),
    "judge_retain_accuracy": "Acc_retain: share of retain rows where the judge picks truth or ideal answer",
    "leak_at_k": "probability that one of k answers drawn at random gives the content away",
}
"""Metrics that are no mean over the examples of one set, and what each says."""


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
    return replace(score, reason=joined(score.reason, metric.caveat(outcomes)))
