"""Two models on the same rows: each one's figure, the difference, what it says, and what an audit comes to.

Rows are resampled in pairs, the same draw for both models, so what makes a row easy for both of them does
not blur the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from palinode.audit.attack import Attack, AttackResult, AttackTest, Groups, Statistic
from palinode.audit.policy import Policy
from palinode.metrics.aggregate import mean_score, no_score, percentile_interval
from palinode.metrics.membership import auc
from palinode.records import Score

Verdict = Literal["within", "knows more", "knows less", "unclear", "not judged", "not tested"]
"""What a difference says. Only "knows more" and "knows less" fail an audit by themselves."""

STATISTICS: dict[Statistic, str] = {
    "mean": "mean over the rows",
    "auc": "area under the ROC curve of the forget rows against others",
}
"""What a figure is, for readers."""

REFERENCE = "reference"
AUDITED = "audited"

RESAMPLES = 1999
"""Bootstrap resamples behind the interval of a difference of AUCs."""


Paired = Mapping[str, tuple[float, ...]]
"""Values of the rows that both models have one for, by set."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One test of one model against the reference model."""

    score: Score
    reference: Score
    difference: Score
    """The model's figure less the reference model's."""
    verdict: Verdict
    reason: str | None
    """Why it is unclear or not tested."""


def compare(
    test: AttackTest,
    values: Groups,
    reference: Groups,
    *,
    more: float | None,
    less: float | None,
    min_rows: int,
    seed: int,
) -> Finding:
    """Return the finding of a test from the values of both models, row by row in the same order."""
    ours, theirs = paired(values, reference)
    if test.relative:
        ours, theirs = _taken_off(ours, theirs), _taken_off(theirs, theirs)
    score, standard = _figure(test, ours, seed=seed), _figure(test, theirs, seed=seed)
    difference = _difference(test, ours, theirs, seed=seed)
    fewest = min((len(group) for group in ours.values()), default=0)
    verdict, reason = judge(difference, more=more, less=less, rows=fewest, min_rows=min_rows)
    return Finding(score, standard, difference, verdict, reason)


def paired(values: Groups, reference: Groups) -> tuple[Paired, Paired]:
    """Return both models' values without those of rows that one of them has no value for."""
    pairs = {
        name: [
            (ours, theirs)
            for ours, theirs in zip(group, reference[name], strict=True)
            if ours is not None and theirs is not None
        ]
        for name, group in values.items()
    }
    ours = {name: tuple(first for first, _ in found) for name, found in pairs.items()}
    return ours, {name: tuple(second for _, second in found) for name, found in pairs.items()}


def _taken_off(values: Paired, other: Paired) -> Paired:
    return {
        name: tuple(ours - theirs for ours, theirs in zip(group, other[name], strict=True))
        for name, group in values.items()
    }


def _figure(test: AttackTest, groups: Paired, *, seed: int) -> Score:
    """Return one model's figure of a test, with its own interval."""
    if not any(groups.values()):
        return no_score(test.missing)
    if test.statistic == "auc":
        return auc(*groups.values(), seed=seed)
    (values,) = groups.values()
    return mean_score(values, seed=seed, missing=test.missing)


def _difference(test: AttackTest, ours: Paired, theirs: Paired, *, seed: int) -> Score:
    if empty := [name for name, group in ours.items() if not group]:
        reason = test.missing if test.statistic == "mean" else f"{test.missing} ({', '.join(empty)} rows)"
        return no_score(reason)
    if test.statistic == "mean":
        (gaps,) = _taken_off(ours, theirs).values()
        return mean_score(gaps, seed=seed, shares=False)
    here, there = ([np.array(group) for group in side.values()] for side in (ours, theirs))
    sizes = [len(sample) for sample in here]
    value = auc_of(*here) - auc_of(*there)
    if min(sizes) == 1:
        return Score(value, sum(sizes), None, None, "one row in a sample gives no interval")
    random = np.random.default_rng(seed)
    drawn = np.empty(RESAMPLES)
    for place in range(RESAMPLES):
        forget, holdout = (random.integers(0, size, size) for size in sizes)
        resampled = (auc_of(side[0][forget], side[1][holdout]) for side in (here, there))
        drawn[place] = next(resampled) - next(resampled)
    return Score(value, sum(sizes), *percentile_interval(drawn))


