"""Ten people ask one after another to be erased from the demo's model: what is left of all the others?

    palinode demo --output DIR
    python benchmarks/many_requests.py DIR [--only WAY …] [--json]

Several ways to serve n open requests:

    added        θ_D − Σ α·v_i: the vector of each person's rows is made once, when that person asks
    one vector   θ_D − α·v, v of all open requests' rows, made anew whenever that set changes
    on and on    a method that trains goes on from the model of the request before

Then each is withdrawn, in a drawn order: is the model bit for bit one that never had the request? To see,
it is made again in a workspace that knows of no withdrawn request. Each state is asked the rows of all ten
people and 200 retain rows that no way has read. What was made and found lies in DIR/many-requests, where
the same command finds it and goes on; remove that folder after a change of the code. Figures in
docs/many-requests.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from at_equal_forgetting import score

from palinode.compare.comparison_recipe import Split, divide_rows
from palinode.data.examples import at_most, read_examples
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.models.inplace import put
from palinode.models.loading import load_model, load_tokenizer
from palinode.pipeline.inputs import Inputs, open_inputs
from palinode.pipeline.recipe import build_recipe
from palinode.pipeline.run import Making
from palinode.pipeline.workspace import Workspace
from palinode.progress import NullListener
from palinode.records import write_text
from palinode.weights import Checkpoint, Point

TRAINING = {"epochs": 20, "batch_size": 16, "max_length": 64, "learning_rate": 5e-4, "precision": "float32"}
"""Of every vector, and of every request of a method that trains."""
SHOWN = (1, 3, 9, 10)
"""Numbers of open requests that the table shows; with nine, one person is left who never asked."""


@dataclass(frozen=True)
class Way:
    """One way to serve open requests."""

    kind: str
    """added, one or on."""
    alpha: float | None = None
    """None: as a run chooses it."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Sections laid over the recipe."""
    named: str = ""
    """How the rows of those who have not asked are named: as retain rows, as background, or not at all."""


SQUARES = {"transforms": [{"name": "least_squares"}]}
PROJECTED = {"transforms": [{"name": "projection", "others": "drop"}]}
WAYS: Mapping[str, Way] = {
    "added, plain": Way("added", 0.75),
    "added, projected": Way("added", 5.0, PROJECTED),
    "added, least squares": Way("added", 0.75, SQUARES),
    "added, least squares, others retain rows": Way("added", 0.75, SQUARES, "retain"),
    "added, least squares, others background": Way("added", 0.75, SQUARES, "background"),
    "one vector, plain": Way("one", 0.75),
    "one vector, least squares": Way("one", 0.75, SQUARES),
    "one vector, least squares, others retain rows": Way("one", 0.75, SQUARES, "retain"),
    "one vector, least squares, others background": Way("one", 0.75, SQUARES, "background"),
    "one vector, plain, α searched": Way("one", None, {"filter": "none"}),
    "one vector, least squares, α searched": Way("one"),
    "one vector, least squares, α searched, others retain rows": Way("one", None, {}, "retain"),
    "NPO, on and on": Way("on", None, {"method": "npo", "training": {**TRAINING, "learning_rate": 7e-5}}),
}


