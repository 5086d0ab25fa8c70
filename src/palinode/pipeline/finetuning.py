"""What a training method is given in a run: objective, rows by role, and what comes from other models.

Other answers that the target is asked for are a step of their own, kept in the workspace.

The fine-tunings of a run: target and retrained model to prepare, ends of vectors, methods that train.

Each is a step of the workspace: a function of fingerprinted inputs, not run again once it has a result.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palinode.data.examples import Example, fingerprint_examples
from palinode.errors import CheckpointError
from palinode.methods import METHODS
from palinode.methods.altpo import AltPOSettings, draw_alternates
from palinode.methods.method import gather
from palinode.methods.msa import PairedSettings, VectorSettings
from palinode.methods.transforms import check_transforms
from palinode.methods.whp import WHPSettings, generic_words
from palinode.models.inplace import CombinedLogits
from palinode.models.loading import load_model, load_tokenizer, pick_device, tokenizer_fingerprint
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.record import thinned_curve
from palinode.pipeline.transforming import Transforming
from palinode.pipeline.workspace import Step, Workspace
from palinode.progress import Listener
from palinode.training.finetune import control_objective, exposed_objective, finetune, pair_material
from palinode.training.losses import ANSWER_LOSS
from palinode.training.objectives import FrozenValues, Objective, answer_term, kl_term
from palinode.training.roles import Joined, Material
from palinode.weights import Checkpoint, Direction, LoraAdapter, WeightedSum, save


@dataclass(frozen=True, slots=True)
class MethodTraining:
    """Everything that decides a method's training, beside the settings that all share."""

    start: Checkpoint
    objective: Objective
    material: Material
    key: Mapping[str, Any]
    """What decides the objective and the rows, for the step's fingerprint."""
    retain: Sequence[Example]
    """The retain rows that are drawn from."""
    frozen: Callable[[Joined, int], Mapping[str, FrozenValues]] | None = None


def prepare_training(
    inputs: Inputs,
    target: Checkpoint,
    workspace: Workspace,
    listener: Listener,
    *,
    reinforced: Callable[[], tuple[Checkpoint, str]],
) -> MethodTraining:
    """Return what the recipe's method trains on; `reinforced` is asked for the target trained on the forget
    rows, and its step's key, where the method needs that."""
    recipe, rows = inputs.recipe, inputs.rows
    method = METHODS[recipe.method]
    assert method.objective is not None
    settings = method.check_settings(recipe.method_settings)
    objective = method.objective(settings, recipe.seed)
    sampled = getattr(settings, "retain_rows", "all") == "sample"
    retain = rows.retain_sample if sampled else rows.retain
    alternates = (
        _alternates(inputs, target, settings, workspace, listener)
        if isinstance(settings, AltPOSettings)
        else ()
    )
    material = gather(
        objective,
        forget=rows.forget_train,
        retain=retain,
        refusals=inputs.refusals,
        alternates=alternates,
    )
    key: dict[str, Any] = {
        "method": method.name,
        "settings": settings.model_dump(mode="json", exclude={"start"}),  # the step has the checkpoint itself
        "rows": {role: fingerprint_examples(found) for role, found in material.examples.items()},
    }
    start = method.start_of(settings, target, inputs.base)
    if not isinstance(settings, WHPSettings):
        return MethodTraining(start, objective, material, key, retain)
    other, other_key = reinforced()
    device = pick_device(recipe.device)

    def combined() -> CombinedLogits:
        models = [load_model(entry, device=device) for entry in (target, other)]
        return CombinedLogits(models[0], models[1], settings.alpha)

    key["reinforced"] = other_key
    return MethodTraining(start, objective, material, key, retain, generic_words(combined))


def prepare_pair(
    inputs: Inputs, target: Checkpoint, settings: PairedSettings
) -> tuple[MethodTraining, MethodTraining]:
    """Return what the two runs of a paired vector train on: with the forget rows, and the control."""
    rows = inputs.rows
    start = settings.start_of(target, inputs.earlier)
    material = pair_material(rows.forget_train, rows.retain_sample, replay_ratio=settings.replay_ratio)
    shared = {
        "method": "paired",
        "replay": fingerprint_examples(rows.retain_sample),
        "replay_ratio": settings.replay_ratio,
    }
    exposed = exposed_objective(settings.weight)
    key = {**shared, "forget_weight": settings.weight}
    return (
        MethodTraining(start, exposed, material, key, rows.retain_sample),
        MethodTraining(start, control_objective(), material, shared, rows.retain_sample),
    )


def prepare_held(inputs: Inputs, start: Checkpoint, weight: float) -> MethodTraining:
    """Return the run CE(forget) + λ·KL(p_s ‖ p_θ) on retain rows, which is held to its start s."""
    rows = inputs.rows
    objective = Objective((answer_term("forget", "forget"), kl_term("retain", "retain", coefficient=weight)))
    material = gather(objective, forget=rows.forget_train, retain=rows.retain_sample)
    key = {"retain_kl": weight, "retain": fingerprint_examples(rows.retain_sample)}
    return MethodTraining(start, objective, material, key, rows.retain_sample)


def _alternates(
    inputs: Inputs, target: Checkpoint, settings: AltPOSettings, workspace: Workspace, listener: Listener
) -> list[tuple[int, str]]:
    """Return the target's other answers to the forget questions, drawn once and kept."""
    recipe, examples = inputs.recipe, inputs.rows.forget_train
    step = workspace.step(
        "alternates",
        target=target.fingerprint(),
        rows=fingerprint_examples(examples),
        sampling=[settings.samples, settings.temperature, settings.max_new_tokens],
        max_length=recipe.training.max_length,
        prompts=recipe.prompts.model_dump(),
        tokenizer=tokenizer_fingerprint(inputs.reader),
        seed=recipe.seed,
        device=pick_device(recipe.device).type,
    )
    facts = step.facts
    if facts is None:
        step.begin()
        found = draw_alternates(
            load_model(target, device=pick_device(recipe.device)),
            load_tokenizer(inputs.reader),
            examples,
            settings,
            seed=recipe.seed,
            max_length=recipe.training.max_length,
            style=recipe.prompts.style(),
            listener=listener,
        )
        step.finish(facts := {"alternates": [list(entry) for entry in found]})
    return [(place, text) for place, text in facts["alternates"]]


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
