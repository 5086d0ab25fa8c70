"""The one rule by which a point is chosen: to behave like the yardstick on the forget set, and keep the rest.

    objective = distance to the yardstick on the forget probes + probability lost on the retain probes

(or to `aim_share` of the yardstick, for whoever wants less to come back when the model is trained on).

Both are in answer probability, mean over rows: how far the model is, on either side, from what it should be.
A point must also keep `retain_share` of the target's probability on retain probes and neutral text. Of points
whose objectives are within TOLERANCE of the least, it is the one that loses least, and forgets as far as
chance can tell. Grid, search and comparison choose by it (docs/scales.md). No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from palinode.evaluation.yardstick import Yardstick

TOLERANCE = 0.005
"""Objectives that differ by no more are alike: some dozens of probe rows cannot tell them apart."""
SETS = ("forget", "retain", "neutral")
"""What a model is asked before it is judged."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a model did on the probes: mean log-probability of each answer."""

    forget: Sequence[float]
    retain: Sequence[float] = ()
    """Empty in forget-only runs."""
    neutral: Sequence[float] = ()
    """Empty where the tokenizer cannot spell the neutral text."""

    @classmethod
    def of(cls, logprobs: Mapping[str, Sequence[float]]) -> Behaviour:
        """Return what mean log-probabilities by set say."""
        return cls(*(tuple(logprobs.get(name, ())) for name in SETS))

    @property
    def probabilities(self) -> dict[str, float]:
        """Mean answer probability by set, of those that were asked."""
        sets = zip(SETS, (self.forget, self.retain, self.neutral), strict=True)
        return {name: math.fsum(map(math.exp, rows)) / len(rows) for name, rows in sets if rows}


@dataclass(frozen=True, slots=True)
class Goal:
    """What points are judged by; `target` is the target's behaviour on the same rows as theirs."""

    yardstick: Yardstick
    target: Behaviour
    retain_share: float
    rows: tuple[int, ...] | None = None
    """Which of the yardstick's rows the forget probes are; None: all."""
    aim_share: float = 1.0
    """Share of the yardstick's answer probability that is aimed at."""

    @property
    def aim(self) -> float:
        """The mean answer probability that is aimed at on the forget probes."""
        return self.aim_share * float(self.yardstick.quantiles(self.rows).mean())

    def distance(self, found: Behaviour) -> float:
        """Return how far the forget-set behaviour is from what is aimed at."""
        return self.yardstick.distance(found.forget, self.rows, share=self.aim_share)

    def kept(self, found: Behaviour) -> dict[str, float]:
        """Return the share of the target's probability that is left, on retain probes and neutral text."""
        ours, before = found.probabilities, self.target.probabilities
        return {
            name: ours[name] / max(before[name], 1e-12) for name in ("retain", "neutral") if name in before
        }

    def lost(self, found: Behaviour) -> float:
        """Return the answer probability lost on the retain probes; what is gained there does not count."""
        ours, before = found.probabilities, self.target.probabilities
        return max(0.0, before["retain"] - ours["retain"]) if "retain" in before else 0.0

    def objective(self, found: Behaviour) -> float:
        """Return what the search makes small."""
        return self.distance(found) + self.lost(found)

    def shortfalls(self, found: Behaviour) -> dict[str, float]:
        """Return by how much each floor is missed, as a share of it; 0 or less where it is kept."""
        return {name: 1 - share / self.retain_share for name, share in self.kept(found).items()}

    def missed(self, found: Behaviour) -> float:
        """Return the larger shortfall, 0 where both floors are kept."""
        largest = max([0.0, *self.shortfalls(found).values()])
        return 0.0 if largest <= 1e-9 else largest

    def keeps(self, found: Behaviour) -> bool:
        """Tell whether both floors are kept."""
        return self.missed(found) == 0

    def forgets(self, found: Behaviour) -> bool:
        """Tell whether the forget-set behaviour is as near to the yardstick as chance lets any model be."""
        return self.distance(found) <= self.yardstick.tolerance

    def figures(self, found: Behaviour) -> dict[str, Any]:
        """Return what a behaviour comes to, as records hold it."""
        means = found.probabilities
        return {
            "forget_probability": means["forget"],
            "retain_probability": means.get("retain"),
            "neutral_probability": means.get("neutral"),
            "distance": self.distance(found),
            "objective": self.objective(found),
            "allowed": self.keeps(found),
        }

    def __str__(self) -> str:
        names = {"retain": "retain rows", "neutral": "neutral text"}
        kept = [names[name] for name in self.target.probabilities if name in names]
        floor = [f"{self.retain_share:.0%} of the target's probability on {name}" for name in kept]
        limits = f", keeping at least {' and '.join(floor)}" if floor else ""
        wanted = self.yardstick.probability
        part = "" if self.aim_share == 1 else f"{self.aim_share:.0%} of "
        return (
            f"the least sum of the distance to {part}the yardstick on the forget set (answer probability "
            f"{wanted.value:.3f}, by {self.yardstick.source}) and the probability lost on retain rows{limits}"
        )


