"""The ladder demo: three kinds of evidence against the truth, and what unlearning gives from each rung.

The truth is what the training loop was seen to do, batch by batch, written down apart from the log.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from palinode.benchmarks.ladder import MARK, LadderModels, Size, build_ladder, ladder_world
from palinode.data.examples import Example, read_examples
from palinode.data.world import World
from palinode.history.duplicates import row_hash
from palinode.history.exposures import ExposureLog, ExposureReader
from palinode.history.judgement import Location
from palinode.history.locating import locate
from palinode.history.orders.palinode import LoggedStage, rebuild, write_stages
from palinode.history.series import open_series
from palinode.models.loading import load_tokenizer
from palinode.pipeline.demo_run import DemoResult, claim, one_thread, recall
from palinode.pipeline.recipe import build_recipe
from palinode.pipeline.run import unlearn
from palinode.pipeline.workspace import Workspace
from palinode.progress import Listener, NullListener
from palinode.records import read_json, write_json, write_text
from palinode.report.location_report import location_markdown
from palinode.report.pictures import location_picture
from palinode.version import __version__

SETTINGS: Mapping[str, Any] = {
    "training": {
        "epochs": 20,
        "learning_rate": 5e-4,
        "batch_size": 32,
        "max_length": 64,
        "precision": "float32",
    },
    "scales": {"probe_rows": 200, "retain_share": 0.95, "retain_grid": [0.0, 1.0]},
    "evaluation": {"max_rows": 10_000, "max_new_tokens": 4, "batch_rows": 512, "max_length": 64},
}
"""What the recipes of the ladder demo have that is not the paper's default."""

VERSION = 1


def demo_locate(
    output: Path | str = "palinode-demo-locate", *, seed: int = 0, listener: Listener | None = None
) -> DemoResult:
    """Train the ladder of an invented world, locate its forget rows, and unlearn from every rung.

    Writes everything under `output`; an interrupted demo goes on where it was. Raises OutputError
    when the folder holds something else.
    """
    return run_locate(ladder_world(seed), Path(output), seed=seed, listener=listener)


