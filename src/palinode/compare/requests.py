"""Erasure requests one after another, each undone in another order: what still stands after each of them?

    for each contestant: carry out requests 1 … n, asking the model after each; all at once besides
    arithmetic: undo them in a drawn order, asking after each; every state is that of the set, bit for bit
    requests.json, requests.md, requests.svg

Undoing goes back to the stored original and forms the sum again without that request's vector; it never adds
the vector. A method that trains can only go on from its last model, and says so. One request is the forget
rows that share a column's value, or so many in order. A plan counts what will be trained.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from palinode.compare.comparing import (
    Compared,
    check_comparison,
    divide_comparison,
    method_facts,
    rows_to_come,
    shared_facts,
    standing,
    write_tables,
)
from palinode.compare.comparison_recipe import CompareRecipe, Contestant, Requests, SearchBudget
from palinode.compare.contest import (
    Ground,
    MethodPoint,
    SearchPart,
    epochs_for,
    part_of,
    recipe_of,
    steps_an_epoch,
    train_part,
)
from palinode.compare.ground import Shares, rows_for, world_of
from palinode.compare.request_states import RequestStates, Sum
from palinode.data.examples import Example, fingerprint_examples, read_set
from palinode.data.sources import Row, json_type
from palinode.errors import DataError, RecipeError
from palinode.methods import METHODS
from palinode.pipeline.finetuning import FineTuning
from palinode.pipeline.inputs import check_folder, check_workspace
from palinode.pipeline.record import heading
from palinode.progress import Listener, NullListener
from palinode.report.comparison_report import requests_markdown, requests_picture
from palinode.weights import Checkpoint

REQUESTS_VERSION = 1
"""Version of the layout of requests.json, described in docs/requests.md."""
FILES = ("requests.json", "requests.md", "requests.svg")
"""What the folder holds: table, report, picture."""
BYTES = 4
"""Of a weight in the models that stay in the workspace: float32."""


def carry_out(recipe: CompareRecipe, *, listener: Listener | None = None) -> Compared:
    """Carry out a recipe's requests and undo them; the same call after an interruption goes on.

    Raises an InputError for anything the user can mend.
    """
    listener = listener or NullListener()
    points = check_contestants(recipe)
    output = Path(recipe.shared.output.folder)
    check_folder(output, FILES, "comparison")
    with standing(recipe, listener) as ground:
        return Compared(output, _Requests(ground, points).run(output))


class _Requests:
    """Requests in progress."""

    def __init__(self, ground: Ground, points: Mapping[str, MethodPoint]) -> None:
        self.ground = ground
        self.recipe = ground.recipe
        self.comparison = ground.recipe.comparison
        self.points = points
        self.started = datetime.now(UTC)
        self.asked = divide_requests(settings_of(self.recipe), ground.shares.forget, _names(self.recipe))
        self.spending = {
            name: spending_of(ground.recipe, point, name, self.asked, ground.shares)
            for name, point in points.items()
        }
        self.numbers = list(self.asked.requests)
        requests = {str(number): rows for number, rows in self.asked.requests.items()}
        parts = {**requests, "others": self.asked.others, "retain": ground.shares.retain_test}
        self.states = RequestStates(ground, parts)

    def run(self, output: Path) -> dict[str, Any]:
        """Go through all contestants and write what was found, anew after each of them.

        Raises OutputError unless the models of all requests will fit: undoing needs them.
        """
        ground = self.ground
        models = sum(spent.models for spent in self.spending.values()) * (len(self.numbers) + 1)
        check_workspace(
            self.recipe.workspace, [output], needs=models * BYTES * ground.inputs.reader.parameters
        )
        given = {"target": ground.target, "base": ground.base, "retrained": ground.retrained}
        states = {
            name: self.states.of_checkpoint(model, self.numbers, name)
            for name, model in given.items()
            if model is not None
        }
        entries: list[dict[str, Any]] = []
        for place, contestant in enumerate(self.comparison.contestants, start=1):
            ground.listener.say(f"{contestant.name} ({place} of {len(self.points)})")
            arithmetic = self.points[contestant.name].scales is not None
            entries.append(self._arithmetic(contestant) if arithmetic else self._trained(contestant))
            table = self._table(states, entries)
            texts = (requests_markdown(table), requests_picture(table))
            write_tables(output, dict(zip(FILES[1:], texts, strict=True)), table, FILES[0])
        return table

    def _arithmetic(self, contestant: Contestant) -> dict[str, Any]:
        """Make every request's vector from the same start, and go through the states of the sums."""
        point = self.points[contestant.name]
        parts = {number: self._grounded(contestant, number)[1] for number in self.numbers}
        joint = self._grounded(contestant, None)[1]
        trained = {number: train_part(self.ground, part) for number, part in parts.items()}
        all_at_once, joint_cost = train_part(self.ground, joint)
        assert point.scales is not None
        vectors = {number: made.vectors for number, (made, _) in trained.items()}
        summed = Sum(vectors, parts, point.scales)
        whole = Sum({0: all_at_once.vectors}, {0: joint}, point.scales)
        states = [self._state(summed, self.numbers[:count], (), contestant) for count in self.numbers]
        undone, facts = self._undone(summed, contestant)
        at_once = self.states.of_sum(whole, [0], [0], f"{contestant.name}, all at once")
        costs = [cost for _, cost in trained.values()]
        states = [self._start(), *states, *undone]
        return _entry(contestant, states, at_once, facts, costs, joint_cost, point.scales)

    def _undone(self, summed: Sum, contestant: Contestant) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Undo all requests; return the states, and how many are bit for bit what they are to be."""
        states, equal, left = [], 0, list(self.numbers)
        for place, number in enumerate(self.asked.undo_order, start=1):
            left.remove(number)
            states.append(self._state(summed, left, self.asked.undo_order[:place], contestant))
            equal += states[-1]["contents"] == self.states.made_anew(summed, left, seed=place)
        return states, {
            "possible": True,
            "states_compared": len(states),
            "states_equal": equal,
            "target_back": states[-1]["contents"] == self._start()["contents"],
        }

    def _table(
        self, models: Mapping[str, Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return the content of requests.json for the contestants that are through."""
        ground, comparison, asked = self.ground, self.comparison, self.asked
        facts = shared_facts(ground)
        return {
            **heading(REQUESTS_VERSION, started=self.started, verb="compare"),
            "complete": len(entries) == len(comparison.contestants),
            "seed": comparison.seed,
            "training_seed": comparison.seeds[0],
            "shared": facts.pop("shared"),
            "comparison": comparison.model_dump(
                mode="json", include={"world", "demo", "budget", "split", "requests"}
            ),
            "requests": [
                {"number": number, "rows": len(rows), "fingerprint": fingerprint_examples(rows)}
                for number, rows in asked.requests.items()
            ],
            "undo_order": list(asked.undo_order),
            "rows": {
                "others": len(asked.others),
                "retain_train": len(ground.shares.retain_train),
                "retain": len(ground.shares.retain_test),
            },
            "models": dict(models),
            "contestants": list(entries),
            **facts,
        }

    def _state(
        self, summed: Sum, numbers: Sequence[int], undone: Sequence[int], contestant: Contestant
    ) -> dict[str, Any]:
        """Return the state of a set of requests, reached by carrying out and undoing."""
        path = [*(self.numbers if undone else numbers), *(-number for number in undone)]
        label = f"{contestant.name}, {len(numbers)} {'left' if undone else 'carried out'}"
        return self.states.of_sum(summed, numbers, path, label)

    def _start(self) -> dict[str, Any]:
        """Return the state before any request: the target."""
        return self.states.of_checkpoint(self.ground.target, [], "target")

    def _trained(self, contestant: Contestant) -> dict[str, Any]:
        """Train request after request, each from the model that the last one left."""

        def written(number: int | None, start: Checkpoint) -> tuple[Checkpoint, Mapping[str, Any]]:
            ground, part = self._grounded(contestant, number, start)
            trained, cost = train_part(ground, part)
            return FineTuning(part.inputs, ground.workspace, ground.listener).whole(trained), cost

        model, states, costs = self.ground.target, [self._start()], []
        for number in self.numbers:
            model, cost = written(number, model)
            label = f"{contestant.name}, {number} carried out"
            states.append(self.states.of_checkpoint(model, self.numbers[:number], label))
            costs.append(cost)
        at_once, joint_cost = written(None, self.ground.target)
        joint = self.states.of_checkpoint(at_once, self.numbers, f"{contestant.name}, all at once")
        steps = [int(cost["steps"]) for cost in costs]
        repeated = sum(sum(steps[place:]) for place in range(1, len(steps)))
        undo = {
            "possible": False,
            "reason": "not possible: training went on from the model of the request before, so going back to "
            "the model before a request means training every later request again",
            "repeat_steps": repeated / len(steps),
        }
        return _entry(contestant, states, joint, undo, costs, joint_cost)

    def _grounded(
        self, contestant: Contestant, number: int | None, target: Checkpoint | None = None
    ) -> tuple[Ground, SearchPart]:
        """Return the ground and the training of one request, or of all at once, from a model that stands.

        Where no retain vector is trained, the retain sample is as large as for all forget rows together: it
        is only drawn from and read, so that it costs no request a step more.
        """
        asked, point = self.asked, self.points[contestant.name]
        rows = asked.rows if number is None else asked.requests[number]
        spent = self.spending[contestant.name]
        shares = replace(self.ground.shares, forget=rows, forget_probe=rows, forget_test=rows)
        ground = replace(self.ground, shares=shares, target=target or self.ground.target)
        second = point.scales is not None and bool(point.scales[1])
        part = part_of(
            ground,
            contestant,
            [point],
            self.comparison.seeds[0],
            epochs=spent.joint_epochs if number is None else spent.epochs[number - 1],
            sized_for=None if second else len(self.ground.shares.forget),
        )
        return ground, part


