"""Finding documents in an exposure log of up to 10⁸ rows, and what keeping such a log costs a training.

    python benchmarks/locate.py [--rows 1e6 1e7 1e8] [--documents 1000] [--folder F] [--json]

A log of random hashes is written on the spot by ExposureLog, `--batch` rows a step, with the documents put in
at known steps, and every answer is checked against these. They are looked for by a program of its own on two
cores: cold, when none of the log's pages is in memory (they are dropped, and mincore says whether they are),
and warm, right after that. Seconds are those of opening the log and finding; the program's start and imports
stand beside them. A peak is the program's VmHWM, so this needs Linux.

The overhead is measured in one training run on real batches: a step in which the loader logs, a step in which
it does not, and so on in turn; the ratio is that of the medians of each pair of neighbours. Beside it stands
the share of its time that a logging step spends in the log's own code, which noise does not hide.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

OF = {"data": "synthetic", "tokenizer": "none", "run": "benchmark"}
CORES = 2

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=float, nargs="+", default=[1e6, 1e7, 1e8], help="sizes of the log")
    parser.add_argument("--documents", type=int, default=1000, help="how many to look for")
    parser.add_argument("--batch", type=int, default=1024, help="rows of a step")
    parser.add_argument("--steps", type=int, default=300, help="steps of the training that measures overhead")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_child(args, *args.run)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sizes = [measure(Path(folder) / "log", int(rows), args) for rows in sorted(args.rows)]
        overhead = start_child(args, "train", Path(folder) / "trained", args.steps)
    print_tables(sizes, overhead)
    if args.json:
        print(json.dumps({"documents": args.documents, "sizes": sizes, "overhead": overhead}))


def measure(folder: Path, rows: int, args: argparse.Namespace) -> dict[str, object]:
    """Write a log, look for the documents in it, cold and warm, and remove it."""
    figures: dict[str, object] = {"rows": rows, "written": start_child(args, "write", folder, rows)}
    figures["bytes_per_row"] = size_of(folder) / rows
    resident = drop_from_memory(folder)
    figures["cold"] = {**start_child(args, "find", folder, rows), "resident_share": resident}
    figures["warm"] = start_child(args, "find", folder, rows)
    shutil.rmtree(folder)
    return figures


def start_child(args: argparse.Namespace, *run: object) -> Figures:
    """Run one of our programs on two cores and return what it measured of itself."""
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    words = [sys.executable, __file__, "--documents", args.documents, "--batch", args.batch, "--run", *run]
    began = time.perf_counter()
    done = subprocess.run(
        list(map(str, words)),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(CORES)},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, run))} failed:\n{done.stderr}")
    measured: Figures = json.loads(done.stdout.splitlines()[-1])
    return {**measured, "program_s": time.perf_counter() - began}


# What the programs do


def run_child(args: argparse.Namespace, name: str, folder: str, *numbers: str) -> None:
    place = Path(folder)
    if name == "write":
        result = write_log(place, int(numbers[0]), args)
    elif name == "find":
        result = find_documents(place, int(numbers[0]), args)
    else:
        result = train(place, int(numbers[0]))
    print(json.dumps({**result, "peak_mb": peak_mb()}))


def planted(rows: int, args: argparse.Namespace) -> dict[int, list[int]]:
    """Return at which steps each document is: one to three, anywhere in the training."""
    random = np.random.default_rng(1)
    steps = -(-rows // args.batch)
    return {
        number: sorted({int(step) for step in random.integers(1, steps + 1, 1 + number % 3)})
        for number in range(args.documents)
    }


def texts(args: argparse.Namespace) -> list[str]:
    return [f"The document number {number} that is looked for." for number in range(args.documents)]


def write_log(folder: Path, rows: int, args: argparse.Namespace) -> Figures:
    """Write the log step by step; a document takes the place of one of the random rows of its step."""
    from palinode.history.duplicates import hashes
    from palinode.history.exposures import ExposureLog

    found = hashes(texts(args))
    at: dict[int, list[int]] = {}
    for number, steps in planted(rows, args).items():
        for step in steps:
            at.setdefault(step, []).append(number)
    random = np.random.default_rng(0)
    spent, slowest = 0.0, 0.0
    log = ExposureLog.open(folder, **OF)
    for step, begin in enumerate(range(0, rows, args.batch), start=1):
        batch = random.integers(0, 256, (min(args.batch, rows - begin), 16), dtype=np.uint8)
        here = at.get(step, [])[: len(batch)]
        batch[: len(here)] = found[here]
        began = time.perf_counter()
        log.record(step, batch, tokens=len(batch))
        took = time.perf_counter() - began
        spent, slowest = spent + took, max(slowest, took)
    began = time.perf_counter()
    log.close()
    spent += time.perf_counter() - began
    return {"seconds": spent, "us_per_step": 1e6 * spent / step, "slowest_step_s": slowest}


def find_documents(folder: Path, rows: int, args: argparse.Namespace) -> Figures:
    """Open the log, find the documents, and check that each was found where it was put."""
    from palinode.history.reader import ExposureReader

    began = time.perf_counter()
    reader = ExposureReader.open(folder)
    opened = time.perf_counter()
    exposures = reader.find(texts(args))
    ended = time.perf_counter()
    found: dict[int, list[int]] = {}
    for exposure in exposures:
        found.setdefault(exposure.row, []).append(exposure.step)
    if found != planted(rows, args) or reader.notes:
        sys.exit(f"found other exposures than were put in; notes: {reader.notes}")
    return {"seconds": ended - began, "open_s": opened - began, "exposures": len(exposures)}


def train(folder: Path, steps: int) -> Figures:
    """Train a small model, with and without logging in turn, and return how the steps' times compare."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig, LlamaForCausalLM

    from palinode.history import callback
    from palinode.history.duplicates import hashes
    from palinode.history.exposures import ExposureLog

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    random = np.random.default_rng(0)
    data = [{"input_ids": random.integers(0, 1024, 128).tolist()} for _ in range(8 * (steps + 2))]

    def collate(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([item["input_ids"] for item in items])
        return {"input_ids": ids, "labels": ids}

    spent = Stopwatch()
    callback.ids_key = spent.around(callback.ids_key)
    callback.RowTable.find = spent.around(callback.RowTable.find)
    callback.LoggedLoader.step = spent.around(callback.LoggedLoader.step)
    table = callback.RowTable(data, hashes(str(number) for number in range(len(data))))
    plain = iter(DataLoader(data, batch_size=8, collate_fn=collate))
    log = ExposureLog.open(folder, **OF)
    logged = callback.LoggedLoader(DataLoader(data, batch_size=8, collate_fn=collate), log, table)
    batches = iter(logged)
    times: dict[bool, list[float]] = {True: [], False: []}
    inside: list[float] = []
    for number in range(steps):
        logging = number % 2 == 0
        before, began = spent.seconds, time.perf_counter()
        loss = model(**next(batches if logging else plain)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if logging:
            logged.step()
            inside.append(spent.seconds - before)
        times[logging].append(time.perf_counter() - began)
    logged.close()
    warm = slice(steps // 20, None)
    shares = [own / whole for own, whole in zip(inside[warm], times[True][warm], strict=True)]
    return {
        "ratio": median(a / b for a, b in zip(times[True][warm], times[False][warm], strict=False)),
        "noise": median(max(a / b, b / a) for a, b in pairwise(times[False][warm])),
        "share": median(shares),
        "step_ms": 1000 * median(times[True][warm]),
        "logging_us": 1e6 * median(inside[warm]),
    }


class Stopwatch:
    """The time spent in some functions, counted once where they call one another."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._deep = 0

    @contextmanager
    def _running(self):
        began = time.perf_counter()
        self._deep += 1
        try:
            yield
        finally:
            self._deep -= 1
            if not self._deep:
                self.seconds += time.perf_counter() - began

    def around(self, function):
        def timed(*args, **kwargs):
            with self._running():
                return function(*args, **kwargs)

        return timed


# Memory


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.parquet"))


def drop_from_memory(folder: Path) -> float:
    """Drop the log's files from the page cache; return the share of them that is still there."""
    os.sync()
    resident = pages = 0
    for path in folder.rglob("*.*"):
        if not path.is_file() or not path.stat().st_size:
            continue
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            here, there = pages_of(file.fileno(), path.stat().st_size)
            resident, pages = resident + here, pages + there
    return resident / max(1, pages)


def pages_of(handle: int, size: int) -> tuple[int, int]:
    """Return how many pages of a file are in memory, and how many it has."""
    count = -(-size // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    place = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
    libc.mincore(ctypes.c_void_p(place), ctypes.c_size_t(size), flags)
    libc.munmap(ctypes.c_void_p(place), ctypes.c_size_t(size))
    return int((np.frombuffer(flags, np.uint8) & 1).sum()), count


# The figures


def print_tables(sizes: list[dict[str, object]], overhead: Figures) -> None:
    print(f"\nFinding documents, seconds to open and find (peak in MB), {CORES} cores\n")
    print("| rows | bytes a row | cold | warm | writing |")
    print("|---|---|---|---|---|")
    for size in sizes:
        cells = [f"{size['rows']:,}", f"{size['bytes_per_row']:.1f}"]
        for name in ("cold", "warm"):
            cells.append(f"{size[name]['seconds']:.2f} ({size[name]['peak_mb']:.0f})")
        cells.append(f"{size['written']['seconds']:.1f} ({size['written']['us_per_step']:.0f} µs a step)")
        print(f"| {' | '.join(cells)} |")
    print(
        f"\nLogging in a training: step {overhead['step_ms']:.0f} ms with, ratio to neighbours without "
        f"{overhead['ratio']:.4f} (neighbours without differ by {overhead['noise'] - 1:.1%}); "
        f"{overhead['logging_us']:.0f} µs a step in the log's own code, {overhead['share']:.2%} of it\n"
    )


if __name__ == "__main__":
    main()
