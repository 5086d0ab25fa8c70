"""A comparison along an axis: the same contestants at each value of one key, and one picture of all.

Every value is a comparison of its own, with its tables in a folder of its own; all of them share one
workspace, so that a training, or a stage of the demo's world, that two values have in common is done once.
axis.json, axis.md and axis.svg are written anew after each value.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from palinode.compare.comparing import FILES as TABLE_FILES
from palinode.compare.comparing import (
    Compared,
    check_comparison,
    compare,
    describe_plan,
    plan_comparison,
    write_tables,
)
from palinode.compare.comparison_recipe import Axis, CompareRecipe, build_comparison
from palinode.errors import RecipeError
from palinode.pipeline.inputs import check_folder
from palinode.pipeline.recipe import set_key
from palinode.pipeline.record import heading
from palinode.progress import Listener, NullListener
from palinode.report.comparison_report import axis_markdown, axis_picture

AXIS_VERSION = 1
"""Version of the layout of axis.json, described in docs/compare.md."""
FILES = ("axis.json", "axis.md", "axis.svg")
"""What the folder of an axis holds beside the values' folders."""


def axis_recipes(recipe: CompareRecipe) -> dict[str, CompareRecipe]:
    """Return, by the name of its folder, the comparison at each value. Raises RecipeError."""
    axis, output = _axis(recipe), Path(recipe.shared.output.folder)
    found = {}
    for value in axis.values:
        try:
            content = _at(recipe.given, axis.key, value)
            content["output"] = {
                **content.get("output", {}),
                "folder": str(output / str(value)),
                "workspace": str(recipe.workspace),
            }
            found[str(value)] = build_comparison(content)
            check_comparison(found[str(value)])
        except RecipeError as error:
            raise RecipeError(f"axis.key {axis.key} at {value}: {error}") from None
    return found


def compare_along(recipe: CompareRecipe, *, listener: Listener | None = None) -> Compared:
    """Run the comparison at each value; the same call after an interruption goes on where it was.

    Raises an InputError for anything the user can mend, for any of the values, before the first is begun.
    """
    listener, started = listener or NullListener(), datetime.now(UTC)
    axis, output = _axis(recipe), Path(recipe.shared.output.folder)
    recipes = _checked(recipe)
    tables: list[Mapping[str, Any]] = []
    content: dict[str, Any] = {}
    for number, (name, one) in enumerate(recipes.items(), start=1):
        listener.say(f"{axis.key} = {name} ({number} of {len(recipes)})")
        tables.append(compare(one, listener=listener).table)
        content = axis_content(axis, tables, started=started)
        texts = (axis_markdown(content), axis_picture(content))
        write_tables(output, dict(zip(FILES[1:], texts, strict=True)), content, FILES[0])
    return Compared(output, content)


def plan_axis(recipe: CompareRecipe) -> dict[str, Any]:
    """Check every value and return what each would train, as plain values; nothing is written."""
    axis, recipes = _axis(recipe), _checked(recipe)
    return {
        "axis": axis.model_dump(mode="json"),
        "values": {name: plan_comparison(one) for name, one in recipes.items()},
        "output": recipe.shared.output.folder,
        "workspace": str(recipe.workspace),
    }


def describe_axis(planned: Mapping[str, Any]) -> list[str]:
    """Return a plan in words; values that plan the same are told once."""
    lines, told = [f"{planned['axis']['title']}: {len(planned['values'])} comparisons"], ""
    for name, plan in planned["values"].items():
        what = "\n".join(describe_plan(plan)[:-1])
        same = "the same" if what == told else what
        lines += [f"{planned['axis']['key']} = {name}: {same}"]
        told = what
    return [*"\n".join(lines).splitlines(), f"to {planned['output']}, all in {planned['workspace']}"]


def axis_content(axis: Axis, tables: Sequence[Mapping[str, Any]], *, started: datetime) -> dict[str, Any]:
    """Return the content of axis.json for the values that are through, from their tables."""
    return {
        **heading(AXIS_VERSION, started=started, verb="compare"),
        "complete": len(tables) == len(axis.values),
        "key": axis.key,
        "title": axis.title,
        "metric": tables[0]["ranking"]["metric"],
        "seeds": tables[0]["seeds"],
        "values": [
            _value(value, table) for value, table in zip(axis.values[: len(tables)], tables, strict=True)
        ],
    }


def _value(value: float | str, table: Mapping[str, Any]) -> dict[str, Any]:
    metric = table["ranking"]["metric"]
    order = {entry["name"]: entry for entry in table["ranking"]["order"]}
    return {
        "value": value,
        "folder": str(value),
        "rows": {name: table["rows"][f"{name}_test"]["rows"] for name in ("forget", "retain")},
        "models": {name: _figures(entry, metric) for name, entry in table["models"].items()},
        "contestants": [
            {
                "name": entry["name"],
                **_figures(entry, metric),
                "gap": _score(order.get(entry["name"], {}), "gap"),
                "kept_rule": entry["chosen"]["kept_rule"],
                "settings": entry["chosen"]["settings"],
                "scales": entry["chosen"]["scales"],
            }
            for entry in table["contestants"]
        ],
    }


def _figures(entry: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Return the forget and the retain figure of a model."""
    rows = entry["summary"]["rows"]
    return {name: _score(rows[name].get(metric, {}), "value") for name in ("forget", "retain")}


def _score(score: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"value": score.get(name), "low": score.get("low"), "high": score.get("high")}


def _axis(recipe: CompareRecipe) -> Axis:
    axis = recipe.comparison.axis
    if axis is None:
        raise RecipeError("the recipe has no [axis]; give it a key, values and a title")
    return axis


def _checked(recipe: CompareRecipe) -> dict[str, CompareRecipe]:
    """Return the comparisons, after a look at every folder that they write to."""
    recipes = axis_recipes(recipe)
    check_folder(Path(recipe.shared.output.folder), (*FILES, *recipes), "comparison")
    for one in recipes.values():
        check_folder(Path(one.shared.output.folder), TABLE_FILES, "comparison")
    return recipes


def _at(given: Mapping[str, Any], key: str, value: float | str) -> dict[str, Any]:
    """Return the recipe's plain values, without its axis, with this value of the key."""
    content = {name: copy.deepcopy(part) for name, part in given.items() if name != "axis"}
    if not key.startswith("contestants."):
        set_key(content, f"{key}={json.dumps(value, ensure_ascii=False)}")
        return content
    for contestant in content["contestants"]:
        start = f"contestants.{contestant['name']}.set."
        if key.startswith(start):
            contestant["set"] = {**contestant.get("set", {}), key.removeprefix(start): value}
            return content
    names = ", ".join(contestant["name"] for contestant in content["contestants"])
    raise RecipeError(f"a contestant's key is contestants.NAME.set.KEY, where NAME is one of {names}")
