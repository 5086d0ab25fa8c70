"""Damaged files by the thousand: each is refused in one sentence, or read, and then read rightly.

`make fuzz` runs 10,000 of them in two processes and prints each kind's seeds; a failure names the kind and
the seed that repeats it: `make fuzz ARGS="--only zipped --seed 1234 --cases 1"`. Never may there be another
exception, a hang, or memory that grows; and what is read must be what other readers of the format read.
"""

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
sys.path.insert(0, str(Path(__file__).parent))

from damage import Damage, NoDamage
from layouts import LAYOUTS, write
from records import OTHERS

from palinode.errors import PalinodeError

SECONDS = 20
"""What reading a damaged file may take on a busy machine."""

MEMORY = 150_000
"""Kilobytes by which a process may grow over all cases of a kind."""


@dataclass(frozen=True)
class Kind:
    """One kind of file: what writes it into an empty folder, damaged or whole, and what reads it."""

    name: str
    write: Callable[[Path, Damage], None]
    read: Callable[[Path], object]


KINDS = {
    kind.name: kind
    for kind in (
        *(Kind(layout.__name__, write(layout), read) for layout, read in LAYOUTS.items()),
        *(Kind(made.__name__, made, read) for made, read in OTHERS.items()),
    )
}


def outcome(kind: Kind, folder: Path, damage: Damage) -> str:
    """Write a file and read it: "read" or "refused"; anything else is a failure."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kind.write(folder, damage)
    refusal = None
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        kind.read(folder)
    except PalinodeError as error:
        refusal = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if refusal is None:
        return "read"
    assert "\n" not in refusal, "a refusal of more than one line"
    assert len(refusal) < 3000
    return "refused"


def run(name: str, seeds: range) -> tuple[str, range, Counter[str], float]:
    """Return the outcomes of a kind over these seeds and the seconds; AssertionError names a failing seed."""
    kind, outcomes, began = KINDS[name], Counter[str](), time.monotonic()
    before = signal.signal(signal.SIGALRM, _too_long)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            outcome(kind, Path(place) / "case", NoDamage(0))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for seed in seeds:
                try:
                    outcomes[outcome(kind, Path(place) / "case", Damage(seed))] += 1
                    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
                    assert grown < MEMORY, f"{grown} kB more memory"
                except Exception as error:
                    raise AssertionError(f"{name}, seed {seed}: {error!r}") from error
        finally:
            signal.signal(signal.SIGALRM, before)
    return name, seeds, outcomes, time.monotonic() - began


def _too_long(*_: object) -> None:
    raise TimeoutError(f"a damaged file took more than {SECONDS} seconds")


def main() -> int:
    """Run all kinds; return 1 when one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="files in all [default: 10000]")
    parser.add_argument("--seed", type=int, default=None, help="first seed [default: the clock's]")
    parser.add_argument("--only", choices=KINDS, action="append", help="only this kind; may be repeated")
    options = parser.parse_args()
    names = options.only or list(KINDS)
    first = int(time.time()) if options.seed is None else options.seed
    each = -(-options.cases // len(names))
    print(f"{len(names)} kinds, {each} files of each, seeds {first} to {first + each - 1}", flush=True)
    failed = 0
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(run, name, range(first, first + each)) for name in names]
        for job in as_completed(jobs):
            try:
                name, _, outcomes, seconds = job.result()
                counts = f"read {outcomes['read']:5}  refused {outcomes['refused']:5}"
                print(f"  {name:16} {counts}  {seconds:4.0f} s", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"  FAILED: {error}\n{str(error.__cause__)[-2000:]}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
