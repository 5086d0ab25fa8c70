"""Search the scales (α, β) that bring the target nearest to the yardstick at the least cost to the rest.

    1. a first look    the points of both grids, on some of the probe rows; for each β, α goes upwards until
                       the forget-set behaviour is past the yardstick and getting worse, beyond the grid if
                       its largest α does not get there and the floors still hold
    2. the search      optuna's Gaussian process between the best of them, on all probe rows
    3. a closer look   steps of about a tenth around the best point: they may be better, and they tell how
                       much hangs on the exact scales

Every point is put into one live model in place, and what it did is kept on disk before anything is decided. A
killed search repeats its decisions from what is on disk and goes on. What is wanted is in `goal.py`.

How optuna is used: a quiet, seeded study in memory that suggests scales and hears how good they are.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from palinode.data.examples import Example
from palinode.data.world import neutral_examples
from palinode.evaluation.yardstick import Unseen, Yardstick, estimate_yardstick
from palinode.methods import unlearned_point
from palinode.pipeline.goal import (
    FIRST_LOOK,
    Behaviour,
    Goal,
    TriedScales,
    as_record,
    best,
    front,
    sensitivity,
    warning,
)
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.scales import ChosenScales, Logprobs, Probes, belongs_to, layer_groups
from palinode.progress import Listener, record
from palinode.weights import Checkpoint, Direction

if TYPE_CHECKING:
    import optuna

FEWEST_ROWS = 16
"""Rows that the first look asks at least."""
FARTHER = (1.5, 2.0, 3.0, 4.0, 5.0)
"""Multiples of the largest α that the first look goes on to: projected vectors need about three times a plain
one's."""
STARTS = 3
"""Best points of the first look that the search begins with."""
ROUNDS = 2
"""Times that the closer look moves on to a better point."""
STEP = 0.1
"""Step of the closer look: in β, and in α relative to it."""
FACTORS = (0.5, 1.5)
"""Limits of the factors on α by group of layers."""
UNKNOWN_SHARE = 0.05
"""Share of unknown tokens above which neutral text is not asked for: the model knows another language."""


def search_scales(
    inputs: Inputs,
    target: Checkpoint,
    forget: Direction,
    retain: Direction | None,
    grid: tuple[Sequence[float], Sequence[float]],
    folder: Path,
    listener: Listener,
    *,
    yardstick: Yardstick | None = None,
) -> ChosenScales:
    """Search (α, β) from the points of a grid on; `folder` keeps what was measured.

    A grid with one value of α or of β leaves that one as it is; beyond the largest of several α the search
    goes on where that forgets too little. A `yardstick` that is given, such as a retrained model's, takes the
    place of the estimate.
    """
    alphas, betas = (sorted(set(values)) for values in grid)
    trials = inputs.recipe.scales.trials
    probes = Probes(inputs, target, folder / "probes.json")
    with listener.task(
        "searching scales", 2 + len(_upwards(alphas)) * len(betas) + trials, "points"
    ) as advance:
        search = ScaleSearch.begin(inputs, target, (forget, retain), probes, listener, yardstick)
        advance(2)

        def counted(points: Iterator[TriedScales]) -> Iterator[TriedScales]:
            for point in points:
                advance(1)
                yield point

        looked = list(counted(search.first_look(alphas, betas)))
        alphas = sorted({*alphas, *(point.forget_scale for point in looked)})
        whole = list(counted(search.between(looked, alphas, betas, trials)))
        whole += search.around(best(whole), varied=(len(alphas) > 1, len(betas) > 1))
        parts = layer_groups(target, inputs.recipe.scales.groups)
        if len(parts) > 1:
            whole += search.grouped(best(whole), parts, trials)
    whole = list({(point.forget_scale, point.retain_scale, point.groups): point for point in whole}.values())
    chosen = best(whole)
    said = warning(chosen.goal, chosen)
    if said is not None:
        listener.say(said)
    return ChosenScales(
        forget=chosen.forget_scale,
        retain=chosen.retain_scale,
        chosen_by="auto",
        rule=str(chosen.goal),
        points=as_record([*looked, *whole], chosen),
        kept_rule=said is None,
        yardstick={**chosen.goal.yardstick.as_record(), "warning": said},
        front=as_record(front(whole), chosen),
        sensitivity=sensitivity(chosen, neighbours(chosen, whole)),
        groups=[
            {"parts": part, "factor": factor}
            for part, factor in zip(parts, chosen.groups, strict=False)  # none where all have one α
        ],
    )


