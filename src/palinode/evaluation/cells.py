"""Cells that several benchmarks have: the common metrics, each in its place in a set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from palinode.evaluation.benchmark import GENERATION, GRADIENTS, STANDARDISED, Cell, Measured
from palinode.metrics.aggregate import mean_score
from palinode.metrics.judged import forget_accuracy, recover_accuracy, retain_accuracy
from palinode.metrics.membership import ATTACKS, Attack, auc, privleak, true_positive_rate
from palinode.metrics.table import COMPARISONS, METRICS
from palinode.records import Outcome, Score

MEMORIZATION = ("exact_memorization", "extraction_strength", "extraction_strength_strict")
"""Metrics of what a model knows by heart."""

_NEEDS = {"generated": GENERATION, "standardised": STANDARDISED, "gradient_norm": GRADIENTS}


def metric_cells(name: str, *metrics: str) -> tuple[Cell, ...]:
    """Return a cell for each of these metrics of METRICS on a set."""
    return tuple(_metric_cell(name, metric) for metric in metrics)


def attack_cells(members: str, others: str) -> tuple[Cell, ...]:
    """Return AUC and true-positive rate of every membership attack, and PrivLeak against the retrained model.

    `members` is the set that was trained on once, `others` one that no model saw.
    """
    cells = [cell for attack in ATTACKS.values() for cell in _attack(attack, members, others)]
    leak = Cell(
        members,
        "privleak",
        COMPARISONS["privleak"].description,
        lambda measured: _privleak(measured, members, others),
        also=(others,),
        reference=True,
    )
    return (*cells, leak)


def judge_cells(forget: str, retain: str) -> tuple[Cell, ...]:
    """Return the three accuracies of a judge (spec: msa.md §5)."""
    return (
        _judge_cell(forget, "judge_forget_accuracy", forget_accuracy),
        _judge_cell(forget, "judge_recover_accuracy", recover_accuracy, reference=True),
        _judge_cell(retain, "judge_retain_accuracy", retain_accuracy),
    )


def min_k_auc(members: Sequence[Outcome], others: Sequence[Outcome], *, seed: int) -> Score:
    """Return the AUC of the Min-K attack, from which PrivLeak follows."""
    attack = ATTACKS["min_k"]
    return auc(attack.values(members), attack.values(others), seed=seed)


def _metric_cell(name: str, key: str) -> Cell:
    metric = METRICS[key]

    def score(measured: Measured) -> Score:
        outcomes = measured.of(name)
        found = mean_score(metric.per_example(outcomes), seed=measured.seed, missing=metric.missing)
        remarks = [remark for remark in (found.reason, metric.caveat(outcomes)) if remark]
        return replace(found, reason="; ".join(remarks) or None)

    return Cell(name, key, metric.description, score, needs=_asked(metric.needs))


def _asked(needs: frozenset[str]) -> frozenset[str]:
    return frozenset(_NEEDS[need] for need in needs if need in _NEEDS)


def _attack(attack: Attack, members: str, others: str) -> tuple[Cell, Cell]:
    def cell(metric: str, what: str, rate: Callable[..., Score]) -> Cell:
        def score(measured: Measured) -> Score:
            return rate(
                attack.values(measured.of(members), measured.of_reference(members)),
                attack.values(measured.of(others), measured.of_reference(others)),
                seed=measured.seed,
            )

        return Cell(
            members,
            f"{metric}_{attack.name}",
            f"{what} of the attack {attack.description}",
            score,
            also=(others,),
            needs=_asked(attack.needs),
            reference="reference" in attack.needs,
            on_request="gradient_norm" in attack.needs,
        )

    return (
        cell("auc", "area under the ROC curve", auc),
        cell("tpr", "true-positive rate at 1 % false positives", true_positive_rate),
    )


def _privleak(measured: Measured, members: str, others: str) -> Score:
    ours = min_k_auc(measured.of(members), measured.of(others), seed=measured.seed)
    theirs = measured.of_reference(members), measured.of_reference(others)
    if theirs[0] and theirs[1]:
        return privleak(ours, min_k_auc(theirs[0], theirs[1], seed=measured.seed))
    return privleak(ours, measured.reference.min_k_auc if measured.reference else None)


def _judge_cell(name: str, key: str, accuracy: Callable[..., Score], *, reference: bool = False) -> Cell:
    def score(measured: Measured) -> Score:
        return accuracy(measured.verdicts[name], seed=measured.seed)

    needs = frozenset({GENERATION})
    return Cell(name, key, COMPARISONS[key].description, score, needs=needs, reference=reference, judge=True)
