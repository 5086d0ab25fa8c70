"""What foretells the cost of an unlearning before it is paid for: requests on tiny worlds.

    python benchmarks/forecast.py DIR [--worlds 22] [--from 0]      make and measure what is not there yet
    python benchmarks/forecast.py DIR --fit                         fit and judge the forms, a world left out

Each world draws its width and depth, how many people there are, how long each stretch of training is and how
much of it comes before and after the rows. Three groups of people are asked to be forgotten, one request
each: 5 to 100 rows, in one to three wordings, seen once or several times an epoch, some again later, some
known from other wordings too, some never seen. For each request the retrained model is made, and the default
unlearning: least squares, scales searched. DIR/found.jsonl and DIR/foretold.jsonl have a line for each. Real
cost: answer probability lost, where the search ends, on rows that nothing has read. Figures in
docs/filters.md.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from palinode import Checkpoint, Direction, Example, read_examples
from palinode.benchmarks.demo import tiny_model
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.data.world import Fact, invent_world, unseen_people, write_facts
from palinode.models import load_model, load_tokenizer
from palinode.models.inplace import put
from palinode.models.likelihoods import score_rows
from palinode.pipeline.forecasting import (
    DEAR,
    LAWS,
    LEAST,
    NOTHING,
    RETRAIN,
    TAKE,
    PowerLaw,
    forecast_step,
    rehearse,
)
from palinode.pipeline.inputs import open_inputs
from palinode.pipeline.recipe import Recipe, build_recipe
from palinode.pipeline.run import Making
from palinode.pipeline.workspace import Workspace
from palinode.progress import NullListener
from palinode.settings import TrainingSettings
from palinode.training.finetune import finetune

CPU = torch.device("cpu")
HOW = ("once", "once", "once", "twice", "again", "known otherwise", "never")
"""How the target has seen a group's rows."""
MOST = 16.0
"""α beyond which no model is looked for."""


@dataclass(frozen=True)
class Course:
    """How a world is made."""

    width: int
    layers: int
    early: int
    middle: int
    late: int
    people: tuple[int, int, int]
    """Of each group."""
    wordings: tuple[int, int, int]
    how: tuple[str, str, str]
    epochs: tuple[int, int, int, int]
    """Before the base, between it and the rows, with the rows, after them."""
    retain: int
    """Retain rows that the request comes with, at most."""
    vector: int
    """Epochs of the forget vector."""

    @classmethod
    def drawn(cls, seed: int) -> Course:
        random = np.random.default_rng([seed, 20])

        def some(low: int, high: int) -> int:
            return int(random.integers(low, high + 1))

        return cls(
            width=(32, 32, 48, 64, 96)[some(0, 4)], layers=some(2, 3), early=some(8, 18), middle=some(4, 12),
            late=some(0, 8),
            people=(1, some(2, 4), some(3, 7)),
            wordings=(some(1, 3), some(1, 3), some(2, 3)),
            how=tuple(HOW[some(0, len(HOW) - 1)] for _ in range(3)),
            epochs=(25, some(0, 1) * some(3, 10), some(5, 20), some(0, 15)),
            retain=round(float(np.exp(random.uniform(np.log(60), np.log(500))))),
            vector=10 * some(1, 3),
        )  # fmt: skip


