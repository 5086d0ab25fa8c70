"""What a recipe with requests will do, checked and counted before anything is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palinode.compare.plan import world_examples
from palinode.compare.points import (
    MethodPoint,
    draw_points,
    epochs_for,
    models_trained,
    recipe_of,
    steps_an_epoch,
)
from palinode.compare.recipe import CompareRecipe, Requests, SearchBudget
from palinode.compare.request_rows import Requested, divide_requests, names_in, read_names
from palinode.compare.rows import Shares
from palinode.compare.run import check_folder, divide_comparison
from palinode.compare.world import world_of
from palinode.data.examples import Example
from palinode.data.sources import Row
from palinode.errors import RecipeError
from palinode.methods import METHODS
from palinode.methods.method import start_from_target
from palinode.pipeline.inputs import open_inputs

FILES = ("requests.json", "requests.md", "requests.svg")
"""What the folder holds: table, report, picture."""


def check_contestants(recipe: CompareRecipe) -> dict[str, MethodPoint]:
    """Return each contestant's one point, its settings checked. Raises RecipeError."""
    comparison, points = recipe.comparison, {}
    for contestant in comparison.contestants:
        method, point = METHODS[contestant.method], draw_points(contestant, 1, seed=comparison.seed)[0]
        made = recipe_of(recipe.content, point, {"target": "."}, epochs=1, seed=comparison.seeds[0])
        from_base = method.start is not start_from_target
        if method.kind == "training" and (from_base or method.check_settings(made.method_settings).from_base):
            raise RecipeError(
                f"{contestant.name} starts from the base every time ({method.name}), so that no request can "
                "go on from the one before; leave it out"
            )
        points[contestant.name] = point
    return points


def settings_of(recipe: CompareRecipe) -> Requests:
    """Return the recipe's section [requests], which it was found to have."""
    assert recipe.comparison.requests is not None
    return recipe.comparison.requests


@dataclass(frozen=True, slots=True)
class Spending:
    """What the budget buys a contestant."""

    models: int
    """Trained for one request."""
    epochs: Sequence[int]
    """Of each request."""
    steps: Sequence[int]
    joint_epochs: int
    """Of one training on all rows, with the budget of all requests."""
    joint_steps: int


def spending_of(
    recipe: CompareRecipe, point: MethodPoint, name: str, asked: Requested, shares: Shares
) -> Spending:
    """Return what a contestant spends on each request, and on all at once."""
    comparison = recipe.comparison
    first = recipe_of(recipe.content, point, {"target": "."}, epochs=1, seed=comparison.seeds[0])
    assert comparison.budget.steps is not None
    models, retain = models_trained(first), len(shares.retain_train)
    sizes = [len(request.rows) for request in asked.requests]
    whole = comparison.budget.model_copy(update={"steps": comparison.budget.steps * len(sizes)})

    def bought(budget: SearchBudget, rows: int) -> tuple[int, int]:
        epochs = epochs_for(budget, first, forget=rows, retain=retain, name=name)
        return epochs, epochs * models * steps_an_epoch(first, rows, retain)

    found = [bought(comparison.budget, size) for size in sizes]
    joint = bought(whole, sum(sizes))
    epochs, steps = zip(*found, strict=True)
    return Spending(models, epochs, steps, *joint)


def plan_requests(recipe: CompareRecipe) -> dict[str, Any]:
    """Check a recipe with requests and return what it would do, as plain values; nothing is written.

    Raises an InputError for anything the user can mend.
    """
    points = check_contestants(recipe)
    output = Path(recipe.shared.output.folder)
    check_folder(output, FILES)
    forget, retain, names = _rows(recipe)
    asked = divide_requests(settings_of(recipe), forget, names)
    shares = divide_comparison(recipe, forget, retain)
    contestants = []
    for contestant in recipe.comparison.contestants:
        spent = spending_of(recipe, points[contestant.name], contestant.name, asked, shares)
        contestants.append(
            {
                "name": contestant.name,
                "method": contestant.method,
                "models": spent.models,
                "trainings": spent.models * (len(asked.requests) + 1),
                "steps": sum(spent.steps) + spent.joint_steps,
                "undone": METHODS[contestant.method].kind == "arithmetic",
            }
        )
    return {
        "requests": [len(request.rows) for request in asked.requests],
        "undo_order": list(asked.undo_order),
        "contestants": contestants,
        "rows": {
            "others": len(asked.others),
            "retain_train": len(shares.retain_train),
            "retain_test": len(shares.retain_test),
        },
        "output": str(output),
        "workspace": str(recipe.workspace),
    }


def describe_requests(planned: Mapping[str, Any]) -> list[str]:
    """Return a plan in words, one line a contestant."""
    sizes, rows = planned["requests"], planned["rows"]
    each = f"{sizes[0]} rows each" if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)} rows each"
    lines = [
        f"{len(sizes)} requests of {each}, undone in the order {', '.join(map(str, planned['undo_order']))}",
        f"{rows['others']} forget rows that nobody asks to erase, {rows['retain_train']} retain rows to "
        f"train on, {rows['retain_test']} measured",
    ]
    for entry in planned["contestants"]:
        trainings = f"{entry['trainings']} trainings, {entry['models']} a request and for all rows at once"
        undone = "each undone" if entry["undone"] else "cannot undo"
        lines.append(f"{entry['name']} ({entry['method']}): {trainings}; {entry['steps']} steps; {undone}")
    lines.append(f"to {planned['output']}")
    return lines


def _rows(recipe: CompareRecipe) -> tuple[list[Example], list[Example], dict[int, str]]:
    """Return forget and retain rows, and what each forget row belongs to; those of a world to come, too."""
    comparison, settings = recipe.comparison, settings_of(recipe)
    if not comparison.world:
        rows, data = open_inputs(recipe.shared).rows, recipe.shared.data
        return list(rows.forget), list(rows.retain), read_names(settings, data.forget, data.columns)
    world = world_of(comparison.demo, comparison.seed)
    forget, retain = world_examples(world.forget), world_examples((*world.others, *world.general))
    known: list[Row] = [
        {"prompt": fact.prompt, "completion": fact.answer, "subject": fact.subject} for fact in world.forget
    ]
    return forget, retain, names_in(known, settings.by, "the demo's world") if settings.by else {}