class Trial:
    """The demo's models and rows, by person, and what was found with them."""

    def __init__(self, demo: Path) -> None:
        self.world, self.home = demo / "world", demo / "many-requests"
        self.seed = int(json.loads((demo / "demo.json").read_text())["seed"])
        self.target, self.retrained = (Checkpoint.open(self.world / name) for name in ("target", "retrained"))
        self.lines = {
            name: (self.world / f"{name}.jsonl").read_text().splitlines() for name in ("forget", "retain")
        }
        people: dict[str, list[str]] = {}
        for line in self.lines["forget"]:
            people.setdefault(json.loads(line)["subject"], []).append(line)
        self.people = dict(enumerate(people.values(), start=1))
        forget, retain = (read_examples(self.world / f"{name}.jsonl") for name in ("forget", "retain"))
        shares = divide_rows(forget, retain, Split(), most=200, seed=self.seed)
        self.retain = [self.lines["retain"][example.row] for example in shares.retain]
        parts = {
            number: read_examples(self._file(f"forget-{number}", own)) for number, own in self.people.items()
        }
        tokenizer = load_tokenizer(self.target)
        self.asked = {
            str(name): tokenize(rows, tokenizer, max_length=64, style=PromptStyle())
            for name, rows in {**parts, "retain": shares.retain_test}.items()
        }
        self.live = load_model(self.target, device=torch.device("cpu"))

    def point(self, way: Way, done: Sequence[int], workspace: Workspace) -> Point:
        """Return the model that serves these requests, made or found in the workspace."""

        def making(asking: Sequence[int], target: Checkpoint = self.target) -> Making:
            return Making(self._inputs(way, asking, target), workspace, NullListener())

        if not done:
            return self.target
        if way.kind == "on":
            before = self.point(way, done[:-1], workspace)
            assert isinstance(before, Checkpoint)
            return making(done[-1:], before).train(before).model
        if way.alpha is None:
            return making(sorted(done)).make(self.target).model
        point: Point = self.target
        for asking in [[number] for number in done] if way.kind == "added" else [sorted(done)]:
            point = point - way.alpha * making(asking).train(self.target).vectors.forget
        return point

    def _inputs(self, way: Way, asking: Sequence[int], target: Checkpoint) -> Inputs:
        """Return what a user gives who serves these people: their rows, and the retain rows."""
        waiting = [
            line for number, lines in self.people.items() for line in lines
            if number not in asking and (way.kind == "one" or number > max(asking))
        ]  # fmt: skip
        label = "-".join(map(str, asking))
        forget = [line for number in asking for line in self.people[number]]
        data = {"forget": self._file(f"forget-{label}", forget), "holdout": str(self.world / "holdout.jsonl")}
        beside = waiting if way.named == "retain" else []
        data["retain"] = self._file(f"retain-{label}-{len(beside)}", [*self.retain, *beside])
        if way.named == "background" and waiting:
            data["background"] = self._file(f"background-{label}-{len(waiting)}", waiting)
        content: dict[str, Any] = {
            "seed": self.seed,
            "device": "cpu",
            "models": {"target": str(target.folder), "base": str(self.world / "base")},
            "data": data,
            "training": TRAINING,
            "evaluation": {"max_length": 64},
            "scales": {"retain": 0.0} if way.alpha is None else {"forget": way.alpha, "retain": 0.0},
            "output": {"folder": str(self.home / "out")},
        }
        if way.kind == "on":
            del content["scales"]
        inputs = open_inputs(build_recipe({**content, **way.recipe}))
        sample = at_most(inputs.rows.retain, len(self.lines["forget"]), seed=self.seed)
        return replace(inputs, rows=replace(inputs.rows, retain_sample=sample))  # projections read as many

    def state(self, name: str, done: Sequence[int], workspace: Workspace) -> Mapping[str, Any]:
        """Return what the model of these requests makes of all rows, and a hash of its weights."""
        way = WAYS.get(name)
        step = workspace.step("state", way=asdict(way) if way else name, done=list(done) if way else [])

        def asked() -> Mapping[str, Any]:
            started = time.monotonic()
            point = self.point(way, done, workspace) if way else getattr(self, name)
            seconds = round(time.monotonic() - started, 1)
            put(point, self.live)
            known = {part: score(self.live, rows)[0] for part, rows in self.asked.items()}
            return {"known": known, "contents": contents(self.live), "seconds": seconds}

        return {**step.once(asked), "done": list(done)}

    def through(self, name: str) -> tuple[list[Any], list[Any], int]:
        """Return the states after each request and each withdrawal, and how many of these are equal."""
        numbers = list(self.people)
        main, without = (Workspace(self.home / folder) for folder in ("requests", "without"))
        with main.locked(), without.locked():
            states = [self.state(name, numbers[:count], main) for count in range(len(numbers) + 1)]
            undone, equal, left = [], 0, numbers
            order = (np.random.default_rng(0).permutation(len(numbers)) + 1).tolist()
            for number in order if name in WAYS and WAYS[name].kind != "on" else ():
                left = [other for other in left if other != number]
                undone.append(self.state(name, left, main))
                equal += undone[-1]["contents"] == self.state(name, left[::-1], without)["contents"]
        return states, undone, equal

    def _file(self, name: str, lines: Sequence[str]) -> str:
        place = self.home / "rows" / f"{name}.jsonl"
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            write_text(place, "".join(f"{line}\n" for line in lines))
        return str(place)


def contents(model: torch.nn.Module) -> str:
    """Return a hash of a live model's weights."""
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def figures(state: Mapping[str, Any]) -> list[float | None]:
    """Return the mean answer probability of rows asked to be erased, of rows not asked, of retain rows."""
    parts: tuple[list[float], list[float]] = [], []
    for number, value in state["known"].items():
        if number != "retain":
            parts[int(number) not in state["done"]].append(value)
    return [*(fmean(part) if part else None for part in parts), state["known"]["retain"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path)
    parser.add_argument("--only", action="append", choices=[*WAYS], help="this way; repeatable")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trial, had = Trial(args.demo), 0.0
    heads = ["", *map(str, SHOWN), "5 withdrawn", "not asked, kept", "equal when withdrawn", "seconds"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name in ("target", "retrained", *(args.only or WAYS)):
        states, undone, equal = trial.through(name)
        waiting = sum(figures(state)[1] or 0.0 for state in states[1:-1])
        had = had or waiting  # the target's come first
        shown = [states[count] for count in SHOWN] + undone[4:5]
        cells = [
            " / ".join("–" if value is None else f"{value:.3f}".lstrip("0") for value in figures(state))
            for state in shown
        ]
        cells += [] if undone else ["–"]
        cells += [f"{waiting / had:.2f}", f"{equal} of {len(undone)}" if undone else "–"]
        print(f"| {name} | {' | '.join(cells)} | {sum(one['seconds'] for one in states):.0f} |", flush=True)


if __name__ == "__main__":
    main()
