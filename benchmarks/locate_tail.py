"""The open tail of an exposure log: our journal beside SQLite in WAL mode, one transaction a step.

    python benchmarks/locate_tail.py [--steps 1024] [--rows 1024] [--folder F]

"one blob" keeps a step's hashes in one cell, "one row each" in a row each; `synchronous` is SQLite's, whose
NORMAL and OFF both outlive a killed program. Bytes a row are those of the open tail with all its side files,
seconds to read are those of reading all of it once.
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from palinode.history.exposures import ExposureLog, read_journal

Record = Callable[[int, np.ndarray], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=1024, help="of a step")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    batches = random.integers(0, 256, (64, args.rows, 16), dtype=np.uint8)
    print("| tail | median µs a step | mean | slowest | bytes a row | seconds to read |")
    print("|---|---|---|---|---|---|")
    for name, begin in TAILS.items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            record, read = begin(Path(folder), args)
            times = []
            for step in range(1, args.steps + 1):
                began = time.perf_counter()
                record(step, batches[step % 64])
                times.append(1e6 * (time.perf_counter() - began))
            files = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".json"]
            size = sum(path.stat().st_size for path in files) / (args.steps * args.rows)
            began = time.perf_counter()
            read()
            seconds = time.perf_counter() - began
        figures = (
            f"{np.median(times):.0f} | {np.mean(times):.0f} | {max(times):.0f} | {size:.1f} | {seconds:.2f}"
        )
        print(f"| {name} | {figures} |")


def journal(folder: Path, args: argparse.Namespace) -> tuple[Record, Callable[[], object]]:
    rows = args.steps * args.rows + 1
    log = ExposureLog.open(folder, data="synthetic", tokenizer="none", segment_rows=rows)
    return log.record, lambda: read_journal(next(folder.rglob("*.journal")))


def sqlite(synchronous: str, *, blob: bool) -> Callable[..., tuple[Record, Callable[[], object]]]:
    def begin(folder: Path, _: argparse.Namespace) -> tuple[Record, Callable[[], object]]:
        database = sqlite3.connect(folder / "tail.db", isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(f"PRAGMA synchronous={synchronous}")
        database.execute("CREATE TABLE tail (step INTEGER, hashes BLOB)")

        def record(step: int, batch: np.ndarray) -> None:
            cells = [batch.tobytes()] if blob else [row.tobytes() for row in batch]
            database.execute("BEGIN")
            database.executemany("INSERT INTO tail VALUES (?, ?)", [(step, cell) for cell in cells])
            database.execute("COMMIT")

        return record, lambda: database.execute("SELECT * FROM tail").fetchall()

    return begin


TAILS = {
    "journal": journal,
    "SQLite, one blob, NORMAL": sqlite("NORMAL", blob=True),
    "SQLite, one blob, OFF": sqlite("OFF", blob=True),
    "SQLite, one row each, NORMAL": sqlite("NORMAL", blob=False),
}


if __name__ == "__main__":
    main()
