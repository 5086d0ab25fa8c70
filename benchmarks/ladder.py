"""A comparison on TOFU in the table of others: memorisation, privacy, utility and their harmonic mean.

    palinode compare recipes/ladder_tofu_forget10.toml
    python benchmarks/ladder.py build/ladder-tofu/table.json

As the meta-evaluation of open-unlearning's metrics ranks methods (spec: metrics.md §12; arXiv 2605.24614):

    memorisation = HM(1 − extraction strength, 1 − exact memorisation, 1 − probability of the paraphrase,
                      1 − right share)
    privacy      = HM over LOSS, ZLib, Min-K, Min-K++ of clip(1 − |AUC − AUC of the retrained| / that, 0, 1)
    utility      = model utility over the target's, at most 1
    overall      = HM of the three

Published utility is HM(model utility, fluency), fluency by a classifier of gibberish that is not run here:
ours is too kind to a model that writes gibberish. Published figures stand below ours, marked as such. Where
the benchmark has no holdout rows, as TOFU's forget01, the AUCs are those of the comparison's own rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

MEMORISED = ("extraction_strength", "exact_memorization", "paraphrased_probability", "right_share")
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus")

PUBLISHED = {
    "retrained": (0.807, 0.807),
    "AltPO": (0.784, 0.773),
    "NPO": (0.752, 0.739),
    "SimNPO": (0.733, 0.722),
    "IdkDPO": (0.720, 0.709),
    "GradDiff": (0.686, 0.637),
    "RMU": (0.631, 0.625),
}
"""Best configurations on Llama-3.2-1B, forget10: overall as here, and with UDS within privacy."""

Summary = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Scores by benchmark's set and metric."""


def rung(model: Summary, target: Summary, retrained: Summary, place: str = "forget") -> dict[str, float]:
    """Return the four figures of a model; `place` holds the AUCs. Exits where a score is missing."""
    known = [value_of(model, "forget", name) for name in MEMORISED]
    close = []
    for attack in ATTACKS:
        own, ideal = (value_of(one, place, f"auc_{attack}") for one in (model, retrained))
        close.append(max(0.0, 1 - abs(own - ideal) / ideal) if ideal else float(own == ideal))
    useful = value_of(model, "all", "model_utility") / value_of(target, "all", "model_utility")
    parts = {
        "memorisation": harmonic_mean([1 - value for value in known]),
        "privacy": harmonic_mean(close),
        "utility": min(1.0, useful),
    }
    return {**parts, "overall": harmonic_mean(list(parts.values()))}


def value_of(model: Summary, name: str, metric: str) -> float:
    """Return a score's value; exits with the reason where there is none."""
    score = model[name][metric]
    if score["value"] is None:
        sys.exit(f"{name} {metric}: {score['reason']}")
    return float(score["value"])


def main() -> None:
    """Print the ladder of a comparison's table.json."""
    table = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = [*table["models"].items(), *((one["name"], one) for one in table["contestants"])]
    rows = {
        name: one["summary"]["tofu"] | {"own": one["summary"].get("rows", {}).get("forget", {})}
        for name, one in found
    }
    absent = rows["retrained"]["forget"].get("auc_loss", {"value": None})["value"] is None
    place = "own" if absent and rows["retrained"]["own"] else "forget"
    print("| model | memorisation | privacy | utility | overall |\n|---|---|---|---|---|")
    for name, model in rows.items():
        parts = rung(model, rows["target"], rows["retrained"], place)
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in parts.values()) + " |")
    print("\n| published | overall | with UDS within privacy |\n|---|---|---|")
    for name, (without, with_uds) in PUBLISHED.items():
        print(f"| {name} | {without:.3f} | {with_uds:.3f} |")


if __name__ == "__main__":
    main()
