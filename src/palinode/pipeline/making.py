"""From target and vectors, or from a trained model, to the unlearned model as it lies in the workspace.

What a finished run has left behind: its target, its base, and the vectors it subtracted and added.

A record names models by their fingerprints, and says of each fine-tuning how it went; a step of the
workspace that says the same to the last digit is the one that the run used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from palinode.data.examples import Example, fingerprint_examples
from palinode.errors import CheckpointError, InputError, PalinodeError
from palinode.methods import METHODS, unlearned_point
from palinode.methods.msa import PairedSettings
from palinode.pipeline.finetuning import Tuning, Vectors, open_whole
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.record import dose_facts, geometry_facts
from palinode.pipeline.scales import ChosenScales, choose_scales, scaled_vector
from palinode.pipeline.search import search_scales
from palinode.pipeline.workspace import Workspace
from palinode.progress import Listener
from palinode.records import read_json, workspace_beside
from palinode.weights import Checkpoint, Direction, LoraAdapter, Saved, StoredVector, WeightedSum, save


@dataclass(frozen=True, slots=True)
class Made:
    """The unlearned model as it lies in the workspace, and how it came about."""

    model: Checkpoint
    chosen: ChosenScales | None
    """The scales; None where no vectors were added."""
    weights: Mapping[str, Any]
    """Dose, and the geometry of the vectors."""
    training: Mapping[str, Any]
    seen: Sequence[Example]
    """The retain rows that training saw."""


class Making:
    """The steps after fine-tuning: choose scales, add up, write."""

    def __init__(self, inputs: Inputs, workspace: Workspace, listener: Listener) -> None:
        self.inputs = inputs
        self.recipe = inputs.recipe
        self.rows = inputs.rows
        self.workspace = workspace
        self.listener = listener
        self.tuning = Tuning(inputs, workspace, listener)

    def make(self, target: Checkpoint) -> Made:
        """Make the unlearned model, in the workspace."""
        arithmetic = METHODS[self.recipe.method].kind == "arithmetic"
        return self._by_arithmetic(target) if arithmetic else self._by_training(target)

    def _by_arithmetic(self, target: Checkpoint) -> Made:
        """Make the unlearned model by adding vectors to the target."""
        vectors = self.tuning.vectors(target)
        chosen = self._scales(target, vectors)
        model, weights = self._apply(target, vectors, chosen)
        return Made(model, chosen, weights, vectors.training, vectors.seen)

    def _by_training(self, target: Checkpoint) -> Made:
        """Make the unlearned model by training; it is saved in the target's layout and types."""
        trained = self.tuning.train(target)
        change = trained.model - target
        output = self.recipe.output
        step = self.workspace.step(
            "apply",
            target=target.fingerprint(),
            trained=trained.key,
            output=[output.dtype, output.rounding, self.recipe.seed],
        )
        weights, model = step.facts, open_whole(step)
        if weights is None or model is None:
            step.clear()
            saved = self._write(target + change, target, {"change": change}, step.folder / "model")
            weights = {"dose": dose_facts(saved, {"change": 1.0})}
            step.finish(weights)
            model = Checkpoint.open(step.folder / "model")
        return Made(model, None, weights, trained.training, trained.seen)

    def _scales(self, target: Checkpoint, vectors: Vectors) -> ChosenScales:
        """Return the scales: as given, searched for, or picked on the grid."""
        scales = self.recipe.scales
        betas = (
            [0.0]
            if vectors.retain is None
            else scales.retain_grid
            if scales.retain is None
            else [scales.retain]
        )
        alphas = scales.forget_grid if scales.forget is None else [scales.forget]
        if len(alphas) == len(betas) == 1:
            return ChosenScales(alphas[0], betas[0], "given", None, [])
        auto = scales.choose == "auto"
        unseen = fingerprint_examples(self.rows.unseen)
        step = self.workspace.step(
            "scales",
            target=target.fingerprint(),
            base=self.inputs.earlier.fingerprint(),
            vectors=dict(vectors.keys),
            grid=[sorted(alphas), sorted(betas)],
            retain_share=scales.retain_share,
            rows=[fingerprint_examples(self.rows.forget_probe), fingerprint_examples(self.rows.retain_probe)],
            max_length=self.recipe.evaluation.max_length,
            prompts=self.recipe.prompts.model_dump(),
            output=[self.recipe.output.dtype, self.recipe.output.rounding, self.recipe.seed],
            **({"auto": [scales.trials, scales.groups, self.rows.unseen_source, unseen]} if auto else {}),
        )
        facts = step.facts
        if facts is None:
            step.begin()
            choose = search_scales if auto else choose_scales
            chosen = choose(
                self.inputs,
                target,
                vectors.forget,
                vectors.retain,
                (alphas, betas),
                step.folder,
                self.listener,
            )
            step.finish(facts := asdict(chosen))
        return ChosenScales(**facts)

    def _apply(
        self, target: Checkpoint, vectors: Vectors, chosen: ChosenScales
    ) -> tuple[Checkpoint, Mapping[str, Any]]:
        """Write the unlearned model into the workspace; return it, its dose and its vectors' geometry."""
        output = self.recipe.output
        step = self.workspace.step(
            "apply",
            target=target.fingerprint(),
            vectors=dict(vectors.keys),
            scales=[chosen.forget, chosen.retain, *(group["factor"] for group in chosen.groups)],
            output=[output.dtype, output.rounding, self.recipe.seed],
        )
        facts, model = step.facts, open_whole(step)
        if facts is None or model is None:
            step.clear()
            retain, forget = vectors.retain if chosen.retain else None, vectors.forget
            if chosen.groups:
                forget = scaled_vector(forget, chosen.groups, step.folder / "vector")
            facts = {**self._save(target, forget, retain, chosen, step.folder / "model")}
            with self.listener.task("measuring the vectors", target.parameters, "weights") as advance:
                geometry = geometry_facts(vectors.forget, vectors.retain, on_progress=advance)
            facts["vectors"] = {
                **geometry,
                **({"transforms": list(vectors.transforms)} if vectors.transforms else {}),
            }
            step.finish(facts)
            model = Checkpoint.open(step.folder / "model")
        return model, facts

    def _save(
        self,
        target: Checkpoint,
        forget: Direction,
        retain: Direction | None,
        chosen: ChosenScales,
        folder: Path,
    ) -> Mapping[str, Any]:
        point = unlearned_point(
            target, forget, retain, forget_scale=chosen.forget, retain_scale=chosen.retain
        )
        along = {"forget": -1.0 * forget} | ({"retain": retain} if retain is not None else {})
        saved = self._write(point, target, along, folder)
        return {"dose": dose_facts(saved, {"forget": chosen.forget, "retain": chosen.retain})}

    def _write(
        self, point: WeightedSum, target: Checkpoint, along: Mapping[str, Direction], folder: Path
    ) -> Saved:
        """Write the unlearned model, and say what the user should know of its rounding."""
        with self.listener.task("writing the unlearned model", target.parameters, "weights") as advance:
            saved = save(
                point,
                folder,
                dtype=self.recipe.output.dtype,
                rounding=self.recipe.output.rounding,
                seed=self.recipe.seed,
                along=along,
                on_progress=advance,
            )
        for note in saved.notes:
            self.listener.say(note)
        return saved


