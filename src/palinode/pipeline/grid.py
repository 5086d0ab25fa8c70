"""Choose the scales (α, β) on a small grid, each point tried in memory.

The rule: among the points that keep at least `retain_share` of the target's retain probability, take
the one with the least forget-set probability that is not below the base checkpoint's own. The base never
saw the forget set, so going below it is over-forgetting, a failure like under-forgetting.
For each β the values of α are tried upwards until the forget-set probability falls below the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Probe:
    """Mean answer probability on the probe rows; `retain` is None in forget-only runs."""

    forget: float
    retain: float | None


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One pair of scales and what the model did there."""

    forget_scale: float
    retain_scale: float
    probe: Probe


@dataclass(frozen=True, slots=True)
class Rule:
    """What a point must satisfy: a floor for forgetting and a floor for retaining."""

    base_forget: float
    """The base checkpoint's forget-set probability."""
    target_retain: float | None
    """The target's retain probability."""
    retain_share: float

    @property
    def retain_floor(self) -> float | None:
        """The least retain probability that a chosen point may have."""
        return None if self.target_retain is None else self.retain_share * self.target_retain

    def allows(self, probe: Probe) -> bool:
        """Tell whether a point over-forgets or costs too much of the retain set."""
        keeps = self.retain_floor is None or (probe.retain or 0.0) >= self.retain_floor
        return keeps and probe.forget >= self.base_forget

    def shortfall(self, probe: Probe) -> float:
        """Return by how much a point breaks the rule, 0 where it keeps it.

        It is the larger of the two relative shortfalls, below the base on the forget set or below the floor
        on the retain set.
        """
        below = max(0.0, self.base_forget - probe.forget) / max(self.base_forget, 1e-9)
        if self.retain_floor is None or probe.retain is None:
            return below
        return max(below, (self.retain_floor - probe.retain) / max(self.retain_floor, 1e-9))

    def __str__(self) -> str:
        text = f"the least forget-set probability not below the base checkpoint's {self.base_forget:.3f}"
        if self.retain_floor is None:
            return text
        return (
            f"{text}, with a retain probability of at least {self.retain_floor:.3f} "
            f"({self.retain_share:.0%} of the target's {self.target_retain:.3f})"
        )


def walk_grid(
    forget_grid: Sequence[float],
    retain_grid: Sequence[float],
    probe: Callable[[float, float], Probe],
    rule: Rule,
) -> Iterator[GridPoint]:
    """Yield the points that are worth trying, each with its probe."""
    for beta in sorted(retain_grid):
        for alpha in sorted(forget_grid):
            found = probe(alpha, beta)
            yield GridPoint(alpha, beta, found)
            if found.forget < rule.base_forget:
                break  # a larger α forgets more still


def choose(points: Sequence[GridPoint], rule: Rule) -> GridPoint | None:
    """Return the point the rule picks, the smaller scales on a tie; None when it allows none."""
    allowed = [point for point in points if rule.allows(point.probe)]
    return min(
        allowed,
        key=lambda point: (point.probe.forget, point.forget_scale, point.retain_scale),
        default=None,
    )


def nearest(points: Sequence[GridPoint], rule: Rule) -> GridPoint:
    """Return the point that breaks the rule least, for when none keeps it."""
    return min(
        points, key=lambda point: (rule.shortfall(point.probe), point.forget_scale, point.retain_scale)
    )


def as_record(points: Sequence[GridPoint], rule: Rule, chosen: GridPoint) -> list[Mapping[str, object]]:
    """Return the points as `record.json` holds them."""
    return [
        {
            "forget": point.forget_scale,
            "retain": point.retain_scale,
            "forget_probability": point.probe.forget,
            "retain_probability": point.probe.retain,
            "allowed": rule.allows(point.probe),
            "chosen": point == chosen,
        }
        for point in points
    ]
