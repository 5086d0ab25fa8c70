"""Search the scales (α, β) that bring the target nearest to the yardstick at the least cost to the rest.

    1. a first look    the points of both grids, on some of the probe rows; for each β, α goes upwards until
                       the forget-set behaviour is past the yardstick and getting worse, beyond the grid if
                       its largest α does not get there and the floors still hold
    2. the search      optuna's Gaussian process between the best of them, on all probe rows
    3. a closer look   steps of about a tenth around the best point: they may be better, and they tell how
                       much hangs on the exact scales

Where the filter of the forget vector is open, the first look goes over its μ as well, and after the search
the vector is filtered once more by what the layers read where the model arrives: held-back rows decide.

Or the grid is walked alone, on all probe rows. What is wanted is in `goal.py`. A killed search repeats its
decisions from what is on disk and goes on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from palinode.evaluation.yardstick import Yardstick
from palinode.methods.method import Vectors
from palinode.pipeline.goal import Goal, TriedScales, best
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.scales import STEP, ChosenScales, Probes, Trials, conclude, layer_groups, step_of
from palinode.pipeline.transforming import OpenFilter
from palinode.progress import Listener
from palinode.weights import Checkpoint

if TYPE_CHECKING:
    import optuna

FARTHER = (1.5, 2.0, 3.0, 4.0, 5.0)
"""Multiples of the largest α that the first look goes on to: projected vectors need about three times a plain
one's."""
STARTS = 3
"""Best points of the first look that the search begins with."""
ROUNDS = 2
"""Times that the closer look moves on to a better point."""
FACTORS = (0.5, 1.5)
"""Limits of the factors on α by group of layers."""
AIMS = 2
"""Points by which each filter is compared with the others: the best of its first look, and one corrected."""

Range = tuple[float, float]


def choose_scales(
    inputs: Inputs,
    target: Checkpoint,
    vectors: Vectors,
    grid: tuple[Sequence[float], Sequence[float]],
    folder: Path,
    listener: Listener,
    *,
    yardstick: Yardstick | None = None,
    filters: OpenFilter | None = None,
) -> ChosenScales:
    """Search (α, β) from the points of a grid on, or choose among these alone, as the recipe says.

    `folder` keeps what was measured. A grid with one value of α or of β leaves that one as it is; beyond the
    largest of several α the search goes on where that forgets too little. A `yardstick` that is given, such
    as a retrained model's, takes the place of the estimate; `filters` are for the search.
    """
    alphas, betas = (sorted(set(values)) for values in grid)
    scales, auto = inputs.recipe.scales, inputs.recipe.scales.choose == "auto"
    beyond = [round(alphas[-1] * times, 2) for times in FARTHER] if auto and len(alphas) > 1 else []
    most = 2 + (len(alphas) + len(beyond)) * len(betas) + (scales.trials if auto else 0)
    with listener.task("searching scales" if auto else "trying scales", most, "points") as advance:
        trials = Trials(Probes(inputs, target, folder / "probes.json"), vectors, listener, yardstick)
        advance(2)

        def counted(points: Iterator[TriedScales]) -> Iterator[TriedScales]:
            for point in points:
                advance(1)
                yield point

        if not auto:
            points = list(counted(walk_grid(trials.goal, trials.tried, alphas, betas)))
            return conclude("grid", [], points, listener)
        glance = partial(trials.tried, whole=False)
        trials.use(filters.usual() if filters else None)
        others: list[TriedScales] = []
        looked = list(counted(walk_grid(trials.few, glance, alphas, betas, beyond)))
        alphas = sorted({*alphas, *(point.forget_scale for point in looked)})
        if filters is not None:
            looked += counted(other_filters(trials, filters, looked, alphas))
            others = compared(trials, filters, looked)
        label = trials.filtered.label if trials.filtered else None
        near = [point for point in looked if point.filter == label]
        varied = (len(alphas) > 1, len(betas) > 1)
        whole = [point for point in others if point.filter == label]
        whole += counted(between(trials, near, alphas, betas, scales.trials, inputs.recipe.seed))
        whole += around(trials, best(whole), varied=varied)
        if filters is not None and filters.arrives != "never":
            there = where_it_arrives(trials, filters, best(whole), varied)
            others += [] if filters.arrives == "where better" else whole
            whole = there if filters.arrives == "always" else [*whole, *there]
            trials.use(filters.of(best(whole)))
        parts = layer_groups(target, scales.groups)
        if len(parts) > 1:
            whole += grouped(trials, best(whole), parts, scales.trials, inputs.recipe.seed)
    if filters is not None:
        filters.tidy(trials.filtered)
    looked += [point for point in others if point not in whole]
    return conclude("auto", looked, whole, listener, parts=parts, filtered=trials.filtered)


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
    wanted = goal.aim
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


def other_filters(
    trials: Trials, filters: OpenFilter, looked: Sequence[TriedScales], alphas: Sequence[float]
) -> Iterator[TriedScales]:
    """Yield first looks at a smaller and a larger μ, near the best α of the usual one."""
    usual = min(looked, key=lambda point: point.rank)
    low, high = range_around([usual.forget_scale], alphas)
    near = [alpha for alpha in alphas if low <= alpha <= usual.forget_scale]
    beyond = [alpha for alpha in alphas if usual.forget_scale < alpha <= high]
    for mu in filters.others():
        trials.use(filters.at(mu))
        glance = partial(trials.tried, whole=False)
        yield from walk_grid(trials.few, glance, near, [usual.retain_scale], beyond)


