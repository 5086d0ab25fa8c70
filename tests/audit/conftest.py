"""Models and rows for audits: half forgotten, forgotten too much, and people whom no model has met."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from palinode.data.world import RELATIONS


@dataclass(frozen=True)
class Scene:
    """What an audit is made of; read it only."""

    target: Path
    retrained: Path
    base: Path
    pushed: Path
    """The target moved two and a half times the way to the retrained model: far past it."""
    forget: Path
    retain: Path
    holdout: Path


@pytest.fixture(scope="session")
def scene(tiny, world, tmp_path_factory):
    from palinode.weights import save

    folder = tmp_path_factory.mktemp("audit")
    save(tiny.target + 2.5 * (tiny.retrained - tiny.target), folder / "pushed")
    (folder / "holdout.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in strangers(world)))
    return Scene(
        tiny.target.folder,
        tiny.retrained.folder,
        tiny.base.folder,
        folder / "pushed",
        tiny.forget,
        tiny.retain,
        folder / "holdout.jsonl",
    )


def strangers(world) -> list[dict[str, str]]:
    """Facts about two people who do not exist: names put together from known ones, values drawn at random."""
    known = sorted({fact.subject for fact in (*world.others, *world.forget)})
    firsts, lasts = ([name.split()[place] for name in known] for place in (0, 1))
    made = [f"{first} {last}" for first in firsts for last in lasts]
    names = [name for name in made if name not in known][:2]
    random = np.random.default_rng(0)
    rows = []
    for name in names:
        for relation, one in RELATIONS.items():
            values = sorted({fact.answer for fact in world.others if fact.relation == relation})
            answer = values[int(random.integers(len(values)))]
            rows += [{"prompt": phrasing.format(name), "completion": answer} for phrasing in one["phrasings"]]
    return rows
