"""The main job: fine-tune, form vectors, choose scales, apply, evaluate, record; and what a run left behind.

Each step is a function of fingerprinted inputs and leaves its result in the workspace; a step that has one is
not run again. The unlearned model takes its final name only when its record is in it. A record names the
steps that made its model, so that a finished run's vectors are found by their keys.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from palinode.data.examples import Example, Question, fingerprint_examples
from palinode.errors import CheckpointError, InputError, OutputError, RecipeError, unwritable
from palinode.evaluation.ask import ask
from palinode.methods import METHODS
from palinode.methods.method import Ends, Vectors
from palinode.metrics.table import score_outcomes
from palinode.models.loading import load_reader, load_tokenizer, pick_device, tokenizer_fingerprint
from palinode.pipeline.costs import Corrected, Machine, Plan, describe, make_plan
from palinode.pipeline.finetuning import FineTuning, Trained, open_end, open_whole
from palinode.pipeline.forecasting import Forecast, compared, forecast_step, rehearse
from palinode.pipeline.goal import TOLERANCE
from palinode.pipeline.inputs import (
    Inputs,
    ask_as_trained,
    check_places,
    open_inputs,
    outline_inputs,
    present,
    workspace_folder,
)
from palinode.pipeline.recipe import Recipe
from palinode.pipeline.reporting import (
    dose_facts,
    environment,
    find_model,
    full_report,
    geometry_facts,
    heading,
    in_order,
    model_facts,
    outcomes_of,
    refresh,
    row_facts,
    with_unseen,
    write_reports,
)
from palinode.pipeline.search import ChosenScales, choose_scales, own_yardstick, scaled_vector
from palinode.pipeline.tracking import tracked
from palinode.pipeline.workspace import Step, Workspace, fingerprint
from palinode.progress import Listener, NullListener
from palinode.records import (
    RECORD_VERSION,
    Outcome,
    Score,
    plain_scores,
    read_json,
    read_outcomes,
    share,
    shared,
    write_outcomes,
)
from palinode.report.reports import Facts, Outcomes
from palinode.report.verdicts import run_verdict
from palinode.weights import Checkpoint, Direction, Point, StoredVector
from palinode.weights.atomic import claimed
from palinode.weights.atomic import publish as publish_folder
from palinode.weights.fingerprints import check_same, known_fingerprint, tensor_digests
from palinode.weights.preflight import complain_of_nonfinite

SHOWN_FROM = 1_000_000_000
"""Bytes of a model from which hashing is shown: some seconds on a slow disk."""


def run_key(inputs: Inputs) -> str:
    """Return the fingerprint of everything that decides a run's result."""
    recipe = inputs.recipe.model_dump(
        mode="json",
        exclude={
            "models": True,
            "data": True,
            "output": {"folder", "workspace", "keep_unchanged"},
            "training": True,
            "tracker": True,
            "transforms": True,
            "filter": True,
        },
    )
    recipe["training"] = inputs.recipe.training.key()
    if inputs.recipe.changes:
        recipe["transforms"] = inputs.recipe.changes
    return fingerprint(
        recipe=recipe,
        models={name: model.fingerprint() for name, model in inputs.models.items()},
        forget=fingerprint_examples(inputs.rows.forget),
        retain=fingerprint_examples(inputs.rows.retain),
        **({"refusals": list(inputs.refusals)} if inputs.refusals else {}),
        **({"unseen": fingerprint_examples(inputs.rows.unseen)} if inputs.rows.unseen else {}),
        **({"spared": fingerprint_examples(inputs.rows.spared)} if inputs.recipe.data.background else {}),
    )


def hash_models(inputs: Inputs, listener: Listener) -> None:
    """Hash the weights that a run starts from, showing how far it is; the digests are remembered."""
    for name, model in inputs.models.items():
        if model.nbytes >= SHOWN_FROM and known_fingerprint(model) is None:
            with listener.task(f"hashing the {name}", model.nbytes, "bytes") as advance:
                tensor_digests(model, on_progress=advance)


def finished_before(inputs: Inputs) -> Mapping[str, Any] | None:
    """Return the record of this very run if the output folder already holds its result."""
    output = Path(inputs.recipe.output.folder)
    try:
        record: dict[str, Any] = read_json(output / "record.json")
        same_run = record["run"] == run_key(inputs)
        written = record["models"]["unlearned"]["fingerprint"]
        return record if same_run and Checkpoint.open(output).fingerprint() == written else None
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return None


