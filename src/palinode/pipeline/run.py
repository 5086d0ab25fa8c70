"""The main job: fine-tune, form vectors, choose scales, apply, evaluate, record. One step a method.

Each step is a function of fingerprinted inputs and leaves its result in the workspace; a step that
has one is not run again. The unlearned model takes its final name only when its record is in it.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from palinode.data.examples import Example, fingerprint_examples
from palinode.errors import CheckpointError
from palinode.evaluation.evaluate import observe
from palinode.methods import METHODS, unlearned_point
from palinode.methods.msa import VectorSettings
from palinode.methods.paired import PairedSettings
from palinode.methods.transforms import check_transforms
from palinode.models.loading import load_model, load_tokenizer, pick_device, tokenizer_fingerprint
from palinode.pipeline.auto import search_scales
from palinode.pipeline.costs import Plan, describe, make_plan
from palinode.pipeline.finished import (
    Outcomes,
    evaluation_step,
    finished_before,
    hash_models,
    known_outcomes,
    read_sets,
    run_key,
    test_sets,
)
from palinode.pipeline.inputs import Inputs, check_places, open_inputs, workspace_folder
from palinode.pipeline.layer_groups import scaled_vector
from palinode.pipeline.method_training import (
    MethodTraining,
    prepare_held,
    prepare_pair,
    prepare_training,
)
from palinode.pipeline.recipe import Recipe
from palinode.pipeline.record import build_record, dose_facts, geometry_facts, thinned_curve
from palinode.pipeline.reporting import full_report, publish
from palinode.pipeline.scales import Chosen, choose_scales
from palinode.pipeline.tracking import tracked
from palinode.pipeline.transforming import Transforming
from palinode.pipeline.workspace import Step, Workspace
from palinode.progress import Listener, Silence
from palinode.records import Outcome, write_json, write_outcomes
from palinode.training.finetune import finetune
from palinode.training.losses import ANSWER_LOSS
from palinode.training.roles import Material
from palinode.weights import Checkpoint, Direction, LoraAdapter, Saved, WeightedSum, save


@dataclass(frozen=True, slots=True)
class Unlearned:
    """What the main job returns."""

    output: Path
    """The unlearned model's folder."""
    record: Mapping[str, Any]
    """The content of its record.json."""
    outcomes: Outcomes
    """What each model did on each row; empty when the run was finished before and its workspace is gone."""
    finished_before: bool
    """Whether the output already held the result of this very run."""
    report: Path | None = None
    """The report with sample answers, in the workspace; None when it is not there any more."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """θ_1 − s and θ_2 − s, with the start s they share, or θ_1 − θ_c and θ_c − s."""

    forget: Direction
    retain: Direction | None
    keys: Mapping[str, str]
    """Fingerprints of the steps that made them."""
    training: Mapping[str, Any]
    """How it went."""
    seen: Sequence[Example] = ()
    """The retain rows that it saw."""
    transforms: Sequence[Mapping[str, Any]] = ()
    """What was done to the forget vector."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The model of a method that trains it itself, as training left it."""

    model: Checkpoint
    key: str
    """Fingerprint of the step that made it."""
    training: Mapping[str, Any]
    """How it went."""
    seen: Sequence[Example]
    """The retain rows that it saw."""


@dataclass(frozen=True, slots=True)
class Made:
    """The unlearned model as it lies in the workspace, and how it came about."""

    model: Checkpoint
    chosen: Chosen | None
    """The scales; None where no vectors were added."""
    weights: Mapping[str, Any]
    """Dose, and the geometry of the vectors."""
    training: Mapping[str, Any]
    seen: Sequence[Example]
    """The retain rows that training saw."""


def plan(recipe: Recipe) -> Plan:
    """Check a recipe's inputs and return what the run would do and cost, without doing it."""
    inputs = open_inputs(recipe)
    if finished_before(inputs) is None:
        check_places(recipe, inputs, needs=0)
    return make_plan(inputs)


def unlearn(
    recipe: Recipe,
    *,
    command: str | None = None,
    listener: Listener | None = None,
    located: Mapping[str, Any] | None = None,
) -> Unlearned:
    """Run a recipe from two model folders and a forget set to an unlearned model with its record.

    The same call after an interruption goes on where it was. `command` is what the record names as
    the way to repeat the run; `located` is how the base was found in a ladder, if it was. Raises an
    InputError for anything the user can mend.
    """
    listener = listener or Silence()
    inputs = open_inputs(recipe)
    hash_models(inputs, listener)
    finished = finished_before(inputs)
    workspace = Workspace(workspace_folder(recipe))
    if finished is not None:
        known = known_outcomes(inputs, workspace, finished)
        report = full_report(finished, workspace.folder)
        there = report if report.exists() else None
        return Unlearned(Path(recipe.output.folder), finished, known, finished_before=True, report=there)
    costs = make_plan(inputs)
    check_places(recipe, inputs, needs=costs.disk)
    for line in describe(costs):
        listener.say(line)
    with workspace.locked(), tracked_run(inputs, workspace, listener) as listener:
        return Job(inputs, workspace, listener).run(command, located)


