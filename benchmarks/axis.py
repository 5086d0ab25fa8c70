"""The same contestants at each value of one key of a comparison's recipe: a row a value and model.

    python benchmarks/axis.py RECIPE KEY VALUE VALUE …
    python benchmarks/axis.py recipes/axes/retain_vector.toml contestants.MSA.set.scales.retain 0.0 0.5

KEY is any key of the recipe, as in demo.later_epochs; of one contestant: contestants.NAME.set.KEY. Each
value is a comparison of its own, in the folder KEY=VALUE below the recipe's `output.folder`. All have one
workspace, so what two of them have in common is made once, and the same command goes on where it was.
Figures in docs/axes.md.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import palinode
from palinode.compare.comparing import plan_comparison
from palinode.compare.comparison_recipe import CompareRecipe, build_comparison
from palinode.pipeline.recipe import set_key
from palinode.report.words import interval_text, number
from palinode.settings import read_settings


def at(content: Mapping[str, Any], key: str, text: str) -> CompareRecipe:
    """Return the comparison with this value of the key, in a folder of its own and the common workspace."""
    common = build_comparison(content)
    changed = copy.deepcopy(dict(content))
    named = [
        (one, key.removeprefix(start))
        for one in changed["contestants"]
        if key.startswith(start := f"contestants.{one['name']}.set.")
    ]
    if named:
        one, own = named[0]
        value: dict[str, Any] = {}
        set_key(value, f"value={text}")
        one["set"] = {**one.get("set", {}), own: value["value"]}
    else:
        set_key(changed, f"{key}={text}")
    folder = Path(common.shared.output.folder) / f"{key}={text}"
    changed["output"] |= {"folder": str(folder), "workspace": str(common.workspace)}
    return build_comparison(changed)


def lines(table: Mapping[str, Any], value: str) -> Iterator[str]:
    """Yield a line of the table for each model: what it knows of forget and retain rows, and its gap."""
    metric, gaps = table["ranking"]["metric"], {one["name"]: one for one in table["ranking"]["order"]}
    entries = [{"name": name, **one} for name, one in table["models"].items()]
    for entry in [*entries, *table["contestants"]]:
        scores = [entry["summary"]["rows"][name][metric] for name in ("forget", "retain")]
        cells = [f"{number(score['value'])} ({interval_text(score) or '–'})" for score in scores]
        gap = gaps.get(entry["name"])
        cells += [f"{number(gap['gap'])} ({interval_text(gap)})" if gap else "–"]
        kept = entry["chosen"]["kept_rule"] if "chosen" in entry else True
        name = entry["name"] if kept else f"{entry['name']} (breaks the rule)"
        yield f"| {value} | {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("key")
    parser.add_argument("values", nargs="+")
    args = parser.parse_args()
    content = read_settings(args.recipe, "recipe")
    comparisons = {value: at(content, args.key, value) for value in args.values}
    for comparison in comparisons.values():
        plan_comparison(comparison)  # all are checked before the first is begun
    metric = next(iter(comparisons.values())).comparison.measure.rank_by
    print(f"| {args.key} | model | forget: {metric} | retain: {metric} | gap |\n|---|---|---|---|---|")
    for value, comparison in comparisons.items():
        print("\n".join(lines(palinode.compare(comparison).table, value)), flush=True)


if __name__ == "__main__":
    main()
