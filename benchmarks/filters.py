"""Filters of a vector beside the plain one, on the demo's invented world, at equal forgetting.

    palinode demo --seed S --output DIR
    python benchmarks/filters.py --demo DIR [--demo DIR …] [--only FILTER …] [--method METHOD …] [--json]

β = 0 and the α at which the forget people's answer probability is the retrained model's. Loss is in answer
probability of others whose rows no filter and no vector has read. `--rivals` measures the
two-sided filters of rivals.py instead. Figures in docs/filters.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from at_equal_forgetting import Demo
from rivals import RIVALS

PAIR = {"method": "paired", "training": {"epochs": 10, "batch_size": 16}}
TRAINED = {"epochs": 10, "batch_size": 16, "learning_rate": 1e-4}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "msa": {},
    "task vector": {"method": "task_vector"},
    "paired": PAIR,
    "GradDiff": {"method": "grad_diff", "training": TRAINED},
    "NPO": {"method": "npo", "training": TRAINED},
    "SimNPO": {"method": "simnpo", "training": TRAINED},
}
"""The last three train the target itself; the change they make is taken as the vector."""


def squares(mu: float, epsilon: float, energy: float = 0.0, **settings: Any) -> list[dict[str, Any]]:
    weights = {"mu": mu, "epsilon": epsilon, "energy": energy}
    return [{"name": "least_squares", **weights, "others": "drop", **settings}]


FILTERS: Mapping[str, list[dict[str, Any]]] = {
    "plain": [{"name": "layer_scales", "scales": {".": 1.0}}],
    "projection .9": [{"name": "projection", "others": "drop"}],
    "soft .1": squares(1e6, 1e5),
    "soft .01": squares(1e6, 1e4),
    "least squares 1, .01": squares(1.0, 0.01),
    "least squares 10, .1": squares(10.0, 0.1),
    "least squares 100, 1": squares(100.0, 1.0),
    "least squares 1000, 10": squares(1000.0, 10.0),
    "least squares 10, 1": squares(10.0, 1.0),
    "least squares 100, .1": squares(100.0, 0.1),
    "to zero 10, .01": squares(10.0, 0.01, ridge="zero"),
    "to zero 100, .1": squares(100.0, 0.1, ridge="zero"),
    "least squares 100, 1, energy .8": squares(100.0, 1.0, 0.8),
    "least squares 100, 1, energy .9": squares(100.0, 1.0, 0.9),
    "least squares 10, .1, energy .8": squares(10.0, 0.1, 0.8),
    "10, .1, embeddings filtered": squares(10.0, 0.1, others="filter"),
    "100, 1, embeddings filtered": squares(100.0, 1.0, others="filter"),
    "1000, 10, embeddings filtered": squares(1000.0, 10.0, others="filter"),
    "10, .1, embeddings kept": squares(10.0, 0.1, others="keep"),
    "10, .1, answers": squares(10.0, 0.1, positions="answers"),
    "10, .1, 40 rows": squares(10.0, 0.1, rows=40),
    "10, .1, 200 rows": squares(10.0, 0.1, rows=200),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, action="append", required=True, help="folder of palinode demo")
    parser.add_argument(
        "--only", action="append", choices=[*FILTERS, *RIVALS], help="this filter; repeatable"
    )
    parser.add_argument("--method", action="append", choices=[*METHODS], help="this method; repeatable")
    parser.add_argument("--rivals", action="store_true", help="rivals alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for folder in args.demo:
        demo = Demo(folder)
        for method, changes in METHODS.items():
            for name in args.only or (RIVALS if args.rivals else FILTERS):
                if method in (args.method or METHODS):
                    own = {**changes, "transforms": FILTERS.get(name, [])}
                    arrive = name.startswith("least squares 10") or "filtered" in name
                    for measured in demo.filtered(own, arrive=arrive, rival=RIVALS.get(name)):
                        found.append({"seed": demo.seed, "method": method, "filter": name, **measured})
                        print(json.dumps({**found[-1], "told": None}), flush=True)
    if args.json:
        print(json.dumps({"results": found}))


if __name__ == "__main__":
    main()
