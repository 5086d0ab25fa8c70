"""Walk a grid of scales (α, β): for each β upwards in α, until it forgets too much and gets worse.

The grid is a way to walk; what is wanted is the goal (`goal.py`), by which one of its points is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from palinode.evaluation.yardstick import Yardstick
from palinode.methods.method import Vectors
from palinode.pipeline.goal import Goal, TriedScales
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.scales import ChosenScales, Probes, Trials, conclude
from palinode.progress import Listener
from palinode.weights import Checkpoint


def grid_scales(
    inputs: Inputs,
    target: Checkpoint,
    vectors: Vectors,
    grid: tuple[Sequence[float], Sequence[float]],
    folder: Path,
    listener: Listener,
    *,
    yardstick: Yardstick | None = None,
) -> ChosenScales:
    """Choose (α, β) among the points of a grid; `folder` keeps what was measured.

    A `yardstick` that is given, such as a retrained model's, takes the place of the estimate.
    """
    alphas, betas = grid
    points = []
    with listener.task("trying scales", 2 + len(alphas) * len(betas), "points") as advance:
        trials = Trials(Probes(inputs, target, folder / "probes.json"), vectors, listener, yardstick)
        advance(2)
        for point in walk_grid(trials.goal, trials.tried, sorted(alphas), sorted(betas)):
            points.append(point)
            advance(1)
    return conclude("grid", [], points, listener)


def walk_grid(
    goal: Goal,
    tried: Callable[[float, float], TriedScales],
    alphas: Sequence[float],
    betas: Sequence[float],
    beyond: Sequence[float] = (),
) -> Iterator[TriedScales]:
    """Yield the points that are worth trying, in order.

    The values of α `beyond` the grid are tried where its largest does not forget enough and keeps the floors.
    """
    wanted = float(goal.yardstick.quantiles(goal.rows).mean())
    for beta in betas:
        before = math.inf
        for alpha in (*alphas, *beyond):
            point = tried(alpha, beta)
            yield point
            distance = goal.distance(point.behaviour)
            past = point.behaviour.probabilities["forget"] < wanted
            if past and distance > before:
                break  # a larger α goes further still
            if alpha >= alphas[-1] and (past or not goal.keeps(point.behaviour)):
                break  # the grid was far enough, or as far as the floors allow
            before = distance
