"""The demo's world as the ground of a comparison, with the settings that the literature left open.

How many people are to be forgotten, for how long and how often they were seen, how much training came
before and after, and which checkpoint methods start from: each is one number of `[demo]`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from palinode.benchmarks.demo import STAGES, Course, DemoStage, build_demo
from palinode.compare.recipe import Demo
from palinode.data.world import World, invent_world
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
            if all(other[key] == said[key] for key in ("seed", *keys)):
                _copy(mark.parent, folder, names)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARK, said)


def _copy(origin: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (origin / name).exists() and not (folder / name).exists():
            with claimed(folder / name) as partial:
                shutil.copytree(origin / name, partial, dirs_exist_ok=True)
                publish(partial, folder / name)


def world_of(settings: Demo, seed: int) -> World:
    """Return the world of these settings."""
    return invent_world(seed, forget=settings.forget_people)
