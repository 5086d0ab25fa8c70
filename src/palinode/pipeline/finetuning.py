"""The fine-tunings of a run: target and retrained model to prepare, and those that the method takes.

Each is a step of the workspace: a function of fingerprinted inputs, not run again once it has a result.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from palinode.data.examples import Example, at_most, fingerprint_examples
from palinode.errors import CheckpointError
from palinode.methods.method import Asked, Ends, Given, MethodRun, Vectors, plain_material
from palinode.methods.transforms import check_transforms
from palinode.models.loading import load_model, load_reader, load_tokenizer, tokenizer_fingerprint
from palinode.pipeline.inputs import Work
from palinode.pipeline.reporting import thinned_curve
from palinode.pipeline.transforming import Filtered, OpenFilter, Transforming
from palinode.pipeline.workspace import Step, fingerprint
from palinode.training.finetune import Finetuned, Watch, finetune
from palinode.training.objectives import PLAIN_OBJECTIVE
from palinode.weights import Checkpoint, Direction, LoraAdapter, Point, WeightedSum, save


@dataclass(frozen=True, slots=True)
class Trained:
    """What the runs of a method came to."""

    result: Vectors | Point
    """Vectors whose scales are still open; or the model, as it lies there or as a formula."""
    steps: Mapping[str, str]
    """Keys of the steps that made it: of each run, and of what was done to the forget vector last."""
    training: Mapping[str, Any]
    """How each run went."""
    seen: Sequence[Example]
    """The retain rows that were trained on."""
    told: Sequence[Mapping[str, Any]] = ()
    """What was done to the forget vector before."""
    filters: OpenFilter | None = None
    """What is done to it last, where a filter's settings may be chosen with the scales."""
    filtered: Filtered | None = None
    """The vector as that leaves it: the usual one until another is chosen, made when it is needed."""
    before: Direction | None = None
    """The forget vector before anything was done to it."""

    @property
    def unfiltered(self) -> Vectors:
        """The vectors of a method that has some, before the filter that is open."""
        assert isinstance(self.result, Vectors)
        return self.result

    @property
    def vectors(self) -> Vectors:
        """The vectors, filtered."""
        own = self.unfiltered
        return replace(own, forget=self.filtered.direction) if self.filtered else own

    @property
    def transforms(self) -> Sequence[Mapping[str, Any]]:
        """What was done to the forget vector."""
        return [*self.told, self.filtered.facts] if self.filtered else self.told

    @property
    def model(self) -> Point:
        """The model of a method that trains it itself."""
        assert not isinstance(self.result, Vectors)
        return self.result


@dataclass
class _Progress:
    """The runs of a method that are through."""

    target: Checkpoint
    seed: int
    ends: dict[str, Checkpoint | WeightedSum] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)


