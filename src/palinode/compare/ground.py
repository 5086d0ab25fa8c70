"""What a comparison stands on: which rows serve for what, and the demo's world where it has that.

    forget set    all of it is unlearned; one part is what points are chosen on, the rest is measured
    retain set    methods train on one part, points are chosen on another, the rest is measured

So nothing is measured on rows that a choice was made on, nor on retain rows that a method rehearsed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from palinode.benchmarks.demo import STAGES, Course, DemoStage, build_demo
from palinode.compare.comparison_recipe import Demo, Split
from palinode.data.examples import Example, at_most
from palinode.data.world import World, invent_world
from palinode.errors import DataError
from palinode.methods import METHODS
from palinode.pipeline.inputs import InputRows, spared_rows
from palinode.pipeline.recipe import Recipe
from palinode.progress import Listener
from palinode.records import read_json, write_json
from palinode.weights.atomic import claimed, publish

MARK = "demo.json"
"""What a world's folder says it is, so that another world can take over what they have in common."""
BEGINNING = ("forget_people",)
"""Settings that decide the base checkpoint."""
MIDDLE = (*BEGINNING, "between_epochs", "exposed_epochs")
"""Settings that decide all that is before stage 3."""
END = (*MIDDLE, "later_epochs")
"""Settings that decide the retrained model, which never sees the forget people."""


def make_world(settings: Demo, folder: Path, *, seed: int, listener: Listener) -> None:
    """Train the world's models into `folder`, and write its rows; earlier stages may be another world's."""
    rate = STAGES[1].learning_rate
    stages = (
        STAGES[0],
        DemoStage(settings.exposed_epochs, rate),
        DemoStage(settings.later_epochs, STAGES[2].learning_rate),
    )
    between = DemoStage(settings.between_epochs, rate) if settings.between_epochs else None
    course = Course(between, again=settings.exposures > 1, halfway=True)
    said = {"seed": seed, **settings.model_dump(exclude={"base"})}
    _take_over(folder, said)
    build_demo(world_of(settings, seed), folder, seed=seed, stages=stages, course=course, listener=listener)


def _take_over(folder: Path, said: dict[str, Any]) -> None:
    """Copy the stages that a world beside this one has had alike, and say what this one is."""
    for mark in sorted(folder.parent.glob(f"world-*/{MARK}")):
        other = read_json(mark)
        for keys, names in (
            (BEGINNING, ("base",)),
            (MIDDLE, ("before", "during", "exposed", "unexposed")),
            (END, ("retrained",)),
        ):
            if any(other[key] != said[key] for key in ("seed", *keys)):
                continue
            for name in names:
                if (mark.parent / name).exists() and not (folder / name).exists():
                    with claimed(folder / name) as partial:
                        shutil.copytree(mark.parent / name, partial, dirs_exist_ok=True)
                        publish(partial, folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARK, said)


def world_of(settings: Demo, seed: int) -> World:
    """Return the world of these settings."""
    return invent_world(seed, forget=settings.forget_people)


@dataclass(frozen=True, slots=True)
class Shares:
    """The rows of a comparison by what they serve for."""

    forget: Sequence[Example]
    forget_probe: Sequence[Example]
    forget_test: Sequence[Example]
    retain_train: Sequence[Example]
    retain_probe: Sequence[Example]
    retain_test: Sequence[Example]

    @property
    def parts(self) -> dict[str, Sequence[Example]]:
        """The parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def divide_rows(
    forget: Sequence[Example], retain: Sequence[Example], split: Split, *, most: int, seed: int
) -> Shares:
    """Return the rows divided; at most `most` of each set are measured.

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
    return Shares(
        forget=forget,
        forget_probe=at_most(probe, split.probe_rows, seed=seed),
        forget_test=at_most(test, most, seed=seed),
        retain_train=train,
        retain_probe=at_most(other, split.probe_rows, seed=seed),
        retain_test=at_most(rest, most, seed=seed),
    )


def rows_for(recipe: Recipe, shares: Shares) -> InputRows:
    """Return the rows of one contestant's run; the seed draws the sample that vectors are trained on."""
    settings = METHODS[recipe.method].check_settings(recipe.method_settings)
    wanted = settings.sample_size(len(shares.forget))
    return InputRows(
        forget=shares.forget,
        retain=shares.retain_train,
        retain_sample=at_most(shares.retain_train, wanted, seed=recipe.seed) if wanted else [],
        forget_probe=shares.forget_probe,
        retain_probe=shares.retain_probe,
        spared=spared_rows(recipe, shares.forget, shares.retain_train, []),
        forget_test=shares.forget_test,
        retain_test=shares.retain_test,
    )


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
