"""Pick a contestant's point by the rule of `pipeline/search.py`, whatever its hyper-parameters are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palinode.compare.points import MethodPoint
from palinode.pipeline.search import Probe, Rule


@dataclass(frozen=True, slots=True)
class Tried:
    """A point and what it did on the probe rows."""

    point: MethodPoint
    probe: Probe
    facts: Mapping[str, Any]
    """What its training cost."""


def better(tried: Sequence[Tried], rule: Rule) -> Tried | None:
    """Return the point that the rule picks among these, or the one that breaks it least; None of none.

    Of equal points it is the one that was drawn first.
    """
    allowed = [one for one in tried if rule.allows(one.probe)]
    if allowed:
        return min(allowed, key=lambda one: (one.probe.forget, one.point.number))
    return min(tried, key=lambda one: (rule.shortfall(one.probe), one.point.number), default=None)
