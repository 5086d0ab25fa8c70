"""Points of a contestant's search: the same number for all, drawn from its own values with a seed.

The first point has the first value of every key, which the recipe's author sets to the method's default.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palinode.compare.recipe import Contestant, SearchBudget
from palinode.errors import RecipeError
from palinode.methods import METHODS
from palinode.methods.paired import PairedSettings
from palinode.pipeline.recipe import Recipe, build_recipe

SCALES = ("scales.forget", "scales.retain")
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
    chosen = [0, *sorted(drawn[: tries - 1].tolist())]
    return [
        _point(contestant, number, dict(zip(keys, grid[place], strict=True)))
        for number, place in enumerate(chosen)
    ]


def _point(contestant: Contestant, number: int, settings: Mapping[str, Any]) -> MethodPoint:
    every = {**contestant.set, **settings}
    recipe: dict[str, Any] = {"method": contestant.method}
    for key, value in every.items():
        if key not in SCALES:
            *path, last = key.split(".")
            place = recipe
            for name in path:
                place = place.setdefault(name, {})
            place[last] = value
    if METHODS[contestant.method].kind != "arithmetic":
        return MethodPoint(number, settings, None, recipe)
    alpha, beta = (float(every.get(key, USUAL_SCALES[key])) for key in SCALES)
    betas = contestant.search.get("scales.retain", [beta])
    recipe["scales"] = {"retain": float(max(betas))}  # 0: no second vector is made for any of its points
    return MethodPoint(number, settings, (alpha, beta), recipe)


def recipe_of(
    content: Mapping[str, Any],
    point: MethodPoint,
    models: Mapping[str, str],
    *,
    epochs: int,
    seed: int,
    final: bool = False,
) -> Recipe:
    """Return a run's recipe for a point, over the shared content; `final` sets its scales.

    Raises RecipeError where the point's settings cannot be.
    """
    built = {key: copy.deepcopy(value) for key, value in content.items() if key != "prepare"}
    built |= {"method": point.recipe["method"], "seed": seed}
    built["models"] = {**built["models"], **models}
    built["method_settings"] = dict(point.recipe.get("method_settings", {}))
    built["training"] = _over(built.get("training", {}), point.recipe.get("training", {})) | {
        "epochs": epochs
    }
    built["transforms"] = point.recipe.get("transforms", [])
    if point.scales:
        alpha, beta = point.scales
        second = bool(point.recipe["scales"]["retain"])
        own = {"forget": alpha, "retain": beta}
        built["scales"] = own if final and second else {**point.recipe["scales"], "forget": alpha}
    return build_recipe(built)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with others laid over them, section by section."""
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _over(found[key], value) if both else value
    return found


def models_trained(recipe: Recipe) -> int:
    """Return how many models a method trains for one unlearned model."""
    settings = METHODS[recipe.method].check_settings(recipe.method_settings)
    if isinstance(settings, PairedSettings):
        return 1 if settings.retain_free else 2
    if recipe.method == "whp":
        return 2
    return 2 if METHODS[recipe.method].kind == "arithmetic" and recipe.scales.retain else 1


def steps_an_epoch(recipe: Recipe, forget: int, retain: int) -> int:
    """Return the optimiser steps of one epoch, for so many forget rows and retain rows to train on."""
    settings = METHODS[recipe.method].check_settings(recipe.method_settings)
    rows = retain if getattr(settings, "epoch", "forget") == "retain" else forget
    training = recipe.training
    return math.ceil(math.ceil(rows / training.batch_size) / training.accumulation)


def epochs_for(budget: SearchBudget, recipe: Recipe, *, forget: int, retain: int, name: str) -> int:
    """Return the epochs that a budget of steps buys, rounded down. Raises RecipeError for less than one."""
    assert budget.steps is not None
    models = models_trained(recipe) if budget.share == "total" else 1
    epoch = models * steps_an_epoch(recipe, forget, retain)
    if budget.steps < epoch:
        raise RecipeError(
            f"a budget of {budget.steps} steps is less than one epoch of {name}, which takes {epoch}"
            f"{f' for {models} models' if models > 1 else ''}; raise budget.steps or training.batch_size"
        )
    return budget.steps // epoch


def by_training(points: Sequence[MethodPoint]) -> list[list[MethodPoint]]:
    """Return points in groups that share their training."""
    groups: dict[str, list[MethodPoint]] = {}
    for point in points:
        groups.setdefault(point.training, []).append(point)
    return list(groups.values())
