"""What a filter costs: one forward pass, moments of the inputs, factorisation, and the vector itself.

    python benchmarks/moments.py --model FOLDER --rows FILE [--count 200] [--repeats 3] [--widths 1024,2048]

Seconds of each part, median and spread of the repeats; the pass alone, the moments, and the moments with
both halves of each sum take turns, so that their price is a ratio of things on one machine. `--widths` solves
one layer of each width, with the peak of memory. Figures in docs/filters.md.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from palinode.data.batches import pad_right
from palinode.data.examples import read_examples
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.models.likelihoods import padded_batches
from palinode.models.loading import load_model, load_tokenizer, pad_token
from palinode.models.reading import model_inputs
from palinode.training import moments as measuring
from palinode.training.moments import BATCH_TOKENS, along, basis_of, input_moments, least_squares
from palinode.weights import Checkpoint


def paired(parts: Mapping[str, Callable[[], object]], repeats: int) -> list[list[float]]:
    """Return the seconds of each repeat of each part; they take turns, so that all meet the same machine."""
    found: dict[str, list[float]] = {label: [] for label in parts}
    for _ in range(repeats):
        for label, act in parts.items():
            started = time.perf_counter()
            act()
            found[label].append(time.perf_counter() - started)
    for label, times in found.items():
        print(
            f"{label:<34} {statistics.median(times):8.2f} s   [{min(times):.2f}, {max(times):.2f}]",
            flush=True,
        )
    return list(found.values())


def ratio(times: Sequence[float], others: Sequence[float]) -> str:
    """Return the median of the ratios, and the least and the greatest."""
    found = [one / other for one, other in zip(times, others, strict=True)]
    return f"{statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", required=True, help="a file of rows")
    parser.add_argument("--count", type=int, default=200, help="rows that are read")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--widths", default="", help="widths of single layers, with commas")
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    model = load_model(checkpoint, device=torch.device("cpu"))
    tokenizer = load_tokenizer(checkpoint)
    rows = tokenize(read_examples(args.rows)[: args.count], tokenizer, max_length=512, style=PromptStyle())
    pad_id = pad_token(tokenizer)
    print(
        f"{len(rows)} rows, {sum(len(row.ids) for row in rows):,} tokens, {torch.get_num_threads()} threads"
    )

    @torch.no_grad()
    def forward() -> None:
        for members in padded_batches(model, rows, pad_id=pad_id, max_tokens=BATCH_TOKENS, max_rows=64):
            batch = pad_right([rows[member] for member in members], pad_id=pad_id)
            model.base_model(**model_inputs(model, batch))

    moments: dict[str, np.ndarray] = {}

    def measure() -> None:
        for group in input_moments(model, rows, pad_id=pad_id):
            moments.update({key: value.float().numpy() for key, value in group.values.items()})

    def measure_whole() -> None:
        strip, measuring.STRIP = measuring.STRIP, 1 << 30
        measure()
        measuring.STRIP = strip

    parts = {
        "forward pass alone": forward,
        "with both halves": measure_whole,
        "moments of all layers": measure,
    }
    alone, whole, half = paired(parts, args.repeats)
    print(f"moments / forward pass: {ratio(half, alone)}; / with both halves: {ratio(half, whole)}")
    matrices = [value for key, value in moments.items() if value.ndim == 2 and key != "head"]
    held = sum(value.nbytes for value in moments.values())
    print(f"moments on disk: {held / 1e6:.0f} MB for a set")

    def solve() -> None:
        for moment in matrices:
            least_squares(moment, moment, mu=100.0, epsilon=1.0)

    def turn() -> None:
        for moment in matrices:
            basis_of(moment, energy=0.9)

    paired({f"principal axes, {len(matrices)} layers": turn}, args.repeats)
    paired({f"factorisation, {len(matrices)} layers": solve}, args.repeats)
    shapes = [
        info.shape for info in checkpoint.tensors.values() if len(info.shape) == 2 and ".layers." in info.name
    ]
    by_width = {len(moment): moment for moment in matrices}

    def apply() -> None:
        for outputs, width in shapes:
            along(np.ones((outputs, width), np.float32), by_width[width], 1)

    paired({"one product with every matrix": apply}, args.repeats)
    for width in (int(text) for text in args.widths.split(",") if text):
        draw = np.random.default_rng(width).standard_normal((width, width), np.float32)
        moment = draw @ draw.T / width
        paired(
            {f"one layer of width {width}": lambda m=moment: least_squares(m, m, mu=100.0, epsilon=1.0)}, 1
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"  peak of the process so far: {peak / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
