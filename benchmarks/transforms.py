"""Every transform of a forget vector beside the plain one, on the demo's invented world.

    palinode demo --output DIR
    python benchmarks/transforms.py --demo DIR [--demo DIR …] [--only WORD] [--json]

Each variant is run as a user would, scales by the grid's rule, and its forget vector is compared with the
plain one at equal forgetting (see at_equal_forgetting.py). Figures in docs/transforms.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from at_equal_forgetting import Demo, Found, table

PAIR = {"method": "paired", "training": {"epochs": 10, "batch_size": 16}}


def one(name: str, **settings: Any) -> dict[str, Any]:
    return {"transforms": [{"name": name, **settings}]}


WIDE = {"scales": {"forget_grid": [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]}}
"""For what takes much of a vector away, so that more of the rest is needed."""
BARE = {"name": "projection", "others": "drop"}

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain MSA": {},
    "projection .9": {**one("projection", energy=0.9), **WIDE},
    "projection .5, others dropped": {**one(**BARE, energy=0.5), **WIDE},
    "projection .9, others dropped": {**one(**BARE, energy=0.9), **WIDE},
    "projection .99, others dropped": {**one(**BARE, energy=0.99), **WIDE},
    "low rank 8": one("low_rank", rank=8),
    "low rank, energy .9": one("low_rank", energy=0.9),
    "blocks only": one("layer_scales", scales={r"model\.layers\..*": 1.0, ".*": 0.0}),
    "MLP only": {**one("layer_scales", scales={r".*\.mlp\..*": 1.0, ".*": 0.0}), **WIDE},
    "retain KL 1": {"method_settings": {"retain_kl": 1.0}},
    "task vector": {"method": "task_vector"},
    "task vector, projection .9, others dropped": {
        "method": "task_vector",
        **one(**BARE, energy=0.9),
        **WIDE,
    },
    "paired": PAIR,
    "paired, projection .9, others dropped": {**PAIR, **one(**BARE, energy=0.9), **WIDE},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, action="append", required=True, help="folder of palinode demo")
    parser.add_argument("--only", default="", help="variants whose name holds this word")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Found] = []
    for folder in args.demo:
        demo = Demo(folder)
        print(f"seed {demo.seed}: retrained forget probability {demo.wanted:.3f}, others {demo.best:.3f}")
        for name, changes in VARIANTS.items():
            if args.only in name:
                found.append(demo.measure(name, changes))
                print(json.dumps(asdict(found[-1])), flush=True)
    for line in table(found):
        print(line)
    if args.json:
        print(json.dumps({"results": [asdict(entry) for entry in found]}))


if __name__ == "__main__":
    main()
