"""Erasure requests one after another, each undone in another order: what still stands after each of them?

    for each contestant: carry out requests 1 … n, asking the model after each; all at once besides
    arithmetic: undo them in a drawn order, asking after each; every state is that of the set, bit for bit
    requests.json, requests.md, requests.svg

Undoing goes back to the stored original and forms the sum again without that request's vector; it never adds
the vector. A method that trains can only go on from its last model, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from palinode.compare.points import MethodPoint
from palinode.compare.recipe import CompareRecipe, Contestant
from palinode.compare.request_plan import FILES, check_contestants, settings_of, spending_of
from palinode.compare.request_rows import divide_requests, read_names
from palinode.compare.request_states import Panel, RequestStates, Sum
from palinode.compare.request_table import RequestEntry, build_requests_table
from palinode.compare.run import Compared, check_folder, open_ground, threads
from palinode.compare.search import Ground, SearchPart, part_of, train_part
from palinode.methods import METHODS
from palinode.pipeline.inputs import check_workspace
from palinode.pipeline.tuning import Trained, Vectors
from palinode.pipeline.workspace import Workspace
from palinode.progress import Listener, NullListener
from palinode.records import shared, write_json, write_text
from palinode.report.comparison_report import requests_markdown
from palinode.report.pictures import requests_picture
from palinode.weights import Checkpoint

BYTES = 4
"""Of a weight in the models that stay in the workspace: float32."""


def carry_out(
    recipe: CompareRecipe, *, command: str | None = None, listener: Listener | None = None
) -> Compared:
    """Carry out a recipe's requests and undo them; the same call after an interruption goes on.

    Raises an InputError for anything the user can mend.
    """
    listener = listener or NullListener()
    points = check_contestants(recipe)
    output = Path(recipe.shared.output.folder)
    check_folder(output, FILES)
    workspace = Workspace(recipe.workspace)
    with workspace.locked(listener), threads(recipe):
        ground = open_ground(recipe, workspace, listener)
        run = _Requests(ground, points, command)
        run.check_room(output)
        return Compared(output, run.run(output))


class _Requests:
    """Requests in progress."""

    def __init__(self, ground: Ground, points: Mapping[str, MethodPoint], command: str | None) -> None:
        self.ground = ground
        self.recipe = ground.recipe
        self.comparison = ground.recipe.comparison
        self.points = points
        self.command = command
        self.started = datetime.now(UTC)
        settings, data = settings_of(ground.recipe), ground.recipe.shared.data
        names = read_names(settings, data.forget, data.columns)
        self.asked = divide_requests(settings, ground.shares.forget, names)
        self.spending = {
            name: spending_of(ground.recipe, point, name, self.asked, ground.shares)
            for name, point in points.items()
        }
        self.numbers = [request.number for request in self.asked.requests]
        rows = {str(request.number): request.rows for request in self.asked.requests}
        self.panel = Panel({**rows, "others": self.asked.others, "retain": ground.shares.retain_test})
        self.states = RequestStates(ground, self.panel)

    def check_room(self, output: Path) -> None:
        """Raise OutputError unless the models of all requests will fit: undoing needs them."""
        models = sum(spent.models for spent in self.spending.values()) * (len(self.numbers) + 1)
        needs = models * BYTES * self.ground.inputs.reader.parameters
        check_workspace(self.recipe.workspace, [output], needs=needs)

    def run(self, output: Path) -> dict[str, Any]:
        """Go through all contestants and write what was found, anew after each of them."""
        ground = self.ground
        given = {"target": ground.target, "base": ground.base, "retrained": ground.retrained}
        models = {
            name: self.states.of_checkpoint(model, self.numbers, name)
            for name, model in given.items()
            if model is not None
        }
        entries: list[RequestEntry] = []
        for place, contestant in enumerate(self.comparison.contestants, start=1):
            ground.listener.say(f"{contestant.name} ({place} of {len(self.points)})")
            arithmetic = METHODS[contestant.method].kind == "arithmetic"
            entries.append(self._arithmetic(contestant) if arithmetic else self._trained(contestant))
            table = build_requests_table(
                ground, self.asked, models, entries, started=self.started, command=self.command
            )
            write_requests(output, table)
        return table

    def _arithmetic(self, contestant: Contestant) -> RequestEntry:
        """Make every request's vector from the same start, and go through the states of the sums."""
        point = self.points[contestant.name]
        parts = {request.number: self._part(contestant, request.number) for request in self.asked.requests}
        joint = self._part(contestant, None)
        trained = {number: train_part(self.ground, part) for number, part in parts.items()}
        all_at_once, joint_cost = train_part(self.ground, joint)
        assert point.scales is not None
        vectors = {number: made for number, (made, _) in trained.items() if isinstance(made, Vectors)}
        assert isinstance(all_at_once, Vectors)
        summed = Sum(vectors, parts, point.scales)
        whole = Sum({0: all_at_once}, {0: joint}, point.scales)
        states = [self._state(summed, self.numbers[:count], (), contestant) for count in self.numbers]
        undone, facts = self._undone(summed, contestant)
        at_once = self.states.of_sum(whole, [0], [0], f"{contestant.name}, all at once")
        return RequestEntry(
            contestant,
            point.scales,
            [self._start(), *states, *undone],
            at_once,
            facts,
            [cost for _, cost in trained.values()],
            joint_cost,
        )

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

    def _trained(self, contestant: Contestant) -> RequestEntry:
        """Train request after request, each from the model that the last one left."""
        model, states, costs = self.ground.target, [self._start()], []
        for request in self.asked.requests:
            trained, cost = train_part(*self._grounded(contestant, request.number, model))
            assert isinstance(trained, Trained)
            model = _written(trained)
            done, label = self.numbers[: request.number], f"{contestant.name}, {request.number} carried out"
            states.append(self.states.of_checkpoint(model, done, label))
            costs.append(cost)
        at_once, joint_cost = train_part(*self._grounded(contestant, None, self.ground.target))
        assert isinstance(at_once, Trained)
        joint = self.states.of_checkpoint(_written(at_once), self.numbers, f"{contestant.name}, all at once")
        return RequestEntry(contestant, None, states, joint, self._no_way_back(costs), costs, joint_cost)

    def _no_way_back(self, costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return why a trained method cannot undo, and what going back would cost instead."""
        steps = [int(cost["steps"]) for cost in costs]
        repeated = [sum(steps[place + 1 :]) for place in range(len(steps))]
        return {
            "possible": False,
            "reason": "not possible: training went on from the model of the request before, so going back to "
            "the model before a request means training every later request again",
            "repeat_steps": sum(repeated) / len(repeated),
        }

    def _part(self, contestant: Contestant, number: int | None) -> SearchPart:
        return self._grounded(contestant, number, self.ground.target)[1]

    def _grounded(
        self, contestant: Contestant, number: int | None, target: Checkpoint
    ) -> tuple[Ground, SearchPart]:
        """Return the ground and the training of one request, or of all at once, from a model that stands.

        Where no retain vector is trained, the retain sample is as large as for all forget rows together: it
        is only drawn from and read, so that it costs no request a step more.
        """
        asked, point = self.asked, self.points[contestant.name]
        rows = asked.rows if number is None else asked.requests[number - 1].rows
        spent = self.spending[contestant.name]
        shares = replace(self.ground.shares, forget=rows, forget_probe=rows, forget_test=rows)
        ground = replace(self.ground, shares=shares, target=target)
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


def _written(trained: Trained) -> Checkpoint:
    """Return the model of a method that trains the target itself; others were refused."""
    assert isinstance(trained.model, Checkpoint)
    return trained.model


@shared()
def write_requests(output: Path, table: Mapping[str, Any]) -> None:
    """Write the picture, the report and, last, the table."""
    table_file, report, picture = FILES
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / picture, requests_picture(table))
    write_text(output / report, requests_markdown(table))
    write_json(output / table_file, table)
