"""Search the scales (α, β) that bring the target nearest to the yardstick at the least cost to the rest.

    1. a first look    the points of both grids, on some of the probe rows; for each β, α goes upwards until
                       the forget-set behaviour is past the yardstick and getting worse, beyond the grid if
                       its largest α does not get there and the floors still hold
    2. the search      optuna's Gaussian process between the best of them, on all probe rows
    3. a closer look   steps of a tenth around the best point: they may be better, and they tell how much
                       hangs on the exact scales

Where the filter of the forget vector is open, the first look goes over its μ as well. They are compared where
each forgets as much as the yardstick asks, and where that is good enough α is not searched for. Last, the
vector is filtered once more by what the layers read where the model arrives: held-back rows decide.

Or the grid is walked alone, on all probe rows. What is wanted is in `goal.py`. Each point is the weighted sum
put into the target's live copy in place: no model is written. What it did is kept on disk before anything is
decided, so that a killed search repeats its decisions from there and goes on. Groups are runs of layers of
about equal number, each with a factor on the common α; the embedding goes with the first one, the final norm
and the head with the last.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from palinode.data.examples import Example
from palinode.data.tokenize import TokenRow, tokenize
from palinode.data.world import neutral_examples
from palinode.evaluation.yardstick import UNFILTERED, Unseen, Yardstick, estimate_yardstick
from palinode.methods.method import Vectors
from palinode.models.inplace import LiveModel
from palinode.models.likelihoods import score_rows
from palinode.models.loading import load_reader, load_tokenizer, pad_token, pick_device
from palinode.pipeline.goal import (
    SETS,
    TOLERANCE,
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
from palinode.pipeline.transforming import Filtered, NothingLeftError, OpenFilter
from palinode.progress import Listener, record
from palinode.records import read_json, write_json
from palinode.weights import Checkpoint, Direction, Point
from palinode.weights.geometry import part_of
from palinode.weights.vectors import transform

Logprobs = Mapping[str, Sequence[float]]
"""Mean log-probability of each row's answer, by set of rows."""

FIRST_LOOK = 0.25
"""Share of the probe rows that the search's first look asks."""
FEWEST_ROWS = 16
"""Rows that the first look asks at least."""
STEP = 0.1
"""A step: in β, and in α relative to it."""
UNKNOWN_SHARE = 0.05
"""Share of unknown tokens above which neutral text is not asked for: the model knows another language."""


@dataclass(frozen=True, slots=True)
class ChosenScales:
    """The scales of a run and how they came about."""

    forget: float
    """The paper's α."""
    retain: float
    """The paper's β."""
    chosen_by: str
    """"given", "grid" or "auto"."""
    rule: str | None
    """The rule in words, with its numbers."""
    points: Sequence[Any]
    """Every point tried, as the record holds it."""
    kept_rule: bool = True
    """False when no point satisfied the rule and the nearest one was taken."""
    yardstick: Mapping[str, Any] | None = None
    """Where the choice wanted to go, as the record holds it."""
    front: Sequence[Any] = field(default_factory=list)
    """The points that no other one beats on both sides."""
    sensitivity: Sequence[Any] = field(default_factory=list)
    """What a step away from the chosen point changes."""
    groups: Sequence[Any] = field(default_factory=list)
    """Parts of the model and the factor on α that each has; empty where all have one α."""
    filter: Mapping[str, Any] | None = None
    """The filter that was chosen with them: μ, whether it reads where the model arrives, key of its step."""


Parts = Sequence[tuple[Point, Callable[[str], bool] | None]]
"""Sums, each with what says yes to the names of the tensors that it is put in; None: to all."""


