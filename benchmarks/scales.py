"""How good are scales that were chosen without the retrained model? Regret, on the demo's world and on TOFU.

    python benchmarks/scales.py [--folder DIR] [--seeds 0 1 2 3] [--json]
    python benchmarks/scales.py --tofu DATA --models TARGET BASE RETRAINED THETA_1 THETA_2 [--json]

For each seed the demo's models and vectors are trained (or found in the folder), by MSA and as task vectors;
for TOFU the models are given: the target fine-tuned on forget01 and 200 retain rows, and so on
(docs/lab-notes.md). Then the scales are chosen by the search with the yardstick from holdout rows, by the
search with the base alone as yardstick, on the paper's fixed grid, and by the search with the retrained
model itself as yardstick. All are judged by the truth: the distance of the forget-set behaviour to the
retrained model's plus the probability lost on retain rows. Regret is that sum less the least one among all
points anyone tried that keep the floors. The estimated yardstick is held against the retrained model's
behaviour too. What was measured is kept; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from palinode.benchmarks.demo import build_demo
from palinode.data.examples import Example, at_most, read_examples, shared_rows
from palinode.data.world import invent_world
from palinode.evaluation.yardstick import BASE_ALONE, Yardstick, estimate_yardstick
from palinode.methods.method import Vectors
from palinode.metrics.aggregate import ks_test
from palinode.pipeline.demo_run import SETTINGS
from palinode.pipeline.finetuning import FineTuning
from palinode.pipeline.goal import Behaviour, Goal
from palinode.pipeline.inputs import Inputs, open_inputs
from palinode.pipeline.recipe import build_recipe
from palinode.pipeline.search import ChosenScales, Probes, choose_scales, open_goal
from palinode.pipeline.workspace import Workspace
from palinode.progress import NullListener
from palinode.weights import Checkpoint, Direction

WAYS = {
    "auto": "search, yardstick from holdout rows",
    "base": "search, yardstick the base alone",
    "grid": "the paper's grid, yardstick from holdout rows",
    "truth": "search, yardstick the retrained model",
}
SETS = ["forget", "retain"]


@dataclass(frozen=True)
class Case:
    """Models and vectors of which everything is known."""

    name: str
    inputs: Inputs
    target: Checkpoint
    forget: Direction
    retain: Direction | None
    folder: Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/scales"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--tofu", type=Path, help="folder of TOFU's files, instead of the demo's world")
    parser.add_argument("--models", type=Path, nargs=5, metavar=("TARGET", "BASE", "RETRAINED", "θ_1", "θ_2"))
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    args = parser.parse_args()
    if bool(args.tofu) != bool(args.models):
        parser.error("--tofu and --models go together")
    cases = (
        tofu_case(args.folder, args.tofu, args.models) if args.tofu else demo_cases(args.folder, args.seeds)
    )
    results = []
    for case in cases:
        results.append(study(case, args.ways))
        for line in case_lines(results[-1]):
            print(line, flush=True)
    print()
    print("\n".join(summary_lines(results)))
    if args.json:
        print(json.dumps(results))


def demo_cases(folder: Path, seeds: Sequence[int]) -> Iterator[Case]:
    """Yield the demo of each seed with vectors from the base and from the target itself."""
    torch.set_num_threads(1)
    for seed in seeds:
        models = build_demo(invent_world(seed), folder / f"world-{seed}", seed=seed)
        for method in ("msa", "task_vector"):
            recipe = build_recipe(
                {
                    **SETTINGS,
                    "method": method,
                    "seed": seed,
                    "device": "cpu",
                    "models": {
                        name: str(getattr(models, name).folder) for name in ("target", "base", "retrained")
                    },
                    "data": {name: str(getattr(models, name)) for name in ("forget", "retain", "holdout")},
                    "output": {"folder": str(folder / f"none-{seed}")},
                }
            )
            inputs = open_inputs(recipe)
            job = FineTuning(inputs, Workspace(folder / f"vectors-{seed}"), NullListener())
            vectors = job.train(models.target).vectors
            place = folder / f"probes-{seed}-{method}"
            yield Case(f"{method}, seed {seed}", inputs, models.target, vectors.forget, vectors.retain, place)


def tofu_case(folder: Path, data: Path, models: Sequence[Path]) -> Iterator[Case]:
    """Yield TOFU forget01; rows that recipes/smollm2_tofu.toml does not train on are the holdout."""
    folder.mkdir(parents=True, exist_ok=True)
    forget, rows = (read_examples(data / f"{name}.jsonl") for name in ("forget01", "retain99"))
    shared = {place for _, place in shared_rows(forget, rows)}
    rows = [row for place, row in enumerate(rows) if place not in shared]
    seen = at_most(rows, 200, seed=0)
    used = {row.key for row in seen}
    sets = {"retain": seen, "holdout": [row for row in rows if row.key not in used]}
    files = {name: _written(folder / f"tofu-{name}.jsonl", found) for name, found in sets.items()}
    target, base, retrained, theta_1, theta_2 = map(str, models)
    recipe = build_recipe(
        {
            "models": {"target": target, "base": base, "retrained": retrained},
            "data": {"forget": str(data / "forget01.jsonl"), **files},
            "scales": {
                "forget_grid": [0.25, 0.5, 0.75, 1.0],
                "retain_grid": [0.0, 0.5, 1.0],
                "retain_share": 0.85,
                "probe_rows": 40,
                "trials": 6,
            },
            "output": {"folder": str(folder / "none")},
        }
    )
    inputs, start = open_inputs(recipe), Checkpoint.open(base)
    forget, retain = (Checkpoint.open(name) - start for name in (theta_1, theta_2))
    yield Case("TOFU forget01", inputs, Checkpoint.open(target), forget, retain, folder / "probes-tofu")


def _written(path: Path, rows: Sequence[Example]) -> str:
    lines = [json.dumps({"question": row.prompt, "answer": row.answer}) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def study(case: Case, wanted: Sequence[str]) -> dict[str, Any]:
    """Return the choices judged by the truth, and the yardstick beside it."""
    case.folder.mkdir(parents=True, exist_ok=True)
    probes = Probes(case.inputs, case.target, case.folder / "probes.json")
    retrained = case.inputs.retrained
    assert retrained is not None
    known = probes.of_point("retrained", retrained, ["forget", "retain"])
    truth = estimate_yardstick(known["forget"])
    chosen = {way: choose(case, way, truth) for way in wanted}
    measured = json.loads((case.folder / "probes.json").read_text(encoding="utf-8"))
    goal = Goal(truth, behaviour(measured["target"]), case.inputs.recipe.scales.retain_share)
    points = {name: behaviour(entry) for name, entry in measured.items() if "," in name and "forget" in entry}
    least = min(goal.objective(found) for found in points.values() if goal.keeps(found))
    ways = {
        way: {
            "forget": one.forget,
            "retain": one.retain,
            "points": len(one.points),
            "kept_rule": one.kept_rule,
            **judged(goal, points[f"{one.forget},{one.retain}"], least),
        }
        for way, one in chosen.items()
    }
    return {"case": case.name, "ways": ways, "yardstick": yardstick_error(case, measured, truth)}


def choose(case: Case, way: str, truth: Yardstick) -> ChosenScales:
    """Return the scales chosen in one of the WAYS."""
    scales = case.inputs.recipe.scales
    grid = scales.forget_grid, scales.retain_grid if case.retain is not None else [0.0]
    inputs = case.inputs
    if way == "base":
        inputs = replace(inputs, rows=replace(inputs.rows, unseen=(), unseen_source=BASE_ALONE))
    vectors = Vectors(case.forget, case.retain)
    chosen = scales.model_copy(update={"choose": "grid" if way == "grid" else "auto"})
    inputs = replace(inputs, recipe=inputs.recipe.model_copy(update={"scales": chosen}))
    yardstick = truth if way == "truth" else None
    return choose_scales(inputs, case.target, vectors, grid, case.folder, NullListener(), yardstick=yardstick)


def behaviour(entry: Mapping[str, Sequence[float]]) -> Behaviour:
    """Return what a point did on the sets that every way of choosing looks at."""
    return Behaviour(*(tuple(entry.get(name, ())) for name in SETS))


def judged(goal: Goal, found: Behaviour, least: float) -> dict[str, float]:
    return {
        "forget_probability": found.probabilities["forget"],
        "kept": goal.kept(found)["retain"],
        "distance": goal.distance(found),
        "objective": goal.objective(found),
        "regret": goal.objective(found) - least,
    }


def yardstick_error(case: Case, measured: Mapping[str, Any], truth: Yardstick) -> dict[str, Any]:
    """Return how far the estimate and the plain base are from the retrained model on the forget rows."""
    base, target = measured["base"], measured["target"]
    estimate = open_goal(Probes(case.inputs, case.target, case.folder / "probes.json")).yardstick
    wanted = fmean(map(math.exp, truth.middles))
    score = estimate.probability
    return {
        "truth": wanted,
        "estimate": score.value,
        "interval": [score.low, score.high],
        "base": fmean(map(math.exp, base["forget"])),
        "target": fmean(map(math.exp, target["forget"])),
        "estimate_distance": estimate.distance(truth.middles),
        "base_distance": truth.distance(base["forget"]),
        "estimate_ks": ks_test(
            list(estimate.quantiles()), [math.exp(value) for value in truth.middles]
        ).statistic,
        "base_ks": ks_test(base["forget"], truth.middles).statistic,
        "tolerance": estimate.tolerance,
    }


def case_lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"== {result['case']}"]
    for way, one in result["ways"].items():
        lines.append(
            f"  {way:6} α {one['forget']:<5g} β {one['retain']:<5g} points {one['points']:3}  forget "
            f"{one['forget_probability']:.3f}  kept {one['kept']:.3f}  distance {one['distance']:.4f}  "
            f"regret {one['regret']:.4f}{'' if one['kept_rule'] else '  (warned)'}"
        )
    found = result["yardstick"]
    low, high = found["interval"]
    lines.append(
        f"  yardstick {found['estimate']:.3f} [{low:.3f}, {high:.3f}], truth {found['truth']:.3f}, base "
        f"{found['base']:.3f}, target {found['target']:.3f}; distance to the truth "
        f"{found['estimate_distance']:.4f} "
        f"(base {found['base_distance']:.4f}), KS {found['estimate_ks']:.3f} (base {found['base_ks']:.3f})"
    )
    return lines


def summary_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return means over the cases as a table in Markdown."""
    lines = [
        "| scales by | regret (worst) | distance to the retrained model | retain kept | points |",
        "|---|---|---|---|---|",
    ]
    for way, words in WAYS.items():
        if way not in results[0]["ways"]:
            continue
        ways = [result["ways"][way] for result in results]
        regrets = [one["regret"] for one in ways]
        lines.append(
            f"| {words} | {fmean(regrets):.4f} ({max(regrets):.4f}) | "
            f"{fmean(one['distance'] for one in ways):.4f} | {fmean(one['kept'] for one in ways):.3f} | "
            f"{fmean(one['points'] for one in ways):.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
