"""Try pairs of scales on a live model and pick one; every probe is kept, so a killed search goes on.

Each point is the weighted sum put into the target's live copy in place: no model is written.

An α of its own for each group of layers: factors on the common one, tried in memory and stored once.

Groups are runs of layers of about equal number; the embedding goes with the first one, the final norm and the
head with the last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from palinode.data.examples import Example
from palinode.data.tokenize import TokenRow, tokenize
from palinode.methods import unlearned_point
from palinode.models.inplace import put
from palinode.models.likelihoods import score_rows
from palinode.models.loading import load_model, load_tokenizer, pad_token, pick_device
from palinode.pipeline.grid import Probe, Rule, as_record, choose, nearest, walk_grid
from palinode.pipeline.inputs import Inputs
from palinode.progress import Listener, record
from palinode.records import read_json, write_json
from palinode.weights import Checkpoint, Direction, Point
from palinode.weights.geometry import part_of
from palinode.weights.vectors import transform

Logprobs = Mapping[str, Sequence[float]]
"""Mean log-probability of each row's answer, by set of rows."""

PROBE_SETS = ("forget", "retain")


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
    """Where the search wanted to go, as the record holds it; None of a grid."""
    front: Sequence[Any] = field(default_factory=list)
    """The points that no other one beats on both sides."""
    sensitivity: Sequence[Any] = field(default_factory=list)
    """What a step away from the chosen point changes."""
    groups: Sequence[Any] = field(default_factory=list)
    """Parts of the model and the factor on α that each has; empty where all have one α."""


def choose_scales(
    inputs: Inputs,
    target: Checkpoint,
    forget: Direction,
    retain: Direction | None,
    grid: tuple[Sequence[float], Sequence[float]],
    folder: Path,
    listener: Listener,
) -> ChosenScales:
    """Walk the grid of (α, β) and return the point that the rule of `search.py` picks.

    `folder` keeps the probes already made.
    """
    alphas, betas = grid
    probes = Probes(inputs, target, folder / "probes.json")
    with listener.task("trying scales", 2 + len(alphas) * len(betas), "points") as advance:
        base, before = probes.of_checkpoint("base", inputs.earlier), probes.of_checkpoint("target", target)
        advance(2)

        numbers = itertools.count(1)

        def probe(alpha: float, beta: float) -> Probe:
            found = probes.of_scales(alpha, beta, forget, retain)
            advance(1)
            record(listener, "scales", next(numbers), figures_of(alpha, beta, found))
            return found

        rule = Rule(base.forget, before.retain, inputs.recipe.scales.retain_share)
        points = list(walk_grid(alphas, betas, probe, rule))
    picked = choose(points, rule)
    chosen = picked or nearest(points, rule)
    return ChosenScales(
        forget=chosen.forget_scale,
        retain=chosen.retain_scale,
        chosen_by="grid",
        rule=str(rule),
        points=as_record(points, rule, chosen),
        kept_rule=picked is not None,
    )


def figures_of(alpha: float, beta: float, found: Probe) -> dict[str, float]:
    """Return a point that was tried as figures for a curve."""
    scales = {"forget_scale": alpha, "retain_scale": beta}
    return scales | {name: value for name, value in asdict(found).items() if value is not None}


class Probes:
    """What models make of the probe rows: mean log-probability of each answer, asked once and kept."""

    def __init__(self, inputs: Inputs, target: Checkpoint, path: Path) -> None:
        self.inputs = inputs
        self.target = target
        self.path = path
        self.known: dict[str, Any] = read_json(path) if path.exists() else {}
        self.device = pick_device(inputs.recipe.device)
        self.live: PreTrainedModel | None = None
        self.tokenizer = load_tokenizer(target)
        self.pad_id = pad_token(self.tokenizer)
        self.sets: dict[str, list[TokenRow]] = {}
        self.add("forget", inputs.rows.forget_probe)
        self.add("retain", inputs.rows.retain_probe)

    def add(self, name: str, examples: Sequence[Example]) -> None:
        """Add a set of rows that can be asked for; an empty one is left out."""
        recipe = self.inputs.recipe
        length, style = recipe.evaluation.max_length, recipe.prompts.style()
        if examples:
            self.sets[name] = tokenize(examples, self.tokenizer, max_length=length, style=style)

    def of_checkpoint(self, name: str, checkpoint: Checkpoint) -> Probe:
        """Return the probe of a checkpoint as it is."""
        return _probe(self.logprobs_of_checkpoint(name, checkpoint, PROBE_SETS))

    def of_point(self, name: str, point: Point) -> Probe:
        """Return the probe of a checkpoint as it is, or of a sum put into the live model in place."""
        if isinstance(point, Checkpoint):
            return self.of_checkpoint(name, point)
        return _probe(self.logprobs_of_point(name, point, PROBE_SETS))

    def of_scales(self, alpha: float, beta: float, forget: Direction, retain: Direction | None) -> Probe:
        """Return the probe of the weighted sum at (α, β), put into the live model in place."""
        point = unlearned_point(self.target, forget, retain, forget_scale=alpha, retain_scale=beta)
        return self.of_point(f"{alpha},{beta}", point)

    def logprobs_of_checkpoint(self, name: str, checkpoint: Checkpoint, sets: Sequence[str]) -> Logprobs:
        """Return the mean log-probabilities of a checkpoint on the sets of those names that there are."""
        return self._asked(name, sets, lambda: load_model(checkpoint, device=self.device))

    def logprobs_of_point(self, name: str, point: Point, sets: Sequence[str]) -> Logprobs:
        """Return those of a weighted sum, put into the live model in place; `name` stands for it on disk."""

        return self.logprobs_of_parts(name, [(point, None)], sets)

    def logprobs_of_parts(
        self,
        name: str,
        parts: Sequence[tuple[Point, Callable[[str], bool] | None]],
        sets: Sequence[str],
    ) -> Logprobs:
        """Return those of a model put together: each sum where its function says yes to a tensor's name."""

        def filled() -> PreTrainedModel:
            self.live = self.live or load_model(self.target, device=self.device)
            output, seed = self.inputs.recipe.output, self.inputs.recipe.seed
            for point, only in parts:
                put(point, self.live, dtype=output.dtype, rounding=output.rounding, seed=seed, only=only)
            return self.live

        return self._asked(name, sets, filled)

    def _asked(self, name: str, sets: Sequence[str], model: Callable[[], PreTrainedModel]) -> Logprobs:
        wanted = [one for one in sets if one in self.sets]
        missing = [one for one in wanted if one not in self.known.get(name, {})]
        if missing:
            live = model()
            found = {one: self._mean_logprobs(live, self.sets[one]) for one in missing}
            self.known[name] = {**self.known.get(name, {}), **found}
            write_json(self.path, self.known)
        return {one: self.known[name][one] for one in wanted}

    def _mean_logprobs(self, model: PreTrainedModel, rows: Sequence[TokenRow]) -> list[float]:
        scored = score_rows(model, rows, pad_id=self.pad_id)
        return [math.fsum(row.logprobs) / len(row.logprobs) for row in scored]


def _probe(logprobs: Logprobs) -> Probe:
    retain = logprobs.get("retain")
    return Probe(mean_probability(logprobs["forget"]), mean_probability(retain) if retain else None)


def mean_probability(logprobs: Sequence[float]) -> float:
    """Return the mean over rows of exp(mean log-probability of the answer's tokens)."""
    return math.fsum(map(math.exp, logprobs)) / len(logprobs)


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
