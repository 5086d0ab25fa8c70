"""Benchmarks, one file each, in a plain table: what is asked, what is forgotten, what is known of the truth.

The demo is no entry of the table: it makes its models itself (`palinode demo`). Nor is it imported here,
because it needs torch, and naming benchmarks does not.
"""

from palinode.benchmarks.hubble import HUBBLE
from palinode.benchmarks.lume_pistol import LUME, PISTOL
from palinode.benchmarks.muse import MUSE
from palinode.benchmarks.own import OWN
from palinode.benchmarks.restor import RESTOR
from palinode.benchmarks.rwku import RWKU
from palinode.benchmarks.tofu import TOFU
from palinode.evaluation.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    "tofu": TOFU,
    "restor": RESTOR,
    "muse": MUSE,
    "rwku": RWKU,
    "lume": LUME,
    "pistol": PISTOL,
    "hubble": HUBBLE,
    "own": OWN,
}

__all__ = ["BENCHMARKS"]
