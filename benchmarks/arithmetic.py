"""Time and memory of writing θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0), beside three yardsticks in the same run.

    python benchmarks/arithmetic.py [--billions 0.5 1.1] [--shards 1 4] [--repeats 5] [--json]

- floor: read the four inputs once and write one output once, no arithmetic, in as many threads as apply
  uses, each with one buffer; in pieces of 1 MB and of 4 MB, and the faster of the two counts;
- apply: Palinode;
- mergekit: the recipe that `palinode export` writes, run by mergekit-yaml in an environment of its own;
- plain: four models loaded with transformers, added in bfloat16, saved, as the official code does.

They are run in turn, several times, inputs in the page cache, each as a program of its own; ratios are
taken within a round. What counts is reading, adding and writing. Apart from that stand: starting the
interpreter and importing (of mergekit: the time of its bare import); apply's opening of the models and
choice of a rounding ("plan", which does count in comparison with mergekit and plain); its check of what it
wrote; and making the output durable (fsync), which floor and apply both do. The models differ so little
that apply rounds stochastically, which is the dearer way. Memory is read from /proc, so this needs Linux; a
peak is that of the process (VmHWM), given above that of an interpreter that has imported torch.
--profile shows, instead of all that, where apply's time goes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import mergekit_env

ALPHA, BETA = 1.5, 0.75
ROLES = ("target", "base", "forget", "retain")
THREADS = min(16, len(os.sched_getaffinity(0)))
"""As many as apply uses."""
SLOW = ("mergekit", "plain")

Figures = dict[str, float]
Runs = dict[str, list[Figures]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--billions", type=float, nargs="+", default=[0.5, 1.1], help="sizes of the models")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 4], help="files of each model")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one that warms up")
    parser.add_argument(
        "--slow-repeats", type=int, default=3, help="rounds that mergekit and plain take part in"
    )
    parser.add_argument(
        "--one-shard-gb", type=float, help="also apply's peak memory on one file of that size"
    )
    parser.add_argument("--profile", action="store_true", help="only show where apply's time goes")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument(
        "--mergekit-env", type=Path, default=mergekit_env.FOLDER, help="its environment; made once"
    )
    parser.add_argument("--without-mergekit", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_child(args.folder, *args.run)
        return
    mergekit = None if args.without_mergekit or args.profile else find_mergekit(args.mergekit_env)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.profile:
            result = profile_all(Path(folder), args)
        else:
            result = measure_all(Path(folder), args, mergekit)
    if args.json:
        print(json.dumps(result))


def find_mergekit(folder: Path) -> Path | None:
    """Return where mergekit's programs lie, or say why there are none."""
    try:
        return mergekit_env.make_environment(folder)
    except mergekit_env.InstallError as error:
        print(f"mergekit is left out: {error}")
        return None


def measure_all(folder: Path, args: argparse.Namespace, mergekit: Path | None) -> dict[str, object]:
    """Measure every combination of size and number of files; print the table, and return its figures."""
    torch_mb = start_child(folder, "torch")["peak_mb"]
    cases = [(billions, shards) for billions in args.billions for shards in args.shards]
    found = []
    for billions, shards in cases:
        place = folder / "models"
        start_child(place, "generate", billions, shards)
        runs = run_in_turn(place, args.repeats, args.slow_repeats, mergekit)
        found.append({"billions": billions, "shards": shards, **summary(runs, torch_mb)})
        shutil.rmtree(place)
    print_table(found, torch_mb, args.repeats)
    first = max(found, key=lambda case: (case["shards"] == 1, case["billions"]))
    result = {name: first[name] for name in HEADLINE} | {"runs": found}
    if args.one_shard_gb:
        result["one_shard"] = measure_one_shard(folder / "models", args.one_shard_gb, torch_mb)
    return result


HEADLINE = (
    "floor_s",
    "apply_s",
    "ratio_to_floor",
    "speedup_over_mergekit",
    "speedup_over_plain",
    "peak_mb_above_torch",
)


# Running the programs in turn


