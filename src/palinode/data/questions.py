"""A prompt with everything that is known about its answers: the right one, other wordings, wrong ones.

An `Example` is what a model is trained on; a `Question` is what an evaluation asks. Benchmarks make
questions of their rows (spec: data.md); questions made from a user's own rows have one answer each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from palinode.data.examples import Example


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt with its right answer, and other answers that are scored under the same prompt."""

    example: Example
    """The prompt and the right answer."""
    alternatives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other answers by kind: "paraphrased" (right, other words), "perturbed" (wrong), …"""
    accepted: tuple[str, ...] = ()
    """Answers that count as right, where there are several; empty means the right answer only."""


def plain_questions(examples: Iterable[Example]) -> list[Question]:
    """Return examples as questions with one answer each."""
    return [Question(example) for example in examples]
