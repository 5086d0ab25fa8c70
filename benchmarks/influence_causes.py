"""Whether the rows that influence ranks first are the causes: planted ones, and what taking them away does.

    python benchmarks/influence_causes.py planted --output DIR [--seed 0] [--json]
    python benchmarks/influence_causes.py taken --output DIR [--seed 0] [--questions 20] [--json]

`planted`: the world of benchmarks/influence.py, but each fact is trained on in one of four ways: one row that
says it, two wordings, the same row five times, or five near-duplicates (the same sentence after other words).
All are asked in another wording. Told is how many of min(k, rows of the fact) are among the first k.

`taken` (DIR may be that of influence.py): questions that the target answers rightly, in a wording that it was
not trained on. The first k rows are left out and both stretches trained again; the same rows are taken back
by the main job (their vector from the base, filtered, α towards a yardstick of people whom no model has
seen); and k random rows are left out. Told is how often the greedy answer is another, how often its
probability falls below half of what it was, and what that costs the other questions that were right. Figures
in docs/influence.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence import EPOCHS, PRECONDITIONERS, Tiny
from palinode.data.world import RELATIONS, Fact, World, invent_world, unseen_people, write_facts
from palinode.models import load_model
from palinode.models.inplace import put
from palinode.models.likelihoods import TokenScores, score_rows
from palinode.pipeline.inputs import open_inputs
from palinode.pipeline.recipe import build_recipe
from palinode.pipeline.run import Making
from palinode.pipeline.workspace import Workspace
from palinode.progress import NullListener

KINDS = ("one row", "two wordings", "five duplicates", "five near-duplicates")
BEGINNINGS = ("", "today ", "they say ", "as all know ", "it is true that ")
"""What near-duplicates begin with."""
AMOUNTS = (1, 2, 5, 20)
RANDOM = 5
"""Draws of random rows, each told for all questions."""
RANKED = {"similarity": ("product", "none", "target"), "ridge": ("ridge", "none", "base")}
PLANTED = (
    ("product", "none", "target"),
    ("cosine", "none", "target"),
    ("product", "none", "all"),
    ("cosine", "none", "base"),
    *product(("ridge",), PRECONDITIONERS, ("target", "base", "all", "seen")),
)
"""Measure, preconditioner and checkpoints of what is told; the first is plain gradient similarity."""


class Planted(Tiny):
    """The world of which each fact is trained on in one of the ways of `KINDS`."""

    def told(self, world: World) -> list[Fact]:
        """Return each fact of the people in the way of its number."""
        found = []
        for number, (first, second) in enumerate(zip(world.middle[::3], world.middle[1::3], strict=True)):
            near = [
                Fact(first.subject, first.relation, f"{begin}{first.prompt}", first.answer)
                for begin in BEGINNINGS
            ]
            ways = ([first], [first, second], [first] * len(near), near)
            found += ways[_kind(number)]
        return found


def _kind(number: int) -> int:
    """Return the way of a question; each relation, in its turn with the people, has all."""
    return (number + number // len(RELATIONS)) % len(KINDS)


def recalls(world: Tiny, scores: np.ndarray) -> dict[str, list[float]]:
    """Return recall at 1, 5 and 20 for each kind of planted cause."""
    order = np.argsort(-scores, axis=0, kind="stable")
    found: dict[str, list[float]] = {}
    for kind, name in enumerate(KINDS):
        own = [q for q in range(len(world.says)) if _kind(q) == kind]
        found[name] = [
            float(np.mean([len(world.says[q] & {*order[:k, q].tolist()}) / min(k, len(world.says[q]))
                           for q in own]))
            for k in (1, 5, 20)
        ]  # fmt: skip
    return found


def planted(output: Path, seed: int) -> dict[str, Any]:
    """Return the recall of each form for each kind, with a table printed."""
    world = Planted(output / "planted", seed)
    target = world.train(np.ones(len(world.rows), bool), ladder=True)
    right = [all(row.hits) for row in world.asked(target)]
    asked = [[hit for q, hit in enumerate(right) if _kind(q) == kind] for kind in range(len(KINDS))]
    shares = [f"{kind} {np.mean(own):.2f}" for kind, own in zip(KINDS, asked, strict=True)]
    print(f"answered rightly: {', '.join(shares)}")
    random = np.random.default_rng(seed).normal(size=(len(world.rows), len(world.says)))
    results = {"random": recalls(world, random)}
    results |= {", ".join(form): recalls(world, world.scores(*form)) for form in PLANTED}
    for name, one in results.items():
        cells = [" / ".join(f"{value:.2f}" for value in one[kind]) for kind in KINDS]
        print(f"| {name} | {' | '.join(cells)} |")
    return {"rows": len(world.rows), "recall": results}


class Taken:
    """Questions that the target answers rightly, and what becomes of them without rows; all of it is kept."""

    def __init__(self, output: Path, seed: int, questions: int) -> None:
        self.world, self.kept = Tiny(output, seed), output / "taken.jsonl"
        self.target = self.world.train(np.ones(len(self.world.rows), bool), ladder=True)
        self.before = self.world.asked(self.target)
        self.right = [q for q, row in enumerate(self.before) if all(row.hits)]
        some = np.linspace(0, len(self.right) - 1, questions).round().astype(int)
        self.asked = [self.right[place] for place in some]
        write_facts(output / "unseen.jsonl", unseen_people(invented(seed), seed=seed))
        lines = self.kept.read_text().splitlines() if self.kept.exists() else []
        self.known = {tuple(one["key"]): one["told"] for one in map(json.loads, lines)}

    def once(self, key: tuple[Any, ...], make: Any) -> list[list[float]]:
        """Return (nats, right or not) of every question for a model, made where it is not known yet."""
        if key not in self.known:
            found: Sequence[TokenScores] = make()
            self.known[key] = [[-sum(row.logprobs), float(all(row.hits))] for row in found]
            with self.kept.open("a") as file:
                file.write(json.dumps({"key": key, "told": self.known[key]}) + "\n")
        return self.known[key]

    def retrained(self, rows: Sequence[int]) -> list[TokenScores]:
        """Return what a model makes of the questions that was trained without these rows."""
        kept = np.ones(len(self.world.rows), bool)
        kept[[*rows]] = False
        return self.world.asked(self.world.train(kept))

    def unlearned(self, rows: Sequence[int]) -> list[TokenScores]:
        """Return the same for the target from which the main job takes these rows back."""
        world, folder = self.world, self.world.folder
        lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
        for name, own in (("forget", {*rows}), ("retain", {*range(len(lines))} - {*rows})):
            (folder / f"{name}.jsonl").write_text("".join(lines[row] for row in sorted(own)))
        inputs = open_inputs(
            build_recipe({
                "seed": world.seed,
                "device": "cpu",
                "models": {"target": str(self.target.folder), "base": str(world.base.folder)},
                "data": {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain")}
                | {"holdout": str(folder / "unseen.jsonl")},
                "training": {**world.settings.model_dump(), "epochs": 2 * EPOCHS},
                "evaluation": {"max_length": 64},
                "scales": {"retain": 0.0, "probe_rows": 300},
                "output": {"folder": str(folder / "never")},
            })
        )  # fmt: skip
        workspace = Workspace(folder / "unlearning")
        with workspace.locked():
            point = Making(inputs, workspace, NullListener()).make(self.target).model
        live = load_model(self.target, device=torch.device("cpu"))
        put(point, live)
        return score_rows(live, world.tokens(world.questions), pad_id=0)

    def figures(self, found: Mapping[int, list[list[float]]]) -> dict[str, float]:
        """Return what models did to the questions they are of, and to the others that were right."""
        own, others = [], []
        for q, told in found.items():
            nats = [now + sum(row.logprobs) for (now, _), row in zip(told, self.before, strict=True)]
            own.append((not told[q][1], nats[q] > np.log(2), nats[q]))
            others += [(not told[other][1], nats[other]) for other in self.right if other != q]
        changed, halved, nats = np.mean(own, axis=0).tolist()
        lost, other_nats = np.mean(others, axis=0).tolist()
        return {"changed": changed, "halved": halved, "nats": nats, "lost": lost, "other nats": other_nats}

    def results(self) -> dict[str, list[dict[str, float]]]:
        """Return the figures by way, for each number of rows."""
        found: dict[str, list[dict[str, float]]] = {}
        for k in AMOUNTS:
            drawn = []
            for draw in range(RANDOM):
                random = np.random.default_rng([self.world.seed, 13, k, draw])
                rows = random.choice(len(self.world.rows), k, replace=False).tolist()
                told = self.once(("retrained", *sorted(rows)), lambda rows=rows: self.retrained(rows))
                drawn.append(self.figures(dict.fromkeys(self.asked, told)))
            means = {name: float(np.mean([one[name] for one in drawn])) for name in drawn[0]}
            found.setdefault("random, retrained", []).append(means)
        for form, ranked in RANKED.items():
            order = np.argsort(-self.world.scores(*ranked), axis=0, kind="stable")
            ways = {"retrained": self.retrained} | ({"unlearned": self.unlearned} if form == "ridge" else {})
            for way, make in ways.items():
                for k in AMOUNTS:
                    tops = {q: order[:k, q].tolist() for q in self.asked}
                    told = {
                        q: self.once((way, *sorted(top)), lambda top=top, make=make: make(top))
                        for q, top in tops.items()
                    }
                    found.setdefault(f"{form}, {way}", []).append(self.figures(told))
        return found


def invented(seed: int) -> World:
    """Return the world that `Tiny` invents."""
    return invent_world(seed, early=30, middle=24, forget=1, late=1)


def taken(output: Path, seed: int, questions: int) -> dict[str, Any]:
    """Return what taking the first rows away does, with a table printed."""
    trial = Taken(output, seed, questions)
    print(f"{len(trial.right)} of {len(trial.before)} questions are answered rightly")
    results = trial.results()
    for name, own in results.items():
        cells = [f"{one['changed']:.2f} / {one['halved']:.2f} / {one['lost']:.2f}" for one in own]
        print(f"| {name} | {' | '.join(cells)} |")
    return {"questions": questions, "right": len(trial.right), "taken": results}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("planted", "taken"))
    parser.add_argument("--output", type=Path, required=True, help="folder for the world and its models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=20, help="taken: that are asked")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "planted":
        found = planted(args.output, args.seed)
    else:
        found = taken(args.output, args.seed, args.questions)
    if args.json:
        print(json.dumps({"seed": args.seed, **found}))


if __name__ == "__main__":
    main()