def run_in_turn(folder: Path, repeats: int, slow_repeats: int, mergekit: Path | None) -> Runs:
    """Run the programs one after the other, round by round, and return what each measured in each round."""
    runs: Runs = {"floor 1 MB": [], "floor 4 MB": [], "apply": []}
    for repeat in range(repeats + 1):
        read_all(folder)  # a slow program may have driven the inputs out of the page cache
        turn = {
            "floor 1 MB": lambda: start_child(folder, "floor", 1 << 20),
            "floor 4 MB": lambda: start_child(folder, "floor", 4 << 20),
            "apply": lambda: start_child(folder, "apply"),
        }
        if 1 <= repeat <= slow_repeats:
            turn["plain"] = lambda: start_child(folder, "plain")
            if mergekit:
                turn["mergekit"] = lambda: run_mergekit(folder, mergekit)
        for name, program in turn.items():
            measured = program()
            shutil.rmtree(folder / "out")
            os.sync()  # so that what this one left to be written does not slow the next one down
            if repeat:
                runs.setdefault(name, []).append(measured)
    return runs


def start_child(folder: Path, *run: object) -> Figures:
    """Run one of our programs and return what it measured of itself."""
    command = [sys.executable, __file__, "--folder", str(folder), "--run", *map(str, run)]
    environment = {**mergekit_env.offline(), "STARTED": str(time.perf_counter())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, run))} failed:\n{done.stderr}")
    measured: Figures = json.loads(done.stdout.splitlines()[-1])
    return measured


def run_mergekit(folder: Path, programs: Path) -> Figures:
    """Run mergekit-yaml on the recipe, and its import alone; the difference is its work."""
    imported = measure_program([programs / "python", "-c", "import mergekit.scripts.run_yaml"])
    quiet = ("--quiet", "--no-copy-tokenizer", "--no-write-model-card")
    whole = measure_program([programs / "mergekit-yaml", folder / "recipe.yaml", folder / "out", *quiet])
    startup = imported["seconds"]
    cpu_s = whole["cpu_s"] - imported["cpu_s"]
    return {**whole, "seconds": whole["seconds"] - startup, "startup": startup, "cpu_s": cpu_s}