class Judged(Protocol):
    """A point that was tried, whatever its settings are."""

    @property
    def goal(self) -> Goal:
        """By what it is judged."""

    @property
    def behaviour(self) -> Behaviour:
        """What the model did there."""

    @property
    def order(self) -> tuple[Any, ...]:
        """Of points that are equal in all else, the first in this order is taken."""


P = TypeVar("P", bound=Judged)


def best(points: Iterable[P]) -> P:
    """Return the point that is chosen: of those that keep the floors, else miss them least, the best.

    That is the one with the least objective; of those within TOLERANCE of it one that is as near to the
    yardstick as chance lets any model be, if there is one, and then the one that loses least.
    """
    judged = [(point, point.goal.missed(point.behaviour)) for point in points]
    fewest = min(missed for _, missed in judged)
    allowed = [(point, point.goal.objective(point.behaviour)) for point, missed in judged if missed == fewest]
    least = min(objective for _, objective in allowed)
    alike = [entry for entry in allowed if entry[1] <= least + TOLERANCE]

    def rank(entry: tuple[P, float]) -> tuple[Any, ...]:
        point, objective = entry
        goal, found = point.goal, point.behaviour
        return not goal.forgets(found), goal.lost(found), objective, point.order

    return min(alike, key=rank)[0]


@dataclass(frozen=True, slots=True)
class TriedScales:
    """One pair of scales and what the model did there."""

    forget_scale: float
    retain_scale: float
    behaviour: Behaviour
    goal: Goal = field(repr=False)
    """By what it was judged: all probe rows, or some of them in the first look."""
    groups: tuple[float, ...] = ()
    """Factors on α by group of layers; empty where all have one."""
    filter: tuple[float, bool] | None = None
    """μ of the filter, and whether its inputs are those where the model arrives; None where none is open."""

    @property
    def whole(self) -> bool:
        """Whether all probe rows were asked."""
        return self.goal.rows is None

    @property
    def order(self) -> tuple[Any, ...]:
        """The smaller scales first."""
        return self.forget_scale, self.retain_scale, self.groups, self.filter or ()

    @property
    def rank(self) -> tuple[Any, ...]:
        """How good a point is at a glance: floors first, then the objective, then the order."""
        return self.goal.missed(self.behaviour), self.goal.objective(self.behaviour), self.order


def front(points: Sequence[TriedScales]) -> list[TriedScales]:
    """Return the Pareto front of the wholly measured points, the nearest to the yardstick first.

    A point belongs to it when no other is at least as near on the forget set and loses as little on the
    retain set, and better in one. In forget-only runs it is the nearest point alone.
    """
    ranked = sorted(
        (point for point in points if point.whole),
        key=lambda point: (point.goal.distance(point.behaviour), point.goal.lost(point.behaviour)),
    )
    found: list[TriedScales] = []
    for point in ranked:
        if not found or point.goal.lost(point.behaviour) < found[-1].goal.lost(found[-1].behaviour):
            found.append(point)
    return found


def warning(goal: Goal, chosen: TriedScales) -> str | None:
    """Return in one plain sentence what the chosen point does not reach; None where it does."""
    found = chosen.behaviour
    if goal.keeps(found) and goal.forgets(found):
        return None
    ours, wanted = found.probabilities["forget"], goal.aim
    side = "more" if ours > wanted else "less"
    far = (
        f"on the forget set the model is still {goal.distance(found):.3f} from the yardstick, where chance "
        f"explains {goal.yardstick.tolerance:.3f} (answer probability {ours:.3f}, {side} than {wanted:.3f})"
    )
    lost = "; ".join(f"it keeps {share:.0%} on {name} probes" for name, share in goal.kept(found).items())
    if goal.keeps(found):
        return f"No point tried satisfied both sides: {far}."
    if goal.forgets(found):
        return f"No point tried kept {goal.retain_share:.0%} of what the target knew: {lost}."
    return f"No point tried satisfied either side: {far}, and {lost}."


def as_record(points: Sequence[TriedScales], chosen: TriedScales) -> list[dict[str, Any]]:
    """Return points as the record holds them, in the order they were tried."""
    return [{**_facts(point), "chosen": point == chosen} for point in points]


def sensitivity(chosen: TriedScales, around: Sequence[TriedScales]) -> list[dict[str, Any]]:
    """Return for each point around the chosen one how distance and probabilities change on the way."""
    before = _facts(chosen)
    changes = ("distance", "forget_probability", "retain_probability")
    return [
        {
            "forget": point.forget_scale,
            "retain": point.retain_scale,
            "allowed": facts["allowed"],
            **{
                f"{name}_change": None if facts[name] is None else facts[name] - before[name]
                for name in changes
            },
        }
        for point in around
        for facts in [_facts(point)]
    ]


def _facts(point: TriedScales) -> Mapping[str, Any]:
    return {
        "forget": point.forget_scale,
        "retain": point.retain_scale,
        **({"groups": list(point.groups)} if point.groups else {}),
        **({"mu": point.filter[0], "arrival": point.filter[1]} if point.filter else {}),
        "rows": len(point.behaviour.forget),
        **point.goal.figures(point.behaviour),
    }