def run_locate(
    world: World,
    folder: Path,
    *,
    seed: int,
    size: Size | None = None,
    settings: Mapping[str, Any] = SETTINGS,
    listener: Listener | None = None,
) -> DemoResult:
    """Run the ladder demo on any world."""
    listener = listener or NullListener()
    claim(folder, seed, name="demo-locate.json")
    path = folder / "record.json"
    started = time.monotonic()
    with one_thread():
        with Workspace(folder / "workspace").locked(listener):
            recorder = _Recorder(folder / "log")
            models = build_ladder(
                world, folder / "world", seed=seed, size=size, on_step=recorder.note, listener=listener
            )
            recorder.close()
        if path.exists():
            return DemoResult(folder, read_json(path))
        found = _locate_all(models, folder, seed, listener)
        rungs = _unlearn_all(world, models, folder, settings, seed, listener)
    main = found["main"]["all"].as_record()
    write_text(folder / "location.md", location_markdown(main))
    write_text(folder / "location.svg", location_picture(main))
    record = {
        "version": VERSION,
        "palinode": __version__,
        "seed": seed,
        "target_step": models.target_step,
        "requests": {name: _request(models, name, kinds) for name, kinds in found.items()},
        "rungs": rungs,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(path, record)
    return DemoResult(folder, record)


class _Recorder:
    """Writes the exposure log of a training that may go on from a finished stretch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log: ExposureLog | None = None

    def note(self, step: int, rows: Sequence[Example]) -> None:
        """Log one step; a session begins with the first step that is heard of."""
        if self.log is None:
            self.log = ExposureLog.open(
                self.folder, data="ladder demo", tokenizer="ladder demo", start=step - 1
            )
        words = sum(
            len(f"{row.prompt} {row.answer}".split()) + 1 for row in rows
        )  # a token each, and the end
        self.log.record(step, [row_hash(row) for row in rows], tokens=words)

    def close(self) -> None:
        """Seal the log."""
        if self.log is not None:
            self.log.close()


def _locate_all(
    models: LadderModels, folder: Path, seed: int, listener: Listener
) -> dict[str, dict[str, Location]]:
    """Locate every request by each kind of evidence alone, and by all of them."""
    ladder, data = open_series(models.ladder), read_examples(models.data)
    stages = [LoggedStage(stretch.numbers, stretch.settings, stretch.seed) for stretch in models.stretches]
    write_stages(folder / "order.json", stages, data="world/data.jsonl", model="world/start")
    order = rebuild(stages, data, load_tokenizer(models.target))
    log = ExposureReader.open(folder / "log")
    control = read_examples(models.control)
    evidence: dict[str, dict[str, Any]] = {
        "log": {"log": log, "corpus": data},
        "order": {"order": order, "corpus": data},
        "behaviour": {"control": control},
        "all": {"log": log, "order": order, "corpus": data, "control": control},
    }
    return {
        name: {
            kind: locate(
                read_examples(path),
                ladder,
                target_step=models.target_step,
                max_length=64,
                device="cpu",
                seed=seed,
                listener=listener if kind == "behaviour" else None,
                **given,
            )
            for kind, given in evidence.items()
        }
        for name, path in models.requests.items()
    }


def _request(models: LadderModels, name: str, found: Mapping[str, Location]) -> dict[str, Any]:
    """Compare what was found about one request with the truth."""
    true_steps = _true_steps(models, name)
    first = min(step for steps in true_steps for step, _ in steps)
    before = [place for place, step in enumerate(models.steps) if step < first]
    place = before[-1] if before else None
    entry: dict[str, Any] = {
        "rows": len(true_steps),
        "first": first,
        "exposures": sum(map(len, true_steps)),
        "clean_place": place,
        "clean_step": None if place is None else models.steps[place],
        "found": {},
    }
    for kind, location in found.items():
        choice = location.recommended
        steps = [{(seen.step, seen.copy is not None) for seen in row.seen} for row in location.rows]
        entry["found"][kind] = {
            "recommended_step": None if choice is None else choice.step,
            "recommended_place": None if choice is None else choice.place,
            "right": (None if choice is None else choice.place) == place,
            "rungs_off": abs((-1 if choice is None else choice.place) - (-1 if place is None else place)),
            "every_exposure_right": steps == true_steps if kind != "behaviour" else None,
            "certainty": None if choice is None else choice.certainty,
            "conclusion": location.onset.conclusion if location.onset else None,
            "loaded": len(location.onset.gaps) if location.onset else None,
            "warnings": list(location.warnings),
        }
    return entry


def _true_steps(models: LadderModels, name: str) -> list[set[tuple[int, bool]]]:
    """Return, for each row of a request, the steps in which it (False) or its near-copy (True) was."""
    truth = {int(row): steps for row, steps in read_json(models.truth).items()}
    numbers = {example.key: number for number, example in enumerate(read_examples(models.data))}
    found = []
    for example in read_examples(models.requests[name]):
        (turn,) = example.turns
        near = replace(example, turns=(replace(turn, content=f"{MARK} {turn.content}"),))
        found.append(
            {
                (step, copy)
                for text, copy in ((example, False), (near, True))
                if text.key in numbers
                for step in truth[numbers[text.key]]
            }
        )
    return found


def _unlearn_all(
    world: World,
    models: LadderModels,
    folder: Path,
    settings: Mapping[str, Any],
    seed: int,
    listener: Listener,
) -> list[dict[str, Any]]:
    """Unlearn the main request from every rung, and from the target itself (the task vector)."""
    ladder = open_series(models.ladder)
    truth = _true_steps(models, "main")
    starts = [(rung.step, Path(rung.location), "msa") for rung in ladder.rungs]
    found = []
    for step, base, method in [*starts, (models.target_step, models.target.folder, "task_vector")]:
        recipe = build_recipe(
            {
                "method": method,
                "seed": seed,
                "device": "cpu",
                "models": {"target": str(models.target.folder), "base": str(base)},
                "data": {"forget": str(models.requests["main"]), "retain": str(models.retain)},
                "output": {
                    "folder": str(folder / "unlearned" / f"step{step}"),
                    "workspace": str(folder / "workspace"),
                },
                **settings,
            }
        )
        done = unlearn(recipe, command=f"palinode demo --locate --seed {seed}", listener=listener)
        people = len(world.early) + len(world.middle)  # the retain rows are theirs, then the general facts
        recalls = {
            name: {
                "forget": recall(sets["forget"]),
                "others": recall([outcome for outcome in sets["retain"] if outcome.row < people]),
            }
            for name, sets in done.outcomes.items()
        }
        found.append(
            {
                "step": step,
                "method": method,
                "seen": sum(any(seen <= step for seen, _ in steps) for steps in truth),
                "base": recalls["base"],
                "target": recalls["target"],
                "unlearned": recalls["unlearned"],
                "scales": {name: done.record["scales"][name] for name in ("forget", "retain")},
                "kept_rule": done.record["scales"]["kept_rule"],
            }
        )
    return found
