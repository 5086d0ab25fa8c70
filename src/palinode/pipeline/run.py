"""What a run has done before: the fingerprint that decides its result, and the results that are there.

The main job: fine-tune, form vectors, choose scales, apply, evaluate, record. One step a method.

Each step is a function of fingerprinted inputs and leaves its result in the workspace; a step that
has one is not run again. The unlearned model takes its final name only when its record is in it.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from palinode.data.examples import Example, fingerprint_examples, plain_questions
from palinode.errors import CheckpointError, unwritable
from palinode.evaluation.ask import ask
from palinode.models.loading import load_model, load_tokenizer, pick_device, tokenizer_fingerprint
from palinode.pipeline.costs import Plan, describe, make_plan
from palinode.pipeline.finetuning import FineTuning
from palinode.pipeline.inputs import Inputs, Work, ask_as_trained, check_places, open_inputs, workspace_folder
from palinode.pipeline.making import Making
from palinode.pipeline.recipe import Recipe
from palinode.pipeline.record import build_record
from palinode.pipeline.reporting import full_report, publish
from palinode.pipeline.tracking import tracked
from palinode.pipeline.workspace import Step, Workspace, fingerprint
from palinode.progress import Listener, NullListener
from palinode.records import (
    Outcome,
    Score,
    read_json,
    read_outcomes,
    share,
    shared,
    write_json,
    write_outcomes,
)
from palinode.weights import Checkpoint
from palinode.weights.atomic import claimed
from palinode.weights.atomic import publish as publish_folder
from palinode.weights.fingerprints import check_same, known_fingerprint, tensor_digests
from palinode.weights.preflight import complain_of_nonfinite

Outcomes = Mapping[str, Mapping[str, Sequence[Outcome]]]
"""Outcomes by model (target, base, unlearned, retrained) and set (forget, retain)."""

SHOWN_FROM = 1_000_000_000
"""Bytes of a model from which hashing is shown: some seconds on a slow disk."""


def opened(inputs: Inputs) -> dict[str, Checkpoint]:
    """Return the models that a run starts from, by role."""
    given = {
        "base": inputs.base,
        "target": inputs.target,
        "retrained": inputs.retrained,
        "given": inputs.unlearned,
    }
    return {name: model for name, model in given.items() if model is not None}


def run_key(inputs: Inputs) -> str:
    """Return the fingerprint of everything that decides a run's result."""
    models = opened(inputs)
    recipe = inputs.recipe.model_dump(
        mode="json",
        exclude={
            "models": True,
            "data": True,
            "output": {"folder", "workspace"},
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
        models={name: entry.fingerprint() for name, entry in models.items()},
        forget=fingerprint_examples(inputs.rows.forget),
        retain=fingerprint_examples(inputs.rows.retain),
        **({"refusals": list(inputs.refusals)} if inputs.refusals else {}),
        **({"unseen": fingerprint_examples(inputs.rows.unseen)} if inputs.rows.unseen else {}),
        **({"spared": fingerprint_examples(inputs.rows.spared)} if inputs.recipe.data.background else {}),
    )


def hash_models(inputs: Inputs, listener: Listener) -> None:
    """Hash the weights that a run starts from, showing how far it is; the digests are remembered."""
    for name, model in opened(inputs).items():
        if model.nbytes < SHOWN_FROM or known_fingerprint(model) is not None:
            continue
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


def known_outcomes(inputs: Inputs, workspace: Workspace, record: Mapping[str, Any]) -> Outcomes:
    """Return the outcomes of a finished run as its workspace holds them; empty when it is gone."""
    steps = {
        name: evaluation_step(inputs, workspace, model["fingerprint"])
        for name, model in record["models"].items()
    }
    if any(step.facts is None for step in steps.values()):
        return {}
    return {name: read_sets(step, inputs) for name, step in steps.items()}


def evaluation_step(inputs: Inputs, workspace: Workspace, model: str) -> Step:
    """Return the step that evaluates the model of that fingerprint."""
    return workspace.step(
        "evaluate",
        model=model,
        rows={label: fingerprint_examples(examples) for label, examples in test_sets(inputs).items()},
        settings=inputs.recipe.evaluation.model_dump(exclude={"batch_rows"}),
        prompts=inputs.recipe.prompts.model_dump(),
        tokenizer=tokenizer_fingerprint(inputs.reader),
    )


def test_sets(inputs: Inputs) -> Mapping[str, Sequence[Example]]:
    """Return the rows that models are evaluated on, by set; forget-only runs have one set."""
    sets = {"forget": inputs.rows.forget_test, "retain": inputs.rows.retain_test}
    return {label: examples for label, examples in sets.items() if examples}


def read_sets(step: Step, inputs: Inputs) -> Mapping[str, Sequence[Outcome]]:
    """Return the outcomes that an evaluation step wrote, by set."""
    return {label: tuple(read_outcomes(step.folder / f"{label}.jsonl")) for label in test_sets(inputs)}


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

    @property
    def scores(self) -> dict[str, Score]:
        """The unlearned model's scores on the forget rows, by metric."""
        return {name: Score(**facts) for name, facts in self.record["scores"]["unlearned"]["forget"].items()}


def dry_run(recipe: Recipe) -> Plan:
    """Check a recipe's inputs and return what the run would do and cost, without doing it."""
    inputs = open_inputs(recipe)
    if finished_before(inputs) is None:
        check_places(recipe, inputs, needs=0)
    return make_plan(inputs)


def unlearn(
    recipe: Recipe,
    *,
    listener: Listener | None = None,
    located: Mapping[str, Any] | None = None,
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
        known = known_outcomes(inputs, workspace, finished)
        report = full_report(finished, workspace.folder)
        there = report if report.exists() else None
        return Unlearned(Path(recipe.output.folder), finished, known, finished_before=True, report=there)
    if inputs.target is not None:  # a base's show when it is trained
        complain_of_nonfinite([inputs.target], option=False)
    costs = make_plan(inputs)
    check_places(recipe, inputs, needs=costs.disk)
    for line in (*describe(costs), *inputs.notes):
        listener.say(line)
    with workspace.locked(listener), tracked_run(inputs, workspace, listener) as listener:
        return _Unlearning(ask_as_trained(inputs, workspace, listener), workspace, listener).run(located)


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


class _Unlearning(Work):
    """One run over its inputs and workspace, from fine-tuning to the published folder."""

    def run(self, located: Mapping[str, Any] | None) -> Unlearned:
        """Go through all steps and publish the result."""
        started = datetime.now(UTC)
        target, retrained = FineTuning(self.inputs, self.workspace, self.listener).given_or_prepared()
        made = Making(self.inputs, self.workspace, self.listener).make(target)
        model = made.model
        given = {
            "target": target,
            "base": self.inputs.base,
            "given": self.inputs.unlearned,
            "unlearned": model,
            "retrained": retrained,
        }
        models = {name: entry for name, entry in given.items() if entry is not None}
        outcomes = {name: self._evaluate(name, checkpoint) for name, checkpoint in models.items()}
        record = build_record(
            self.inputs,
            models=models,
            outcomes=outcomes,
            chosen=made.chosen,
            weights=made.weights,
            training=made.trained.training,
            seen=made.trained.seen,
            steps=made.steps,
            started=started,
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

    def _evaluate(self, name: str, checkpoint: Checkpoint) -> Mapping[str, Sequence[Outcome]]:
        """Return a model's outcomes on the forget and retain rows, read back if they are there."""
        before = checkpoint.fingerprint()
        step = self._evaluation(checkpoint)
        if step.facts is None:
            step.begin()
            started = time.monotonic()
            model, tokenizer = load_model(checkpoint, device=self.device), load_tokenizer(self.inputs.reader)
            for label, examples in test_sets(self.inputs).items():
                outcomes = ask(
                    model,
                    tokenizer,
                    plain_questions(examples),
                    self.recipe.evaluation.asking,
                    style=self.recipe.prompts.style(),
                    label=f"{name} on the {label} set",
                    listener=self.listener,
                )
                write_outcomes(step.folder / f"{label}.jsonl", outcomes)
            check_same(checkpoint, before)
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
        with shared():
            output.parent.mkdir(parents=True, exist_ok=True)
            share(model.folder)
        move_folder(model.folder, output.resolve())  # a link is no place to rename to
        return output, report


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
