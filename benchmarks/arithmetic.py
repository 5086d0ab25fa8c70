"""Time and memory of writing θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0), beside two yardsticks in the same run.

    python benchmarks/arithmetic.py [--billions 0.5] [--shards 1] [--repeats 5] [--folder DIR] [--json]

- floor: read the four inputs once and write one output once, no arithmetic, as many threads;
- plain: four models loaded with transformers, added in bfloat16, saved, as the official code does.

The three are run in turn, several times, inputs in the page cache; each as a program of its own, whose
time for starting the interpreter and importing is counted apart. Prints medians and spreads, and with
--json one object last. Memory is read from /proc, so this needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ALPHA, BETA = 1.5, 0.75
ROLES = ("target", "base", "forget", "retain")
CHUNK = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--billions", type=float, default=0.5, help="parameters of the generated models")
    parser.add_argument("--shards", type=int, default=1, help="files of each model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--run", choices=sorted(PROGRAMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_child(args.run, args.folder)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = compare(Path(folder), args.billions, args.shards, args.repeats)
    if args.json:
        print(json.dumps(result))


def compare(folder: Path, billions: float, shards: int, repeats: int) -> dict[str, float]:
    """Generate the models, run the programs in turn, print a table and return its figures."""
    for seed, role in enumerate(ROLES):
        generate(folder / role, billions, shards, seed)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
    for repeat in range(repeats + 1):  # the first round only warms the page cache
        for name in PROGRAMS:
            shutil.rmtree(folder / "out", ignore_errors=True)
            measured = start_child(name, folder)
            if repeat:
                runs[name].append(measured)
    print(f"{billions} B parameters, {shards} file(s) a model, {os.cpu_count()} cores, {repeats} repeats")
    for name, found in runs.items():
        seconds = sorted(run["seconds"] for run in found)
        print(
            f"  {name:<6} {statistics.median(seconds):7.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}), "
            f"start-up {statistics.median(run['startup'] for run in found):.2f} s, "
            f"peak {max(run['peak_mb'] for run in found):,.0f} MB"
        )
    floor, apply, plain = (statistics.median(run["seconds"] for run in runs[name]) for name in PROGRAMS)
    above = max(run["peak_mb"] - run["torch_mb"] for run in runs["apply"])
    pairs = [a["seconds"] / f["seconds"] for a, f in zip(runs["apply"], runs["floor"], strict=True)]
    print(
        f"  apply / floor {statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f}); "
        f"plain / apply {plain / apply:.1f}; apply's peak above an interpreter with torch {above:,.0f} MB"
    )
    return {
        "floor_s": floor,
        "apply_s": apply,
        "ratio_to_floor": statistics.median(pairs),
        "speedup_over_plain": plain / apply,
        "peak_mb_above_torch": above,
    }


def start_child(name: str, folder: Path) -> dict[str, float]:
    """Run one program and return what it measured of itself."""
    command = [sys.executable, __file__, "--run", name, "--folder", str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


def run_child(name: str, folder: Path) -> None:
    """Import what the program needs, then time it alone."""

    def peak_mb() -> float:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024

    began = time.perf_counter()
    import torch  # noqa: F401

    torch_mb = peak_mb()
    work = PROGRAMS[name]()
    ready = time.perf_counter()
    work(folder)
    done = time.perf_counter()
    print(
        json.dumps(
            {"seconds": done - ready, "startup": ready - began, "peak_mb": peak_mb(), "torch_mb": torch_mb}
        )
    )


# The programs: a function that imports and returns the function that works


def floor_program():
    """Read every input once and write the output once, in large pieces, nothing else."""

    def work(folder: Path) -> None:
        pieces = []
        out = folder / "out"
        out.mkdir()
        for path in sorted((folder / "target").glob("*.safetensors")):
            size = path.stat().st_size
            with (out / path.name).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            pieces += [(path.name, start, min(CHUNK, size - start)) for start in range(0, size, CHUNK)]
        names = {name for name, _, _ in pieces}
        inputs = [{name: os.open(folder / role / name, os.O_RDONLY) for name in names} for role in ROLES]
        outputs = {name: os.open(out / name, os.O_WRONLY) for name in names}

        def copy(piece: tuple[str, int, int]) -> None:
            name, start, length = piece
            buffer = bytearray(length)
            for handles in inputs:
                os.preadv(handles[name], [buffer], start)
            os.pwrite(outputs[name], buffer, start)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(copy, pieces))
        for handle in outputs.values():
            os.fsync(handle)

    return work


def apply_program():
    """Palinode."""
    from palinode.methods import apply

    def work(folder: Path) -> None:
        apply(
            folder / "target",
            folder / "base",
            folder / "forget",
            folder / "out",
            retain_model=folder / "retain",
            forget_scale=ALPHA,
            retain_scale=BETA,
        )

    return work


def plain_program():
    """Four models in memory, added in bfloat16, saved."""
    import torch
    from transformers import AutoModelForCausalLM

    def work(folder: Path) -> None:
        models = [AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.bfloat16) for role in ROLES]
        target, base, forget, retain = (dict(model.named_parameters()) for model in models)
        with torch.no_grad():
            for name, weight in target.items():
                change = -ALPHA * (forget[name] - base[name]) + BETA * (retain[name] - base[name])
                weight.add_(change)
        models[0].save_pretrained(folder / "out")

    return work


PROGRAMS = {"floor": floor_program, "apply": apply_program, "plain": plain_program}


# Llama-shaped models with random weights


def generate(folder: Path, billions: float, shards: int, seed: int) -> None:
    """Write a Llama checkpoint of about that size in bfloat16, in that many files."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    width = 2048 if billions > 0.8 else 1536
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_hidden_layers=1,
        tie_word_embeddings=False,
    )
    per_layer = 4 * width * width + 3 * width * config.intermediate_size
    config.num_hidden_layers = max(1, round((billions * 1e9 - 2 * 32_000 * width) / per_layer))
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(1 << 20, generator=random).mul_(0.02).to(torch.bfloat16)
    tensors = {
        name: noise.repeat(-(-size // len(noise)))[:size].reshape(shape)
        for name, shape in shapes(config)
        for size in [shape[0] * (shape[1] if len(shape) > 1 else 1)]
    }
    names = list(tensors)
    index = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config.save_pretrained(folder)


def shapes(config) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of a Llama model."""
    width, inner = config.hidden_size, config.intermediate_size
    found = [("model.embed_tokens.weight", (config.vocab_size, width))]
    for layer in range(config.num_hidden_layers):
        home = f"model.layers.{layer}."
        found += [(f"{home}self_attn.{part}_proj.weight", (width, width)) for part in "qkvo"]
        found += [(f"{home}mlp.{part}_proj.weight", (inner, width)) for part in ("gate", "up")]
        found += [(f"{home}mlp.down_proj.weight", (width, inner))]
        found += [(f"{home}{part}_layernorm.weight", (width,)) for part in ("input", "post_attention")]
    return [*found, ("model.norm.weight", (width,)), ("lm_head.weight", (config.vocab_size, width))]


if __name__ == "__main__":
    main()
