"""Filters of a recipe's vector at equal forgetting: on a real model, after a run of that recipe.

    palinode run RECIPE [--set …]
    python benchmarks/filters_at.py RECIPE [--set …] [--only WORD]

For each filter the α at which the forget rows' mean answer probability is the retrained model's (by secants
on its logarithm, β = 0), and the probability there of the retain probes, which no vector or filter has read.
What the run trained and measured is found in its workspace. Figures in docs/filters.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from at_equal_forgetting import score

from palinode.data.tokenize import tokenize
from palinode.models.inplace import put
from palinode.models.loading import load_model, load_tokenizer
from palinode.pipeline.finetuning import FineTuning
from palinode.pipeline.inputs import open_inputs, workspace_folder
from palinode.pipeline.recipe import load_recipe
from palinode.pipeline.workspace import Workspace
from palinode.progress import NullListener
from palinode.weights import Direction

ASKED = 4
"""Values of α that are tried for each vector."""


def squares(mu: float, **settings: Any) -> list[dict[str, Any]]:
    return [{"name": "least_squares", "mu": mu, **settings}]


FILTERS: Mapping[str, tuple[float, list[dict[str, Any]]]] = {
    "plain": (0.7, []),
    "projection .9": (3.0, [{"name": "projection", "others": "drop"}]),
    "least squares 10": (1.0, squares(10.0)),
    "least squares 100": (0.9, squares(100.0)),
    "least squares 1000": (0.7, squares(1000.0)),
    "100, embeddings filtered": (0.9, squares(100.0, others="filter")),
}
"""The α to begin with, and the transforms."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--only", default="", help="filters whose name holds this word")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.changes)
    inputs, workspace = open_inputs(recipe), Workspace(workspace_folder(recipe))
    tokenizer, style = load_tokenizer(inputs.reader), recipe.prompts.style()
    forget, retain = (
        tokenize(rows, tokenizer, max_length=recipe.evaluation.max_length, style=style)
        for rows in (inputs.rows.forget, inputs.rows.retain_probe)
    )
    with workspace.locked():
        target, retrained = FineTuning(inputs, workspace, NullListener()).given_or_prepared()
        assert retrained is not None
        truth = load_model(retrained, device=torch.device("cpu"))
        wanted, best = score(truth, forget)[0], score(truth, retain)[0]
        live = load_model(target, device=torch.device("cpu"))
        print(f"target: forget {score(live, forget)[0]:.4f}, retain {score(live, retain)[0]:.4f}", flush=True)
        print(f"retrained: forget {wanted:.4f}, retain {best:.4f}", flush=True)

        def at(vector: Direction, alpha: float) -> float:
            put(target - alpha * vector, live)
            return score(live, forget)[0]

        def equal(vector: Direction, alpha: float) -> tuple[float, float, float]:
            """Return α, and the forget and retain probabilities there."""
            tried = {0.0: math.log(known)}
            for _ in range(ASKED):
                tried[alpha] = math.log(at(vector, alpha))
                alpha = crossing(tried, math.log(wanted))
            return alpha, at(vector, alpha), score(live, retain)[0]

        put(target, live)
        known = score(live, forget)[0]
        for name, (alpha, transforms) in FILTERS.items():
            if args.only not in name:
                continue
            scales = recipe.scales.model_copy(update={"retain": 0.0})
            own = recipe.model_copy(update={"transforms": transforms, "filter": "none", "scales": scales})
            started = time.monotonic()
            trained = FineTuning(open_inputs(own), workspace, NullListener()).train(target)
            found = equal(trained.vectors.forget, alpha)
            report(name, 0, started, *found)
            if trained.filters is not None:
                alpha = found[0]
                started = time.monotonic()
                again = trained.filters.arrived(trained.filters.usual(), alpha)
                report(name, 1, started, *equal(again.direction, alpha))


def report(name: str, place: int, started: float, alpha: float, forget: float, retain: float) -> None:
    facts = {"filter": name, "round": place, "alpha": round(alpha, 3), "forget": forget, "retain": retain}
    print(json.dumps({**facts, "seconds": round(time.monotonic() - started, 1)}), flush=True)


def crossing(tried: Mapping[float, float], wanted: float) -> float:
    """Return the α where the line through the two nearest points, one on either side if any, comes to it."""
    ordered = sorted(tried)
    pairs = list(itertools.pairwise(ordered))
    low, high = next(((a, b) for a, b in pairs if tried[a] >= wanted > tried[b]), pairs[-1])
    slope = (tried[high] - tried[low]) / (high - low)
    reached = low + (wanted - tried[low]) / slope if slope < 0 else 1.5 * high
    return min(max(reached, 0.3 * high), 2 * high)


if __name__ == "__main__":
    main()
