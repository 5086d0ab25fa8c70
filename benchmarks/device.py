"""What people run, on the device that is here: one JSON line as soon as a part ends.

    python benchmarks/device.py [--parts train,read,…] [--model DIR | --shape NAME] [--cpu-small]

Parts: train, read, answers, filter, search, unlearn, eight (a model of 8 B: an adapter, and all weights),
and compiled (training, and training with compiled blocks), which is run only where it is named.
Each has its own limit in seconds, and one that ends there, is refused or has no room says so in its line.
`plain` is the field's own way in the same run: transformers' Trainer, its logits, its generate in batches of
64, and `continuous` its continuous batching. On a GPU `waits` counts where the host waits for the device in a
step of training. No network is needed: without --model weights are random, of the shape named. --cpu-small
runs every part on two cores, small.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import training
from palinode import Checkpoint
from palinode.benchmarks.demo import tiny_model
from palinode.data.tokenize import TokenRow
from palinode.data.world import invent_world, write_facts
from palinode.errors import PalinodeError
from palinode.models import generate, load_model, score_rows
from palinode.models.inplace import LiveModel
from palinode.models.loading import load_reader
from palinode.pipeline.costs import product_seconds
from palinode.pipeline.recipe import build_recipe
from palinode.pipeline.run import unlearn
from palinode.settings import LoraSettings, TrainingSettings
from palinode.training.finetune import add_adapter
from palinode.training.loop import train
from palinode.training.moments import input_moments, least_squares
from palinode.training.objectives import PLAIN_OBJECTIVE

SHAPES = {
    "small": (256, 704, 4, 4, 4, 8_192),
    "135m": (576, 1_536, 30, 9, 3, 49_152),
    "1b": (2_048, 8_192, 16, 32, 8, 128_256),
    "8b": (4_096, 14_336, 32, 32, 8, 128_256),
}
"""Width, inner width, layers, heads, key-value heads, vocabulary: like SmolLM2 and Llama 3."""

LIMITS = {
    "train": 60,
    "read": 40,
    "answers": 40,
    "filter": 60,
    "search": 40,
    "unlearn": 90,
    "eight": 150,
    "compiled": 90,
}
SMALL_LIMIT = 60


class Skipped(Exception):  # noqa: N818 - no error
    """Why a part is left out."""


class Bench:
    """A model on the device, and how much of everything there is."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.small, self.folder = args.cpu_small, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() and not self.small else "cpu")
        self.shape = "small" if self.small else args.shape
        self.rows = 24 if self.small else 400
        self.tokens, self.answer = (24, 12) if self.small else (62, 40)
        self.place = Path(args.model) if args.model else folder / "target"
        if not args.model:
            save(self.shape, self.place, device=self.device)
        self.target = Checkpoint.open(self.place)

    def token_rows(self, count: int) -> list[TokenRow]:
        chosen = random.Random(0)
        texts = (tuple(chosen.randrange(3, 5_000) for _ in range(self.tokens)) for _ in range(count))
        return [TokenRow(text, self.tokens - self.answer, place) for place, text in enumerate(texts)]

    def timed(self, work: Callable[[], object]) -> float:
        """Return the seconds of some work, the device's part of it included."""
        self.settle()
        started = time.perf_counter()
        work()
        self.settle()
        return time.perf_counter() - started

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # Parts

    def options(self, **others: Any) -> argparse.Namespace:
        """Return what `training` takes: steps over rows of one length."""
        usual = {
            "model": self.place, "batch": 16, "accumulation": 1, "tokens": self.tokens, "answer": self.answer,
            "steps": 4 if self.small else 30, "precision": "float32" if self.small else "bfloat16",
            "device": str(self.device),
        }  # fmt: skip
        return argparse.Namespace(**{**usual, **others})

    def train(self) -> dict[str, Any]:
        options = self.options()
        model = training.build_model(options)
        ours, plain = (fastest(step(model, options), options) for step in training.STEPPERS.values())
        size, peak = 6 * model.num_parameters(), self.peak()
        found = {"tokens_per_s": ours, "plain": plain, "of_peak": size * ours / peak}
        if self.device.type == "cuda":
            found["waits"] = self.waits(lambda: training.our_steps(model, options)) / options.steps
        eight = {"tokens": 8 * self.tokens, "answer": 8 * self.answer}
        longer = self.options(**eight, steps=max(3, options.steps // 3))
        long = fastest(training.our_steps(model, longer), longer)
        return {**found, "long_tokens_per_s": long, "long_of_peak": size * long / peak}

    def compiled(self) -> dict[str, Any]:
        """Train as usual, with compiled decoder blocks and, on a GPU, with CUDA graphs of them."""
        model, found, plain = training.build_model(self.options()), {}, torch.nn.Module.compile
        modes = {"eager": None, "compiled": None, "graphs": "reduce-overhead"}
        for name in modes if self.device.type == "cuda" else list(modes)[:2]:
            options = self.options(compile=name != "eager")
            torch.nn.Module.compile = partialmethod(plain, mode=modes[name])
            try:
                first = self.timed(lambda options=options: training.our_steps(model, options))
                again = training.our_steps(model, options)
            finally:
                torch.nn.Module.compile = plain
            found[name] = {"tokens_per_s": fastest(again, options), "first_s": first - sum(again)}
            print(json.dumps({"compiled": name, **found[name]}), flush=True)
        return found

    def peak(self) -> float:
        """Return the operations a second of a large product."""
        kind, size = (torch.bfloat16, 8_192) if self.device.type == "cuda" else (torch.float32, 1_024)
        return 2 * size**3 / product_seconds(self.device, kind, size, (size, size))

    def waits(self, work: Callable[[], object]) -> int:
        """Return how often the host waits for the device, which torch counts in warnings."""
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            work()
            torch.cuda.set_sync_debug_mode("default")
        return len(heard)

    def read(self) -> dict[str, Any]:
        model, rows = load_reader(self.target, device=self.device), self.token_rows(self.rows)
        score_rows(model, rows[:8], pad_id=0)  # whether they may be read together is found out once
        ours = self.timed(lambda: score_rows(model, rows, pad_id=0))

        @torch.inference_mode()
        def plain() -> None:
            for start in range(0, len(rows), 64):
                ids = torch.tensor([row.ids for row in rows[start : start + 64]], device=self.device)
                model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).cpu()

        tokens = sum(len(row.ids) for row in rows)
        return {"tokens_per_s": tokens / ours, "plain": tokens / self.timed(plain), "dtype": str(model.dtype)}

    def answers(self) -> dict[str, Any]:
        model = load_reader(self.target, device=self.device)
        prompts = [row.ids[: row.start] for row in self.token_rows(self.rows // 2)]
        most = 8 if self.small else 40
        limits: dict[str, Any] = {"max_new_tokens": most, "pad_id": 0, "stop_ids": [], "batch_rows": 256}
        generate(model, prompts[:4], **limits)
        ours = self.timed(lambda: generate(model, prompts, **limits))

        @torch.inference_mode()
        def plain() -> None:
            for start in range(0, len(prompts), 64):
                ids = torch.tensor(prompts[start : start + 64], device=self.device)
                rule = {"do_sample": False, "max_new_tokens": most, "min_new_tokens": most, "pad_token_id": 0}
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **rule)

        def continuous() -> None:
            rule = GenerationConfig(do_sample=False, max_new_tokens=most, pad_token_id=0, eos_token_id=-1)
            room = (
                len(prompts) * (self.tokens + most) if self.small else None
            )  # else all free memory is taken
            limit = room and ContinuousBatchingConfig(num_blocks=-(-room // 32), max_batch_tokens=room)
            asked = [list(prompt) for prompt in prompts]
            model.generate_batch(asked, generation_config=rule, continuous_batching_config=limit)

        found = {"seconds": ours, "plain": self.timed(plain), "continuous": self.timed(continuous)}
        return {"answers": len(prompts), "tokens": most, **found}

    def filter(self) -> dict[str, Any]:
        model, kept = load_model(self.target, device=self.device), {}

        def measure() -> None:
            for group in input_moments(model, self.token_rows(self.rows), pad_id=0):
                kept.update({key: value for key, value in group.values.items() if value.dim() == 2})

        read, widest = self.timed(measure), max(kept.values(), key=len)
        seconds = self.timed(lambda: least_squares(*2 * [widest.cpu().numpy()], mu=10.0, epsilon=0.1))
        return {"read_s": read, "moments": len(kept), "widest": len(widest), "solve_widest_s": seconds}

    def search(self) -> dict[str, Any]:
        other = moved(self.target, self.folder / "other")
        live, rows = load_reader(self.target, device=self.device), self.token_rows(self.rows // 4)
        score_rows(live, rows, pad_id=0)
        point = self.target - 0.5 * (other - self.target)
        one = LiveModel(live, held=True)  # the first time reads what the second finds
        first_s, put_s = (self.timed(lambda: one.put(point)) for _ in range(2))
        point_s = put_s + self.timed(lambda: score_rows(live, rows, pad_id=0))
        return {"first_put_s": first_s, "put_s": put_s, "point_s": point_s}

    def unlearn(self) -> dict[str, Any]:
        """The whole of it, projected, with words of an invented world as rows."""
        world = invent_world(3, early=5, middle=4, forget=2, late=2)
        if self.small:
            width, layers = 64, 2
        else:
            width, layers = SHAPES[self.shape][0], SHAPES[self.shape][2]
        target = tiny_model(
            self.folder / "words", world.vocabulary, width=width // 4 * 4, layers=layers, seed=1
        )
        base = moved(target, self.folder / "words-base")
        forget, retain = self.folder / "forget.jsonl", self.folder / "retain.jsonl"
        write_facts(forget, world.forget)
        write_facts(retain, world.others)
        content = {
            "device": str(self.device),
            "models": {"target": str(target.folder), "base": str(base.folder)},
            "data": {"forget": str(forget), "retain": str(retain)},
            "training": {"epochs": 2, "max_length": 64, "batch_size": 16},
            "transforms": [{"name": "projection"}],
            "scales": {"forget": 1.0, "retain": 0.0},
            "evaluation": {"max_rows": 20, "max_new_tokens": 4, "max_length": 64},
            "output": {"folder": str(self.folder / "unlearned")},
        }
        seconds = self.timed(lambda: unlearn(build_recipe(content)))
        return {"seconds": seconds, "parameters": target.parameters}

    def eight(self) -> dict[str, Any]:
        shape = "small" if self.small else "8b"
        needs, free = 24e9, torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else 0
        if not self.small and free < needs:
            raise Skipped(
                f"an adapter of 8 B takes a GPU with {needs / 1e9:.0f} GB free; {free / 1e9:.0f} are"
            )
        place = self.folder / "eight"
        save(shape, place, torch.bfloat16, self.device)
        origin, rows = Checkpoint.open(place), self.token_rows(4 * 16)
        found: dict[str, Any] = {"parameters": origin.parameters}
        lora = LoraSettings(rank=8, base="bfloat16")
        for name in ("adapter", "host"):
            model = load_model(origin, device=self.device, dtype=torch.bfloat16)
            if name == "adapter":
                add_adapter(model, origin, lora, seed=0)
            chosen: dict[str, Any] = {"lora": lora} if name == "adapter" else {"optimizer": name}
            found[name] = self.steps(model, rows, precision="bfloat16", **chosen)
            print(json.dumps({"eight": name, **found[name]}), flush=True)
            del model
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if not self.small and 17 * origin.parameters > free:
            return {**found, "device": "skipped: weights, gradients and moments take more than is free"}
        return {**found, "device": self.steps(load_model(origin, device=self.device), rows)}

    def steps(self, model: Any, rows: list[TokenRow], **settings: Any) -> dict[str, Any]:
        """Train a model; return which optimiser it took, and the seconds of its steps."""
        chosen, ends = TrainingSettings(epochs=1, batch_size=16, **settings), [time.perf_counter()]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def hear(_tokens: int) -> None:
            self.settle()
            ends.append(time.perf_counter())

        curve = train(model, rows, PLAIN_OBJECTIVE, chosen, seed=0, pad_id=0, on_progress=hear)
        first, *others = (after - before for before, after in itertools.pairwise(ends))
        found = {"optimizer": curve[-1].optimizer, "first_s": first, "step_s": median(others)}
        if self.device.type == "cuda":
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return {**found, "tokens_per_s": 16 * self.tokens / found["step_s"]}


PARTS = {name: getattr(Bench, name) for name in LIMITS}
USUAL = [name for name in LIMITS if name != "compiled"]


def fastest(steps: list[float], options: argparse.Namespace) -> float:
    """Return the tokens a second of the fastest step but the first."""
    return options.batch * options.tokens / min(steps[1:])


def save(
    shape: str, place: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> None:
    """Write a Llama of random weights."""
    width, inner, layers, heads, others, words = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=others, tie_word_embeddings=shape != "8b",
        max_position_embeddings=2_048,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(place)


def moved(origin: Checkpoint, place: Path) -> Checkpoint:
    """Return a model a little off another one."""
    model = AutoModelForCausalLM.from_pretrained(origin.folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=1e-3)
    model.save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (origin.folder / name).exists():
            (place / name).write_bytes((origin.folder / name).read_bytes())
    return Checkpoint.open(place)


def run(part: str, bench: Bench, limit: int) -> dict[str, Any]:
    """Return what a part found, or why it found nothing."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    started = time.perf_counter()
    try:
        found = PARTS[part](bench)
    except Skipped as reason:
        found = {"skipped": str(reason)}
    except Exception as error:
        if not isinstance(error, TimeoutError | PalinodeError | torch.OutOfMemoryError):
            traceback.print_exc()
        found = {"stopped": f"{type(error).__name__}: {error}"}
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    rounded = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()
    }
    return {"part": part, **rounded, "took_s": round(time.perf_counter() - started, 1), "limit_s": limit}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(USUAL), help="those wanted, with commas")
    parser.add_argument("--model", type=Path, help="a model folder")
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "8b"], default="135m")
    parser.add_argument("--cpu-small", action="store_true", help="every part on a processor, small")
    args = parser.parse_args()
    wanted = args.parts.split(",")
    if unknown := set(wanted) - LIMITS.keys():
        parser.error(f"there is no part {sorted(unknown)[0]}; there are {', '.join(LIMITS)}")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "processor"
        shape = args.model.name if args.model else bench.shape
        print(json.dumps({"device": name, "model": shape, "parameters": bench.target.parameters}), flush=True)
        for part in wanted:
            print(json.dumps(run(part, bench, SMALL_LIMIT if args.cpu_small else LIMITS[part])), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