class FineTuning(Work):
    """The fine-tunings of one run over its inputs and workspace."""

    def given_or_prepared(self) -> tuple[Checkpoint, Checkpoint | None]:
        """Return target and retrained model: as given, or made from the base as [prepare] says."""
        if self.inputs.target is not None:
            return self.inputs.target, self.inputs.retrained
        rows, done = self.inputs.rows, _Progress(self.inputs.earlier, self.recipe.seed)
        for name, examples in (("target", [*rows.forget, *rows.retain]), ("retrained", rows.retain)):
            self._finetuned(MethodRun(name, "base", plain_material("rows", examples)), done, whole=True)
        target, retrained = done.ends["target"], done.ends["retrained"]
        assert isinstance(target, Checkpoint)  # all weights are trained, whatever the recipe says
        assert isinstance(retrained, Checkpoint)
        return target, retrained

    def train(self, target: Checkpoint) -> Trained:
        """Do the method's runs, and to its forget vector what the recipe says."""
        trained = self._train(target, self.inputs.given)
        transforms = check_transforms(self.recipe.changes)
        if not transforms:
            return trained
        transforming = Transforming(self.inputs, self.workspace, self.listener, target)
        before = trained.vectors.forget
        forget, key, told, filters = transforming.apply(transforms, before, trained.steps)
        rows, seen = self.inputs.rows, {example.row: example for example in trained.seen}
        for one in transforms:  # some read retain rows
            read = rows.spared if "inputs" in one.transform.needs else ()
            read = rows.retain_sample if "retain" in one.transform.needs else read
            most = getattr(one.settings, "rows", len(read))
            seen.update({row.row: row for row in at_most(read, most, seed=self.recipe.seed)})
        return replace(
            trained,
            result=replace(trained.vectors, forget=forget),
            steps={**trained.steps, "transform": key},
            seen=list(seen.values()),
            told=told,
            filters=filters,
            filtered=filters.usual() if filters else None,
            before=before,
        )

    def _train(self, target: Checkpoint, given: Given) -> Trained:
        """Do the method's runs one after another, and put their ends together."""
        method, settings = self.inputs.method, self.inputs.settings
        done, seen = _Progress(target, given.seed), {}
        if self.inputs.unlearned is not None:
            done.ends["given"] = self.inputs.unlearned
            done.steps["given"] = fingerprint(
                target=target.fingerprint(), given=self.inputs.unlearned.fingerprint()
            )
        for run in method.runs(settings, given):
            material = self._finetuned(run, done)
            retain = material.get("retain", ())
            plain = run.objective is None
            places = range(len(retain)) if plain else done.facts[run.name]["seen_retain"]
            seen.update({retain[place].row: retain[place] for place in places})
        start = target if settings.starts_at == "target" else self.inputs.earlier
        ends = Ends(target, start, done.ends)
        result = method.vectors(settings, ends) if self.recipe.has_scales else method.point(settings, ends)
        if isinstance(result, Vectors) and given.retain_scale == 0:
            result = replace(result, retain=None)
        return Trained(result, done.steps, done.facts, list(seen.values()))

    def keys(self, target: Checkpoint) -> dict[str, str]:
        """Return the key of each run's step, known before any of them is done."""
        done = _Progress(target, self.recipe.seed)
        for run in self.inputs.method.runs(self.inputs.settings, self.inputs.given):
            done.steps[run.name] = self._step(run, done).key
        return done.steps

    def _start(self, run: MethodRun, target: Checkpoint) -> Checkpoint:
        return target if run.start == "target" else self.inputs.earlier

    def _step(self, run: MethodRun, done: _Progress, *, whole: bool = False) -> Step:
        """Return the step of a run; those that it reads are known."""
        settings = self.recipe.training
        job: dict[str, Any] = {}
        if run.objective is not None:
            rows = {role: fingerprint_examples(found) for role, found in run.material.examples.items()}
            job = {"job": {**run.decides, "rows": rows}}
        if run.asked is not None:
            job["asked"] = self._asking(run, run.asked, done.target).key
        if run.reads:
            job["reads"] = [done.steps[name] for name in run.reads]
        return self.workspace.step(
            f"finetune-{run.name}",
            start=self._start(run, done.target).fingerprint(),
            **job,
            rows=fingerprint_examples(run.anchors),
            training=(settings.model_copy(update={"lora": None}) if whole else settings).key(),
            prompts=self.recipe.prompts.model_dump(),
            tokenizer=tokenizer_fingerprint(self.inputs.reader),
            seed=done.seed,
            device=self.device.type,
        )

    def _finetuned(
        self, run: MethodRun, done: _Progress, *, whole: bool = False
    ) -> Mapping[str, Sequence[Example]]:
        """Do a run, unless its result is there; add its end to what is done, and return its rows by role.

        A low-rank run ends at start + adapter; with `whole` all weights are trained whatever the recipe says.
        """
        start, material = self._start(run, done.target), run.material
        if run.asked is not None:
            material = run.asked.material(self._alternates(run, run.asked, done.target))
        step = self._step(run, done, whole=whole)
        lora = None if whole else self.recipe.training.lora
        place = step.folder / ("adapter" if lora else "model")
        point, facts = open_end(step, start), step.facts
        if facts is None or point is None:
            step.begin()
            shutil.rmtree(place, ignore_errors=True)

            def load(name: str) -> PreTrainedModel:
                model = done.ends.get(name, done.target)
                assert isinstance(model, Checkpoint)  # runs that others read are whole
                return load_model(model, device=self.device)

            found = finetune(
                start,
                material.examples[material.anchor]
                if run.objective is None
                else replace(material, frozen=run.frozen(load) if run.frozen else None),
                place,
                self.recipe.training.model_copy(update={"lora": lora}),
                seed=done.seed,
                style=self.recipe.prompts.style(),
                reader=self.inputs.reader,
                device=self.recipe.device,
                loss=run.objective or PLAIN_OBJECTIVE,
                state=step.folder / "state",
                listener=self.listener,
                watch=Watch(f"fine-tuning {run.name}"),
            )
            point, facts = found.point, _facts(found, material.examples[material.anchor], run)
            step.finish(facts)
        done.ends[run.name] = self._merged(point, step.key) if run.whole else point
        done.steps[run.name], done.facts[run.name] = step.key, facts
        return material.examples

    def _merged(self, point: Point, key: str) -> Checkpoint:
        """Return a point as a whole model, for what has to load it."""
        if isinstance(point, Checkpoint):
            return point
        step = self.workspace.step("merge", trained=key)
        model = open_whole(step) if step.facts is not None else None
        if model is None:
            step.clear()
            model = save(point, step.folder / "model", dtype="float32").checkpoint
            step.finish({})
        return model

    def _asking(self, run: MethodRun, asked: Asked, target: Checkpoint) -> Step:
        recipe = self.recipe
        return self.workspace.step(
            "alternates",
            target=target.fingerprint(),
            rows=fingerprint_examples(run.material.examples["forget"]),
            sampling=list(asked.sampling),
            max_length=recipe.training.max_length,
            prompts=recipe.prompts.model_dump(),
            tokenizer=tokenizer_fingerprint(self.inputs.reader),
            seed=recipe.seed,
            device=self.device.type,
        )

    def _alternates(self, run: MethodRun, asked: Asked, target: Checkpoint) -> list[tuple[int, str]]:
        """Return the target's other answers, drawn once and kept."""
        step, recipe = self._asking(run, asked, target), self.recipe

        def drawn() -> Mapping[str, Any]:
            found = asked.draw(
                load_reader(target, device=self.device),
                load_tokenizer(self.inputs.reader),
                seed=recipe.seed,
                max_length=recipe.training.max_length,
                style=recipe.prompts.style(),
                listener=self.listener,
            )
            return {"alternates": [list(entry) for entry in found]}

        return [(place, text) for place, text in step.once(drawn)["alternates"]]


def open_whole(step: Step) -> Checkpoint | None:
    """Return the step's model if it is there and whole."""
    try:
        return Checkpoint.open(step.folder / "model")
    except CheckpointError:
        return None


def open_end(step: Step, start: Checkpoint) -> Checkpoint | WeightedSum | None:
    """Return where a fine-tuning ended, if its model or adapter is there and whole."""
    try:
        return start + LoraAdapter.open(step.folder / "adapter", base=start)
    except CheckpointError:
        return open_whole(step)


def _facts(found: Finetuned, anchors: Sequence[Example], run: MethodRun) -> dict[str, Any]:
    """Return what the record tells of a run."""
    facts = {
        "rows": len(anchors),
        "steps": len(found.curve),
        "tokens": found.tokens,
        "first_loss": found.curve[0].loss,
        "last_loss": found.curve[-1].loss,
        "curve": thinned_curve([point.loss for point in found.curve]),
        "optimizers": list(dict.fromkeys(point.optimizer for point in found.curve)),
        "seconds": round(found.seconds, 1),
    }
    if run.objective is not None:
        facts["planned_steps"] = found.planned_steps
        facts["seen_retain"] = sorted(found.seen.get("retain", ()))
    return facts
