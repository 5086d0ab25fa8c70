"""What models answered, side by side, the worst cases first; and how likely each right answer was to them.

A case is bad on the forget set when the unlearned model is far from a model that never saw it, above or
below; on other sets when it lost much of what the target knew. Long texts are kept whole; what would make
a page too large to open is left out at the end of the list, and counted.
"""

from __future__ import annotations

import html
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palinode.records import Outcome

Outcomes = Mapping[str, Mapping[str, Sequence[Outcome]]]
"""Outcomes by model (target, base, unlearned, retrained) and set (forget, retain)."""

MOST_ROWS = 200
"""Rows of a set that a page shows."""
MOST_BYTES = 1_200_000
"""Of a set's texts as HTML, so that a page stays under 8 MB."""
DIGITS = 5
"""Significant digits of a log-probability; a page holds thousands of them."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the data and what each model makes of it."""

    row: int
    difference: float | None
    """The unlearned model's answer probability less the one it is held against; None without one."""
    outcomes: Mapping[str, Outcome]
    """By model."""

    def as_json(self) -> dict[str, Any]:
        """Return row, texts and answer probabilities as plain values."""
        first = next(iter(self.outcomes.values()))
        return {
            "row": self.row,
            "prompt": first.prompt,
            "expected": first.expected,
            "difference": None if self.difference is None else _short(self.difference),
            "answers": {name: outcome.generated for name, outcome in self.outcomes.items()},
            "probabilities": {name: _probability(outcome) for name, outcome in self.outcomes.items()},
        }

    def nbytes(self) -> int:
        """Return the size of its texts as HTML."""
        first = next(iter(self.outcomes.values()))
        texts = [first.prompt, first.expected, *(found.generated or "" for found in self.outcomes.values())]
        return sum(len(html.escape(text).encode("utf-8", "replace")) for text in texts)


def log_probabilities(outcomes: Outcomes) -> dict[str, dict[str, list[float]]]:
    """Return by set and model the mean log-probability of each row's answer tokens, in nats."""
    return {
        label: {
            model: [_short(value) for outcome in sets[label] if (value := _mean(outcome)) is not None]
            for model, sets in outcomes.items()
            if sets.get(label)
        }
        for label in _labels(outcomes)
    }


def side_by_side(outcomes: Outcomes) -> dict[str, dict[str, Any]]:
    """Return by set: the cases shown, the worst first, as plain values, and of how many they are."""
    shown = {}
    for label in _labels(outcomes):
        cases = worst_first(outcomes, label)
        shown[label] = {"of": len(cases), "rows": [case.as_json() for case in _fitting(cases)]}
    return shown


def worst_first(outcomes: Outcomes, label: str) -> list[Case]:
    """Return the rows of a set on which the unlearned model was measured, the worst first."""
    by_model = {
        model: {outcome.row: outcome for outcome in sets[label]}
        for model, sets in outcomes.items()
        if sets.get(label)
    }
    goal = held_against(label, by_model)
    cases = []
    for row, outcome in by_model.get("unlearned", {}).items():
        found = {model: rows[row] for model, rows in by_model.items() if row in rows}
        cases.append(Case(row, _difference(outcome, found.get(goal or "")), found))

    def badness(case: Case) -> float:
        difference = case.difference or 0.0
        return abs(difference) if label == "forget" else -difference

    return sorted(cases, key=lambda case: (-badness(case), case.row))


def held_against(label: str, models: Container[str]) -> str | None:
    """Return the model whose answers the unlearned one's should be like on a set; None without one."""
    goals = ("retrained", "base") if label == "forget" else ("target",)
    return next((name for name in goals if name in models), None)


def _fitting(cases: Sequence[Case]) -> list[Case]:
    """Return the first cases, as many as a page can take, and at least one."""
    total, fitting = 0, list[Case]()
    for case in cases[:MOST_ROWS]:
        total += case.nbytes()
        if fitting and total > MOST_BYTES:
            break
        fitting.append(case)
    return fitting


def _labels(outcomes: Outcomes) -> list[str]:
    return list(dict.fromkeys(label for sets in outcomes.values() for label, found in sets.items() if found))


def _difference(outcome: Outcome, goal: Outcome | None) -> float | None:
    mine, should = _probability(outcome), _probability(goal) if goal else None
    return None if mine is None or should is None else mine - should


def _mean(outcome: Outcome) -> float | None:
    return math.fsum(outcome.logprobs) / len(outcome.logprobs) if outcome.logprobs else None


def _probability(outcome: Outcome) -> float | None:
    """Return exp of the mean log-probability of the answer's tokens: the metric answer_probability."""
    mean = _mean(outcome)
    return None if mean is None else _short(math.exp(mean))


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