def measure_program(command: list[object]) -> Figures:
    """Run a program that does not measure itself."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        words = list(map(str, command))
        process = subprocess.Popen(words, env=mergekit_env.offline(), stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(words)} failed:\n{said.read().decode(errors='replace')}")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}


def read_all(folder: Path) -> None:
    """Read every input once, so that it lies in the page cache."""
    buffer = bytearray(4 << 20)
    for path in folder.glob("*/*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# The figures


def summary(runs: Runs, torch_mb: float) -> dict[str, object]:
    """Return medians, spreads and ratios; null where a program did not run."""
    floor = min(("floor 1 MB", "floor 4 MB"), key=lambda name: median(run["seconds"] for run in runs[name]))
    named = {"floor": runs[floor], **{name: runs.get(name, []) for name in ("apply", *SLOW)}}
    figures: dict[str, object] = {"floor_piece": floor.removeprefix("floor ")}
    for name, found in named.items():
        for key, short in (("seconds", "s"), ("startup", "startup_s"), ("cpu_s", "cpu_s")):
            figures[f"{name}_{short}"] = middle([run[key] for run in found])
        figures[f"{name}_spread_s"] = spread([run["seconds"] for run in found])
        figures[f"{name}_peak_mb"] = max((run["peak_mb"] for run in found), default=None)
    for name in ("floor", "apply"):
        figures[f"{name}_durable_s"] = middle([run["durable"] for run in named[name]])
    for phase in ("plan", "check"):
        figures[f"apply_{phase}_s"] = middle([run[phase] for run in named["apply"]])
    figures["apply_rounding"] = runs["apply"][0]["rounding"]
    pairs = ratios(named["apply"], named["floor"])
    figures |= {"ratio_to_floor": middle(pairs), "ratio_spread": spread(pairs)}
    planned = [{"seconds": run["seconds"] + run["plan"]} for run in named["apply"]]
    for name in SLOW:  # their times hold the opening of the models, so ours does here
        figures[f"speedup_over_{name}"] = middle(ratios(named[name], planned))
    figures["peak_mb_above_torch"] = max(run["peak_mb"] for run in named["apply"]) - torch_mb
    return figures


def ratios(first: list[Figures], second: list[Figures]) -> list[float]:
    """Return first / second, round by round; the slow programs are in the first rounds only."""
    return [a["seconds"] / b["seconds"] for a, b in zip(first, second, strict=False)]


def middle(values: list[float]) -> float | None:
    return median(values) if values else None


def spread(values: list[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None


def print_table(found: list[dict[str, object]], torch_mb: float, repeats: int) -> None:
    """Print one line for each combination; and in a second table what stands apart."""
    print(f"\nSeconds, medians of {repeats} rounds (smallest to largest); {THREADS} threads\n")
    columns = ["size", "files", "floor", "apply", "apply / floor", "mergekit", "plain", "peak, MB"]
    print_row(columns, head=True)
    for case in found:
        print_row(
            [
                f"{case['billions']} B",
                str(case["shards"]),
                *(
                    f"{shown(case[f'{name}_s'])} {between(case[f'{name}_spread_s'])}"
                    for name in ("floor", "apply")
                ),
                f"{shown(case['ratio_to_floor'])} {between(case['ratio_spread'])}",
                *(compared(case[f"{name}_s"], case[f"speedup_over_{name}"]) for name in SLOW),
                f"{shown(case['apply_peak_mb'], ',.0f')} ({case['peak_mb_above_torch']:+,.0f})",
            ]
        )
    print(
        f"\nPeak of apply; in brackets above an interpreter with torch, {torch_mb:,.0f} MB. Seconds apart:\n"
    )
    seconds = [
        ("start-up: apply", "apply_startup_s"),
        ("mergekit", "mergekit_startup_s"),
        ("apply: plan", "apply_plan_s"),
        ("check", "apply_check_s"),
        ("fsync: floor", "floor_durable_s"),
        ("apply", "apply_durable_s"),
        ("CPU: floor", "floor_cpu_s"),
        ("apply", "apply_cpu_s"),
    ]
    peaks = [("peak, MB: mergekit", "mergekit_peak_mb"), ("plain", "plain_peak_mb")]
    print_row(["size", "files", *(head for head, _ in seconds + peaks), "floor in pieces of"], head=True)
    for case in found:
        times = [shown(case[key]) for _, key in seconds]
        memory = [shown(case[key], ",.0f") for _, key in peaks]
        print_row([f"{case['billions']} B", str(case["shards"]), *times, *memory, case["floor_piece"]])


def print_row(cells: list[str], *, head: bool = False) -> None:
    print(f"| {' | '.join(cells)} |" + (f"\n|{'---|' * len(cells)}" if head else ""))


def shown(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def compared(seconds: float | None, times: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} ({times:.0f} x)"


def between(values: list[float]) -> str:
    return f"({values[0]:.2f} to {values[1]:.2f})"


def measure_one_shard(folder: Path, gigabytes: float, torch_mb: float) -> Figures:
    """Return apply's peak memory on four models of one file of that size, all holes."""
    start_child(folder, "generate_holes", gigabytes)
    measured = start_child(folder, "apply")
    shutil.rmtree(folder)
    above = measured["peak_mb"] - torch_mb
    print(f"\nOne file of {gigabytes:g} GB: apply's peak is {measured['peak_mb']:,.0f} MB ({above:+,.0f})")
    return {"gb": gigabytes, "apply_s": measured["seconds"], "peak_mb_above_torch": above}


# The programs: a function that imports what it needs, and returns the function that works.
# That one may tell the seconds of what stands apart from reading, adding and writing, and more.

APART = ("plan", "check", "durable")


def run_child(folder: Path, name: str, *words: str) -> None:
    """Import what a program needs, then time it alone, and print what it took and told."""
    work = PROGRAMS[name](*map(float, words))
    ready, before = time.perf_counter(), os.times()
    told = work(folder) or {}
    done, after = time.perf_counter(), os.times()
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]
    measured = {
        "seconds": done - ready - sum(told.get(phase, 0.0) for phase in APART),
        "startup": ready - float(os.environ["STARTED"]),
        "cpu_s": after.user + after.system - before.user - before.system,
        "peak_mb": int(peak) / 1024,
    }
    print(json.dumps({**measured, **told}))


def torch_program():
    """An interpreter that has imported torch, and does nothing."""
    import torch  # noqa: F401

    return lambda _folder: None


