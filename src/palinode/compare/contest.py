"""The search for each contestant's best point: points drawn from its own values, tried, and one chosen.

All contestants have the same number; a first point has the first value of every key, which the recipe's
author sets to the method's default. What a point did on the probe rows is kept, and one is chosen by the rule
of `pipeline/goal.py`. Points that differ in their scales only share their vectors: the sums are tried in
memory. Everything is kept under the fingerprint of what decides it, so a stopped search goes on; models of
points that lost are removed as soon as their probes are kept and no later point needs them.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palinode.compare.comparison_recipe import CompareRecipe, Contestant, SearchBudget, rows_for
from palinode.data.examples import Example, fingerprint_examples
from palinode.errors import RecipeError
from palinode.methods import METHODS
from palinode.methods.method import read_refusals
from palinode.models.loading import pick_device, tokenizer_fingerprint
from palinode.pipeline.finetuning import FineTuning, Trained
from palinode.pipeline.goal import Behaviour, Goal, best
from palinode.pipeline.inputs import InputRows, Inputs, given_to
from palinode.pipeline.recipe import Recipe, build_recipe, laid_over
from palinode.pipeline.search import Probes
from palinode.pipeline.workspace import Step, Workspace
from palinode.progress import Listener
from palinode.weights import Checkpoint

USUAL_SCALES = {"scales.forget": 1.0, "scales.retain": 0.0}
"""Scales that are neither fixed nor searched: the paper's α, and forget-only."""


@dataclass(frozen=True, slots=True)
class MethodPoint:
    """One setting of a contestant's own hyper-parameters."""

    number: int
    settings: Mapping[str, Any]
    """The searched keys and their values here."""
    scales: tuple[float, float] | None
    """α and β; None where the method adds no vectors."""
    recipe: Mapping[str, Any]
    """What decides training: method, method_settings and training, but for epochs; and the β that decides
    whether there is a second vector."""

    @property
    def training(self) -> str:
        """Text that points have in common if they differ in their scales only."""
        return json.dumps(self.recipe, sort_keys=True)


def draw_points(contestant: Contestant, tries: int, *, seed: int) -> list[MethodPoint]:
    """Return `tries` different points, the first with the first values, the others drawn at random.

    Raises RecipeError where the search has fewer points.
    """
    keys = list(contestant.search)
    grid = list(itertools.product(*contestant.search.values()))
    if len(grid) < tries:
        raise RecipeError(
            f"{contestant.name} has {len(grid)} points to search and tries is {tries}; every "
            "contestant has the same number, so give it more values or lower tries"
        )
    drawn = np.random.default_rng([seed, *contestant.name.encode()]).permutation(len(grid) - 1) + 1
    points = []
    for number, place in enumerate([0, *sorted(drawn[: tries - 1].tolist())]):
        settings, scales = dict(zip(keys, grid[place], strict=True)), None
        every = {**contestant.set, **settings}
        own = {key: value for key, value in every.items() if key not in USUAL_SCALES}
        recipe: dict[str, Any] = laid_over({"method": contestant.method}, own)
        if METHODS[contestant.method].adds_vectors(recipe.get("transforms", ())):
            alpha, beta = (float(every.get(key, usual)) for key, usual in USUAL_SCALES.items())
            betas = contestant.search.get("scales.retain", [beta])
            recipe["scales"] = {"retain": float(max(betas))}  # 0: none of its points has a second vector
            scales = alpha, beta
        points.append(MethodPoint(number, settings, scales, recipe))
    return points