class Probes:
    """What models make of the probe rows: mean log-probability of each answer, asked once and kept."""

    def __init__(self, inputs: Inputs, target: Checkpoint, path: Path) -> None:
        self.inputs = inputs
        self.target = target
        self.path = path
        self.known: dict[str, Any] = {}
        with suppress(FileNotFoundError, ValueError):  # nothing is kept yet, or it is damaged
            self.known = read_json(path)
        self.device = pick_device(inputs.recipe.device)
        self.live: LiveModel | None = None
        self.tokenizer = load_tokenizer(target)
        self.pad_id = pad_token(self.tokenizer)
        self.sets: dict[str, list[TokenRow]] = {}
        self.add("forget", inputs.rows.forget_probe)
        self.add("retain", inputs.rows.retain_probe)
        self.add("neutral", neutral_examples())
        unknown = self.tokenizer.unk_token_id
        ids = [token for row in self.sets["neutral"] for token in row.ids]
        if unknown is not None and ids.count(unknown) > UNKNOWN_SHARE * len(ids):
            del self.sets["neutral"]

    def add(self, name: str, examples: Sequence[Example]) -> None:
        """Add a set of rows that can be asked for; an empty one is left out."""
        recipe = self.inputs.recipe
        length, style = recipe.evaluation.max_length, recipe.prompts.style()
        if examples:
            self.sets[name] = tokenize(examples, self.tokenizer, max_length=length, style=style)

    def of_point(self, name: str, point: Point, sets: Sequence[str] = SETS) -> Logprobs:
        """Return the mean log-probabilities on the sets of those names that there are.

        Of a checkpoint, or of a sum put into the live model; `name` stands for it on disk.
        """
        if isinstance(point, Checkpoint):
            return self._asked(name, sets, lambda: self._loaded(point))
        return self.of_parts(name, lambda: [(point, None)], sets)

    def of_parts(self, name: str, parts: Callable[[], Parts], sets: Sequence[str] = SETS) -> Logprobs:
        """Return those of a model put together; `parts` is called where it was not asked before."""

        def filled() -> PreTrainedModel:
            output, seed = self.inputs.recipe.output, self.inputs.recipe.seed
            self.live = self.live or LiveModel(self._loaded(self.target, output.dtype))
            for point, only in parts():
                self.live.put(point, dtype=output.dtype, rounding=output.rounding, seed=seed, only=only)
            return self.live.model

        return self._asked(name, sets, filled)

    def _loaded(self, checkpoint: Checkpoint, written: str | None = None) -> PreTrainedModel:
        precision = self.inputs.recipe.evaluation.precision
        return load_reader(checkpoint, device=self.device, precision=precision, written=written)

    def _asked(self, name: str, sets: Sequence[str], model: Callable[[], PreTrainedModel]) -> Logprobs:
        wanted = [one for one in sets if one in self.sets]
        missing = [one for one in wanted if one not in self.known.get(name, {})]
        if missing:
            live, found = model(), dict[str, list[float]]()
            for one in missing:
                scored = score_rows(live, self.sets[one], pad_id=self.pad_id)
                found[one] = [math.fsum(row.logprobs) / len(row.logprobs) for row in scored]
            self.known[name] = {**self.known.get(name, {}), **found}
            write_json(self.path, self.known)
        return {one: self.known[name][one] for one in wanted}


# What is wanted


def open_goal(probes: Probes, yardstick: Yardstick | None = None) -> Goal:
    """Ask base and target, and return the goal on all probe rows.

    A `yardstick` that is given, such as a retrained model's, takes the place of the estimate; no base is
    asked then.
    """
    inputs, rows = probes.inputs, probes.inputs.rows
    probes.add("unseen", rows.unseen)
    before = probes.of_point("target", probes.target, [*SETS, "unseen"])
    if yardstick is None:
        base, unseen = probes.of_point("base", inputs.earlier, ["forget", "unseen"]), None
        if rows.unseen:
            unseen = Unseen(rows.unseen_source, base["unseen"], before["unseen"], _groups(rows.unseen))
        groups, seed = _groups(rows.forget_probe), inputs.recipe.seed
        yardstick = estimate_yardstick(base["forget"], unseen, groups=groups, seed=seed)
    scales = inputs.recipe.scales
    return Goal(yardstick, Behaviour.of(before), scales.retain_share, aim_share=scales.aim_share)


