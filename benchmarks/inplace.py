"""Time of trying a grid of scales on one live model, beside that of the evaluations alone.

    python benchmarks/inplace.py [--model DIR] [--rows 64] [--grid 5] [--json]

Each of 5 x 5 pairs (α, β) is put into one live model, which then gives the log-probabilities of answers on
some rows; in turn with it the same evaluation is made without putting anything. The overhead compares
medians: (put + evaluation) / evaluation alone − 1. A search evaluates 64 rows at a point, and 64 more where
there is a retain set: then putting weighs half as much. At the end (0, 0) must give the target back bit
for bit. The model is a generated Llama of 0.1 B parameters in bfloat16, or the one in --model, in either
case with three made-up neighbours. Memory is read from /proc, so this needs Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median

import arithmetic

TOKENS, SCORED = 64, 32
"""Length of a row and of its answer, about those of TOFU."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model folder, such as SmolLM2-135M")
    parser.add_argument("--billions", type=float, default=0.1, help="size of the generated model")
    parser.add_argument("--rows", type=int, default=64, help="rows of an evaluation")
    parser.add_argument("--grid", type=int, default=5, help="values of α, and of β")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--neighbours", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.neighbours:
        write_neighbours(args.model, args.neighbours)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        place = Path(folder) / "models"
        if args.model:  # in a process of its own, so that our peak is that of the search
            words = ["--model", str(args.model), "--neighbours", str(place)]
            subprocess.run([sys.executable, __file__, *words], check=True)
        else:
            arithmetic.start_child(place, "generate", args.billions, 1)
        figures = measure(place, args.rows, args.grid)
    report(figures)
    if args.json:
        print(json.dumps(figures))


def measure(folder: Path, row_count: int, grid: int) -> dict[str, object]:
    """Try every point of the grid on one live model, and return what that took."""
    import torch

    from palinode.data.tokenize import TokenRow
    from palinode.methods.method import Vectors
    from palinode.models.inplace import put
    from palinode.models.likelihoods import score_rows
    from palinode.models.loading import load_model
    from palinode.weights import Checkpoint

    target, base, forget, retain = (Checkpoint.open(folder / role) for role in arithmetic.ROLES)
    live = load_model(target, device=torch.device("cpu"))
    chosen, words = random.Random(0), live.config.vocab_size
    texts = [tuple(chosen.randrange(words) for _ in range(TOKENS)) for _ in range(row_count)]
    rows = [TokenRow(text, TOKENS - SCORED, place) for place, text in enumerate(texts)]

    def set_scales(alpha: float, beta: float) -> None:
        put(Vectors(forget - base, retain - base).taken_off(target, alpha, beta), live)

    def evaluate() -> None:
        score_rows(live, rows, pad_id=0)

    before = digest(live)
    evaluate()  # the first of each is slower than all that follow
    peak_without = peak_mb()
    set_scales(1.0, 1.0)
    moved = digest(live) != before
    puts, evaluations, alone = [], [], []
    steps = [2.0 * place / max(1, grid - 1) for place in range(grid)]
    for place, (alpha, beta) in enumerate(product(steps, steps)):
        if place % 2:
            alone.append(seconds_of(evaluate))
        puts.append(seconds_of(lambda: set_scales(alpha, beta)))  # noqa: B023 - called at once
        evaluations.append(seconds_of(evaluate))
        if not place % 2:
            alone.append(seconds_of(evaluate))
    set_scales(0.0, 0.0)
    return {
        "model": f"{target.parameters / 1e9:.2f} B",
        "rows": row_count,
        "points": len(puts),
        "put_s": median(puts),
        "evaluate_s": median(alone),
        "overhead": (median(puts) + median(evaluations)) / median(alone) - 1,
        "overhead_of_put": median(puts) / median(alone),
        "peak_mb": peak_mb(),
        "peak_mb_of_put": peak_mb() - peak_without,
        "returns_bit_for_bit": moved and digest(live) == before,
    }


def report(figures: dict[str, object]) -> None:
    back = (
        "gives the target back bit for bit"
        if figures["returns_bit_for_bit"]
        else "DOES NOT GIVE THE TARGET BACK"
    )
    size = f"{figures['model']} parameters, {figures['points']} points, {figures['rows']} rows"
    print(
        f"{size} of {TOKENS} tokens\n"
        f"  put {figures['put_s']:.2f} s, evaluate {figures['evaluate_s']:.2f} s (medians)\n"
        f"  all points cost {figures['overhead']:+.1%} over as many evaluations; putting alone is "
        f"{figures['overhead_of_put']:.1%} of them\n"
        f"  peak {figures['peak_mb']:,.0f} MB, of which putting {figures['peak_mb_of_put']:,.0f} MB\n"
        f"  (0, 0) {back}"
    )


def seconds_of(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def digest(model) -> str:
    """Return a hash of all parameters."""
    total = hashlib.blake2b()
    for parameter in model.parameters():
        total.update(parameter.detach().contiguous().view(-1).numpy())
    return total.hexdigest()


def peak_mb() -> float:
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def write_neighbours(model: Path, folder: Path) -> None:
    """Write a model (as the target) and three states near it."""
    import torch
    from safetensors.torch import load_file, save_file

    for seed, role in enumerate(arithmetic.ROLES):
        shutil.copytree(model, folder / role)
        for path in (folder / role).glob("*.safetensors") if seed else ():
            noise, tensors = torch.Generator().manual_seed(seed), load_file(path)
            for weight in tensors.values():
                if weight.is_floating_point():
                    weight += torch.randn(weight.shape, generator=noise) * 2e-4
            save_file(tensors, path, {"format": "pt"})


if __name__ == "__main__":
    main()