def recipe_of(
    content: Mapping[str, Any],
    point: MethodPoint,
    models: Mapping[str, str] | None = None,
    *,
    epochs: int = 1,
    seed: int,
) -> Recipe:
    """Return a run's recipe for a point, over the shared content; without models to look at its settings.

    Raises RecipeError where these cannot be.
    """
    built = {key: copy.deepcopy(value) for key, value in content.items() if key != "prepare"}
    built |= {"method": point.recipe["method"], "seed": seed}
    built["models"] = {**built["models"], **({"target": "."} if models is None else models)}
    built["method_settings"] = dict(point.recipe.get("method_settings", {}))
    training = laid_over(built.get("training", {}), point.recipe.get("training", {}))
    built["training"] = training | {"epochs": epochs}
    built |= {"transforms": point.recipe.get("transforms", []), "filter": "none"}
    if point.scales:
        built["scales"] = {**point.recipe["scales"], "forget": point.scales[0]}
    return build_recipe(built)


def steps_an_epoch(recipe: Recipe, rows: InputRows) -> list[int]:
    """Return the optimiser steps of one epoch, of each run that the method takes for one unlearned model."""
    method, training, data = METHODS[recipe.method], recipe.training, recipe.data
    refusals = read_refusals(data.refusals)
    settings = method.check_settings(recipe.method_settings)
    return [
        math.ceil(math.ceil(len(run.anchors) / training.batch_size) / training.accumulation)
        for run in method.runs(settings, given_to(recipe, rows, refusals))
    ]


def epochs_for(budget: SearchBudget, each: Sequence[int], name: str) -> int:
    """Return the epochs that a budget of steps buys, rounded down. Raises RecipeError for less than one.

    `each` are the steps of one epoch of each run.
    """
    assert budget.steps is not None
    models = len(each) if budget.share == "total" else 1
    epoch = sum(each) if budget.share == "total" else max(each)
    if budget.steps < epoch:
        raise RecipeError(
            f"a budget of {budget.steps} steps is less than one epoch of {name}, which takes {epoch}"
            f"{f' for {models} models' if models > 1 else ''}; raise budget.steps or training.batch_size"
        )
    return budget.steps // epoch


@dataclass(frozen=True, slots=True)
class Tried:
    """A point and what it did on the probe rows."""

    point: MethodPoint
    behaviour: Behaviour
    goal: Goal
    facts: Mapping[str, Any]
    """What its training cost."""

    @property
    def order(self) -> tuple[int]:
        """The one that was drawn first."""
        return (self.point.number,)


LEAST_SECONDS = 0.05
"""What an epoch is taken to last at least: half of what the record's seconds are rounded to."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What all contestants stand on."""

    recipe: CompareRecipe
    inputs: Inputs
    """Of the shared recipe, its target and retrained model made."""
    shares: InputRows
    """The rows divided: to train on, to choose on, to measure."""
    workspace: Workspace
    listener: Listener

    @property
    def target(self) -> Checkpoint:
        """θ_D."""
        assert self.inputs.target is not None
        return self.inputs.target

    @property
    def left_over(self) -> Sequence[Example]:
        """The rows like the retain rows that [prepare] left out, so that no model has seen them."""
        rows = self.inputs.rows
        return rows.unseen if rows.unseen_source == "prepared" else ()


@dataclass(frozen=True, slots=True)
class SearchPart:
    """The training that some points of a contestant share."""

    contestant: Contestant
    points: Sequence[MethodPoint]
    recipe: Recipe
    inputs: Inputs
    key: Mapping[str, Any]
    """Everything that decides what is trained."""
    steps: Sequence[str]
    """Keys of the fine-tuning steps."""

    def step(self, workspace: Workspace, name: str, **others: Any) -> Step:
        """Return a step that this training decides."""
        return workspace.step(name, part=dict(self.key), **others)