def neighbours(chosen: TriedScales, points: Sequence[TriedScales]) -> list[TriedScales]:
    """Return the other points within about a step of the chosen one."""
    reach = 1.5 * _step(chosen.forget_scale), 1.5 * STEP
    near = {
        (point.forget_scale, point.retain_scale): point
        for point in points
        if not point.groups
        and abs(point.forget_scale - chosen.forget_scale) <= reach[0]
        and abs(point.retain_scale - chosen.retain_scale) <= reach[1]
    }
    near.pop((chosen.forget_scale, chosen.retain_scale), None)
    return [near[scales] for scales in sorted(near)]


class ScaleSearch:
    """One search: vectors, probes, and the goal on all probe rows and on the few of the first look."""

    def __init__(
        self,
        target: Checkpoint,
        vectors: tuple[Direction, Direction | None],
        probes: Probes,
        goals: tuple[Goal, Goal],
        *,
        seed: int,
        listener: Listener,
    ) -> None:
        self.target = target
        self.forget, self.retain = vectors
        self.probes = probes
        self.goal, self.few = goals
        self.seed = seed
        self.listener = listener
        self.numbers = itertools.count(1)

    @classmethod
    def begin(
        cls,
        inputs: Inputs,
        target: Checkpoint,
        vectors: tuple[Direction, Direction | None],
        probes: Probes,
        listener: Listener,
        yardstick: Yardstick | None = None,
    ) -> ScaleSearch:
        """Ask base and target, set the yardstick if there is none, and choose the rows of the first look."""
        rows, share = inputs.rows, inputs.recipe.scales.retain_share
        probes.add("unseen", rows.unseen)
        probes.add("neutral", neutral_examples())
        if not _spelled(probes):
            del probes.sets["neutral"]
        base = probes.logprobs_of_checkpoint("base", inputs.earlier, ["forget", "unseen"])
        before = probes.logprobs_of_checkpoint("target", target, ["forget", "retain", "neutral", "unseen"])
        yardstick = yardstick or set_yardstick(inputs, base, before)
        few = {name: _few(len(before[name])) for name in ("forget", "retain") if name in before}
        for name, places in few.items():
            probes.sets[f"{name}, some"] = [probes.sets[name][place] for place in places]
        part = {name: [before[name][place] for place in places] for name, places in few.items()}
        goals = (
            Goal(yardstick, _behaviour(before), share),
            Goal(yardstick, _behaviour(part), share, tuple(few["forget"])),
        )
        return cls(target, vectors, probes, goals, seed=inputs.recipe.seed, listener=listener)

    def tried(self, alpha: float, beta: float, *, whole: bool = True) -> TriedScales:
        """Return what the model does at (α, β), on all probe rows or on the few of the first look."""
        point = unlearned_point(self.target, self.forget, self.retain, forget_scale=alpha, retain_scale=beta)
        name = f"{alpha},{beta}"
        if whole:
            found = self.probes.logprobs_of_point(name, point, ["forget", "retain", "neutral"])
        else:
            some = self.probes.logprobs_of_point(name, point, ["forget, some", "retain, some"])
            found = {name.removesuffix(", some"): rows for name, rows in some.items()}
        tried = TriedScales(alpha, beta, _behaviour(found), self.goal if whole else self.few)
        figures = {"forget_scale": alpha, "retain_scale": beta, **tried.behaviour.probabilities}
        figures["objective"] = tried.goal.objective(tried.behaviour)
        record(self.listener, "scales", next(self.numbers), figures)
        return tried

    def grouped(self, centre: TriedScales, parts: Sequence[Sequence[str]], trials: int) -> list[TriedScales]:
        """Return points at the centre's (α, β) where optuna gives each group of layers its own factor."""
        found: list[TriedScales] = []
        with quiet_study(self.seed, starts=1) as study:
            study.enqueue_trial({str(group): 1.0 for group in range(len(parts))})
            for _ in range(trials):
                trial = study.ask()
                factors = tuple(suggested(trial, str(group), FACTORS) for group in range(len(parts)))
                point = self._with_factors(centre, parts, factors)
                tell(study, trial, point)
                found.append(point)
        return found

    def _with_factors(
        self, centre: TriedScales, parts: Sequence[Sequence[str]], factors: tuple[float, ...]
    ) -> TriedScales:
        """Return what the model does where each group of parts has its factor on α."""
        alpha, beta = centre.forget_scale, centre.retain_scale
        points = [
            (
                unlearned_point(
                    self.target, self.forget, self.retain, forget_scale=alpha * factor, retain_scale=beta
                ),
                belongs_to(part),
            )
            for part, factor in zip(parts, factors, strict=True)
        ]
        name = f"{alpha},{beta},{','.join(map(str, factors))}"
        found = self.probes.logprobs_of_parts(name, points, ["forget", "retain", "neutral"])
        own = () if set(factors) == {1.0} else factors
        return TriedScales(alpha, beta, _behaviour(found), self.goal, own)

    def first_look(self, alphas: Sequence[float], betas: Sequence[float]) -> Iterator[TriedScales]:
        """Yield the points of the grid, and beyond it, that are worth a look, on some of the rows."""
        wanted = float(self.few.yardstick.quantiles(self.few.rows).mean())
        for beta in betas:
            before = math.inf
            for alpha in _upwards(alphas):
                point = self.tried(alpha, beta, whole=False)
                yield point
                distance = self.few.distance(point.behaviour)
                past = point.behaviour.probabilities["forget"] < wanted
                if past and distance > before:
                    break  # a larger α goes further still
                if alpha >= alphas[-1] and (past or not self.few.keeps(point.behaviour)):
                    break  # the grid was far enough, or as far as the floors allow
                before = distance

    def between(
        self, looked: Sequence[TriedScales], alphas: Sequence[float], betas: Sequence[float], trials: int
    ) -> Iterator[TriedScales]:
        """Yield the points that optuna suggests between the neighbours of the best ones, on all rows."""
        starts = sorted(looked, key=lambda point: point.rank)[:STARTS]
        ranges = {
            "forget": range_around([point.forget_scale for point in starts], alphas),
            "retain": range_around([point.retain_scale for point in starts], betas),
        }
        with quiet_study(self.seed, starts=len(starts)) as study:
            for point in starts:
                scales = {"forget": point.forget_scale, "retain": point.retain_scale}
                study.enqueue_trial(
                    {name: scales[name] for name, (low, high) in ranges.items() if low < high}
                )
            for _ in range(max(trials, len(starts))):
                trial = study.ask()
                alpha, beta = (suggested(trial, name, limits) for name, limits in ranges.items())
                point = self.tried(alpha, beta)
                tell(study, trial, point)
                yield point

    def around(self, centre: TriedScales, *, varied: tuple[bool, bool]) -> list[TriedScales]:
        """Return the points a step away from the centre, and from a better one found on the way."""
        found: list[TriedScales] = []
        for _ in range(ROUNDS):
            alpha, beta = centre.forget_scale, centre.retain_scale
            step = _step(alpha)
            places = [(round(alpha + sign * step, 2), beta) for sign in (-1, 1) if varied[0]]
            places += [(alpha, round(beta + sign * STEP, 2)) for sign in (-1, 1) if varied[1]]
            found += [self.tried(*place) for place in places if min(place) >= 0]
            better = best([centre, *found])
            if better is centre:
                break
            centre = better
        return found