def test_sets(inputs: Inputs) -> Mapping[str, Sequence[Example]]:
    """Return the rows that models are evaluated on, by set; forget-only runs have one set."""
    sets = {"forget": inputs.rows.forget_test, "retain": inputs.rows.retain_test}
    return {label: examples for label, examples in sets.items() if examples}


@dataclass(frozen=True, slots=True)
class Unlearned:
    """What the main job returns."""

    output: Path | None
    """The unlearned model's folder; None where nothing was subtracted or there was nothing to forget."""
    record: Mapping[str, Any]
    """The content of its record.json."""
    outcomes: Outcomes
    """What each model did on each row; empty when the run was finished before and its workspace is gone."""
    finished_before: bool
    """Whether the output already held the result of this very run."""
    report: Path | None = None
    """The report with sample answers, in the workspace; None when it is not there any more."""

    @property
    def scores(self) -> dict[str, Score]:
        """The unlearned model's scores on the forget rows, by metric; none where there is no such model."""
        found = self.record["scores"].get("unlearned", {}).get("forget", {})
        return {name: Score(**facts) for name, facts in found.items()}

    @property
    def verdict(self) -> Mapping[str, Any]:
        """Its `code`, `light`, `sentence`, `exit_code` and claims (docs/report.md)."""
        return dict(self.record["verdict"])


def dry_run(recipe: Recipe, listener: Listener | None = None, *, on: str | None = None) -> Plan:
    """Check a recipe's inputs and return what the run would do and cost, without doing it.

    `on` another machine, as in "8xh100", the models may be folders with a config.json alone.
    """
    if on is not None:
        machine = Machine.named(on)
        return make_plan(outline_inputs(recipe), machine)
    inputs, listener = open_inputs(recipe), listener or NullListener()
    for note in inputs.notes:
        listener.say(note)
    plan = make_plan(inputs)
    if finished_before(inputs) is None:
        check_places(recipe, inputs, needs=0)
        try:
            check_places(recipe, inputs, needs=plan.disk)
        except OutputError as error:  # what it costs is told all the same
            listener.say(f"The run will be refused: {error}.")
    return plan


def forecast(recipe: Recipe, listener: Listener | None = None) -> Forecast:
    """Rehearse a recipe's unlearning, and return what that foretells; the run finds it in the workspace.

    Raises RecipeError where nothing can be foretold.
    """
    inputs, workspace = open_inputs(recipe), Workspace(workspace_folder(recipe))
    step = forecast_step(inputs, workspace, run_key(inputs))
    if step is None:
        raise RecipeError(
            "what can be foretold is an unlearning by the methods msa and task_vector, filtered by least "
            "squares, of a target and a base that are there; name these, or leave --measure out"
        )
    with workspace.locked(listener):
        found = partial(rehearse, inputs, workspace, listener or NullListener(), step)
        return Forecast(**step.once(lambda: asdict(found())))


def unlearn(
    recipe: Recipe, *, listener: Listener | None = None, located: Mapping[str, Any] | None = None
) -> Unlearned:
    """Run a recipe from two model folders and a forget set to an unlearned model with its record.

    The same call after an interruption goes on where it was. `located` is how the base was found in a
    ladder, if it was. Raises an InputError for anything the user can mend.
    """
    listener = listener or NullListener()
    inputs = open_inputs(recipe)
    hash_models(inputs, listener)
    finished = finished_before(inputs)
    workspace = Workspace(workspace_folder(recipe))
    if finished is not None:
        known = outcomes_of(finished, workspace.folder)
        report = full_report(finished, workspace.folder)
        there = report if report.exists() else None
        return Unlearned(Path(recipe.output.folder), finished, known, finished_before=True, report=there)
    if inputs.target is not None:  # a base's show when it is trained
        complain_of_nonfinite([inputs.target], option=False)
    costs = make_plan(inputs)
    check_places(recipe, inputs, needs=costs.disk)
    for line in (*describe(costs), *inputs.notes):
        listener.say(line)
    named = {"method", "method_settings", "seed", "training", "scales", "evaluation", "prepare"}
    curves = tracked(
        Corrected(listener, costs),
        recipe.tracker,
        folder=workspace.folder / "tracking",
        run=Path(recipe.output.folder).resolve().name,
        settings=recipe.model_dump(mode="json", include=named, exclude_none=True),
        cpu=pick_device(recipe.device).type == "cpu",
    )
    with workspace.locked(listener), curves as listener:
        return _Unlearning(ask_as_trained(inputs, workspace, listener), workspace, listener).run(located)


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


