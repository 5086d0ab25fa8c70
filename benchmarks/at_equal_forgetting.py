"""What a recipe's vectors are worth on the demo's world: by the rule, and at equal forgetting.

Used by `benchmarks/lora.py` and `benchmarks/transforms.py`. By the rule: the run as a user makes it, scales
by `scales.choose = "grid"`. At equal forgetting: β = 0, and the α at which the forget people's mean answer
probability is the retrained model's, which no user knows; so vectors are compared, and not a grid's luck.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rivals import Rival, Sides, filtered, read

from palinode.data.examples import at_most, read_examples
from palinode.data.tokenize import PromptStyle, TokenRow, tokenize
from palinode.data.world import invent_world
from palinode.models.inplace import put
from palinode.models.likelihoods import score_rows
from palinode.models.loading import load_model, load_tokenizer
from palinode.pipeline.demo_run import SETTINGS, exact_match
from palinode.pipeline.finetuning import FineTuning
from palinode.pipeline.inputs import Inputs, open_inputs
from palinode.pipeline.recipe import build_recipe
from palinode.pipeline.run import unlearn
from palinode.pipeline.workspace import Workspace
from palinode.progress import NullListener
from palinode.weights import Checkpoint, Direction

CPU = torch.device("cpu")
LARGEST_ALPHA = 16.0


@dataclass(frozen=True)
class Found:
    """One variant on one demo; recalls are shares of rows answered exactly."""

    seed: int
    name: str
    alpha: float
    """By the rule."""
    beta: float
    forget: float
    others: float
    equal_alpha: float | None
    """At equal forgetting; None where no α reaches it."""
    equal_others: float | None
    equal_probability: float | None
    """Mean answer probability of the others there."""
    first_seconds: float
    """Of the whole run by the rule; less where its steps were there already."""
    facts: Any = None
    """What the transforms did, as the record has it."""


class Demo:
    """A folder that `palinode demo --output DIR` made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seed = int(json.loads((folder / "demo.json").read_text())["seed"])
        self.people = len(invent_world(self.seed).others)
        world = folder / "world"
        self.target = Checkpoint.open(world / "target")
        tokenizer = load_tokenizer(self.target)
        self.rows, self.others = (
            tokenize(rows, tokenizer, max_length=64, style=PromptStyle())
            for rows in (
                read_examples(world / "forget.jsonl"),
                read_examples(world / "retain.jsonl")[: self.people],
            )
        )
        self.live = load_model(self.target, device=CPU)
        self._sides: tuple[Sides, Sides] | None = None
        retrained = load_model(Checkpoint.open(world / "retrained"), device=CPU)
        self.wanted = score(retrained, self.rows)[0]
        self.best = score(retrained, self.others)[1]

    def measure(self, name: str, changes: Mapping[str, Any]) -> Found:
        """Run a variant of the demo's recipe; `changes` are laid over it, section by section."""
        place = name.replace(" ", "-").replace("/", "-").replace("=", "").replace(",", "")
        recipe = self._recipe(place, changes)
        started = time.monotonic()
        done = unlearn(recipe)
        seconds = time.monotonic() - started
        outcomes = done.outcomes["unlearned"]
        others = [outcome for outcome in outcomes["retain"] if outcome.row < self.people]
        with Workspace(self.folder / "workspace").locked():
            job = FineTuning(open_inputs(recipe), Workspace(self.folder / "workspace"), NullListener())
            vector = job.train(self.target).vectors.forget
        alpha, recalled, probability = self._equal(vector)
        scales = done.record["scales"]
        return Found(
            self.seed, name, scales["forget"], scales["retain"],
            exact_match(outcomes["forget"]), exact_match(others),
            alpha, recalled, probability, round(seconds, 1), done.record["vectors"].get("transforms"),
        )  # fmt: skip

    def filtered(
        self, changes: Mapping[str, Any], *, arrive: bool = False, rival: Rival | None = None
    ) -> list[dict[str, Any]]:
        """Return α, recall and probability at equal forgetting, of others that no vector or filter has read.

        With `arrive` a second time, for the vector filtered again where that α arrives. Nothing but vectors
        is written. A `rival` is put on the vector.
        """
        recipe = self._recipe("filtered", changes)
        inputs = open_inputs(recipe)
        read = {example.row for example in at_most(inputs.rows.spared, 1000, seed=recipe.seed)}
        read |= {example.row for example in inputs.rows.retain_sample}
        whole, self.others = self.others, [row for place, row in enumerate(self.others) if place not in read]
        found = []
        with Workspace(self.folder / "workspace").locked(), TemporaryDirectory() as place:
            started = time.monotonic()
            job = FineTuning(inputs, Workspace(self.folder / "workspace"), NullListener())
            trained = job.train(self.target)
            vectors = [(trained.vectors.forget, list(trained.transforms))]
            if rival:
                made = filtered(vectors[0][0], rival, *self.sides(inputs), Path(place) / "vector")
                vectors = [(made, [])]
            for vector, told in vectors:
                seconds = time.monotonic() - started
                alpha, recalled, probability = self._equal(vector)
                found.append({"alpha": alpha, "others": recalled, "probability": probability, "told": told})
                found[-1] |= {"round": len(found) - 1, "seconds": round(seconds, 1)}
                if arrive and trained.filters and alpha is not None and len(found) == 1:
                    started = time.monotonic()
                    again = trained.filters.arrived(trained.filters.usual(), alpha)
                    vectors.append((again.direction, [again.facts]))
        put(self.target, self.live)
        before = score(self.live, self.others)[0]
        self.others = whole
        return [{**one, "target": before} for one in found]

    def sides(self, inputs: Inputs) -> tuple[Sides, Sides]:
        """Return what the target's layers read, and what reaches their outputs, on forget and spared rows."""
        if self._sides is None:
            put(self.target, self.live)
            tokenizer, style = load_tokenizer(self.target), PromptStyle()
            forget, spared = (
                read(
                    self.live,
                    tokenize(at_most(rows, 1000, seed=self.seed), tokenizer, max_length=64, style=style),
                )
                for rows in (inputs.rows.forget, inputs.rows.spared)
            )
            self._sides = forget, spared
        return self._sides

    def _recipe(self, place: str, changes: Mapping[str, Any]) -> Any:
        world = self.folder / "world"
        content: dict[str, Any] = {
            "method": "msa",
            "seed": self.seed,
            "device": "cpu",
            "models": {name: str(world / name) for name in ("target", "base", "retrained")},
            "data": {name: str(world / f"{name}.jsonl") for name in ("forget", "retain")},
            "output": {
                "folder": str(self.folder / "variants" / place),
                "workspace": str(self.folder / "workspace"),
            },
            **SETTINGS,
        }
        content["scales"] = {**content["scales"], "choose": "grid"}
        for section, value in changes.items():
            known = content.get(section)
            content[section] = {**known, **value} if isinstance(known, dict) else value
        return build_recipe(content)

    def _equal(self, vector: Direction) -> tuple[float | None, float | None, float | None]:
        """Return α, the others' recall and their probability where forgetting is the retrained model's."""

        def forget_at(alpha: float) -> float:
            put(self.target - alpha * vector, self.live)
            return score(self.live, self.rows)[0]

        high = 0.25
        while forget_at(high) > self.wanted:
            high *= 2
            if high > LARGEST_ALPHA:
                return None, None, None
        low = high / 2 if high > 0.25 else 0.0
        for _ in range(7):
            middle = (low + high) / 2
            low, high = (middle, high) if forget_at(middle) > self.wanted else (low, middle)
        forget_at(high)
        probability, recalled = score(self.live, self.others)
        return high, recalled, probability


