"""The demo's world as the ground of a comparison, with the settings that the literature left open.

How many people are to be forgotten, for how long they were seen, how much training came after, and which
checkpoint methods start from: each is one number of `[demo]`.
"""

from __future__ import annotations

from pathlib import Path

from palinode.benchmarks.demo import STAGES, Stage, build_demo
from palinode.data.world import World, invent_world
from palinode.pipeline.compare.recipe import Demo
from palinode.progress import Listener


def make_world(settings: Demo, folder: Path, *, seed: int, listener: Listener) -> None:
    """Train the world's models into `folder`, and write its rows."""
    stages = (
        STAGES[0],
        Stage(settings.exposed_epochs, STAGES[1].learning_rate),
        Stage(settings.later_epochs, STAGES[2].learning_rate),
    )
    build_demo(world_of(settings, seed), folder, seed=seed, stages=stages, listener=listener)


def world_of(settings: Demo, seed: int) -> World:
    """Return the world of these settings."""
    return invent_world(seed, forget=settings.forget_people)
