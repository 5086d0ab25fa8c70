"""Filter the change that some tool made to unlearn: `palinode filter`, with forget rows or without.

With forget rows it is a run of the method given. Without, nothing can be searched: the change is filtered
by what the retain rows make alone (the soft filter, Σ_f = 0), and taken so far that it keeps its effect along
itself, tr τΔᵀ = tr ττᵀ over the blocks, as if forget inputs lay in all directions alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from palinode.methods.transforms import check_transforms
from palinode.models.loading import pick_device
from palinode.pipeline.inputs import check_places, open_retain_only, workspace_folder
from palinode.pipeline.recipe import Recipe
from palinode.pipeline.reporting import dose_facts, environment, heading, model_facts, row_facts
from palinode.pipeline.transforming import Transforming
from palinode.pipeline.workspace import Workspace, fingerprint
from palinode.progress import Listener, NullListener
from palinode.records import write_json
from palinode.weights.preflight import complain_of_nonfinite

FILTER_VERSION = 1
"""Version of the layout of filter.json, described in docs/filters.md."""


@dataclass(frozen=True, slots=True)
class FilteredModel:
    """A model whose change was filtered without forget rows."""

    output: Path
    record: Mapping[str, Any]
    """The content of its filter.json."""


def filter_recipe(
    content: Mapping[str, Any], *, mu: float | None = None, epsilon: float | None = None
) -> dict[str, Any]:
    """Return the content of a recipe that filters a given model, by least squares where nothing is said.

    The retain rows stand in where forget rows are missing: nobody reads them as such then.
    """
    data = content.get("data", {})
    own = {name: value for name, value in (("mu", mu), ("epsilon", epsilon)) if value is not None}
    usual = {"transforms": [{"name": "least_squares", **own}], "filter": "none"}
    missing = {} if "forget" in data else {"forget": data.get("retain")}
    return {**usual, **content, "method": "given", "data": {**data, **missing}}


def filter_by_retain_rows(recipe: Recipe, *, listener: Listener | None = None) -> FilteredModel:
    """Filter the change of a given model by what its retain rows make, and write the result.

    Raises an InputError for anything the user can mend.
    """
    listener, started = listener or NullListener(), datetime.now(UTC)
    transforms, folder = check_transforms(recipe.changes), Path(recipe.output.folder)
    inputs, target, given = open_retain_only(recipe)
    complain_of_nonfinite([target, given], option=False)
    check_places(recipe, inputs, needs=target.nbytes + 8 * target.parameters)
    for note in inputs.notes:
        listener.say(note)
    alpha = 1.0 if recipe.scales.forget is None else recipe.scales.forget
    key = fingerprint(target=target.fingerprint(), given=given.fingerprint())
    workspace, vector = Workspace(workspace_folder(recipe)), target - given
    with workspace.locked(listener):
        transforming = Transforming(inputs, workspace, listener, target)
        filtered, _, told, filters = transforming.apply(transforms, vector, {"given": key})
        if filters:
            usual = filters.find(filters.usual().key)
            filtered, told = usual.direction, [*told, usual.facts]
        along = {"forget": -1.0 * filtered}
        saved = transforming.write(target - alpha * filtered, folder, along, "filtered")
    record = {
        **heading(FILTER_VERSION, started=started, verb="filter"),
        "seed": recipe.seed,
        "models": {
            "target": model_facts(recipe.models.target, target),
            "given": model_facts(recipe.models.given, given),
            "unlearned": model_facts(recipe.output.folder, saved.checkpoint),
        },
        "data": {"retain": row_facts(recipe.data.retain, inputs.rows.retain)},
        "alpha": alpha,
        "transforms": told,
        "dose": dose_facts(saved, {"forget": alpha}),
        "environment": environment(pick_device(recipe.device)),
        "notes": [*inputs.notes, *saved.notes],
    }
    write_json(folder / "filter.json", record)
    return FilteredModel(folder, record)