def score(model: torch.nn.Module, rows: Sequence[TokenRow]) -> tuple[float, float]:
    """Return mean answer probability and the share of rows whose every token is the likeliest."""
    scored = score_rows(model, rows, pad_id=0)
    probabilities = [math.exp(math.fsum(row.logprobs) / len(row.logprobs)) for row in scored]
    return mean(probabilities), mean(all(row.hits) for row in scored)


def table(found: Sequence[Found]) -> list[str]:
    """Return one line a variant: figures of all seeds, separated by slashes."""
    heads = [
        "variant",
        "α, β by the rule",
        "forget",
        "others",
        "α",
        "others at equal forgetting",
        "probability",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(one.name for one in found):
        group = [one for one in found if one.name == name]
        cells = [
            _joined([f"{one.alpha:g}, {one.beta:g}" for one in group]),
            _joined([_text(one.forget) for one in group]),
            _joined([_text(one.others) for one in group]),
            _joined([_text(one.equal_alpha, 2) for one in group]),
            _joined([_text(one.equal_others) for one in group]),
            _joined([_text(one.equal_probability) for one in group]),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _joined(cells: Sequence[str]) -> str:
    return " / ".join(cells)


def _text(value: float | None, digits: int = 3) -> str:
    return "never" if value is None else f"{value:.{digits}f}"
