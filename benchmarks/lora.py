"""Low-rank vectors beside full ones: memory, time, disk, and on the demo's world what they are worth.

    python benchmarks/lora.py [--model DIR] [--ranks 8 64] [--demo DIR …] [--json]

Cost: the same rows through `finetune`, all weights or an adapter, each in a process of its own. Peak memory
is the process's own above what it held before the model was loaded; seconds are the median optimiser step;
disk is what the vector takes. The model is a generated Llama of 35 M weights or the one in --model. Memory
is read from /proc, so this needs Linux.
Worth, with --demo (folders of `palinode demo`): recall by the rule and at equal forgetting, by rank and rate
(see at_equal_forgetting.py).

The last line names, for the first rank: memory_ratio, speed_ratio and disk_ratio, full over low-rank; above 1
is better. Figures in docs/lora.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from palinode.training.finetune import Watch

POOL = (
    "the", "of", "and", "a", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be",
    "at", "by", "had", "not", "are", "but", "from", "or", "have", "an",
)  # fmt: skip

WARM_UP = 2
"""Steps at the beginning that are not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model folder, such as SmolLM2-135M")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--words", type=int, default=48, help="words of a row")
    parser.add_argument("--demo", type=Path, action="append", default=[], help="folder of palinode demo")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3, 5e-3])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(cost(args.model, json.loads(args.alone), args.steps, args.batch, args.words)))
        return
    found = costs(args)
    worth = [entry for folder in args.demo for entry in study(folder, args.ranks, args.rates)]
    if args.json:
        full, low = found[0], found[1]
        ratios = {
            f"{name}_ratio": round(full[key] / low[key], 3)
            for name, key in (("memory", "memory"), ("speed", "seconds"), ("disk", "disk"))
        }
        print(json.dumps({"costs": found, "worth": worth, **ratios}))


# Cost


def costs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each variant in a process of its own, and print a line each."""
    variants: list[Any] = [None]
    for rank in args.ranks:
        variants += [{"rank": rank}, {"rank": rank, "base": "bfloat16"}]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or generated(Path(folder) / "model")
        for lora in variants:
            words = [sys.executable, __file__, "--model", str(model), "--alone", json.dumps(lora)]
            words += ["--steps", str(args.steps), "--batch", str(args.batch), "--words", str(args.words)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found.append({"lora": lora, **json.loads(done.stdout.splitlines()[-1])})
            print(line(found[-1], found[0]), flush=True)
    return found


def line(one: dict[str, Any], full: dict[str, Any]) -> str:
    name = (
        "full" if one["lora"] is None else ", ".join(f"{key} {value}" for key, value in one["lora"].items())
    )
    return (
        f"{name:28} peak {one['memory'] / 1e6:7.0f} MB ({full['memory'] / one['memory']:.2f} x)   "
        f"step {one['seconds']:.3f} s ({full['seconds'] / one['seconds']:.2f} x)   "
        f"disk {one['disk'] / 1e6:7.2f} MB ({full['disk'] / one['disk']:.0f} x)"
    )


def cost(model: Path, lora: Any, steps: int, batch: int, words: int) -> dict[str, Any]:
    """Fine-tune a few steps and return peak memory, seconds a step, and bytes of the vector."""
    import torch

    from palinode import Checkpoint, TrainingSettings, finetune, read_examples

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    base = Checkpoint.open(model)
    settings = TrainingSettings.model_validate(
        {"epochs": -(-(steps + WARM_UP) // 4), "batch_size": batch, "learning_rate": 1e-4, "lora": lora}
    )
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        rows = read_examples(write_rows(Path(folder) / "rows.jsonl", batch * 4, words))
        held = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        done = finetune(
            base,
            rows,
            Path(folder) / "out",
            settings,
            watch=Watch(on_step=lambda *_: ends.append(time.perf_counter())),
        )
        peak = memory("VmHWM")
        size = sum(path.stat().st_size for path in done.saved.folder.glob("*.safetensors"))
    seconds = [later - sooner for sooner, later in pairwise(ends)][WARM_UP - 1 :]
    return {"memory": peak - held, "seconds": median(seconds), "disk": size, "steps": len(seconds)}


def write_rows(path: Path, count: int, words: int) -> Path:
    """Write prompts and answers of random common words."""
    chance = random.Random(0)
    rows = [[chance.choice(POOL) for _ in range(words)] for _ in range(count)]
    texts = [(" ".join(row[: words // 3]), " ".join(row[words // 3 :])) for row in rows]
    path.write_text(
        "".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in texts)
    )
    return path


def memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def generated(folder: Path) -> Path:
    """Write a Llama of 35 M weights whose words are those of the rows and many more."""
    from palinode.benchmarks.demo import tiny_model

    words = [*POOL, *(f"w{number}" for number in range(8000))]
    return tiny_model(folder, words, width=512, layers=10, seed=0).folder


# Worth


def study(folder: Path, ranks: list[int], rates: list[float]) -> list[dict[str, Any]]:
    """Measure full vectors and low-rank ones on one demo, and print a table."""
    import torch
    from at_equal_forgetting import Demo, table

    torch.set_num_threads(1)
    demo = Demo(folder)
    found = [demo.measure("plain MSA", {})]
    for rank in ranks:
        for rate in rates:
            changes = {"training": {"lora": {"rank": rank}, "learning_rate": rate}}
            found.append(demo.measure(f"rank {rank}, rate {rate:g}", changes))
            print(json.dumps(asdict(found[-1])), flush=True)
    for text in table(found):
        print(text)
    return [asdict(entry) for entry in found]


if __name__ == "__main__":
    main()
