"""What a run has done before: the fingerprint that decides its result, and the results that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palinode.data.examples import Example, fingerprint_examples
from palinode.errors import CheckpointError
from palinode.models.loading import tokenizer_fingerprint
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.workspace import Step, Workspace, fingerprint
from palinode.progress import Listener
from palinode.records import Outcome, read_json, read_outcomes
from palinode.weights import Checkpoint
from palinode.weights.fingerprints import known_fingerprint, tensor_digests

Outcomes = Mapping[str, Mapping[str, Sequence[Outcome]]]
"""Outcomes by model (target, base, unlearned, retrained) and set (forget, retain)."""

SHOWN_FROM = 1_000_000_000
"""Bytes of a model from which hashing is shown: some seconds on a slow disk."""


def run_key(inputs: Inputs) -> str:
    """Return the fingerprint of everything that decides a run's result."""
    models = {"base": inputs.base, "target": inputs.target, "retrained": inputs.retrained}
    recipe = inputs.recipe.model_dump(
        mode="json",
        exclude={
            "models": True,
            "data": True,
            "output": {"folder", "workspace"},
            "training": True,
            "tracker": True,
            "transforms": True,
        },
    )
    recipe["training"] = inputs.recipe.training.key()
    if inputs.recipe.transforms:
        recipe["transforms"] = inputs.recipe.transforms
    return fingerprint(
        recipe=recipe,
        models={name: entry.fingerprint() for name, entry in models.items() if entry is not None},
        forget=fingerprint_examples(inputs.rows.forget),
        retain=fingerprint_examples(inputs.rows.retain),
        **({"refusals": list(inputs.refusals)} if inputs.refusals else {}),
        **({"unseen": fingerprint_examples(inputs.rows.unseen)} if inputs.rows.unseen else {}),
    )


def hash_models(inputs: Inputs, listener: Listener) -> None:
    """Hash the weights that a run starts from, showing how far it is; the digests are remembered."""
    for name, model in {"base": inputs.base, "target": inputs.target, "retrained": inputs.retrained}.items():
        if model is None or model.nbytes < SHOWN_FROM or known_fingerprint(model) is not None:
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
