"""The table of attacks. To add one: a file with an `Attack`, and its line here."""

from __future__ import annotations

from collections.abc import Mapping

from palinode.audit.attack import Attack, Test
from palinode.audit.membership import MEMBERSHIP
from palinode.audit.paraphrases import PARAPHRASES
from palinode.audit.prefixes import PREFIXES
from palinode.audit.quantisation import QUANTISE_4, QUANTISE_8
from palinode.audit.questions import QUESTIONS
from palinode.audit.relearning import RELEARN_FORGET, RELEARN_LOOKALIKES, RELEARN_RETAIN
from palinode.audit.sampling import SAMPLING

ATTACKS: Mapping[str, Attack] = {
    attack.name: attack
    for attack in (
        QUESTIONS,
        PARAPHRASES,
        PREFIXES,
        SAMPLING,
        MEMBERSHIP,
        QUANTISE_8,
        QUANTISE_4,
        RELEARN_FORGET,
        RELEARN_RETAIN,
        RELEARN_LOOKALIKES,
    )
}
"""Attacks by name, in the order they are run: those that only ask first, so that they share a model."""


def tests_by_key() -> dict[str, tuple[Attack, Test]]:
    """Return every test of every attack by its key in a policy, `attack.test`."""
    return {
        f"{attack.name}.{test.name}": (attack, test) for attack in ATTACKS.values() for test in attack.tests
    }