def own_yardstick(inputs: Inputs, target: Checkpoint, unfiltered: Point, folder: Path) -> Yardstick:
    """Return what a model does on the forget probes as the yardstick: as much forgetting as before."""
    probes = Probes(inputs, target, folder / "probes.json")
    found = probes.of_point(UNFILTERED, unfiltered, ["forget"])["forget"]
    groups, seed = _groups(inputs.rows.forget_probe), inputs.recipe.seed
    return replace(estimate_yardstick(found, groups=groups, seed=seed), source=UNFILTERED)


def _groups(examples: Sequence[Example]) -> list[int]:
    """Return a number for each row; neighbours with one answer ask the same in other words and share it."""
    changes = [one.answer != other.answer for one, other in itertools.pairwise(examples)]
    return list(itertools.accumulate(changes, initial=0))


class Trials:
    """Pairs of scales tried on a live model, and judged on all probe rows or on some."""

    def __init__(
        self, probes: Probes, vectors: Vectors, listener: Listener, yardstick: Yardstick | None = None
    ) -> None:
        self.probes = probes
        self.vectors = vectors
        self.filtered: Filtered | None = None
        """The vector in use, as a filter leaves it."""
        self.listener = listener
        self.goal = open_goal(probes, yardstick)
        self.numbers = itertools.count(1)
        asked = [name for name in ("forget", "retain") if name in probes.sets]
        places = {str(name): _few(len(probes.sets[name])) for name in asked}
        for name, few in places.items():
            probes.sets[f"{name}, some"] = [probes.sets[name][place] for place in few]
        before: Logprobs = {"forget": self.goal.target.forget, "retain": self.goal.target.retain}
        part = {name: [before[name][place] for place in few] for name, few in places.items()}
        self.few = replace(self.goal, target=Behaviour.of(part), rows=tuple(places["forget"]))

    @property
    def _prefix(self) -> str:
        return "" if self.filtered is None else f"{self.filtered.key[:12]} "

    def tried(self, alpha: float, beta: float, *, whole: bool = True) -> TriedScales:
        """Return what the model does at (α, β), on all probe rows or on the few of the first look."""
        name, sets = f"{self._prefix}{alpha},{beta}", SETS if whole else ("forget, some", "retain, some")
        asked = self.probes.of_parts(name, lambda: [(self._point(alpha, beta), None)], sets)
        found = Behaviour.of({name.removesuffix(", some"): rows for name, rows in asked.items()})
        label = self.filtered.label if self.filtered else None
        tried = TriedScales(alpha, beta, found, self.goal if whole else self.few, filter=label)
        figures = {"forget_scale": alpha, "retain_scale": beta, **tried.behaviour.probabilities}
        figures["objective"] = tried.goal.objective(tried.behaviour)
        record(self.listener, "scales", next(self.numbers), figures)
        return tried

    def with_factors(
        self, centre: TriedScales, parts: Sequence[Sequence[str]], factors: tuple[float, ...]
    ) -> TriedScales:
        """Return what the model does where each group of parts has its factor on α."""
        alpha, beta = centre.forget_scale, centre.retain_scale
        name = f"{self._prefix}{alpha},{beta},{','.join(map(str, factors))}"
        each = [(factor, belongs_to(part)) for part, factor in zip(parts, factors, strict=True)]
        found = self.probes.of_parts(
            name, lambda: [(self._point(alpha * factor, beta), only) for factor, only in each]
        )
        own = () if set(factors) == {1.0} else factors
        return TriedScales(alpha, beta, Behaviour.of(found), self.goal, own, centre.filter)

    def _point(self, alpha: float, beta: float) -> Point:
        vectors = self.vectors
        if self.filtered is not None:
            vectors = replace(vectors, forget=self.filtered.direction)
        return vectors.taken_off(self.probes.target, alpha, beta)


