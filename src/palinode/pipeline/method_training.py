"""What a training method is given in a run: objective, rows by role, and what comes from other models.

Other answers that the target is asked for are a step of their own, kept in the workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palinode.data.examples import Example, fingerprint_examples
from palinode.methods import METHODS
from palinode.methods.altpo import AltPOSettings, draw_alternates
from palinode.methods.cast import gather
from palinode.methods.paired import PairedSettings
from palinode.methods.whp import WHPSettings, generic_words
from palinode.models.inplace import CombinedLogits
from palinode.models.loading import load_model, load_tokenizer, pick_device, tokenizer_fingerprint
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.workspace import Workspace
from palinode.progress import Listener
from palinode.training.finetune import control_objective, exposed_objective, pair_material
from palinode.training.objectives import FrozenValues, Objective, answer_term, kl_term
from palinode.training.roles import Joined, Material
from palinode.weights import Checkpoint


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
