"""Membership attacks: do forget rows look like training data, beside rows that no model has seen?

The AUC is 1 where they do, one half where nothing tells them apart, and well below one half where they look
stranger than rows never seen, which gives them away as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from palinode.audit.attack import Attack, Measurement, Test
from palinode.metrics.membership import ATTACKS as SCORES

if TYPE_CHECKING:
    from palinode.audit.budget import Budget
    from palinode.audit.material import Material
    from palinode.audit.subject import Subject

MARGIN = 0.1
"""Distance from the yardstick's AUC, either way."""

RELATIVE = "reference"
"""The attack that takes the yardstick's loss off; it is formed when both models have been measured."""

MISSING = {"gradient_norm": "this budget has no gradient norms; the full one does"}
"""Why rows have no value, where an audit knows better than the attack."""


def measure(subject: Subject, material: Material, budget: Budget) -> Measurement:
    """Score every forget and holdout row with each membership attack; higher is less likely a member."""
    from palinode.audit.subject import likelihoods_only

    asking = replace(likelihoods_only(budget), standardise=True, gradient_norms=budget.gradient_norms)
    sets = {
        "forget": subject.ask(material.forget, asking, label="membership of forget rows"),
        "holdout": subject.ask(material.holdout, asking, label="membership of holdout rows"),
    }
    return Measurement(
        {
            test.name: {
                name: tuple(SCORES["loss" if test.relative else test.name].values(outcomes))
                for name, outcomes in sets.items()
            }
            for test in MEMBERSHIP.tests
        }
    )


def lacks(material: Material, budget: Budget) -> str | None:  # noqa: ARG001 - every attack is asked alike
    """Say what is missing."""
    if material.holdout:
        return None
    return "no rows that the models have not seen were given; name them with --holdout"


MEMBERSHIP = Attack(
    name="membership",
    title="membership attacks",
    description="AUC of telling forget rows from rows never seen, one half where nothing tells them apart",
    tests=tuple(
        Test(
            name,
            f"AUC of {attack.description.split(':')[0]}",
            more=MARGIN,
            less=MARGIN,
            missing=MISSING.get(name, attack.missing),
            statistic="auc",
            relative=name == RELATIVE,
        )
        for name, attack in SCORES.items()
    ),
    measure=measure,
    lacks=lacks,
)