def tracked_run(inputs: Inputs, workspace: Workspace, listener: Listener) -> AbstractContextManager[Listener]:
    """Give a listener that also keeps curves with the trackers of the recipe, if it names any."""
    recipe = inputs.recipe
    named = {"method", "method_settings", "seed", "training", "scales", "evaluation", "prepare"}
    return tracked(
        listener,
        recipe.tracker,
        folder=workspace.folder / "tracking",
        run=Path(recipe.output.folder).resolve().name,
        settings=recipe.model_dump(mode="json", include=named, exclude_none=True),
        cpu=pick_device(recipe.device).type == "cpu",
    )


class Job:
    """The steps of one run over its inputs and workspace; `compare` takes some of them one by one."""

    def __init__(self, inputs: Inputs, workspace: Workspace, listener: Listener) -> None:
        self.inputs = inputs
        self.recipe = inputs.recipe
        self.rows = inputs.rows
        self.workspace = workspace
        self.listener = listener
        self.style = inputs.recipe.prompts.style()
        self.device = pick_device(inputs.recipe.device)

    def run(self, command: str | None, located: Mapping[str, Any] | None = None) -> Unlearned:
        """Go through all steps and publish the result."""
        started = datetime.now(UTC)
        target, retrained = self.given_or_prepared()
        made = self.make(target)
        model = made.model
        given = {"target": target, "base": self.inputs.base, "unlearned": model, "retrained": retrained}
        models = {name: entry for name, entry in given.items() if entry is not None}
        outcomes = {name: self._evaluate(name, checkpoint) for name, checkpoint in models.items()}
        record = build_record(
            self.inputs,
            models=models,
            outcomes=outcomes,
            chosen=made.chosen,
            weights=made.weights,
            training=made.training,
            seen=made.seen,
            started=started,
            command=command,
            run=run_key(self.inputs),
            device=str(self.device),
        )
        if located is not None:
            record["located"] = dict(located)
            record["notes"].append(
                f"The base was chosen from a ladder: step {located['step']:,}, {located['reason']}."
            )
        record["outcomes"] = {name: self._evaluation(entry).folder.name for name, entry in models.items()}
        output, report = self._publish(model, record, outcomes, target)
        return Unlearned(output, record, outcomes, finished_before=False, report=report)

    def given_or_prepared(self) -> tuple[Checkpoint, Checkpoint | None]:
        """Return target and retrained model: as given, or made from the base as [prepare] says."""
        if self.inputs.target is not None:
            return self.inputs.target, self.inputs.retrained
        base, rows = self.inputs.earlier, self.rows
        everything = [*rows.forget, *rows.retain]
        target, retrained = (
            self._merged(*self._finetuned(name, base, examples, whole=True)[:2])
            for name, examples in (("target", everything), ("retrained", rows.retain))
        )
        return target, retrained

    def make(self, target: Checkpoint) -> Made:
        """Make the unlearned model, in the workspace."""
        arithmetic = METHODS[self.recipe.method].kind == "arithmetic"
        return self._by_arithmetic(target) if arithmetic else self._by_training(target)

    def _by_arithmetic(self, target: Checkpoint) -> Made:
        """Make the unlearned model by adding vectors to the target."""
        vectors = self.vectors(target)
        chosen = self._scales(target, vectors)
        model, weights = self._apply(target, vectors, chosen)
        return Made(model, chosen, weights, vectors.training, vectors.seen)

    def _by_training(self, target: Checkpoint) -> Made:
        """Make the unlearned model by training; it is saved in the target's layout and types."""
        trained = self.train(target)
        change = trained.model - target
        output = self.recipe.output
        step = self.workspace.step(
            "apply",
            target=target.fingerprint(),
            trained=trained.key,
            output=[output.dtype, output.rounding, self.recipe.seed],
        )
        weights, model = step.facts, _open_whole(step)
        if weights is None or model is None:
            step.clear()
            saved = self._write(target + change, target, {"change": change}, step.folder / "model")
            weights = {"dose": dose_facts(saved, {"change": 1.0})}
            step.finish(weights)
            model = Checkpoint.open(step.folder / "model")
        return Made(model, None, weights, trained.training, trained.seen)

    def train(self, target: Checkpoint) -> Trained:
        """Train the model of a method that trains it itself."""
        training: dict[str, Any] = {}

        def reinforced() -> tuple[Checkpoint, str]:
            tuned, key, training["reinforced"] = self._finetuned("forget", target, self.rows.forget_train)
            return self._merged(tuned, key), key

        job = prepare_training(self.inputs, target, self.workspace, self.listener, reinforced=reinforced)
        tuned, key, facts = self._finetuned(self.recipe.method, job.start, job.material, job=job)
        training["method"] = facts
        seen = [job.retain[place] for place in facts["seen_retain"]]
        return Trained(self._merged(tuned, key), key, training, seen)

    def vectors(self, target: Checkpoint) -> Vectors:
        """Return the vectors that are added up, the forget vector transformed as the recipe says."""
        found = self._vectors(target)
        transforms = check_transforms(self.recipe.transforms)
        if not transforms:
            return found

        def another(seed: int) -> tuple[Direction, Mapping[str, str]]:
            other = self._vectors(target, other_seed=seed)
            return other.forget, other.keys

        transforming = Transforming(self.inputs, target, self.workspace, self.listener, another)
        forget, key, told = transforming.apply(transforms, found.forget, found.keys)
        reads_retain = any("retain" in one.transform.needs for one in transforms)
        seen = self.rows.retain_sample if reads_retain else found.seen
        return replace(found, forget=forget, keys={**found.keys, "forget": key}, seen=seen, transforms=told)

    def _vectors(self, target: Checkpoint, *, other_seed: int | None = None) -> Vectors:
        """Fine-tune θ_1, and θ_2 where β may be other than 0, and return their differences to the start.

        With another seed there is a forget vector only.
        """
        method = METHODS[self.recipe.method]
        settings = method.check_settings(self.recipe.method_settings)
        if isinstance(settings, PairedSettings):
            return self._paired_vectors(target, settings, other_seed)
        start = method.start(target, self.inputs.base)
        assert isinstance(settings, VectorSettings)
        held = prepare_held(self.inputs, start, settings.retain_kl) if settings.retain_kl else None
        rows = held.material if held else self.rows.forget_train
        forget, forget_key, forget_facts = self._finetuned("forget", start, rows, job=held, seed=other_seed)
        if not self.rows.retain or self.recipe.scales.retain == 0.0 or other_seed is not None:
            return Vectors(
                forget - start,
                None,
                {"forget": forget_key},
                {"forget": forget_facts, "retain": None},
                [self.rows.retain_sample[place] for place in forget_facts.get("seen_retain", ())],
            )
        retain, retain_key, retain_facts = self._finetuned("retain", start, self.rows.retain_sample)
        return Vectors(
            forget - start,
            retain - start,
            {"forget": forget_key, "retain": retain_key},
            {"forget": forget_facts, "retain": retain_facts},
            self.rows.retain_sample,
        )

    def _paired_vectors(self, target: Checkpoint, settings: PairedSettings, seed: int | None) -> Vectors:
        """Fine-tune with the forget rows and without; the second term is there only if its scale is given."""
        start = settings.start_of(target, self.inputs.earlier)
        if settings.retain_free:  # no replay, no control: MSA, or the task vector
            forget, key, facts = self._finetuned("forget", start, self.rows.forget_train, seed=seed)
            return Vectors(forget - start, None, {"forget": key}, {"forget": facts, "retain": None})
        with_forget, without = prepare_pair(self.inputs, target, settings)
        exposed, key, facts = self._finetuned(
            "exposed", start, with_forget.material, job=with_forget, seed=seed
        )
        control, control_key, control_facts = self._finetuned(
            "control", start, without.material, job=without, seed=seed
        )
        return Vectors(
            exposed - control,
            control - start if self.recipe.scales.retain else None,
            {"forget": key, "control": control_key},
            {"exposed": facts, "control": control_facts},
            [self.rows.retain_sample[place] for place in facts["seen_retain"]],
        )

    def _finetuned(
        self,
        name: str,
        start: Checkpoint,
        examples: Sequence[Example] | Material,
        *,
        job: MethodTraining | None = None,
        whole: bool = False,
        seed: int | None = None,
    ) -> tuple[Checkpoint | WeightedSum, str, Mapping[str, Any]]:
        """Return where a fine-tuning ends, its step's key and facts; trained only if it is not there yet.

        A low-rank run ends at start + adapter; with `whole` all weights are trained whatever the recipe says.
        """
        settings = self.recipe.training
        settings = settings.model_copy(update={"lora": None}) if whole else settings
        seed = self.recipe.seed if seed is None else seed
        step = self.workspace.step(
            f"finetune-{name}",
            start=start.fingerprint(),
            **({"rows": fingerprint_examples(_anchors(examples))} | ({"job": dict(job.key)} if job else {})),
            training=settings.key(),
            prompts=self.recipe.prompts.model_dump(),
            tokenizer=tokenizer_fingerprint(self.inputs.reader),
            seed=seed,
            device=self.device.type,
        )
        place = step.folder / ("adapter" if settings.lora else "model")
        facts, point = step.facts, _open_end(place, start)
        if facts is None or point is None:
            step.begin()
            shutil.rmtree(place, ignore_errors=True)
            done = finetune(
                start,
                examples,
                place,
                settings,
                seed=seed,
                style=self.style,
                reader=self.inputs.reader,
                device=self.recipe.device,
                loss=job.objective if job else ANSWER_LOSS,
                frozen=job.frozen if job else None,
                state=step.folder / "state",
                label=f"fine-tuning {name}",
                listener=self.listener,
            )
            point = done.point
            facts = {
                "rows": len(_anchors(examples)),
                "steps": len(done.curve),
                "tokens": done.tokens,
                "first_loss": done.curve[0].loss,
                "last_loss": done.curve[-1].loss,
                "curve": thinned_curve([point.loss for point in done.curve]),
                "seconds": round(done.seconds, 1),
            }
            if job:
                facts["planned_steps"] = done.planned_steps
                facts["seen_retain"] = sorted(done.seen.get("retain", ()))
            step.finish(facts)
        return point, step.key, facts

    def _merged(self, point: Checkpoint | WeightedSum, key: str) -> Checkpoint:
        """Return where a fine-tuning ends as a whole model, for what has to load it."""
        if isinstance(point, Checkpoint):
            return point
        step = self.workspace.step("merge", trained=key)
        model = _open_whole(step) if step.facts is not None else None
        if model is None:
            step.clear()
            model = save(point, step.folder / "model", dtype="float32").checkpoint
            step.finish({})
        return model

    def _scales(self, target: Checkpoint, vectors: Vectors) -> Chosen:
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
            return Chosen(alphas[0], betas[0], "given", None, [])
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
        return Chosen(**facts)

    def _apply(
        self, target: Checkpoint, vectors: Vectors, chosen: Chosen
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
        facts, model = step.facts, _open_whole(step)
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
        self, target: Checkpoint, forget: Direction, retain: Direction | None, chosen: Chosen, folder: Path
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

    def _evaluate(self, name: str, checkpoint: Checkpoint) -> Mapping[str, Sequence[Outcome]]:
        """Return a model's outcomes on the forget and retain rows, read back if they are there."""
        step = self._evaluation(checkpoint)
        if step.facts is None:
            step.begin()
            started = time.monotonic()
            model, tokenizer = load_model(checkpoint, device=self.device), load_tokenizer(self.inputs.reader)
            for label, examples in test_sets(self.inputs).items():
                outcomes = observe(
                    model,
                    tokenizer,
                    examples,
                    self.recipe.evaluation,
                    style=self.style,
                    label=f"{name} on the {label} set",
                    listener=self.listener,
                )
                write_outcomes(step.folder / f"{label}.jsonl", outcomes)
            step.finish({"model": name, "seconds": round(time.monotonic() - started, 1)})
        return read_sets(step, self.inputs)

    def _evaluation(self, checkpoint: Checkpoint) -> Step:
        return evaluation_step(self.inputs, self.workspace, checkpoint.fingerprint())

    def _publish(
        self, model: Checkpoint, record: Mapping[str, Any], outcomes: Outcomes, target: Checkpoint
    ) -> tuple[Path, Path]:
        """Put record and reports beside the weights, then give the folder its final name.

        Returns it, and where the report with sample answers lies.
        """
        report = publish(
            record,
            outcomes,
            folder=model.folder,
            workspace=self.workspace.folder,
            target=target.folder,
        )
        write_json(model.folder / "record.json", record)
        output = Path(self.recipe.output.folder)
        output.parent.mkdir(parents=True, exist_ok=True)
        move_folder(model.folder, output.resolve())  # a link is no place to rename to
        return output, report


def move_folder(folder: Path, output: Path) -> None:
    """Rename a folder, over an empty one if there is one; across file systems, copy and then rename."""
    try:
        folder.replace(output)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = output.with_name(f".{output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial)
        partial.replace(output)
        shutil.rmtree(folder)


def _open_whole(step: Step) -> Checkpoint | None:
    """Return the step's model if it is there and whole."""
    try:
        return Checkpoint.open(step.folder / "model")
    except CheckpointError:
        return None


def _open_end(place: Path, start: Checkpoint) -> Checkpoint | WeightedSum | None:
    """Return where a fine-tuning ended, if its model or adapter is there and whole."""
    try:
        return start + LoraAdapter.open(place) if place.name == "adapter" else Checkpoint.open(place)
    except CheckpointError:
        return None


def _anchors(examples: Sequence[Example] | Material) -> Sequence[Example]:
    """Return the examples that an epoch goes through."""
    return examples.examples[examples.anchor] if isinstance(examples, Material) else examples
