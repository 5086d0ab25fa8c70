"""Which outcome of another model belongs to which outcome of this one."""

from __future__ import annotations

from collections.abc import Sequence

from palinode.records import Outcome


def partners(outcomes: Sequence[Outcome], reference: Sequence[Outcome]) -> list[Outcome | None]:
    """Return for each outcome the reference's outcome of the same row and text, None where there is none.

    Rows are numbered in their source, so the order of either side does not matter; each reference outcome
    is used once. Texts must agree where both sides have them (published logs may hold numbers only): the
    same answer, and one prompt inside the other, as a log may keep the prompt with its chat template.
    """
    waiting: dict[int, list[Outcome]] = {}
    for outcome in reference:
        waiting.setdefault(outcome.row, []).append(outcome)
    return [_take(outcome, waiting.get(outcome.row, [])) for outcome in outcomes]


def _take(outcome: Outcome, candidates: list[Outcome]) -> Outcome | None:
    for place, candidate in enumerate(candidates):
        if _same_text(outcome, candidate):
            return candidates.pop(place)
    return None


def _same_text(one: Outcome, other: Outcome) -> bool:
    answers = one.expected.strip(), other.expected.strip()
    prompts = one.prompt.strip(), other.prompt.strip()
    same_answer = not all(answers) or answers[0] == answers[1]
    return same_answer and (prompts[0] in prompts[1] or prompts[1] in prompts[0])
