"""The demo: the real pipeline on an invented world, beside the truth and beside the plain task vector.

Exact match is the share of rows to which a model's greedy answer is exactly the right one. The scales are
chosen by the same rule as everywhere, without looking at the retrained model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from palinode.benchmarks.demo import build_demo
from palinode.data.world import World, invent_world
from palinode.errors import OutputError, WorkspaceError
from palinode.pipeline.recipe import Recipe, build_recipe
from palinode.pipeline.reporting import NAME, gather, write_reports
from palinode.pipeline.run import Unlearned, unlearn
from palinode.pipeline.workspace import Workspace
from palinode.progress import Listener, NullListener
from palinode.records import RECORD_VERSION, Outcome, read_json, repeated_by, write_json
from palinode.version import __version__

SETTINGS: Mapping[str, Any] = {
    "training": {
        "epochs": 30,
        "learning_rate": 5e-4,
        "batch_size": 32,
        "max_length": 64,
        "precision": "float32",
    },
    "scales": {"probe_rows": 300, "retain_share": 0.95},
    "evaluation": {"max_rows": 10_000, "max_new_tokens": 4, "batch_rows": 512, "max_length": 64},
}
"""What the demo's recipes have that is not the paper's default."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found, and where its files are."""

    folder: Path
    record: Mapping[str, Any]
    """The content of the folder's record.json."""


def demo(
    output: Path | str = "palinode-demo", *, seed: int = 0, listener: Listener | None = None
) -> DemoResult:
    """Train the invented world's models, unlearn the forget people, and measure exact match.

    Writes everything under `output`; an interrupted demo goes on where it was. Raises OutputError
    when the folder holds something else.
    """
    return run_demo(invent_world(seed), Path(output), seed=seed, settings=SETTINGS, listener=listener)


def run_demo(
    world: World,
    folder: Path,
    *,
    seed: int,
    settings: Mapping[str, Any],
    listener: Listener | None = None,
    **training: Any,
) -> DemoResult:
    """Run the demo on any world; `training` goes to `build_demo` (stages, width, layers)."""
    listener = listener or NullListener()
    claim(folder, seed)
    started = time.monotonic()
    with one_thread(), repeated_by(f"palinode demo --seed {seed}"):
        with Workspace(folder / "workspace").locked(listener):
            models = build_demo(world, folder / "world", seed=seed, listener=listener, **training)
        named = {"target": models.target, "base": models.base, "retrained": models.retrained}
        rows = {"forget": models.forget, "retain": models.retain, "holdout": models.holdout}
        places = {name: model.folder for name, model in named.items()}
        done, plain = (
            unlearn(
                demo_recipe(
                    method, folder / name, folder / "workspace", places, rows, {"seed": seed, **settings}
                ),
                listener=listener,
            )
            for method, name in (("msa", "unlearned"), ("task_vector", "task_vector"))
        )
    path = folder / "record.json"
    if not (done.finished_before and plain.finished_before and path.exists()):
        write_json(path, _record(world, done, plain, seed, time.monotonic() - started))
        write_reports(gather(folder), folder / f"{NAME}.html")
    return DemoResult(folder, read_json(path))


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch on one thread: so small a model gains little from two, and loses much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def claim(folder: Path, seed: int, *, name: str = "demo.json") -> None:
    """Make the folder a demo's own by a mark of that name, or see that it already is."""
    mark = folder / name
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name another --output for the demo")
    if mark.exists():
        try:
            other = read_json(mark)["seed"]
        except (OSError, ValueError, KeyError, TypeError):
            raise OutputError(f"{mark} cannot be read; name another --output for the demo") from None
        if other != seed:
            raise OutputError(
                f"{folder} holds the demo of seed {other}; name another --output for seed {seed}"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} exists and is not empty; name another --output for the demo")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"seed": seed, "palinode": __version__})


def demo_recipe(
    method: str,
    output: Path,
    workspace: Path,
    models: Mapping[str, Path],
    rows: Mapping[str, Path],
    settings: Mapping[str, Any],
) -> Recipe:
    """Return the recipe of one of a demo's runs, from folders of models and files of rows."""
    return build_recipe(
        {
            "method": method,
            "device": "cpu",
            "models": {name: str(place) for name, place in models.items()},
            "data": {name: str(place) for name, place in rows.items()},
            "output": {"folder": str(output), "workspace": str(workspace), "keep_unchanged": True},
            **settings,
        }
    )


def _record(world: World, done: Unlearned, plain: Unlearned, seed: int, seconds: float) -> dict[str, Any]:
    if not (done.outcomes and plain.outcomes):
        raise WorkspaceError("the demo's workspace is gone; remove its folder to run it anew")
    answers = {**done.outcomes, "task_vector": plain.outcomes["unlearned"]}
    chosen = {"unlearned": done.record["scales"], "task_vector": plain.record["scales"]}
    people = len(world.others)  # the retain rows are the others' facts, then the general ones
    return {
        "version": RECORD_VERSION,
        "palinode": __version__,
        "seed": seed,
        "people": {
            "forget": len({fact.subject for fact in world.forget}),
            "others": len({fact.subject for fact in world.others}),
        },
        "recall": {
            name: {
                "forget": exact_match(sets["forget"]),
                "others": exact_match([outcome for outcome in sets["retain"] if outcome.row < people]),
                "general": exact_match([outcome for outcome in sets["retain"] if outcome.row >= people]),
            }
            for name, sets in answers.items()
        },
        "scales": {
            name: {which: scales[which] for which in ("forget", "retain")} for name, scales in chosen.items()
        },
        "points": {name: scales["points"] for name, scales in chosen.items()},
        "seconds": round(seconds, 1),
    }


def exact_match(outcomes: Sequence[Outcome]) -> float:
    """Return the share of outcomes whose generated answer is exactly the expected one."""
    return sum(outcome.generated == outcome.expected for outcome in outcomes) / len(outcomes)