def judge(
    difference: Score, *, more: float | None, less: float | None, rows: int, min_rows: int
) -> tuple[Verdict, str | None]:
    """Say what a difference from the reference model is evidence of.

    knows more: it exceeds `more`, and its 95 % interval lies above 0. knows less: the same below −`less`.
    within: the whole interval lies between the two. Anything else is unclear: the rows are too few for it.
    A side whose margin is None is not judged, and without any nothing is.
    """
    value, low, high = difference.value, difference.low, difference.high
    if value is None:
        return "not tested", difference.reason
    if more is None and less is None:
        return "not judged", None
    if low is None or high is None or rows < min_rows:
        return "unclear", f"{rows} rows are too few; {min_rows} are asked for"
    upper, lower = math.inf if more is None else more, -math.inf if less is None else -less
    if value > upper and low > 0:
        return "knows more", None
    if value < lower and high < 0:
        return "knows less", None
    if lower <= low and high <= upper:
        return "within", None
    return "unclear", "the interval is too wide to tell; more rows would narrow it"


def auc_of(members: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> float:
    """Return P(other > member) + ½ P(other = member).

    >>> auc_of(np.array([0.2, 0.5, 0.9, 1.1]), np.array([0.8, 1.2, 1.5, 0.4]))
    0.6875
    """
    ranked = np.sort(members)
    below = np.searchsorted(ranked, others, side="left") + np.searchsorted(ranked, others, side="right")
    return float(below.mean() / (2 * len(members)))


@dataclass(frozen=True, slots=True)
class Answer:
    """What an audit comes to. Keys are `attack.test`, or the attack's name where it was not run."""

    passed: bool
    knows_more: Sequence[str]
    knows_less: Sequence[str]
    unclear: Sequence[str]
    within: Sequence[str]
    not_tested: Mapping[str, str]
    """Reasons by key."""
    required: Sequence[str]
    """Attacks that the policy asks for and that gave nothing."""


def find(
    attack: Attack, measured: Mapping[str, AttackResult], policy: Policy, *, seed: int
) -> dict[str, dict[str, Finding]]:
    """Return the findings of every model but the reference model, by model and test."""
    reference = measured[REFERENCE]
    return {
        subject: {
            test.name: compare(
                test,
                measurement.tests[test.name],
                reference.tests[test.name],
                more=policy.margins[f"{attack.name}.{test.name}"].above,
                less=policy.margins[f"{attack.name}.{test.name}"].below,
                min_rows=policy.min_rows,
                seed=seed,
            )
            for test in attack.tests
        }
        for subject, measurement in measured.items()
        if subject != REFERENCE
    }


def answer(
    findings: Mapping[str, Mapping[str, Finding]], skipped: Mapping[str, str], policy: Policy
) -> Answer:
    """Return the answer from the audited model's findings by attack and test.

    `skipped` has the reasons of attacks that were not run. An audit in which no test could tell that the
    model knows no more does not pass: there is no evidence of forgetting in it.
    """
    flat = {
        f"{attack}.{test}": finding for attack, tests in findings.items() for test, finding in tests.items()
    }

    def keys(verdict: str) -> list[str]:
        return [key for key, finding in flat.items() if finding.verdict == verdict]

    not_tested = dict(skipped) | {key: flat[key].reason or "" for key in keys("not tested")}
    tested = {key.split(".")[0] for key in flat if key not in not_tested}
    required = [name for name in policy.require if name not in tested]
    within, unclear = keys("within"), keys("unclear")
    evidence = [key for key in within if policy.margins[key].above is not None]
    failed = keys("knows more") or keys("knows less") or required or not evidence
    return Answer(
        passed=not failed and not (unclear and policy.unclear == "fail"),
        knows_more=keys("knows more"),
        knows_less=keys("knows less"),
        unclear=unclear,
        within=within,
        not_tested=not_tested,
        required=required,
    )