def compared(trials: Trials, filters: OpenFilter, looked: Sequence[TriedScales]) -> list[TriedScales]:
    """Return points on all rows where the vector of each filter forgets about as much as the yardstick.

    The filter of the best one is in use from then on.
    """
    found = []
    for label in dict.fromkeys(point.filter for point in looked):
        own = [point for point in looked if point.filter == label]
        start = min(own, key=lambda point: point.rank)
        trials.use(filters.of(start))
        slope, alpha, wanted = fall(own), start.forget_scale, math.log(max(1e-12, trials.goal.aim))
        for _ in range(AIMS):
            found.append(trials.tried(alpha, start.retain_scale))
            farther = alpha + (log_forget(found[-1]) - wanted) / slope
            alpha = round(min(max(farther, alpha / 2), 2 * alpha), 2)
    trials.use(filters.of(best(found)))
    return found


def fall(points: Sequence[TriedScales]) -> float:
    """Return by how much the logarithm of the forget probability falls with α, between the outer points."""
    ordered = sorted(points, key=lambda point: point.forget_scale)
    first, last = ordered[0], ordered[-1]
    fallen = log_forget(first) - log_forget(last)
    return max(fallen / max(last.forget_scale - first.forget_scale, STEP), 1 / (last.forget_scale or STEP))


def log_forget(point: TriedScales) -> float:
    """Return the logarithm of the mean answer probability on the forget probes."""
    return math.log(max(1e-12, point.behaviour.probabilities["forget"]))


def where_it_arrives(
    trials: Trials, filters: OpenFilter, centre: TriedScales, varied: tuple[bool, bool]
) -> list[TriedScales]:
    """Return the points near the centre for the vector filtered by what the layers read there."""
    assert trials.filtered is not None
    second = trials.vectors.retain
    rest = centre.retain_scale * second if second is not None and centre.retain_scale else None
    trials.use(filters.arrived(trials.filtered, centre.forget_scale, rest))
    found = [trials.tried(centre.forget_scale, centre.retain_scale)]
    return found + around(trials, found[0], varied=varied)


def between(
    trials: Trials,
    looked: Sequence[TriedScales],
    alphas: Sequence[float],
    betas: Sequence[float],
    count: int,
    seed: int,
) -> Iterator[TriedScales]:
    """Yield the points that optuna suggests between the neighbours of the best ones, on all rows."""
    starts = sorted(looked, key=lambda point: point.rank)[:STARTS]
    ranges = {
        "forget": range_around([point.forget_scale for point in starts], alphas),
        "retain": range_around([point.retain_scale for point in starts], betas),
    }
    with quiet_study(seed, starts=len(starts)) as study:
        for point in starts:
            scales = {"forget": point.forget_scale, "retain": point.retain_scale}
            study.enqueue_trial({name: scales[name] for name, (low, high) in ranges.items() if low < high})
        for _ in range(max(count, len(starts))):
            trial = study.ask()
            try:
                alpha, beta = (suggested(trial, name, limits) for name, limits in ranges.items())
            except ValueError:  # no place promises anything: all that was tried misses a floor by far
                return
            point = trials.tried(alpha, beta)
            tell(study, trial, point)
            yield point


def around(trials: Trials, centre: TriedScales, *, varied: tuple[bool, bool]) -> list[TriedScales]:
    """Return the points a step away from the centre, and from a better one found on the way."""
    found: list[TriedScales] = []
    for _ in range(ROUNDS):
        alpha, beta = centre.forget_scale, centre.retain_scale
        step = step_of(alpha)
        places = [(round(alpha + sign * step, 2), beta) for sign in (-1, 1) if varied[0]]
        places += [(alpha, round(beta + sign * STEP, 2)) for sign in (-1, 1) if varied[1]]
        found += [trials.tried(*place) for place in places if min(place) >= 0]
        better = best([centre, *found])
        if better is centre:
            break
        centre = better
    return found


def grouped(
    trials: Trials, centre: TriedScales, parts: Sequence[Sequence[str]], count: int, seed: int
) -> list[TriedScales]:
    """Return points at the centre's (α, β) where optuna gives each group of layers its own factor."""
    found: list[TriedScales] = []
    with quiet_study(seed, starts=1) as study:
        study.enqueue_trial({str(group): 1.0 for group in range(len(parts))})
        for _ in range(count):
            trial = study.ask()
            factors = tuple(suggested(trial, str(group), FACTORS) for group in range(len(parts)))
            point = trials.with_factors(centre, parts, factors)
            tell(study, trial, point)
            found.append(point)
    return found


def range_around(values: Sequence[float], grid: Sequence[float]) -> Range:
    """Return the range from the neighbour below the least value to the one above the largest."""
    if len(grid) == 1:
        return grid[0], grid[0]
    below = max((other for other in grid if other < min(values)), default=0.0)
    above = min((other for other in grid if other > max(values)), default=max(values))
    return below, above


def suggested(trial: optuna.Trial, name: str, limits: Range) -> float:
    """Return a scale with two decimals between the limits; more exact than that it need not be."""
    low, high = limits
    with np.errstate(invalid="ignore"):  # optuna divides by the sum of what it hopes for, which may be 0
        return low if low == high else round(trial.suggest_float(name, low, high), 2)


@contextmanager
def quiet_study(seed: int, *, starts: int) -> Iterator[optuna.Study]:
    """Give a study in memory, seeded and quiet."""
    import optuna

    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # exact objectives are new
            sampler = optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=starts, deterministic_objective=True
            )
        yield optuna.create_study(direction="minimize", sampler=sampler)
    finally:
        optuna.logging.set_verbosity(loud)


def tell(study: optuna.Study, trial: optuna.Trial, point: TriedScales) -> None:
    """Report what a suggested point was worth, and which floors it misses."""
    for name, shortfall in point.goal.shortfalls(point.behaviour).items():
        trial.set_constraint(name, shortfall)
    study.tell(trial, point.goal.objective(point.behaviour))
