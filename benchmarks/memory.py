"""Peak memory of each phase of a run beside what the plan says, on this machine's processor.

    python benchmarks/memory.py --model FOLDER [--rows 24] [--batch-size 4] [--plan]

A model is fine-tuned on invented rows, its vector filtered, two scales tried, all evaluated. The process's
resident memory is looked at two hundred times a second; every task of the run has its own peak. A JSON line
for each task as it ends, the plan in the last one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
from safetensors.torch import load_file, save_file

from palinode.data.world import invent_world
from palinode.jobs import unlearn
from palinode.pipeline.recipe import build_recipe
from palinode.pipeline.run import dry_run
from palinode.progress import Advance


def beside(model: Path, place: Path) -> Path:
    """A base that is the model but for one tensor."""
    shutil.copytree(model, place)
    tensors = load_file(place / "model.safetensors")
    tensors |= {name: value * 1.001 for name, value in tensors.items() if name.endswith("norm.weight")}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


class Peaks:
    """A listener that knows the most memory that each task saw."""

    def __init__(self) -> None:
        self.process, self.peak, self.label = psutil.Process(), 0, "before"
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.005)

    def say(self, text: str) -> None: ...

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Advance]:  # noqa: ARG002
        self._end()
        self.label = label
        yield lambda _amount: None
        self._end()

    def _end(self) -> None:
        print(json.dumps({"task": self.label, "peak": self.peak}), flush=True)
        self.peak, self.label = self.process.memory_info().rss, f"after {self.label}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--plan", action="store_true", help="print the plan alone")
    parser.add_argument("--set", nargs="*", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        world = invent_world(0, early=2, middle=2, forget=40, late=40)
        for name, rows in (("forget", world.forget), ("retain", world.late)):
            lines = [{"question": one.prompt, "answer": f"{one.answer}. " * 8} for one in rows[: given.rows]]
            (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        content = {
            "method": "msa",
            "device": "cpu",
            "models": {"target": str(given.model), "base": str(beside(given.model, place / "base"))},
            "data": {name: str(place / f"{name}.jsonl") for name in ("forget", "retain")},
            "training": {"epochs": 1, "batch_size": given.batch_size},
            "transforms": [{"name": "least_squares", "mu": 10, "arrival": False}],
            "scales": {"choose": "grid", "forget_grid": [0.5, 1.0], "probe_rows": 8},
            "evaluation": {"max_rows": 8, "max_new_tokens": 16},
            "output": {"folder": str(place / "out"), "keep_unchanged": True},
        }
        recipe = build_recipe(content, given.set)
        planned = dry_run(recipe)
        if not given.plan:
            unlearn(recipe, listener=Peaks())
        held = {
            one.phase: sum((one.weights, one.gradients, one.optimiser, one.activations))
            for one in planned.held
        }
        print(
            json.dumps(
                {"plan": held, "memory": planned.memory, "steps": [asdict(one) for one in planned.steps]}
            )
        )


if __name__ == "__main__":
    main()