def set_yardstick(inputs: Inputs, base: Logprobs, target: Logprobs) -> Yardstick:
    """Return the yardstick from what base and target make of the forget probes and of the unseen rows."""
    rows, unseen = inputs.rows, None
    if rows.unseen:
        unseen = Unseen(rows.unseen_source, base["unseen"], target["unseen"], _groups(rows.unseen))
    groups = _groups(rows.forget_probe)
    return estimate_yardstick(base["forget"], unseen, groups=groups, seed=inputs.recipe.seed)


def _groups(examples: Sequence[Example]) -> list[int]:
    """Return a number for each row; neighbours with one answer ask the same in other words and share it."""
    changes = [one.answer != other.answer for one, other in itertools.pairwise(examples)]
    return list(itertools.accumulate(changes, initial=0))


def _behaviour(found: Logprobs) -> Behaviour:
    return Behaviour(*(tuple(found.get(name, ())) for name in ("forget", "retain", "neutral")))


def _few(count: int) -> list[int]:
    """Return the places of the rows of the first look, evenly spread; all where that saves little."""
    some = max(FEWEST_ROWS, math.ceil(FIRST_LOOK * count))
    return list(range(count)) if some > count / 2 else [place * count // some for place in range(some)]


def _spelled(probes: Probes) -> bool:
    """Tell whether the tokenizer knows nearly all of the neutral text."""
    unknown = probes.tokenizer.unk_token_id
    ids = [token for row in probes.sets["neutral"] for token in row.ids]
    return unknown is None or ids.count(unknown) <= UNKNOWN_SHARE * len(ids)


def _upwards(alphas: Sequence[float]) -> list[float]:
    """Return the values of α in the order in which they are tried; a single one stands alone."""
    farther = [round(alphas[-1] * times, 2) for times in FARTHER] if len(alphas) > 1 else []
    return [*alphas, *farther]


def _step(alpha: float) -> float:
    """Return the closer look's step in α."""
    return max(STEP / 2, STEP * alpha)


Range = tuple[float, float]


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