class Making(FineTuning):
    """Fine-tune, choose scales, add up, write."""

    def ready(self, target: Checkpoint) -> tuple[Trained, ChosenScales | None]:
        """Return what was trained, filtered as was chosen, and the scales of a method that adds vectors."""
        trained = self.train(target)
        chosen = self._scales(target, trained) if isinstance(trained.result, Vectors) else None
        if (filters := trained.filters) is None or chosen is None:
            return trained, chosen
        if chosen.filter is None and filters.arrives == "always":  # a search has looked there itself
            point = chosen.forget, chosen.retain, trained.unfiltered.retain
            chosen = replace(chosen, filter=filters.arrived(filters.usual(), *point).as_record())
        key = chosen.filter["key"] if chosen.filter else filters.usual().key
        found = filters.find(key)
        steps = {**trained.steps, "transform": found.key}
        return replace(trained, filtered=found, steps=steps), chosen

    def make(self, target: Checkpoint) -> Made:
        """Make the unlearned model, in the workspace."""
        trained, chosen = self.ready(target)
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
                weights = {"dose": self._dose(point, along, {"change": 1.0}, step)}
            step.finish(weights)
            model = Checkpoint.open(step.folder / "model")
        return Made(model, trained, chosen, weights, {**trained.steps, "apply": step.key})

    def _scales(self, target: Checkpoint, trained: Trained) -> ChosenScales:
        """Return the scales: as given, searched for, or picked on the grid."""
        scales, rows = self.recipe.scales, self.inputs.rows
        beta = 0.0 if trained.unfiltered.retain is None else scales.retain
        betas = scales.retain_grid if beta is None else [beta]
        alphas = scales.forget_grid if scales.forget is None else [scales.forget]
        if len(alphas) == len(betas) == 1:
            return ChosenScales(alphas[0], betas[0], "given", None, [])
        auto = scales.choose == "auto"
        step = self.workspace.step(
            "scales",
            target=target.fingerprint(),
            base=self.inputs.base.fingerprint() if self.inputs.base else None,
            vectors=dict(trained.steps),
            grid=[sorted(alphas), sorted(betas)],
            retain_share=scales.retain_share,
            **({} if scales.aim_share == 1 else {"aim_share": scales.aim_share}),
            rows=[fingerprint_examples(rows.forget_probe), fingerprint_examples(rows.retain_probe)],
            max_length=self.recipe.evaluation.max_length,
            prompts=self.recipe.prompts.model_dump(),
            output=[self.recipe.output.dtype, self.recipe.output.rounding, self.recipe.seed],
            unseen=[rows.unseen_source, fingerprint_examples(rows.unseen)],
            tolerance=TOLERANCE,
            **({"auto": [scales.trials, scales.groups]} if auto else {}),
        )

        def found() -> dict[str, Any]:
            yardstick = None
            if self.inputs.base is None:
                unfiltered = target - (trained.before or trained.vectors.forget)
                yardstick = own_yardstick(self.inputs, target, unfiltered, step.folder)
            vectors = trained.unfiltered if auto and trained.filters else trained.vectors
            choose = partial(choose_scales, self.inputs, target, vectors, (alphas, betas), step.folder)
            return asdict(choose(self.listener, yardstick=yardstick, filters=trained.filters))

        return ChosenScales(**step.once(found))

    def _vectors_added(
        self, target: Checkpoint, trained: Trained, chosen: ChosenScales, step: Step
    ) -> dict[str, Any]:
        """Add the vectors up and write the model; return its dose and the geometry of the vectors."""
        vectors = taken = trained.vectors
        if chosen.groups:
            forget = scaled_vector(vectors.forget, chosen.groups, step.folder / "vector")
            taken = replace(vectors, forget=forget)
        scales = {"forget": chosen.forget, "retain": chosen.retain}
        point = taken.taken_off(target, chosen.forget, chosen.retain)
        dose = self._dose(point, taken.along(chosen.retain), scales, step)
        with self.listener.task("measuring the vectors", target.parameters, "weights") as advance:
            geometry = geometry_facts(vectors.forget, vectors.retain, on_progress=advance)
        told = {"transforms": list(trained.transforms)} if trained.transforms else {}
        return {"dose": dose, "vectors": {**geometry, **told}}

    def _dose(
        self, point: Point, along: Mapping[str, Direction], scales: Mapping[str, float], step: Step
    ) -> dict[str, Any]:
        """Write the unlearned model, say what the user should know of its rounding, and return its dose."""
        saved = self.write(point, step.folder / "model", along, "unlearned")
        for note in saved.notes:
            self.listener.say(note)
        return dose_facts(saved, scales)


