"""What a comparison will train, counted before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palinode.compare.points import by_training, epochs_for, models_trained, recipe_of, steps_an_epoch
from palinode.compare.recipe import CompareRecipe
from palinode.compare.run import check_comparison, check_folder, divide_comparison
from palinode.compare.world import world_of
from palinode.data.examples import Example, Message
from palinode.data.world import Fact
from palinode.pipeline.inputs import open_inputs


def plan_comparison(recipe: CompareRecipe) -> dict[str, Any]:
    """Check a comparison and return what it would train, as plain values; nothing is written.

    Raises an InputError for anything the user can mend.
    """
    points = check_comparison(recipe)
    check_folder(_output(recipe))
    comparison = recipe.comparison
    if comparison.world:
        world = world_of(comparison.demo, comparison.seed)
        forget, retain = world_examples(world.forget), world_examples((*world.others, *world.general))
    else:
        rows = open_inputs(recipe.shared).rows
        forget, retain = list(rows.forget), list(rows.retain)
    shares = divide_comparison(recipe, forget, retain)
    contestants = []
    for contestant in comparison.contestants:
        drawn = points[contestant.name]
        groups = by_training(drawn)
        first = recipe_of(recipe.content, drawn[0], {"target": "."}, epochs=1, seed=comparison.seeds[0])
        sizes = {"forget": len(shares.forget), "retain": len(shares.retain_train)}
        models, epochs, steps = models_trained(first), None, None
        if comparison.budget.steps is not None:
            epochs = epochs_for(comparison.budget, first, **sizes, name=contestant.name)
            steps = epochs * models * steps_an_epoch(first, **sizes)
        contestants.append(
            {
                "name": contestant.name,
                "method": contestant.method,
                "points": len(drawn),
                "trainings": len(groups) + len(comparison.seeds) - 1,
                "models": models,
                "epochs": epochs,
                "steps": steps,
            }
        )
    return {
        "contestants": contestants,
        "seeds": list(comparison.seeds),
        "rows": {
            "forget": len(shares.forget),
            "forget_test": len(shares.forget_test),
            "retain_train": len(shares.retain_train),
            "retain_test": len(shares.retain_test),
        },
        "output": str(_output(recipe)),
        "workspace": str(recipe.workspace),
    }


def describe_plan(planned: dict[str, Any]) -> list[str]:
    """Return a plan in words, one line a contestant."""
    rows = planned["rows"]
    lines = [
        f"{rows['forget']} forget rows ({rows['forget_test']} measured), {rows['retain_train']} retain rows "
        f"to train on, {rows['retain_test']} measured"
    ]
    for entry in planned["contestants"]:
        what = (
            f"{entry['epochs']} epochs, {entry['steps']} steps"
            if entry["epochs"]
            else "epochs as the budget of seconds buys"
        )
        models = f"{entry['models']} model{'s' if entry['models'] > 1 else ''}"
        points = f"{entry['points']} points in {entry['trainings']} trainings of {models}"
        lines.append(f"{entry['name']} ({entry['method']}): {points}, {what}")
    lines.append(f"seeds {', '.join(map(str, planned['seeds']))}; to {planned['output']}")
    return lines


def _output(recipe: CompareRecipe) -> Path:
    return Path(recipe.shared.output.folder)


def world_examples(facts: tuple[Fact, ...]) -> list[Example]:
    """Return the rows that the demo's world will write for these facts."""
    return [
        Example(row, "world", "completion", (Message("prompt", fact.prompt),), fact.answer)
        for row, fact in enumerate(facts)
    ]