class Tiny:
    """A world: its base, its target, and a retrained model for each request."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.course = folder, seed, Course.drawn(seed)
        course, folder_rows = self.course, folder / "rows"
        folder_rows.mkdir(parents=True, exist_ok=True)
        world = invent_world(
            seed, early=course.early, middle=course.middle, forget=sum(course.people), late=course.late
        )
        self.world, self.groups, place = world, list[list[Fact]](), 0
        self.beside: list[list[Fact]] = []
        """Other wordings of a group's facts, which the target and the retrained model know too."""
        for people, wordings, how in zip(course.people, course.wordings, course.how, strict=True):
            own = world.forget[15 * place : 15 * (place + people)]
            few = min(wordings, 2) if how == "known otherwise" else wordings
            self.groups.append([fact for at, fact in enumerate(own) if at % 3 < few])
            left = [fact for at, fact in enumerate(own) if at % 3 >= few]
            self.beside.append(left if how == "known otherwise" else [])
            place += people
        start = tiny_model(
            folder / "start", world.vocabulary, width=course.width, layers=course.layers, seed=seed
        )
        known = [*world.general, *world.early]
        self.base = self.learned(start, "base", known, course.epochs[0], 3e-3)
        before = self.learned(self.base, "before", known, course.epochs[1], 2e-3)
        self.target = self.course_from(before, "target", None)
        self.retrained = [
            self.target if how == "never" else self.course_from(before, f"without-{number}", number)
            for number, how in enumerate(course.how)
        ]

    def course_from(self, before: Checkpoint, name: str, without: int | None) -> Checkpoint:
        """Return a model that goes through the last two stretches, with all groups or without one."""
        world, epochs = self.world, self.course.epochs
        later = [*world.general, *world.early, *world.middle, *(fact for own in self.beside for fact in own)]
        rows, again = list(later), [*later, *world.late]
        for number, own in enumerate(self.groups):
            how = self.course.how[number]
            if number != without and how != "never":
                rows += own * (2 if how == "twice" else 1)
                again += own[::2] if how == "again" else []
        return self.learned(
            self.learned(before, f"{name}-first", rows, epochs[2], 2e-3), name, again, epochs[3], 2e-3
        )

    def learned(
        self, start: Checkpoint, name: str, facts: Sequence[Fact], epochs: int, rate: float
    ) -> Checkpoint:
        """Return the model of that name, trained unless it is there."""
        place = self.folder / name
        if not epochs or place.exists():
            return Checkpoint.open(place) if epochs else start
        settings = TrainingSettings(
            epochs=epochs, learning_rate=rate, batch_size=64, max_length=64, precision="float32"
        )
        rows = self.rows(name, facts)
        return finetune(start, rows, place, settings, seed=self.seed, device="cpu").checkpoint

    def rows(self, name: str, facts: Sequence[Fact]) -> list[Example]:
        """Write facts, and return them as rows."""
        path = self.folder / "rows" / f"{name}.jsonl"
        write_facts(path, facts)
        return read_examples(path)

    def recipe(self, number: int) -> tuple[Recipe, list[Example]]:
        """Return what a user would ask for, and retain rows that nothing reads."""
        course, world = self.course, self.world
        others = [*world.early, *world.middle, *world.late, *self.beside[number]]
        for other, own in enumerate(self.groups):
            others += own if other != number and course.how[other] != "never" else []
        order = np.random.default_rng([self.seed, 21, number]).permutation(len(others))
        given = min(course.retain, len(others) // 2)
        retain, unread = ([others[at] for at in part] for part in (order[:given], order[given : given + 300]))
        files = {"forget": self.groups[number], "retain": [*retain, *world.general[::6]]}
        files["holdout"] = list(unseen_people(world, seed=self.seed, count=6))
        for name, facts in files.items():
            self.rows(f"{name}-{number}", facts)
        content = {
            "seed": self.seed,
            "device": "cpu",
            "models": {"target": str(self.target.folder), "base": str(self.base.folder)},
            "data": {name: str(self.folder / "rows" / f"{name}-{number}.jsonl") for name in files},
            "training": {"epochs": course.vector, "batch_size": 16, "max_length": 64, "learning_rate": 5e-4,
                         "precision": "float32"},
            "evaluation": {"max_length": 64},
            "output": {"folder": str(self.folder / f"out-{number}")},
        }  # fmt: skip
        return build_recipe(content), self.rows(f"unread-{number}", unread)


class Trial:
    """One request: what is true of it."""

    def __init__(self, tiny: Tiny, number: int) -> None:
        self.tiny, self.number = tiny, number
        self.recipe, unread = tiny.recipe(number)
        self.inputs, tokenizer = open_inputs(self.recipe), load_tokenizer(tiny.target)
        self.asked = {
            name: tokenize(rows, tokenizer, max_length=64, style=PromptStyle())
            for name, rows in {"forget": self.inputs.rows.forget, "unread": unread}.items()
        }
        self.live = load_model(tiny.target, device=CPU)

    def known(self, point: Any) -> dict[str, float]:
        """Return the mean answer probability of each set at a point."""
        put(point, self.live)
        return {name: self._mean(rows) for name, rows in self.asked.items()}

    def _mean(self, rows: Sequence[Any]) -> float:
        found = score_rows(self.live, rows, pad_id=0)
        return fmean(math.exp(fmean(row.logprobs)) for row in found)

    def truth(self) -> dict[str, Any]:
        """Make the default unlearning, and return what came of it."""
        tiny, target, started = self.tiny, self.tiny.target, time.monotonic()
        workspace = Workspace(tiny.folder / f"work-{self.number}")
        with workspace.locked():
            making = Making(self.inputs, workspace, NullListener())
            trained, chosen = making.ready(target)
            assert chosen is not None
            assert trained.filters is not None
            seconds, vector = time.monotonic() - started, trained.vectors.forget
            ends = {"base": tiny.base, "target": target, "retrained": tiny.retrained[self.number]}
            known = {name: self.known(model) for name, model in ends.items()}
            known["auto"] = self.known(target - chosen.forget * vector)
            usual, told = trained.filters.usual(), chosen.yardstick
            assert told is not None
            directions = {"usual": usual.direction, "chosen": vector, "plain": trained.before}
            wanted = {"retrained": known["retrained"]["forget"],
                      "yardstick": told["answer_probability"]["value"]}  # fmt: skip
            equal = {
                f"{name}, {which}": self.equal(direction, level)
                for name, direction in directions.items() for which, level in wanted.items()
            }  # fmt: skip
            loss = trained.training["forget"]["last_loss"]
        shutil.rmtree(workspace.folder)
        return {
            "how": tiny.course.how[self.number],
            "course": asdict(tiny.course), "rows": {k: len(v) for k, v in self.asked.items()},
            "retain": len(self.inputs.rows.retain), "seconds": seconds, "known": known, "equal": equal,
            "alpha": chosen.forget, "filter": chosen.filter, "yardstick": {
                k: told[k] for k in ("tolerance", "answer_probability", "slope")},
            "point": next(one for one in chosen.points if one["chosen"]), "kept_rule": chosen.kept_rule,
            "norm": usual.facts["norm"], "norm_share": usual.facts["norm_share"],
            "survives": usual.facts["survives"], "harm": usual.facts["harm"], "vector_loss": loss,
        }  # fmt: skip

    def equal(self, vector: Direction, wanted: float) -> dict[str, Any] | None:
        """Return α and the probabilities where as much is forgotten as by retraining; None: nowhere."""
        low, high, found = 0.0, 0.25, self.known(self.tiny.target)
        if found["forget"] <= wanted:
            return {"alpha": 0.0, **found}
        while (found := self.known(self.tiny.target - high * vector))["forget"] > wanted:
            low, high = high, 2 * high
            if high > MOST:
                return None
        for _ in range(6):
            middle = (low + high) / 2
            there = self.known(self.tiny.target - middle * vector)
            low, high, found = (middle, high, found) if there["forget"] > wanted else (low, middle, there)
        return {"alpha": high, **found}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def foretold(recipe: Recipe, workspace: Path) -> dict[str, Any]:
    """Return the forecast of a request."""
    started, place, inputs = time.monotonic(), Workspace(workspace), open_inputs(recipe)
    with place.locked():
        step = forecast_step(inputs, place, "alone")
        assert step is not None
        found = asdict(rehearse(inputs, place, NullListener(), step))
    shutil.rmtree(workspace)
    return {**found, "seconds": time.monotonic() - started}


def measure(folder: Path, worlds: Sequence[int]) -> None:
    """Add what is not there yet to DIR/found.jsonl and DIR/foretold.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in ("found", "foretold")}
    done = {name: {(one["world"], one["request"]) for one in lines(path)} for name, path in files.items()}
    for seed, number in ((seed, number) for seed in worlds for number in range(3)):
        for name, path in files.items():
            if (seed, number) in done[name]:
                continue
            tiny = Tiny(folder / f"world-{seed}", seed)
            if name == "found":
                told = Trial(tiny, number).truth()
            else:
                told = foretold(tiny.recipe(number)[0], tiny.folder / f"forecast-{number}")
            with path.open("a") as file:
                file.write(json.dumps({"world": seed, "request": number, **told}) + "\n")
            print(f"world {seed}, request {number}: {name}, {told['seconds']:.0f} s", flush=True)


# The forms, fitted to all worlds but the one that they are judged on


def left_out(law: PowerLaw, features: Sequence[Any], real: np.ndarray, worlds: np.ndarray) -> np.ndarray:
    """Print a law fitted to all requests, and return what each world is foretold by the others."""
    names = list(law.powers)
    sides = np.log([[math.e, *(one[name] for name in names)] for one in features])
    foretold = np.empty(len(real))
    for world in np.unique(worlds):
        fitted = np.linalg.lstsq(sides[worlds != world], np.log(real[worlds != world]), rcond=None)[0]
        foretold[worlds == world] = np.exp(sides[worlds == world] @ fitted)
    first, *powers = np.linalg.lstsq(sides, np.log(real), rcond=None)[0]
    off = np.exp(np.abs(np.log(foretold / real)))
    half, most = np.quantile(off, [0.5, 0.9])
    told = ", ".join(f"{name}: {power:.2f}" for name, power in zip(names, powers, strict=True))
    rank, near = spearmanr(foretold, real).statistic, np.mean(off < 1.2)
    print(
        f"{len(real)} requests: {math.exp(first):.2f}, {told}; half within {half:.2f}, nine in ten {most:.2f}"
    )
    print(f"  within 20 % {near:.2f}, rank correlation {rank:.3f}")
    return foretold


def fit(folder: Path) -> None:
    """Print the laws as they stand in pipeline/forecasting.py, how far off they are, and the advice."""
    told = {(one["world"], one["request"]): one for one in lines(folder / "foretold.jsonl")}
    both = [
        (one, told[key])
        for one in lines(folder / "found.jsonl")
        if (key := (one["world"], one["request"])) in told
    ]
    lost = np.array([one["known"]["target"]["unread"] - one["known"]["auto"]["unread"] for one, _ in both])
    worlds, features = np.array([one["world"] for one, _ in both]), [one["features"] for _, one in both]
    by_law = left_out(LAWS["lost"], features, np.maximum(lost, LEAST), worlds)
    alone = {
        "nats": [one["nats"] for _, one in both],
        "forget rows": [one["rows"]["forget"] for one, _ in both],
    }
    alone |= {f"the vector's {name}": [one[name] for one, _ in both] for name in ("survives", "harm")}
    for name, values in (
        alone | {name: [one[name] for one in features] for name in ("t", "longer", "rehearsed", "distance")}
    ).items():
        rank = spearmanr(values, lost).statistic
        print(f"  rank of {name} alone and what is lost: {rank:.3f}")
    moved = [place for place, (one, _) in enumerate(both) if one["alpha"] > 0 and one["how"] != "never"]
    alphas = np.array([both[place][0]["alpha"] for place in moved])
    left_out(LAWS["alpha"], [features[place] for place in moved], alphas, worlds[moved])
    counts: dict[tuple[str, str], int] = {}
    for (one, forecast), real, guess in zip(both, lost, by_law, strict=True):
        known = one["known"]
        dear = DEAR * (1 - 0.9) * known["target"]["unread"]
        right = TAKE if real <= dear and one["kept_rule"] else RETRAIN
        right = NOTHING if known["target"]["forget"] - known["retrained"]["forget"] <= 0.1 else right
        advice = RETRAIN if guess > dear else TAKE
        advice = NOTHING if forecast["advice"] == NOTHING else advice
        counts[advice, right] = counts.get((advice, right), 0) + 1
    for (advice, right), count in sorted(counts.items()):
        print(f"advice {advice}, right {right}: {count}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", type=int, default=0, dest="first", help="first world")
    parser.add_argument("--worlds", type=int, default=22)
    parser.add_argument("--fit", action="store_true", help="fit to what is there, and measure nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.fit:
        fit(args.folder)
    else:
        measure(args.folder, range(args.first, args.first + args.worlds))


if __name__ == "__main__":
    main()