def _few(count: int) -> list[int]:
    """Return the places of the rows of the first look, evenly spread; all where that saves little."""
    some = max(FEWEST_ROWS, math.ceil(FIRST_LOOK * count))
    return list(range(count)) if some > count / 2 else [place * count // some for place in range(some)]


def conclude(
    chosen_by: str,
    glanced: Sequence[TriedScales],
    whole: Sequence[TriedScales],
    listener: Listener,
    *,
    parts: Sequence[Sequence[str]] = (),
    filtered: Filtered | None = None,
) -> ChosenScales:
    """Return the choice among the points tried on all probe rows, and say what it does not reach."""
    whole = list({point.order: point for point in whole}.values())
    chosen = best(whole)
    said = warning(chosen.goal, chosen)
    if said is not None:
        listener.say(said)
    return ChosenScales(
        forget=chosen.forget_scale,
        retain=chosen.retain_scale,
        chosen_by=chosen_by,
        rule=str(chosen.goal),
        points=as_record([*glanced, *whole], chosen),
        kept_rule=said is None,
        yardstick={**chosen.goal.yardstick.as_record(), "warning": said},
        front=as_record(front(whole), chosen),
        sensitivity=sensitivity(chosen, neighbours(chosen, whole)),
        groups=[
            {"parts": part, "factor": factor}
            for part, factor in zip(parts, chosen.groups, strict=False)  # none where all have one α
        ],
        filter=filtered.as_record() if filtered else None,
    )


def neighbours(chosen: TriedScales, points: Sequence[TriedScales]) -> list[TriedScales]:
    """Return the other points within about a step of the chosen one."""
    reach = 1.5 * step_of(chosen.forget_scale), 1.5 * STEP
    near = {
        (point.forget_scale, point.retain_scale): point
        for point in points
        if not point.groups
        and point.filter == chosen.filter
        and abs(point.forget_scale - chosen.forget_scale) <= reach[0]
        and abs(point.retain_scale - chosen.retain_scale) <= reach[1]
    }
    near.pop((chosen.forget_scale, chosen.retain_scale), None)
    return [near[scales] for scales in sorted(near)]


def step_of(alpha: float) -> float:
    """Return a step in α; scales have two decimals."""
    return max(0.01, STEP * alpha)


# Groups of layers


def layer_groups(model: Checkpoint, count: int) -> list[list[str]]:
    """Return the parts of a model in so many groups; fewer where it has fewer layers."""
    parts = {part_of(name) for name in model.tensors}
    layers = sorted((part for part in parts if part.startswith("layer ")), key=lambda part: int(part[6:]))
    groups = [list(map(str, group)) for group in np.array_split(layers, min(count, len(layers)) or 1)]
    groups[0] = [*sorted(parts & {"embedding"}), *groups[0]]
    groups[-1] = [*groups[-1], *sorted(parts - {"embedding"} - set(layers))]
    return groups


def belongs_to(parts: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a tensor is in one of the parts."""
    wanted = frozenset(parts)
    return lambda name: part_of(name) in wanted


def scaled_vector(vector: Direction, groups: Sequence[Mapping[str, Any]], folder: Path) -> Direction:
    """Store the vector with each group's factor on its tensors, and return it."""
    factors = {part: float(group["factor"]) for group in groups for part in group["parts"]}

    def rule(name: str, values: Sequence[np.ndarray]) -> np.ndarray:
        scaled: np.ndarray = (values[0] * factors[part_of(name)]).astype(values[0].dtype)
        return scaled

    return transform([vector], rule, folder, label=f"layer groups {sorted(factors.items())}")


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
"""Points by which filters are compared: one told from the first look, and one corrected."""
FARTHEST = 3.0
"""How many times the largest α that was tried an α may be that is told from it."""

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
        others: list[TriedScales] = []
        looked = of_next(
            trials, filters, lambda: counted(walk_grid(trials.few, glance, alphas, betas, beyond))
        )
        alphas = sorted({*alphas, *(point.forget_scale for point in looked)})
        if filters is not None:
            glances, others = compared(trials, filters, looked, alphas)
            looked += glances
            advance(len(glances))
        label = trials.filtered.label if trials.filtered else None
        near = [point for point in (*others, *looked) if point.filter == label]
        varied = (len(alphas) > 1, len(betas) > 1)
        whole = [point for point in others if point.filter == label]
        if not whole or len(betas) > 1 or not good_enough(whole, near):
            whole += counted(between(trials, near, alphas, betas, scales.trials, inputs.recipe.seed))
        whole += around(trials, best(whole), varied=varied)
        if filters is not None and filters.arrives != "never":
            there = where_it_arrives(trials, filters, best(whole), varied)
            others += [] if filters.arrives == "where better" else whole
            whole = there if filters.arrives == "always" else [*whole, *there]
            trials.filtered = filters.of(best(whole))
        parts = layer_groups(target, scales.groups)
        if len(parts) > 1:
            whole += grouped(trials, best(whole), parts, scales.trials, inputs.recipe.seed)
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


def of_next(
    trials: Trials, filters: OpenFilter | None, walk: Callable[[], Iterator[TriedScales]]
) -> list[TriedScales]:
    """Return a walk with the vector of the next μ in use, one that leaves something; none at the end of them.

    Raises NothingLeftError where none at all leaves anything.
    """
    if filters is None:
        return list(walk())
    while filters.untried:
        trials.filtered = filters.at(filters.untried.pop(0))
        try:
            return list(walk())
        except NothingLeftError:
            if not (filters.drop(trials.filtered) or filters.untried):
                raise
    return []


def compared(
    trials: Trials, filters: OpenFilter, looked: Sequence[TriedScales], alphas: Sequence[float]
) -> tuple[list[TriedScales], list[TriedScales]]:
    """Return first looks at the vector of each other μ, and points of all where they come to the yardstick.

    `looked` are first looks at the usual one. The better one of two is in use from then on, and the other is
    removed, as large as a model as it is.
    """
    usual = min(looked, key=lambda point: point.rank)
    low, high = range_around([usual.forget_scale], alphas)
    near = [alpha for alpha in alphas if low <= alpha <= usual.forget_scale]
    beyond = [alpha for alpha in alphas if usual.forget_scale < alpha <= high]
    glance = partial(trials.tried, whole=False)
    glances: list[TriedScales] = []
    at_its_aim = partial(at_the_aim, trials, varied=len(alphas) > 1)
    found = at_its_aim(looked)
    better = best(found)
    walk = partial(walk_grid, trials.few, glance, near, [usual.retain_scale], beyond)
    while own := of_next(trials, filters, walk):
        glances += own
        found += (new := at_its_aim(own))
        better = best([better, *new])
        filters.tidy(filters.of(better).key)
    trials.filtered = filters.of(better)
    return glances, found


def at_the_aim(trials: Trials, looked: Sequence[TriedScales], *, varied: bool) -> list[TriedScales]:
    """Return points on all rows where the vector in use forgets about as much as the yardstick.

    `looked` are first looks at that vector; the nearest one's α is left as it is unless it is `varied`.
    """
    start = min(looked, key=lambda point: point.rank)
    beta, found = start.retain_scale, list[TriedScales]()
    beside = [point for point in looked if point.retain_scale == beta]
    for _ in range(AIMS if varied else 1):
        alpha = towards_the_aim([*beside, *found]) if varied else start.forget_scale
        found.append(trials.tried(alpha, beta))
    return found


def towards_the_aim(points: Sequence[TriedScales]) -> float:
    """Return the α that forgets as much as the yardstick, told from points of one vector.

    The logarithm of the forget probability falls from the target's on, about in proportion to α: it is
    interpolated between points, and beyond the last one the line from the target goes on.
    """

    def below_target(probability: float, goal: Goal) -> float:
        before = max(1e-12, goal.target.probabilities["forget"])
        return math.log(before / max(1e-12, probability))

    wanted = below_target(points[-1].goal.aim, points[-1].goal)
    fallen = {0.0: 0.0}
    for point in points:  # a later one, on all rows, counts for an earlier one
        fallen[point.forget_scale] = below_target(point.behaviour.probabilities["forget"], point.goal)
    for low, high in itertools.pairwise(sorted(fallen)):
        if fallen[low] < wanted <= fallen[high]:
            share = (wanted - fallen[low]) / (fallen[high] - fallen[low])
            return round(low + share * (high - low), 2)
    last = max(fallen)
    return round(last * min(FARTHEST, wanted / max(fallen[last], 1e-12)), 2) if wanted > 0 else 0.0


def good_enough(found: Sequence[TriedScales], looked: Sequence[TriedScales]) -> bool:
    """Tell whether the best of the points found at the aim does all that is wanted of one.

    It forgets as far as chance can tell, keeps the floors, and nothing looked at promises to be better.
    """
    chosen = best(found)
    least = min(point.goal.objective(point.behaviour) for point in looked)
    does = chosen.goal.forgets(chosen.behaviour) and chosen.goal.keeps(chosen.behaviour)
    return does and chosen.goal.objective(chosen.behaviour) <= least + TOLERANCE


def where_it_arrives(
    trials: Trials, filters: OpenFilter, centre: TriedScales, varied: tuple[bool, bool]
) -> list[TriedScales]:
    """Return the points near the centre for the vector filtered by what the layers read there."""
    assert trials.filtered is not None
    alpha, beta = centre.forget_scale, centre.retain_scale
    trials.filtered = filters.arrived(trials.filtered, alpha, beta, trials.vectors.retain)
    try:
        found = [trials.tried(alpha, beta)]
    except NothingLeftError:
        if filters.arrives == "always":
            raise
        return []
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
    different = {(point.forget_scale, point.retain_scale): point for point in reversed(looked)}
    best_first = sorted(different.values(), key=lambda point: point.rank)
    starts = [(point.forget_scale, point.retain_scale) for point in best_first[:STARTS]]
    ranges = {
        "forget": range_around([alpha for alpha, _ in starts], alphas),
        "retain": range_around([beta for _, beta in starts], betas),
    }
    return suggested(trials.tried, ranges, starts, count, seed)


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
) -> Iterator[TriedScales]:
    """Yield points at the centre's (α, β) where optuna gives each group of layers its own factor."""
    ranges, starts = {str(group): FACTORS for group in range(len(parts))}, [[1.0] * len(parts)]
    return suggested(
        lambda *factors: trials.with_factors(centre, parts, factors), ranges, starts, count, seed
    )


def range_around(values: Sequence[float], grid: Sequence[float]) -> Range:
    """Return the range from the neighbour below the least value to the one above the largest."""
    if len(grid) == 1:
        return grid[0], grid[0]
    below = max((other for other in grid if other < min(values)), default=0.0)
    above = min((other for other in grid if other > max(values)), default=max(values))
    return below, above


def suggested(
    tried: Callable[..., TriedScales],
    ranges: Mapping[str, Range],
    starts: Sequence[Sequence[float]],
    count: int,
    seed: int,
) -> Iterator[TriedScales]:
    """Yield the points that are tried, at the starts first, then where optuna suggests, with two decimals.

    Its study is in memory, seeded and quiet; it hears what each point is worth, and which floors that misses.
    """
    import optuna

    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # exact objectives are new
            sampler = optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=len(starts), deterministic_objective=True
            )
        study = optuna.create_study(direction="minimize", sampler=sampler)
        open_to = {name for name, (low, high) in ranges.items() if low < high}
        for start in starts:
            study.enqueue_trial({name: it for name, it in zip(ranges, start, strict=True) if name in open_to})
        for _ in range(max(count, len(starts))):
            trial, values = study.ask(), list[float]()
            for name, (low, high) in ranges.items():
                try:
                    with np.errstate(invalid="ignore"):  # it divides by the sum of its hopes, which may be 0
                        values.append(
                            round(trial.suggest_float(name, low, high), 2) if name in open_to else low
                        )
                except ValueError:  # no place promises anything: all that was tried misses a floor by far
                    return
            point = tried(*values)
            for name, shortfall in point.goal.shortfalls(point.behaviour).items():
                trial.set_constraint(name, shortfall)
            study.tell(trial, point.goal.objective(point.behaviour))
            yield point
    finally:
        optuna.logging.set_verbosity(loud)