@dataclass
class ComparisonSearch:
    """Points of all contestants, tried one contestant after another."""

    ground: Ground
    goal: Goal
    pending: Counter[str] = field(default_factory=Counter)
    kept: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Step keys of the models of each contestant's best point so far."""

    def announce(self, parts: Sequence[SearchPart]) -> None:
        """Hear of parts that will come, so that what they share is kept until then."""
        for part in parts:
            self.pending.update(part.steps)

    def run(self, parts: Sequence[SearchPart]) -> list[Tried]:
        """Return what every point of a contestant did, in the order of their numbers."""
        tried: list[Tried] = []
        for part in parts:
            found, keys = self._try(part)
            tried += found
            self.pending.subtract(part.steps)
            if best(tried) not in found:
                self._remove(keys)
            else:
                former = self.kept.get(part.contestant.name, ())
                self.kept[part.contestant.name] = keys
                self._remove(former)
        return sorted(tried, key=lambda one: one.point.number)

    def _try(self, part: SearchPart) -> tuple[list[Tried], tuple[str, ...]]:
        """Return what the points of a part did, and the keys of the steps that made their models."""
        workspace = self.ground.workspace
        steps = [(point, part.step(workspace, "tried", scales=point.scales)) for point in part.points]
        missing = [(point, step) for point, step in steps if step.facts is None]
        if missing:
            made, cost = train_part(self.ground, part)
            folder = part.step(workspace, "probes")
            folder.begin()
            probes = Probes(part.inputs, self.ground.target, folder.folder / "probes.json")
            for point, step in missing:
                step.begin()
                if point.scales is None:
                    asked = probes.of_point("model", made.model)
                else:
                    alpha, beta = point.scales
                    taken = made.vectors.taken_off(probes.target, alpha, beta)
                    asked = probes.of_point(f"{alpha},{beta}", taken)
                step.finish({"logprobs": asked, **cost})
            folder.finish({})
        told = [(point, step.facts or {}) for point, step in steps]
        tried = [Tried(point, Behaviour.of(facts["logprobs"]), self.goal, facts) for point, facts in told]
        return tried, tuple(tried[0].facts["keys"])

    def finish(self, part: SearchPart) -> None:
        """Let go of the models of a chosen point, which has been measured."""
        self.pending.subtract(part.steps)
        cost = part.step(self.ground.workspace, "cost").facts
        keys = tuple(cost["keys"]) if cost else ()
        if self.kept.get(part.contestant.name) == keys:
            del self.kept[part.contestant.name]
        self._remove(keys)

    def _remove(self, keys: Sequence[str]) -> None:
        """Remove the models of these steps, but for those that another point has, or will."""
        needed = {key for kept in self.kept.values() for key in kept}
        gone = [key for key in keys if key not in needed and self.pending[key] <= 0]
        remove_models(self.ground.workspace, gone)


def plan_parts(
    ground: Ground, contestant: Contestant, points: Sequence[MethodPoint], seed: int
) -> list[SearchPart]:
    """Return a contestant's trainings, each with the points that share it: they differ in scales only."""
    groups: dict[str, list[MethodPoint]] = {}
    for point in points:
        groups.setdefault(point.training, []).append(point)
    return [part_of(ground, contestant, group, seed) for group in groups.values()]


def part_of(
    ground: Ground,
    contestant: Contestant,
    points: Sequence[MethodPoint],
    seed: int,
    *,
    epochs: int | None = None,
) -> SearchPart:
    """Return the training that these points share; its epochs follow from the budget unless given."""
    models = {name: str(model.folder) for name, model in ground.inputs.models.items() if name != "base"}
    content = ground.recipe.content
    epochs = epochs or _epochs(ground, contestant, points[0], recipe_of(content, points[0], seed=seed))
    recipe = recipe_of(content, points[0], models, epochs=epochs, seed=seed)
    rows = rows_for(recipe, ground.shares)
    inputs = replace(ground.inputs, recipe=recipe, rows=rows)
    key = {
        "method": recipe.method,
        "settings": recipe.method_settings,
        "second": bool(recipe.scales.retain),
        "training": recipe.training.key(),
        "transforms": recipe.transforms,
        "prompts": recipe.prompts.model_dump(),
        "output": [recipe.output.dtype, recipe.output.rounding],
        "seed": seed,
        "device": pick_device(recipe.device).type,
        "max_length": recipe.evaluation.max_length,
        "target": ground.target.fingerprint(),
        "base": inputs.earlier.fingerprint(),
        "tokenizer": tokenizer_fingerprint(ground.inputs.reader),
        "rows": {
            "forget": fingerprint_examples(rows.forget),
            "retain": fingerprint_examples(rows.retain),
            "sample": fingerprint_examples(rows.retain_sample),
            "forget probe": fingerprint_examples(rows.forget_probe),
            "retain probe": fingerprint_examples(rows.retain_probe),
        },
        "refusals": list(ground.inputs.refusals),
    }
    steps = FineTuning(inputs, ground.workspace, ground.listener).keys(ground.target)
    return SearchPart(contestant, points, recipe, inputs, key, list(steps.values()))


