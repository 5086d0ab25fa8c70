"""What a comparison stands on: its recipe, which rows serve for what, and the demo's world where it has that.

The recipe is strict TOML: a run's own recipe for what all share, said in the same words and checked by the
same code, and a list of contestants; only what a comparison has besides is defined here.

    forget set    all of it is unlearned; one part is what points are chosen on, the rest is measured
    retain set    methods train on one part, points are chosen on another, the rest is measured

So nothing is measured on rows that a choice was made on, nor on retain rows that a method rehearsed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from palinode.audit.attack import BUDGETS
from palinode.benchmarks import BENCHMARKS
from palinode.benchmarks.demo import STAGES, Course, DemoStage, build_demo
from palinode.data.examples import Example, at_most
from palinode.data.world import invent_world
from palinode.errors import DataError, RecipeError
from palinode.methods import METHODS
from palinode.metrics.table import METRICS
from palinode.pipeline.inputs import InputRows, spared_rows, workspace_folder
from palinode.pipeline.recipe import Recipe, build_recipe, checked_settings, known_keys, with_changes
from palinode.pipeline.workspace import fingerprint
from palinode.progress import Listener
from palinode.settings import MAX_SEED, Seed, StrictModel, read_settings

SHARED = ("device", "models", "data", "training", "evaluation", "prompts", "output", "prepare")
"""Keys of a run's recipe that all contestants share."""
OPEN_TO_CONTESTANTS = ("training.", "method_settings.", "scales.forget", "scales.retain", "transforms")
"""Keys that a contestant may fix or search."""


class SearchBudget(StrictModel):
    """What every contestant may spend on one unlearned model."""

    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps."""
    seconds: float | None = Field(default=None, gt=0)
    """Seconds of training; epochs are set by how long one of them takes on this machine."""
    share: Literal["total", "each"] = "total"
    """Of a method that trains two models: both together have the budget, or each of them."""

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Self:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("say budget.steps or budget.seconds: one of the two")
        return self


class Choice(StrictModel):
    """The rule that picks one point of each contestant, on the probe rows."""

    floor: Literal["base", "retrained"] = "base"
    """Whose behaviour on the forget rows is wanted: estimated from the base, or the retrained model's own."""
    retain_share: float = Field(default=0.9, gt=0, le=1)
    """Share of the target's retain probability that a point must keep."""


class Split(StrictModel):
    """Which rows serve for what. All forget rows are unlearned; no retain row serves for two things."""

    forget_probe: float = Field(default=0.5, gt=0, lt=1)
    """Share of the forget rows on which points are chosen; the others are measured."""
    retain_train: float = Field(default=0.5, gt=0, lt=1)
    """Share of the retain rows that methods may train on."""
    retain_probe: float = Field(default=0.25, gt=0, lt=1)
    """Share of the retain rows on which points are chosen; what is left is measured."""
    probe_rows: int = Field(default=200, ge=1)
    """Most rows of each set on which points are chosen."""

    @model_validator(mode="after")
    def _leaves_rows_to_measure(self) -> Self:
        if self.retain_train + self.retain_probe >= 1:
            raise ValueError("retain_train and retain_probe together leave no retain rows to measure")
        return self


class Measures(StrictModel):
    """What is measured of the models that were chosen."""

    judge: str | None = "overlap"
    """overlap, offline:FOLDER or URL#model; "" for none."""
    key_variable: str | None = None
    """The environment variable with the key of a judge at a URL, where it is not OpenAI's own."""
    relearning: bool = False
    """Whether half of the forget set is relearned, with the audit's quick budget."""
    relearn_rate: float = Field(default=BUDGETS["quick"].relearn_rate, gt=0)
    """Learning rate of relearning."""
    rank_by: str = "answer_probability"
    """A metric of single rows by which contestants are ranked."""

    @model_validator(mode="after")
    def _knows_the_metric(self) -> Self:
        if self.rank_by not in METRICS:
            raise ValueError(f"there is no metric {self.rank_by!r}; choose among {', '.join(METRICS)}")
        return self