@dataclass(frozen=True, slots=True)
class KeptVectors:
    """The target of a run and the directions from it, so that any (α, β) can be tried again."""

    target: Checkpoint
    forget: Direction
    retain: Direction | None
    """None where β was fixed at 0."""


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
) -> KeptVectors:
    """Return the vectors of a run; raises InputError that says what is missing where they are gone."""
    name = record["recipe"].get("method", "msa")
    method = METHODS.get(name)
    if method is None or method.kind != "arithmetic":
        raise InputError(f"the method {name} trains the model itself and adds no vectors")
    if target is None:
        raise InputError("the run's target is not found any more, or has changed")
    settings = method.check_settings(record["recipe"].get("method_settings", {}))
    if base is None and "base" in method.needs:
        raise InputError("the run's base is not found any more, or has changed")
    if isinstance(settings, PairedSettings) and base is not None:
        start = settings.start_of(target, base)
    else:
        start = method.start(target, base)
    kept = {
        role: _end_of(workspace, facts, start)
        for role, facts in record["training"].items()
        if isinstance(facts, Mapping)
    }
    if "exposed" in kept:
        control = kept["control"]
        added = control - start if record["scales"]["retain"] else None
        return KeptVectors(target, _transformed(workspace, record) or kept["exposed"] - control, added)
    retain = kept.get("retain")
    forget = _transformed(workspace, record) or kept["forget"] - start
    return KeptVectors(target, forget, retain - start if retain is not None else None)


def _transformed(workspace: Path, record: Mapping[str, Any]) -> Direction | None:
    """Return the forget vector as the run's last change to it left it; None where there was none."""
    told = (record.get("vectors") or {}).get("transforms")
    if record["scales"].get("groups"):  # the last change of all: an α for each group of layers
        pattern, name, value = "apply-*/step.json", "dose", record["dose"]
    elif told:
        pattern, name, value = "transform-*/step.json", "norm", told[-1]["norm"]
    else:
        return None
    for step in sorted(workspace.glob(pattern)):
        if (_facts(step) or {}).get(name) == value:
            with suppress(CheckpointError):
                return StoredVector.open(step.parent / "vector")
    raise InputError(f"the run's vector as it was changed is not in {workspace} any more")


def _end_of(workspace: Path, facts: Mapping[str, Any], start: Checkpoint) -> Checkpoint | WeightedSum:
    """Return where the fine-tuning of which a record tells these facts ended."""
    for step in sorted(workspace.glob("finetune-*/step.json")):
        known = _facts(step)  # a record may say more
        if not known or any(facts.get(name) != value for name, value in known.items()):
            continue
        try:
            if (step.parent / "adapter").is_dir():
                return start + LoraAdapter.open(step.parent / "adapter", base=start)
            return Checkpoint.open(step.parent / "model")
        except CheckpointError:
            continue
    raise InputError(f"the run's vectors are not in {workspace} any more")


def _facts(step: Path) -> Mapping[str, Any] | None:
    """Return what a finished step says of itself."""
    try:
        facts = read_json(step)["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if isinstance(facts, dict) else None
