"""Time and memory of an optimiser step, beside transformers' own Trainer.

    python benchmarks/training.py [--model DIR] [--batch 4] [--tokens 64] [--answer 32] [--steps 6] [--json]

Both train the same model on the same rows, in batches of the same shape and in the same precision, with
AdamW and clipping as each has them. In one process they take turns, a few steps each, on one live model of
their own; steps are timed from the end of one to the end of the next, so that what each does between them
counts. Peak memory is that of a process of its own for each, above what it held before its first step:
weights are there already, gradients, optimiser state and activations are not. The model is a generated
Llama or the one in --model; rows are about as long as TOFU's, and with --answer 0 wholly
scored, as documents are. Memory on a processor is read from /proc, so this needs Linux; on CUDA the
allocator's own peak is taken.

speed_ratio is the Trainer's median step over ours, the median over pairs of turns that stand side by side;
memory_ratio is its peak over ours. Above 1 is better.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

SIDES = ("palinode", "trainer")
WARM_UP = 2
"""Steps at the beginning of a turn that are not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model folder, such as SmolLM2-135M")
    parser.add_argument("--width", type=int, default=256, help="width of the generated model")
    parser.add_argument("--layers", type=int, default=6, help="its layers")
    parser.add_argument("--words", type=int, default=16_384, help="its vocabulary")
    parser.add_argument("--batch", type=int, default=4, help="rows in a batch")
    parser.add_argument("--accumulation", type=int, default=1, help="batches in a step")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    parser.add_argument("--answer", type=int, default=32, help="tokens of its answer; 0: all but the first")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn, counted ones and two before")
    parser.add_argument("--turns", type=int, default=6, help="turns of each side")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if _has_cuda() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.answer = args.answer or args.tokens - 1
    logging.disable(logging.WARNING)
    if args.alone:
        print(json.dumps(peak_of(args.alone, args)))
        return
    figures = measure(args)
    report(figures)
    if args.json:
        print(json.dumps(figures))


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Return the medians of both sides' steps, and their peaks."""
    models = {side: build_model(args) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    ratios = []
    for turn in range(args.turns):
        found = {}
        for side in SIDES if turn % 2 else SIDES[::-1]:
            found[side] = STEPPERS[side](models[side], args)[WARM_UP:]
            seconds[side] += found[side]
        ratios.append(median(found["trainer"]) / median(found["palinode"]))
    parameters = models["palinode"].num_parameters()
    del models
    gc.collect()
    peaks = {side: alone(side) for side in SIDES}
    medians = {side: median(found) for side, found in seconds.items()}
    return {
        "parameters": parameters,
        "device": args.device,
        "precision": args.precision,
        "batch": [args.batch, args.accumulation, args.tokens, args.answer],
        "steps": len(seconds["palinode"]),
        **{f"{side}_step_s": medians[side] for side in SIDES},
        **{f"{side}_peak_mb": peaks[side] for side in SIDES},
        "speed_ratio": median(ratios),
        "memory_ratio": peaks["trainer"] / peaks["palinode"],
    }


def report(figures: dict[str, object]) -> None:
    rows, accumulation, tokens, answer = figures["batch"]
    print(
        f"{figures['parameters'] / 1e6:.1f} M parameters on {figures['device']}, {figures['precision']}, "
        f"{accumulation} x {rows} rows of {tokens} tokens, {answer} of them scored"
    )
    for side in SIDES:
        print(
            f"  {side:<9} {1000 * figures[f'{side}_step_s']:8.1f} ms a step,"
            f" {figures[f'{side}_peak_mb']:8.1f} MB above the weights"
        )
    ratios = f"{figures['speed_ratio']:.2f} x our time, {figures['memory_ratio']:.2f} x our memory"
    print(f"  the Trainer takes {ratios}")


# Both sides: train for some steps, return the seconds of each


def our_steps(model, args: argparse.Namespace) -> list[float]:
    from palinode.settings import TrainingSettings
    from palinode.training.loop import train
    from palinode.training.objectives import PLAIN_OBJECTIVE

    settings = TrainingSettings(
        epochs=1,
        learning_rate=1e-5,
        batch_size=args.batch,
        accumulation=args.accumulation,
        precision=args.precision,
        max_length=args.tokens,
        compile=getattr(args, "compile", False),
    )
    ends: list[float] = []
    train(
        model,
        rows_of(args),
        PLAIN_OBJECTIVE,
        settings,
        seed=0,
        pad_id=0,
        on_progress=lambda _tokens: ends.append(now(args)),
    )
    return differences(ends)


def their_steps(model, args: argparse.Namespace) -> list[float]:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(now(args))

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulation,
            learning_rate=1e-5,
            weight_decay=0.01,
            max_grad_norm=1.0,
            warmup_steps=1,
            lr_scheduler_type="linear",
            bf16=args.precision == "bfloat16",
            use_cpu=args.device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=args.device != "cpu",
            seed=0,
        )
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=[examples_of(row) for row in rows_of(args)],
            data_collator=collate,
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return differences(ends)


STEPPERS = {"palinode": our_steps, "trainer": their_steps}


def differences(ends: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(ends)]


def now(args: argparse.Namespace) -> float:
    if args.device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


# What is trained, and on what


def build_model(args: argparse.Namespace):
    """Return a float32 model on the device, the same one every time."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=args.words,
                hidden_size=args.width,
                intermediate_size=int(2.75 * args.width),
                num_hidden_layers=args.layers,
                num_attention_heads=4,
                tie_word_embeddings=True,
            )
        )
    return model.to(args.device)


def rows_of(args: argparse.Namespace) -> list:
    """Return as many rows as a turn needs, all of one length."""
    from palinode.data.tokenize import TokenRow

    chosen = random.Random(0)
    count = (args.steps + 1) * args.batch * args.accumulation
    texts = [tuple(chosen.randrange(3, 5_000) for _ in range(args.tokens)) for _ in range(count)]
    return [TokenRow(text, args.tokens - args.answer, place) for place, text in enumerate(texts)]


def examples_of(row) -> dict[str, list[int]]:
    labels = [-100] * row.start + list(row.ids[row.start :])
    return {"input_ids": list(row.ids), "attention_mask": [1] * len(row.ids), "labels": labels}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, object]:
    import torch

    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


# Memory, in a process of its own


def alone(side: str) -> float:
    """Return the peak of one side, in MB above what was held before its first step."""
    words = [sys.executable, __file__, *sys.argv[1:], "--alone", side]
    steady = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    found = subprocess.run(  # memory that is freed is given back at once, or the peak is a matter of luck
        words, check=True, capture_output=True, text=True, env={**os.environ, **steady}
    )
    return float(found.stdout.splitlines()[-1])


def peak_of(side: str, args: argparse.Namespace) -> float:
    import accelerate  # noqa: F401 - both sides use it, so that importing it is no part of a peak
    import torch
    from transformers import Trainer, TrainingArguments  # noqa: F401

    import palinode.training.finetune  # noqa: F401

    model = build_model(args)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        STEPPERS[side](model, args)
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    gc.collect()
    held = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    STEPPERS[side](model, args)
    return memory("VmHWM") - held


def memory(name: str) -> float:
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def _has_cuda() -> bool:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
