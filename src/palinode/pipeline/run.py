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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from palinode.data.examples import plain_questions
from palinode.errors import unwritable
from palinode.evaluation.ask import ask
from palinode.models.loading import load_model, load_tokenizer, pick_device
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
from palinode.pipeline.inputs import Inputs, ask_as_trained, check_places, open_inputs, workspace_folder
from palinode.pipeline.making import Making
from palinode.pipeline.recipe import Recipe
from palinode.pipeline.record import build_record
from palinode.pipeline.reporting import full_report, publish
from palinode.pipeline.tracking import tracked
from palinode.pipeline.tuning import Tuning
from palinode.pipeline.workspace import Step, Workspace
from palinode.progress import Listener, NullListener
from palinode.records import Outcome, share, shared, write_json, write_outcomes
from palinode.weights import Checkpoint
from palinode.weights.atomic import claimed
from palinode.weights.atomic import publish as publish_folder
from palinode.weights.fingerprints import check_same
from palinode.weights.preflight import complain_of_nonfinite


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
        return _Run(ask_as_trained(inputs, workspace, listener), workspace, listener).run(command, located)


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


class _Run:
    """One run over its inputs and workspace, from fine-tuning to the published folder."""

    def __init__(self, inputs: Inputs, workspace: Workspace, listener: Listener) -> None:
        self.inputs = inputs
        self.recipe = inputs.recipe
        self.workspace = workspace
        self.listener = listener
        self.device = pick_device(inputs.recipe.device)

    def run(self, command: str | None, located: Mapping[str, Any] | None = None) -> Unlearned:
        """Go through all steps and publish the result."""
        started = datetime.now(UTC)
        target, retrained = Tuning(self.inputs, self.workspace, self.listener).given_or_prepared()
        made = Making(self.inputs, self.workspace, self.listener).make(target)
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