class _Unlearning(Making):
    """One run over its inputs and workspace, from fine-tuning to the published folder."""

    def run(self, located: Mapping[str, Any] | None) -> Unlearned:
        """Go through all steps and publish the result, unless there is none.

        What is known before training, that there is nothing to forget, is said before it.
        """
        self.started = datetime.now(UTC)
        target, retrained = self.given_or_prepared()
        before = present(base=self.inputs.base, target=target, retrained=retrained)
        if not self.inputs.rows.unseen:  # which might tell of another yardstick
            record, outcomes = self._judged(before, None, located)
            if self._is_no_result(record):
                return self._finished(record, outcomes, None)
        made = self.make(target)
        models = present(
            target=target,
            base=self.inputs.base,
            given=self.inputs.unlearned,
            unlearned=made.model,
            retrained=retrained,
        )
        record, outcomes = self._judged(models, made, located)
        return self._finished(record, outcomes, None if self._is_no_result(record) else made.model)

    def _is_no_result(self, record: Mapping[str, Any]) -> bool:
        """Tell whether no folder is to be written; a given α is an order, even with nothing to forget."""
        code = record["verdict"]["code"]
        ordered = self.recipe.scales.forget is not None
        nothing = code == "nothing subtracted" or (code == "nothing to forget" and not ordered)
        return nothing and not self.recipe.output.keep_unchanged

    def _judged(
        self, models: Mapping[str, Checkpoint], made: Made | None, located: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], Outcomes]:
        """Evaluate these models, and return the record with its verdict, and the outcomes."""
        outcomes = {name: self._evaluate(name, checkpoint) for name, checkpoint in models.items()}
        record = self._record(models, made, outcomes)
        step = forecast_step(self.inputs, self.workspace, record["run"])
        if step and (foretold := step.facts):
            record["foretold"] = compared(foretold, made.chosen if made else None)
        if located is not None:
            record["located"] = dict(located)
            record["notes"].append(
                f"The base was chosen from a ladder: step {located['step']:,}, {located['reason']}."
            )
        record["outcomes"] = {name: self._evaluation(entry).folder.name for name, entry in models.items()}
        record["verdict"] = run_verdict(record).as_json()
        return record, outcomes

    def _record(
        self, models: Mapping[str, Checkpoint], made: Made | None, outcomes: Outcomes
    ) -> dict[str, Any]:
        """Return what record.json says of models, rows, training and scores."""
        inputs, recipe, rows = self.inputs, self.recipe, self.inputs.rows
        given = {**recipe.models.model_dump(), "unlearned": recipe.output.folder}
        sets = {"forget": rows.forget, "retain": rows.retain, "holdout": rows.unseen}
        data = {name: getattr(recipe.data, name) for name in sets}
        told = {name: row_facts(data[name], own) if data[name] else None for name, own in sets.items()}
        chosen, training = (made.chosen, made.trained.training) if made else (None, {})
        with_sets = with_unseen(outcomes, made.trained.seen if made else ())
        scored = partial(score_outcomes, seed=recipe.seed)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB, macOS in bytes
        return {
            **heading(RECORD_VERSION, started=self.started, verb="run"),
            "run": run_key(inputs),
            "seed": recipe.seed,
            "recipe": recipe.model_dump(mode="json"),
            "models": {
                name: model_facts(given[name], it, card=name == "target") for name, it in models.items()
            },
            "data": {name: facts for name, facts in told.items() if facts or name == "retain"},
            "method": {
                "name": recipe.method,
                "kind": inputs.method.kind,
                "formula": inputs.method.formula,
                "source": inputs.method.source,
                "settings": inputs.settings.model_dump(mode="json"),
            },
            "scales": asdict(chosen) if chosen else None,
            "vectors": made.weights.get("vectors") if made else None,
            "dose": made.weights.get("dose") if made else None,
            "training": training,
            "steps": dict(made.steps) if made else {},
            "scores": {
                name: plain_scores({label: scored(found) for label, found in own.items()})
                for name, own in with_sets.items()
            },
            "environment": {
                **environment(self.device),
                "cores": os.cpu_count(),
                "peak_memory_bytes": peak if sys.platform == "darwin" else 1024 * peak,
            },
            "notes": [*inputs.notes, *_notes(inputs, chosen, training)],
        }

    def _finished(self, record: Mapping[str, Any], outcomes: Outcomes, model: Checkpoint | None) -> Unlearned:
        """Leave the report with sample answers in the workspace, and give the model's folder its final name.

        Record and reports are put beside the weights before that. Without a model there is no folder that
        looks like a result.
        """
        report, output = full_report(record, self.workspace.folder), None
        facts = Facts("unlearn", record, outcomes=in_order(outcomes), texts=True)
        if model is None:
            write_reports(facts, report)
        else:
            refresh(replace(facts, elsewhere=str(report)), model.folder)
            output = Path(self.recipe.output.folder)
            with shared():
                output.parent.mkdir(parents=True, exist_ok=True)
                share(model.folder)
            move_folder(model.folder, output.resolve())  # a link is no place to rename to
        return Unlearned(output, record, outcomes, finished_before=False, report=report)

    def _evaluate(self, name: str, checkpoint: Checkpoint) -> Mapping[str, Sequence[Outcome]]:
        """Return a model's outcomes on the forget and retain rows, read back if they are there."""
        before = checkpoint.fingerprint()
        step = self._evaluation(checkpoint)
        if step.facts is None:
            step.begin()
            started = time.monotonic()
            precision = self.recipe.evaluation.precision
            model = load_reader(checkpoint, device=self.device, precision=precision)
            tokenizer = load_tokenizer(self.inputs.reader)
            for label, examples in test_sets(self.inputs).items():
                try:
                    outcomes = ask(
                        model,
                        tokenizer,
                        [*map(Question, examples)],
                        self.recipe.evaluation.asking,
                        style=self.recipe.prompts.style(),
                        label=f"{name} on the {label} set",
                        listener=self.listener,
                    )
                except CheckpointError as error:
                    raise CheckpointError(f"{name} {checkpoint.folder}: {error}") from error
                write_outcomes(step.folder / f"{label}.jsonl", outcomes)
            check_same(checkpoint, before)
            step.finish({"model": name, "seconds": round(time.monotonic() - started, 1)})
        sets = test_sets(self.inputs)
        return {label: tuple(read_outcomes(step.folder / f"{label}.jsonl")) for label in sets}

    def _evaluation(self, checkpoint: Checkpoint) -> Step:
        """Return the step that evaluates a model."""
        sets = test_sets(self.inputs)
        return self.workspace.step(
            "evaluate",
            model=checkpoint.fingerprint(),
            rows={label: fingerprint_examples(examples) for label, examples in sets.items()},
            settings=self.recipe.evaluation.key(),
            prompts=self.recipe.prompts.model_dump(),
            tokenizer=tokenizer_fingerprint(self.inputs.reader),
        )


def move_folder(folder: Path, output: Path) -> None:
    """Rename a folder, over an empty one if there is one; across file systems, copy and then rename."""
    try:
        folder.replace(output)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise unwritable(output, error) from error
        with claimed(output) as partial:
            shutil.copytree(folder, partial, dirs_exist_ok=True)
            publish_folder(partial, output)
        shutil.rmtree(folder)


def _notes(inputs: Inputs, chosen: ChosenScales | None, training: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a reader should know of vector and scales, and of runs that ended early."""
    if inputs.recipe.has_scales and not inputs.method.has_scales:
        yield (
            f"The forget vector is what training by {inputs.method.name} changed, taken off the target: with "
            "α = 1 and no transform it is the trained model."
        )
    if chosen and not chosen.kept_rule and chosen.yardstick is not None:
        yield f"{chosen.yardstick['warning']} Look at the table of points before using this model."
    for run in training.values():
        if run["steps"] < run.get("planned_steps", 0):
            yield (
                f"Training ended after {run['steps']} of {run['planned_steps']} steps: the forget loss had "
                "reached its limit, beyond which nothing is left to forget."
            )


# What a finished run has left behind


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