def _entry(
    contestant: Contestant,
    states: Sequence[Mapping[str, Any]],
    joint: Mapping[str, Any],
    undo: Mapping[str, Any],
    costs: Sequence[Mapping[str, Any]],
    joint_cost: Mapping[str, Any],
    scales: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Return what the table says of a contestant that is through.

    `states`: before any request, after each, and then after each that was undone; `joint`: of one training
    on the rows of all requests.
    """
    kept = ("epochs", "steps", "tokens", "seconds")
    each, whole = ([{name: cost[name] for name in kept} for cost in part] for part in (costs, [joint_cost]))
    return {
        **method_facts(contestant),
        "scales": list(scales) if scales else None,
        "states": list(states),
        "joint": dict(joint),
        "undo": dict(undo),
        "cost": {"requests": each, "joint": whole[0]},
    }


def check_contestants(recipe: CompareRecipe) -> dict[str, MethodPoint]:
    """Return each contestant's one point, its settings checked. Raises RecipeError."""
    points = {name: point for name, (point,) in check_comparison(recipe).items()}
    for contestant in recipe.comparison.contestants:
        method, point = METHODS[contestant.method], points[contestant.name]
        settings = point.recipe.get("method_settings", {})
        at_base = method.check_settings(settings).starts_at == "base"
        if at_base and point.scales is None:
            raise RecipeError(
                f"{contestant.name} starts from the base every time ({method.name}), so that no request can "
                "go on from the one before; leave it out"
            )
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
    models = 0

    def bought(budget: SearchBudget, rows: Sequence[Example]) -> tuple[int, int]:
        nonlocal models
        each = steps_an_epoch(first, rows_for(first, replace(shares, forget=rows)))
        epochs, models = epochs_for(budget, each, name), len(each)
        return epochs, epochs * sum(each)

    found = [bought(comparison.budget, rows) for rows in asked.requests.values()]
    whole = comparison.budget.model_copy(update={"steps": comparison.budget.steps * len(found)})
    joint = bought(whole, asked.rows)
    epochs, steps = zip(*found, strict=True)
    return Spending(models, epochs, steps, *joint)


def plan_requests(recipe: CompareRecipe) -> dict[str, Any]:
    """Check a recipe with requests and return what it would do, as plain values; nothing is written.

    Raises an InputError for anything the user can mend.
    """
    points = check_contestants(recipe)
    output = Path(recipe.shared.output.folder)
    check_folder(output, FILES, "comparison")
    forget, retain = rows_to_come(recipe)
    asked = divide_requests(settings_of(recipe), forget, _names(recipe))
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
                "undone": points[contestant.name].scales is not None,
            }
        )
    return {
        "requests": [len(rows) for rows in asked.requests.values()],
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


@dataclass(frozen=True, slots=True)
class Requested:
    """All forget rows by request."""

    requests: Mapping[int, Sequence[Example]]
    """By number, from 1, in the order in which requests come."""
    others: Sequence[Example]
    """Rows that nobody asks to erase."""
    undo_order: Sequence[int]
    """Numbers of the requests in the order in which they are undone."""

    @property
    def rows(self) -> list[Example]:
        """The rows of all requests, in order."""
        return [row for rows in self.requests.values() for row in rows]


def divide_requests(settings: Requests, forget: Sequence[Example], names: Mapping[int, str]) -> Requested:
    """Return the forget rows by request; `names` says by row to what it belongs, where a column says so.

    Raises RecipeError where there are fewer requests than asked for, or fewer than two.
    """
    if settings.size is not None:
        places = {row: place for place, row in enumerate(dict.fromkeys(one.row for one in forget))}
        names = {row: str(place // settings.size) for row, place in places.items()}
    groups: dict[str, list[Example]] = {}
    for example in forget:
        groups.setdefault(names[example.row], []).append(example)
    count = settings.count or len(groups)
    if not 2 <= count <= len(groups):
        raise RecipeError(
            f"the {len(forget)} forget rows make {len(groups)} requests and requests.count asks for "
            f"{max(count, 2)}; lower it, or form requests otherwise"
        )
    chosen = list(groups.values())
    drawn = np.random.default_rng(settings.undo_seed).permutation(count) + 1
    return Requested(
        dict(enumerate(chosen[:count], start=1)),
        [row for rows in chosen[count:] for row in rows],
        drawn.tolist(),
    )


def _names(recipe: CompareRecipe) -> dict[int, str]:
    """Return what each forget row has in the column that requests are formed by, also of a world to come."""
    settings, comparison, data = settings_of(recipe), recipe.comparison, recipe.shared.data
    if settings.by is None:
        return {}
    if not comparison.world:
        return names_in(read_set(data.forget, columns=data.columns)[1], settings.by, data.forget)
    known: list[Row] = [
        {"prompt": fact.prompt, "completion": fact.answer, "subject": fact.subject}
        for fact in world_of(comparison.demo, comparison.seed).forget
    ]
    return names_in(known, settings.by, "the demo's world")


def names_in(rows: Sequence[Row], column: str, source: str) -> dict[int, str]:
    """Return each row's value in a column as text; raises DataError for a row without one."""
    known = list(dict.fromkeys(name for row in rows for name in row))
    if column not in known:
        near = difflib.get_close_matches(column, known, n=1, cutoff=0.0)
        raise DataError(
            f"{source} has no column {column!r} (it has: {', '.join(known)}); set requests.by to "
            f"{near[0]!r}, or form requests by size"
        )
    names = {}
    for place, row in enumerate(rows):
        value = row.get(column)
        if not isinstance(value, str | int) or not str(value).strip():
            got = "empty" if value is None or value == "" else json_type(value)
            raise DataError(
                f"row {place + 1} of {source}: {column!r} is {got}; "
                "requests are formed by texts or whole numbers"
            )
        names[place] = str(value)
    return names