def floor_program(piece: float):
    """Read every input once and write the output once, in large pieces, nothing else."""
    size = int(piece)

    def work(folder: Path) -> Figures:
        out, parts = folder / "out", []
        out.mkdir()
        paths = sorted((folder / "target").glob("*.safetensors"))
        inputs = {
            path.name: [os.open(folder / role / path.name, os.O_RDONLY) for role in ROLES] for path in paths
        }
        outputs = {path.name: os.open(out / path.name, os.O_WRONLY | os.O_CREAT, 0o644) for path in paths}
        for path in paths:
            total = path.stat().st_size
            os.posix_fallocate(outputs[path.name], 0, total)
            parts += [(path.name, start, min(size, total - start)) for start in range(0, total, size)]
        queue = iter(parts)

        def copy() -> None:
            buffer = memoryview(bytearray(size))
            for name, start, length in queue:
                for handle in inputs[name]:
                    os.preadv(handle, [buffer[:length]], start)
                os.pwrite(outputs[name], buffer[:length], start)

        threads = [threading.Thread(target=copy) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        began = time.perf_counter()
        for handle in outputs.values():
            os.fsync(handle)
        return {"durable": time.perf_counter() - began}

    return work


def apply_program():
    """Palinode."""
    from palinode.methods import apply

    def work(folder: Path) -> dict[str, object]:
        began = time.perf_counter()
        saved = apply(
            folder / "target",
            folder / "base",
            folder / "forget",
            folder / "out",
            retain_model=folder / "retain",
            forget_scale=ALPHA,
            retain_scale=BETA,
        )
        spent = saved.seconds
        plan = time.perf_counter() - began - sum(spent.values())
        return {
            "plan": plan,
            "check": spent["check"],
            "durable": spent["publish"],
            "rounding": saved.rounding,
        }

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


# Where apply's time goes


def profile_all(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Time apply's loop with ever more of its parts, for every size, and print what each part adds."""
    found = {}
    for billions in args.billions:
        start_child(folder / "models", "generate", billions, 1)
        read_all(folder / "models")
        told = start_child(folder / "models", "profile", args.repeats)
        parts: dict[str, float] = told["parts"]
        found[f"{billions} B"] = parts
        print(f"\n{billions} B parameters, {THREADS} threads, {told['rounding']} rounding\n")
        print_row(["part", "seconds up to it", "of its own"], head=True)
        before = 0.0
        for part, seconds in parts.items():
            print_row([part, f"{seconds:.2f}", f"{seconds - before:.2f}"])
            before = seconds
        shutil.rmtree(folder / "models")
    return {"profile": found}


def profile_program(repeats: float):
    """Apply's loop over all slices in this process: reading only, then with each further part."""
    import numpy as np

    from palinode.weights import Checkpoint
    from palinode.weights.arithmetic import Evaluator, Operands, Settings, formula, map_slices, slices
    from palinode.weights.geometry import choose_rounding
    from palinode.weights.store import OutputFiles, checksum, plan_files
    from palinode.weights.tensors import Files

    def work(folder: Path) -> dict[str, object]:
        target, base, forget, retain = (Checkpoint.open(folder / role) for role in ROLES)
        along = {"forget": base - forget, "retain": retain - base}
        point = target + ALPHA * along["forget"] + BETA * along["retain"]
        form = formula(target, point.terms, {name: line.terms for name, line in along.items()})
        parts = list(slices(target))
        how, _ = choose_rounding(form, Settings(), parts)

        def reading(files: Files, _out: OutputFiles):
            operands = Operands(form.checkpoints, form.displacements, files)
            return lambda part: operands.load(part, np.dtype(np.float32))

        def adding(files: Files, _out: OutputFiles, *, measure: bool = False):
            return Evaluator(form, how, files, measure=measure).evaluate

        def measuring(files: Files, out: OutputFiles):
            return adding(files, out, measure=True)

        def summing(files: Files, out: OutputFiles, *, write: bool = False):
            evaluate = measuring(files, out)

            def run(part) -> None:
                raw = memoryview(evaluate(part)[0].view(np.uint8).data)
                checksum(raw)
                if write:
                    out.write(part.info.name, part.start * 2, raw)

            return run

        def writing(files: Files, out: OutputFiles):
            return summing(files, out, write=True)

        steps = {
            "read": reading,
            "add and round": adding,
            "measure the dose": measuring,
            "checksums": summing,
            "write": writing,
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(int(repeats) + 1):
            for name, step in steps.items():
                spent = once(step, folder / "out")
                if repeat:
                    seconds[name].append(spent)
        return {"parts": {name: median(times) for name, times in seconds.items()}, "rounding": how.rounding}

    def once(step, out: Path) -> float:
        """Walk all slices, into an output laid out anew."""
        target = Checkpoint.open(out.parent / "target")
        out.mkdir()
        with ExitStack() as stack:
            files = stack.enter_context(Files())
            handles = OutputFiles(plan_files(target, None), out, stack)
            began = time.perf_counter()
            map_slices(slices(target), lambda: step(files, handles))
            spent = time.perf_counter() - began
        shutil.rmtree(out)
        return spent

    return work


# Llama-shaped models


def generate_program(billions: float, shards: float):
    """Four neighbouring models of random weights in bfloat16, and the recipe for mergekit."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from palinode.weights import Checkpoint
    from palinode.weights.checkpoint import mergekit_recipe

    sizes, files = llama(billions), int(shards)
    layout = shapes(sizes)
    names = list(layout)
    parts = [names[i * len(names) // files : (i + 1) * len(names) // files] for i in range(files)]
    paths = (
        ["model.safetensors"]
        if files == 1
        else [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    )
    own = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02

    def write(folder: Path, seed: int) -> None:
        step = torch.randn(len(own), generator=torch.Generator().manual_seed(seed)) * 2e-5
        values = (own + step).to(torch.bfloat16)
        for path, part in zip(paths, parts, strict=True):
            tensors = {name: fill(values, layout[name]) for name in part}
            save_file(tensors, folder / path, {"format": "pt"})
        if files > 1:
            index = {name: path for path, part in zip(paths, parts, strict=True) for name in part}
            text = json.dumps({"metadata": {}, "weight_map": index})
            (folder / "model.safetensors.index.json").write_text(text)
        config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16")
        config.save_pretrained(folder)

    def fill(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return values.repeat(-(-count // len(values)))[:count].reshape(shape)

    def work(folder: Path) -> None:
        for seed, role in enumerate(ROLES, start=1):
            (folder / role).mkdir(parents=True)
            write(folder / role, seed)
        target, base, forget, retain = (Checkpoint.open(folder / role) for role in ROLES)
        point = target - ALPHA * (forget - base) + BETA * (retain - base)
        (folder / "recipe.yaml").write_text(mergekit_recipe(point), encoding="utf-8")

    return work


def generate_holes_program(gigabytes: float):
    """Four models of one file each whose weights are holes, all zero: they take no room on the disk."""
    sizes = llama(gigabytes / 2)
    entries, end = {}, 0
    for name, shape in shapes(sizes).items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        **sizes,
    }

    def work(folder: Path) -> None:
        for role in ROLES:
            (folder / role).mkdir(parents=True)
            (folder / role / "config.json").write_text(json.dumps(config))
            with (folder / role / "model.safetensors").open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                file.truncate(8 + len(header) + end)

    return work


PROGRAMS = {
    "torch": torch_program,
    "floor": floor_program,
    "apply": apply_program,
    "plain": plain_program,
    "profile": profile_program,
    "generate": generate_program,
    "generate_holes": generate_holes_program,
}


def llama(billions: float) -> dict[str, int]:
    """Return the sizes of a Llama of about so many parameters."""
    width = next(
        width for limit, width in ((0.3, 512), (0.8, 1536), (3, 2048), (1e9, 4096)) if billions <= limit
    )
    inner, words = width * 11 // 4, 32_000
    layer = 4 * width * width + 3 * width * inner
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": max(1, round((billions * 1e9 - 2 * words * width) / layer)),
    }


def shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a Llama."""
    width, inner, words = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
    for layer in range(sizes["num_hidden_layers"]):
        home = f"model.layers.{layer}."
        found |= {f"{home}self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        found |= {f"{home}mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        found[f"{home}mlp.down_proj.weight"] = (width, inner)
        found |= {f"{home}{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (words, width)}


if __name__ == "__main__":
    main()
