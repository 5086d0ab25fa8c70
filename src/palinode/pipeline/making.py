"""From what the runs came to, to the unlearned model as it lies in the workspace, and back again.

A record names the steps that made its model, so that a finished run's vectors are found by their keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from palinode.data.examples import fingerprint_examples
from palinode.errors import CheckpointError, InputError, PalinodeError
from palinode.methods import METHODS, unlearned_point
from palinode.methods.method import Ends, Vectors
from palinode.pipeline.finetuning import FineTuning, Trained, open_end, open_whole
from palinode.pipeline.goal import TOLERANCE
from palinode.pipeline.grid import grid_scales
from palinode.pipeline.inputs import Work
from palinode.pipeline.record import dose_facts, geometry_facts
from palinode.pipeline.scales import ChosenScales, Probes, own_yardstick, scaled_vector
from palinode.pipeline.search import search_scales
from palinode.pipeline.workspace import Step, Workspace
from palinode.records import read_json, workspace_beside
from palinode.weights import Checkpoint, Direction, Point, StoredVector, save


@dataclass(frozen=True, slots=True)
class Made:
    """The unlearned model as it lies in the workspace, and how it came about."""

    model: Checkpoint
    trained: Trained
    chosen: ChosenScales | None
    """The scales; None where no vectors were added."""
    weights: Mapping[str, Any]
    """Dose, and the geometry of the vectors."""
    steps: Mapping[str, str]
    """Keys of the steps that made it."""


class Making(Work):
    """Fine-tune, choose scales, add up, write."""

    def make(self, target: Checkpoint) -> Made:
        """Make the unlearned model, in the workspace."""
        trained = FineTuning(self.inputs, self.workspace, self.listener).train(target)
        chosen = self._scales(target, trained) if isinstance(trained.result, Vectors) else None
        if chosen and chosen.filter and trained.filters:
            trained = trained.filtered(trained.filters.find(chosen.filter["key"]))
        output = self.recipe.output
        step = self.workspace.step(
            "apply",
            target=target.fingerprint(),
            steps=dict(trained.steps),
            scales=chosen and [chosen.forget, chosen.retain, *(group["factor"] for group in chosen.groups)],
            output=[output.dtype, output.rounding, self.recipe.seed],
        )
        weights, model = step.facts, open_whole(step)
        if weights is None or model is None:
            step.clear()
            if chosen:
                weights = self._vectors_added(target, trained, chosen, step)
            else:
                along = {"change": trained.model - target}
                point = target + along["change"]
                weights = {"dose": self._write(point, target, along, {"change": 1.0}, step)}
            step.finish(weights)
            model = Checkpoint.open(step.folder / "model")
        return Made(model, trained, chosen, weights, {**trained.steps, "apply": step.key})

    def _scales(self, target: Checkpoint, trained: Trained) -> ChosenScales:
        """Return the scales: as given, searched for, or picked on the grid."""
        scales, vectors, rows = self.recipe.scales, trained.vectors, self.inputs.rows
        beta = 0.0 if vectors.retain is None else scales.retain
        betas = scales.retain_grid if beta is None else [beta]
        alphas = scales.forget_grid if scales.forget is None else [scales.forget]
        if len(alphas) == len(betas) == 1:
            return self._given(alphas[0], betas[0], trained)
        auto = scales.choose == "auto"
        step = self.workspace.step(
            "scales",
            target=target.fingerprint(),
            base=self.inputs.base.fingerprint() if self.inputs.base else None,
            vectors=dict(trained.steps),
            grid=[sorted(alphas), sorted(betas)],
            retain_share=scales.retain_share,
            rows=[fingerprint_examples(rows.forget_probe), fingerprint_examples(rows.retain_probe)],
            max_length=self.recipe.evaluation.max_length,
            prompts=self.recipe.prompts.model_dump(),
            output=[self.recipe.output.dtype, self.recipe.output.rounding, self.recipe.seed],
            unseen=[rows.unseen_source, fingerprint_examples(rows.unseen)],
            tolerance=TOLERANCE,
            **({"auto": [scales.trials, scales.groups]} if auto else {}),
        )
        choose = partial(grid_scales, self.inputs, target, vectors)
        if auto:
            choose = partial(search_scales, self.inputs, target, vectors, filters=trained.filters)

        def found() -> dict[str, Any]:
            yardstick = None
            if self.inputs.base is None:
                unfiltered = target - (trained.before or vectors.forget)
                yardstick = own_yardstick(
                    Probes(self.inputs, target, step.folder / "probes.json"), unfiltered
                )
            return asdict(choose((alphas, betas), step.folder, self.listener, yardstick=yardstick))

        return ChosenScales(**step.once(found))

    def _given(self, alpha: float, beta: float, trained: Trained) -> ChosenScales:
        """Return scales that are given; a filter that is to read where the model arrives does it there."""
        chosen = ChosenScales(alpha, beta, "given", None, [])
        filters = trained.filters
        if filters is None or filters.arrives != "always":
            return chosen
        return replace(chosen, filter=filters.arrived(filters.usual(), alpha).as_record())

    def _vectors_added(
        self, target: Checkpoint, trained: Trained, chosen: ChosenScales, step: Step
    ) -> dict[str, Any]:
        """Add the vectors up and write the model; return its dose and the geometry of the vectors."""
        vectors, forget = trained.vectors, trained.vectors.forget
        retain = vectors.retain if chosen.retain else None
        if chosen.groups:
            forget = scaled_vector(forget, chosen.groups, step.folder / "vector")
        scales = {"forget": chosen.forget, "retain": chosen.retain}
        point = unlearned_point(
            target, forget, retain, forget_scale=chosen.forget, retain_scale=chosen.retain
        )
        along = {"forget": -1.0 * forget} | ({"retain": retain} if retain is not None else {})
        dose = self._write(point, target, along, scales, step)
        with self.listener.task("measuring the vectors", target.parameters, "weights") as advance:
            geometry = geometry_facts(vectors.forget, vectors.retain, on_progress=advance)
        told = {"transforms": list(trained.transforms)} if trained.transforms else {}
        return {"dose": dose, "vectors": {**geometry, **told}}

    def _write(
        self,
        point: Point,
        target: Checkpoint,
        along: Mapping[str, Direction],
        scales: Mapping[str, float],
        step: Step,
    ) -> dict[str, Any]:
        """Write the unlearned model, say what the user should know of its rounding, and return its dose."""
        with self.listener.task("writing the unlearned model", target.parameters, "weights") as advance:
            saved = save(
                point,
                step.folder / "model",
                dtype=self.recipe.output.dtype,
                rounding=self.recipe.output.rounding,
                seed=self.recipe.seed,
                along=along,
                on_progress=advance,
            )
        for note in saved.notes:
            self.listener.say(note)
        return dose_facts(saved, scales)


# What a finished run has left behind


def read_record(folder: Path) -> Mapping[str, Any]:
    """Return the record beside an unlearned model; raises CheckpointError where there is none."""
    try:
        record = read_json(folder / "record.json")
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no record.json; name the output folder of palinode unlearn or run"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'record.json'} cannot be read ({error}); run it again") from None
    if not isinstance(record, dict) or "recipe" not in record or "models" not in record:
        raise CheckpointError(f"{folder / 'record.json'} is no record of palinode unlearn; name its output")
    return record


def workspace_of(folder: Path, record: Mapping[str, Any]) -> Path:
    """Return the workspace of a run: beside its output, or where its recipe put it."""
    beside = workspace_beside(folder)
    named = record["recipe"].get("output", {}).get("workspace")
    return Path(named) if named and not beside.is_dir() else beside


def find_model(
    record: Mapping[str, Any], role: str, workspace: Path, *, hint: str | None = None
) -> Checkpoint | None:
    """Return the target or base of a run, None where its very weights are not found any more.

    Looked at are `hint`, the place that the record names, and the workspace, where [prepare] makes a target.
    """
    entry = record["models"].get(role)
    if entry is None:
        return None
    allowed = bool(record["recipe"]["models"].get("allow_pickle"))
    made = sorted(workspace.glob(f"finetune-{role}-*/model")) + sorted(workspace.glob("merge-*/model"))
    for place in (hint, entry["location"], *made):
        if place is None or not Path(place).expanduser().exists():
            continue
        try:
            model = Checkpoint.open(place, allow_pickle=allowed)
        except PalinodeError:
            continue
        if model.fingerprint() == entry["fingerprint"]:
            return model
    return None


def find_vectors(
    record: Mapping[str, Any], workspace: Path, target: Checkpoint | None, base: Checkpoint | None
) -> Vectors:
    """Return the vectors of a run; raises InputError that says what is missing where they are gone."""
    name = record["recipe"].get("method", "msa")
    method = METHODS.get(name)
    if method is None or not record.get("scales"):
        raise InputError(f"the method {name} trains the model itself and adds no vectors")
    if target is None:
        raise InputError("the run's target is not found any more, or has changed")
    changed = _changed(Workspace(workspace), record)
    if changed is not None and not record["vectors"]["retain"]:
        return Vectors(changed, None)
    settings = method.check_settings(record["recipe"].get("method_settings", {}))
    if base is None and "base" in method.needs:
        raise InputError("the run's base is not found any more, or has changed")
    start = base if base is not None and settings.starts_at == "base" else target
    steps, points = record["steps"], dict[str, Point]()
    for run, facts in record["training"].items():
        step = Workspace(workspace).step_of(f"finetune-{run}", steps[run])
        end = open_end(step, start) if facts and step.facts is not None else None
        if end is None:
            raise InputError(f"the run's vectors are not in {workspace} any more")
        points[run] = end
    if "given" in method.needs:
        given = find_model(record, "given", workspace)
        if given is None:
            raise InputError("the model that was given is not found any more, or has changed")
        points["given"] = given
    vectors = method.vectors(settings, Ends(target, start, points))
    retain = vectors.retain if record["vectors"]["retain"] else None
    return Vectors(changed or vectors.forget, retain)


def _changed(workspace: Workspace, record: Mapping[str, Any]) -> Direction | None:
    """Return the forget vector as the run's last change to it left it; None where there was none."""
    told, steps = (record.get("vectors") or {}).get("transforms"), record["steps"]
    if record["scales"].get("groups"):  # the last change of all: an α for each group of layers
        step = workspace.step_of("apply", steps["apply"])
    elif told:
        step = workspace.step_of(f"transform-{told[-1]['name']}", steps["transform"])
    else:
        return None
    try:
        return StoredVector.open(step.folder / "vector")
    except CheckpointError:
        raise InputError(
            f"the run's vector as it was changed is not in {workspace.folder} any more"
        ) from None