class BenchmarkPart(StrictModel):
    """A benchmark that the chosen models are measured with besides."""

    name: str
    """A name that `palinode list benchmarks` prints."""
    data: str
    """Its folder, or a hub name."""
    split: str | None = None
    options: dict[str, str] = Field(default_factory=dict)
    max_rows: int | None = Field(default=None, ge=1)
    """Questions of each set."""
    rows: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Questions of single sets, where they are to be others, as in {forget = 40}."""
    max_new_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.name not in BENCHMARKS or self.name == "own":
            known = ", ".join(name for name in BENCHMARKS if name != "own")
            raise ValueError(
                f"there is no benchmark {self.name!r} here; choose among {known}, or leave [benchmark] out: "
                "your own rows are measured in any case"
            )
        return self


class Demo(StrictModel):
    """The invented world of the demo, where `world = "demo"`."""

    forget_people: int = Field(default=10, ge=1)
    exposed_epochs: int = Field(default=20, ge=1)
    """Epochs in which the forget people are trained on."""
    later_epochs: int = Field(default=10, ge=1)
    """Epochs of further training without them."""
    between_epochs: int = Field(default=0, ge=0)
    """Epochs of further training on the base's own rows, between the base and the exposure."""
    exposures: int = Field(default=1, ge=1, le=2)
    """2: the forget people are in the rows of the later epochs too, so that training ends with them."""
    base: Literal["start", "base", "during", "exposed"] = "base"
    """The checkpoint that methods start from: untrained, before the exposure, halfway through it, or right
    after it."""

    def key(self) -> dict[str, Any]:
        """Return what decides the world, as plain values; a key's default is as if there were no such key."""
        found = self.model_dump(exclude={"base"})
        usual = {"between_epochs": 0, "exposures": 1}
        return {name: value for name, value in found.items() if usual.get(name) != value}


class Contestant(StrictModel):
    """One method, or one form of it, with its own few hyper-parameters."""

    name: str = Field(min_length=1)
    method: str
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys that are fixed, such as "method_settings.beta" = 0.1."""
    search: dict[str, list[Any]] = Field(default_factory=dict)
    """Keys that are searched, with their values; the first values are the first point."""

    @model_validator(mode="after")
    def _can_be_tried(self) -> Self:
        open_to = [
            name for name, one in METHODS.items() if one.kind != "inference" and "given" not in one.needs
        ]
        if self.method not in open_to:
            raise ValueError(
                f"there is no method {self.method!r} to compare; choose among {', '.join(open_to)}"
            )
        transformed = "transforms" in (*self.set, *self.search)
        for key in (*self.set, *self.search):
            if not key.startswith(OPEN_TO_CONTESTANTS) or key == "training.epochs":
                raise ValueError(
                    f"{key} is the same for all contestants (epochs follow from the budget); a "
                    "contestant has its own training.…, method_settings.…, scales.forget, scales.retain and "
                    "transforms"
                )
            if key.startswith("scales.") and not (METHODS[self.method].has_scales or transformed):
                raise ValueError(f"the method {self.method} adds no vectors, so it has no {key}")
        if both := sorted(set(self.set) & set(self.search)):
            raise ValueError(f"{both[0]} is both fixed and searched")
        if empty := [key for key, values in self.search.items() if not values]:
            raise ValueError(f"{empty[0]} has no values to search")
        return self


class ComparisonRecipe(StrictModel):
    """What a comparison says beside what all contestants share."""

    world: Literal["demo"] | None = None
    """Make the demo's models and rows; None: [models] and [data] name them."""
    demo: Demo = Demo()
    seed: Seed = 0
    """Seeds the division of rows, the points drawn, and intervals."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Seeds of training: points are tried with the first, the chosen one is made with each."""
    tries: int = Field(default=6, ge=1)
    """Points that every contestant has."""
    budget: SearchBudget
    choose: Choice = Choice()
    split: Split = Split()
    measure: Measures = Measures()
    benchmark: BenchmarkPart | None = None
    keep_models: bool = True
    """Keep the chosen models in the workspace when they have been measured."""
    contestants: list[Contestant] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_different_contestants(self) -> Self:
        names = [contestant.name for contestant in self.contestants]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two contestants are called {twice[0]!r}")
        if len(set(self.seeds)) < len(self.seeds) or not all(0 <= seed <= MAX_SEED for seed in self.seeds):
            raise ValueError(f"seeds is {self.seeds}; name different numbers from 0")
        return self


@dataclass(frozen=True, slots=True)
class CompareRecipe:
    """A whole comparison: what all share as a run's recipe, and the rest."""

    shared: Recipe
    content: Mapping[str, Any]
    """The shared part as plain values, from which contestants' recipes are built."""
    comparison: ComparisonRecipe

    @property
    def workspace(self) -> Path:
        """The folder of steps."""
        return workspace_folder(self.shared)


def load_comparison(path: Path, changes: Sequence[str] = ()) -> CompareRecipe:
    """Read a TOML recipe of a comparison and apply `key=value` changes. Raises RecipeError."""
    return build_comparison(read_settings(path, "recipe"), changes)


def build_comparison(content: Mapping[str, Any], changes: Sequence[str] = ()) -> CompareRecipe:
    """Check plain nested values, with `key=value` changes, and return the comparison they describe."""
    changed = with_changes(content, changes)
    own = {key: value for key, value in changed.items() if key not in SHARED}
    if misplaced := sorted(own.keys() & {"method", "method_settings", "scales"}):
        raise RecipeError(f"{misplaced[0]} belongs to a contestant, in [[contestants]]")
    comparison = checked_settings(ComparisonRecipe, own, _keys)
    shared = {key: value for key, value in changed.items() if key in SHARED} | {"seed": comparison.seed}
    if comparison.world is not None:
        shared = _with_world(shared, comparison.demo)
    recipe = build_recipe(shared)
    if recipe.models.base is None or recipe.data.retain is None:
        lacking = "data.retain" if recipe.models.base else "models.base"
        raise RecipeError(f"a comparison needs {lacking}: the rule that chooses points looks at it")
    if comparison.choose.floor == "retrained" and not (recipe.models.retrained or recipe.prepare):
        raise RecipeError('choose.floor = "retrained" needs models.retrained')
    return CompareRecipe(recipe, shared, comparison)


