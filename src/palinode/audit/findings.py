"""From measurements to findings, and from findings to one answer: passed or not, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from palinode.audit.attack import Attack, Measurement
from palinode.audit.comparison import Finding, compare
from palinode.audit.policy import Policy

YARDSTICK = "yardstick"
AUDITED = "audited"


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
    attack: Attack, measured: Mapping[str, Measurement], policy: Policy, *, seed: int
) -> dict[str, dict[str, Finding]]:
    """Return the findings of every model but the yardstick, by model and test."""
    yardstick = measured[YARDSTICK]
    return {
        subject: {
            test.name: compare(
                test,
                measurement.tests[test.name],
                yardstick.tests[test.name],
                more=policy.margins[f"{attack.name}.{test.name}"].above,
                less=policy.margins[f"{attack.name}.{test.name}"].below,
                min_rows=policy.min_rows,
                seed=seed,
            )
            for test in attack.tests
        }
        for subject, measurement in measured.items()
        if subject != YARDSTICK
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
