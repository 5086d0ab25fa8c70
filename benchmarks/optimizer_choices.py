"""What each place of AdamW's moments does to a forget vector, its α and the forgetting.

    python benchmarks/optimizer_choices.py [--seed 3] [--model FOLDER --rows 16]

A world of invented people is learned by a tiny model, and two of them unlearned, with weights and moments on
the device, with moments in 8 bits, and in host memory with float32 and with bfloat16 passes. Each forget
vector is held against that of the device. With --model the vectors of a real model on invented rows instead.
A JSON line each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from palinode.benchmarks.demo import DemoStage, build_demo
from palinode.data.examples import read_examples
from palinode.data.world import invent_world
from palinode.jobs import unlearn
from palinode.pipeline.recipe import build_recipe
from palinode.settings import TrainingSettings
from palinode.training.finetune import finetune
from palinode.weights import Checkpoint, profile

WAYS = [
    ("device", "float32"),
    ("8bit", "float32"),
    ("host", "float32"),
    ("device", "bfloat16"),
    ("host", "bfloat16"),
]


def against(first, other) -> dict[str, float]:
    measured = profile({"plain": first, "other": other, "difference": other - first})
    norms = measured.norms()
    return {
        "relative": norms["difference"] / norms["plain"],
        "cosine": measured.cosine("plain", "other") or 0.0,
    }


def in_the_world(seed: int, place: Path) -> None:
    world = invent_world(seed, early=5, middle=4, forget=2, late=2)
    stages = (DemoStage(40, 1e-2), DemoStage(40, 1e-2), DemoStage(10, 5e-3))
    tiny = build_demo(world, place / "world", seed=seed, stages=stages, width=32, layers=2)
    plain = None
    for optimizer, precision in WAYS:
        output = place / f"{optimizer}-{precision}"
        content = {
            "device": "cpu",
            "models": {"target": str(tiny.target.folder), "base": str(tiny.base.folder)},
            "data": {"forget": str(tiny.forget), "retain": str(tiny.retain)},
            "training": {
                "epochs": 8,
                "learning_rate": 3e-3,
                "batch_size": 16,
                "max_length": 64,
                "precision": precision,
                "optimizer": optimizer,
            },
            "evaluation": {"max_rows": 40, "max_new_tokens": 3, "max_length": 64, "batch_rows": 64},
            "output": {"folder": str(output), "keep_unchanged": True},
        }
        made = unlearn(build_recipe(content))
        (model,) = Path(f"{output}.workspace").glob("finetune-forget-*/model")
        vector = Checkpoint.open(model) - tiny.base
        plain = plain or vector
        scores = {
            name: made.record["scores"]["unlearned"][name]["answer_probability"]["value"]
            for name in ("forget", "retain")
        }
        alpha = made.record["scales"]["forget"]
        line = {
            "model": "tiny world",
            "seed": seed,
            "optimizer": optimizer,
            "precision": precision,
            "alpha": alpha,
        }
        print(json.dumps({**line, **scores, **against(plain, vector)}), flush=True)


def of_a_model(folder: Path, rows: int, place: Path) -> None:
    base, plain = Checkpoint.open(folder), None
    world = invent_world(0, early=2, middle=2, forget=40, late=2)
    lines = [{"question": one.prompt, "answer": f"{one.answer}."} for one in world.forget[:rows]]
    (place / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    examples = read_examples(str(place / "rows.jsonl"))
    for optimizer, precision in WAYS:
        settings = TrainingSettings(epochs=3, batch_size=4, precision=precision, optimizer=optimizer)
        done = finetune(base, examples, place / f"{optimizer}-{precision}", settings, device="cpu")
        vector = done.checkpoint - base
        plain = plain or vector
        line = {
            "model": folder.name,
            "optimizer": optimizer,
            "precision": precision,
            "loss": done.curve[-1].loss,
        }
        print(json.dumps({**line, "seconds": done.seconds, **against(plain, vector)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.model:
            of_a_model(given.model, given.rows, Path(folder))
        else:
            in_the_world(given.seed, Path(folder))


if __name__ == "__main__":
    main()