def _with_world(shared: Mapping[str, Any], demo: Demo) -> dict[str, Any]:
    """Return the shared part with the places where the world's models and rows will be."""
    if given := sorted(shared.keys() & {"models", "data", "prepare"}):
        raise RecipeError(f'world = "demo" makes its own models and rows; leave [{given[0]}] out')
    draft = build_recipe({**shared, "models": {"target": ".", "base": "."}, "data": {"forget": "."}})
    folder = world_folder(demo, workspace_folder(draft), seed=shared["seed"])
    models = {"target": "target", "base": demo.base, "retrained": "retrained"}
    rows = {"forget": "forget.jsonl", "retain": "retain.jsonl", "holdout": "holdout.jsonl"}
    return {
        **shared,
        "models": {name: str(folder / place) for name, place in models.items()},
        "data": {name: str(folder / place) for name, place in rows.items()},
    }


def world_folder(demo: Demo, workspace: Path, *, seed: int) -> Path:
    """Return the folder of the world's models and rows, which all choices of a base share."""
    key = fingerprint(world=demo.key(), seed=seed)
    return workspace / f"world-{key[:12]}"


def _keys(place: Sequence[int | str]) -> list[str]:
    """Return the keys that may stand in the section of `place`."""
    if place[0] == "contestants" and len(place) > 1:
        return [f"contestants.{place[1]}.{name}" for name in Contestant.model_fields]
    shared = [key for key in known_keys() if key.split(".")[0] in SHARED]
    return [*known_keys(ComparisonRecipe), *shared]


def make_world(settings: Demo, folder: Path, *, seed: int, listener: Listener) -> None:
    """Train the world's models into `folder`, and write its rows."""
    rate = STAGES[1].learning_rate
    stages = (
        STAGES[0],
        DemoStage(settings.exposed_epochs, rate),
        DemoStage(settings.later_epochs, STAGES[2].learning_rate),
    )
    between = DemoStage(settings.between_epochs, rate) if settings.between_epochs else None
    course = Course(between, again=settings.exposures > 1, halfway=True)
    world = invent_world(seed, forget=settings.forget_people)
    build_demo(world, folder, seed=seed, stages=stages, course=course, listener=listener)


def divide_rows(
    forget: Sequence[Example], retain: Sequence[Example], split: Split, *, most: int, seed: int
) -> InputRows:
    """Return the rows divided, the retain rows to train on as `retain`; at most `most` are measured of a set.

    Raises DataError where a part is empty.
    """
    probe, test = _parts(forget, [split.forget_probe], seed=seed + 1)
    train, other, rest = _parts(retain, [split.retain_train, split.retain_probe], seed=seed + 2)
    found = {
        "forget rows to choose on": probe,
        "forget rows to measure": test,
        "retain rows to train on": train,
        "retain rows to choose on": other,
        "retain rows to measure": rest,
    }
    if empty := [name for name, rows in found.items() if not rows]:
        raise DataError(
            f"there are no {empty[0]} ({len(forget)} forget and {len(retain)} retain rows); "
            "give more rows, or other shares in [split]"
        )
    return InputRows(
        forget=forget,
        forget_probe=at_most(probe, split.probe_rows, seed=seed),
        forget_test=at_most(test, most, seed=seed),
        retain=train,
        retain_probe=at_most(other, split.probe_rows, seed=seed),
        retain_test=at_most(rest, most, seed=seed),
    )


def rows_for(recipe: Recipe, shares: InputRows) -> InputRows:
    """Return the rows of one contestant's run; the seed draws the sample that vectors are trained on."""
    settings = METHODS[recipe.method].check_settings(recipe.method_settings)
    wanted = settings.sample_size(len(shares.forget))
    sample = at_most(shares.retain, wanted, seed=recipe.seed) if wanted else []
    return replace(shares, retain_sample=sample, spared=spared_rows(recipe, shares.forget, shares.retain, []))


def _parts(examples: Sequence[Example], shares: Sequence[float], *, seed: int) -> list[list[Example]]:
    """Return the examples in parts of these shares, and what is left; answers of one row stay together."""
    rows = sorted({example.row for example in examples})
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    ends = np.cumsum([round(share * len(rows)) for share in shares]).tolist()
    part_of = {}
    for place, position in enumerate(order):
        part_of[rows[position]] = sum(place >= end for end in ends)
    return [
        [example for example in examples if part_of[example.row] == part] for part in range(len(shares) + 1)
    ]