def train_part(ground: Ground, part: SearchPart) -> tuple[Trained, dict[str, Any]]:
    """Return the vectors or the model of a part, and what they cost; trained only if not there."""
    cost = part.step(ground.workspace, "cost")
    fine_tuning = FineTuning(part.inputs, ground.workspace, ground.listener)
    facts = cost.facts
    watched = watch_memory(fine_tuning.device) if facts is None else contextlib.nullcontext(lambda: None)
    with watched as peak:
        made = fine_tuning.train(ground.target)
        if made.filtered:
            made.filtered.made()  # what filtering takes belongs to the cost
        most = peak()
    if facts is None:
        cost.begin()
        training = {name: dict(run) for name, run in made.training.items() if run}
        for run in training.values():
            run.pop("seen_retain", None)
            run.pop("curve", None)
        units = ("steps", "tokens", "seconds")
        total = {unit: round(sum(run[unit] for run in training.values()), 1) for unit in units}
        facts = {"epochs": part.recipe.training.epochs, "training": training, **total}
        facts |= {"peak_bytes": most, "keys": [*made.steps.values()]}
        cost.finish(facts)
    return made, facts


def remove_models(workspace: Workspace, keys: Sequence[str]) -> None:
    """Remove the models of these fine-tuning steps; what the steps recorded stays."""
    for key in keys:
        for folder in workspace.folder.glob(f"finetune-*-{key[:12]}"):
            for place in ("model", "adapter"):
                shutil.rmtree(folder / place, ignore_errors=True)
        merged = workspace.step("merge", trained=key)  # what a low-rank run was merged to
        shutil.rmtree(merged.folder / "model", ignore_errors=True)


def _epochs(ground: Ground, contestant: Contestant, point: MethodPoint, recipe: Recipe) -> int:
    """Return the epochs that the budget buys; in seconds, by the time that a run of one epoch takes."""
    budget = ground.recipe.comparison.budget
    seconds = budget.seconds
    if seconds is None:
        return epochs_for(budget, steps_an_epoch(recipe, rows_for(recipe, ground.shares)), contestant.name)
    part = part_of(ground, contestant, [point], recipe.seed, epochs=1)
    facts = part.step(ground.workspace, "cost").facts
    if facts is None:
        _, facts = train_part(ground, part)
        remove_models(ground.workspace, facts["keys"])
    runs = [run["seconds"] for run in facts["training"].values()]
    took = sum(runs) if budget.share == "total" else max(runs)
    if took > seconds:
        raise RecipeError(
            f"a budget of {seconds:g} seconds is less than one epoch of {contestant.name}, which took "
            f"{took:.1f}; raise budget.seconds"
        )
    return int(seconds / max(took, LEAST_SECONDS))


@contextlib.contextmanager
def watch_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Give a function that returns the most memory held since entry, in bytes; None where it cannot be told.

    On a CUDA device it is the memory of tensors; on a processor the process's resident memory, weights read
    from mapped files included. Only Linux can forget a process's earlier peak.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device))
        return
    process = Path("/proc/self")
    try:
        (process / "clear_refs").write_text("5")  # resets VmHWM, proc(5)
    except OSError:
        yield lambda: None
        return

    def peak() -> int | None:
        found = re.search(r"^VmHWM:\s+(\d+)", (process / "status").read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else None

    yield peak
