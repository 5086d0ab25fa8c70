"""The fine-tunings of a run: target and retrained model to prepare, ends of vectors, methods that train.

Each is a step of the workspace: a function of fingerprinted inputs, not run again once it has a result.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palinode.data.examples import Example, fingerprint_examples
from palinode.errors import CheckpointError
from palinode.methods import METHODS
from palinode.methods.msa import VectorSettings
from palinode.methods.paired import PairedSettings
from palinode.methods.transforms import check_transforms
from palinode.models.loading import pick_device, tokenizer_fingerprint
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.method_training import (
    MethodTraining,
    prepare_held,
    prepare_pair,
    prepare_training,
)
from palinode.pipeline.record import thinned_curve
from palinode.pipeline.transforming import Transforming
from palinode.pipeline.workspace import Step, Workspace
from palinode.progress import Listener
from palinode.training.finetune import finetune
from palinode.training.losses import ANSWER_LOSS
from palinode.training.roles import Material
from palinode.weights import Checkpoint, Direction, LoraAdapter, WeightedSum, save


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
    """The model of a method that trains it itself."""

    model: Checkpoint | WeightedSum
    """As training left it; or the target with the change that training made at the base, not yet written."""
    key: str
    """Fingerprint of the step that made it."""
    training: Mapping[str, Any]
    """How it went."""
    seen: Sequence[Example]
    """The retain rows that it saw."""


class Tuning:
    """The fine-tunings of one run over its inputs and workspace; `compare` takes some of them one by one."""

    def __init__(self, inputs: Inputs, workspace: Workspace, listener: Listener) -> None:
        self.inputs = inputs
        self.recipe = inputs.recipe
        self.rows = inputs.rows
        self.workspace = workspace
        self.listener = listener
        self.device = pick_device(inputs.recipe.device)

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
        settings = METHODS[self.recipe.method].check_settings(self.recipe.method_settings)
        model = target + (tuned - job.start) if settings.from_base else self._merged(tuned, key)
        return Trained(model, key, training, seen)

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
                style=self.recipe.prompts.style(),
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
        model = open_whole(step) if step.facts is not None else None
        if model is None:
            step.clear()
            model = save(point, step.folder / "model", dtype="float32").checkpoint
            step.finish({})
        return model


def open_whole(step: Step) -> Checkpoint | None:
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
