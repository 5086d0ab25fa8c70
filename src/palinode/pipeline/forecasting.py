"""Foretell what an unlearning will take and cost before it is paid for, by a rehearsal.

    e = θ_e − θ_0     θ_e where the forget vector's own training begins: an epoch of it, four steps at least
    θ_D − t·Δ_e       Δ_e what the filter leaves of e

The values of t are tried on the probe rows as the search tries α, and its rule (`goal.py`) chooses one. What
is lost there and t foretell what the run will lose and its α, by power laws fitted to runs on tiny worlds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from palinode.methods.transforms import LeastSquaresSettings, check_transforms
from palinode.pipeline.finetuning import FineTuning
from palinode.pipeline.goal import best
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.search import ChosenScales, Probes, Trials, walk_grid
from palinode.pipeline.workspace import Step, Workspace
from palinode.progress import Listener
from palinode.training.loop import count_steps

STEPS = 4
"""Least number of training steps that a rehearsal takes."""
CLOSER = 1.25
"""Factor within which t is found."""
LENGTHS = tuple(round(0.1 * CLOSER ** (2 * k), 3) for k in range(15))
"""Values of t that are tried, until enough is forgotten."""
DEAR = 0.5
"""Share of what a run may lose of the retain probability from which retraining is advised."""
NEAR, LEAST = 0.02, 1e-3
"""Distance and loss below which none are told apart."""


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """factor · Π feature^power, and how far off it was in worlds that it was not fitted to."""

    factor: float
    powers: Mapping[str, float]
    most: float
    """Factor within which nine in ten were."""

    def of(self, features: Mapping[str, float]) -> float:
        """Return what it foretells."""
        found = (features[name] ** power for name, power in self.powers.items())
        return float(self.factor * math.prod(found))

    def told(self, value: float) -> str:
        """Return a value that it foretold, and between which nine in ten of the real ones should lie."""
        return f"about {value:.2g} (nine in ten: {value / self.most:.2g} to {value * self.most:.2g})"


LAWS = {
    "alpha": PowerLaw(0.78, {"t": 0.79, "longer": -0.30}, 1.49),
    "lost": PowerLaw(0.63, {"rehearsed": 0.75, "distance": 0.52, "t": -0.31}, 2.34),
}
"""`python benchmarks/forecast.py DIR --fit` repeats these numbers.

t: as above; longer: epochs of the vector's training by those of the rehearsal; rehearsed: what is lost there;
distance: of the target to the yardstick.
"""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is foretold of an unlearning, and by what."""

    advice: str
    """take back, retrain, or nothing to take back."""
    alpha: float
    lost: float | None
    """Answer probability on retain rows; None where there are none."""
    target: Mapping[str, float]
    """The target's answer probability by set of probe rows."""
    yardstick: Mapping[str, Any]
    """Of a model that never saw the forget rows: answer probability with its interval, source, tolerance."""
    nats: float
    """How much better an answer token of the forget rows is known to the target than to the base."""
    features: Mapping[str, float]
    """What the numbers were foretold by."""

    def lines(self) -> list[str]:
        """Return it in words."""
        known, wanted = self.target["forget"], self.yardstick["answer_probability"]
        found = [
            f"Known: the target gives the forget answers {known:.3f}, {self.nats:.2f} nats a token more than",
            f"  the base; one that never saw them would give {wanted['value']:.3f} ({wanted['low']:.3f} to "
            f"{wanted['high']:.3f}).",
        ]
        if self.advice != NOTHING:
            found.append(f"α: {LAWS['alpha'].told(self.alpha)}.")
            if self.lost is not None:
                whole, lost = self.target["retain"], LAWS["lost"].told(self.lost)
                found.append(f"Lost of {whole:.3f} on retain rows: {lost}.")
        return [*found, f"Advice: {self.advice}."]


TAKE, RETRAIN, NOTHING = "take back", "retrain", "nothing to take back"


def forecast_step(inputs: Inputs, workspace: Workspace, run: str) -> Step | None:
    """Return the step that holds the forecast of a run, named by its key; None where none can be made."""
    changes, method = check_transforms(inputs.recipe.changes), inputs.recipe.method
    squares = any(isinstance(one.settings, LeastSquaresSettings) for one in changes)
    able = squares and method in ("msa", "task_vector") and inputs.target and inputs.base
    return workspace.step("forecast", run=run, laws=str(LAWS)) if able else None


def compared(facts: Mapping[str, Any], chosen: ChosenScales | None) -> dict[str, Any]:
    """Return a forecast with what a run found, as the record has them."""
    point: Mapping[str, Any] = next((one for one in chosen.points if one["chosen"]), {}) if chosen else {}
    before, after = facts["target"].get("retain"), point.get("retain_probability")
    lost = None if before is None or after is None else max(0.0, before - after)
    return {**facts, "found": {"alpha": chosen and chosen.forget, "lost": lost}}


def rehearse(inputs: Inputs, workspace: Workspace, listener: Listener, step: Step) -> Forecast:
    """Measure what the step of a forecast keeps. Of models nothing is left in the workspace."""
    assert inputs.target is not None
    training = inputs.recipe.training
    once = training.model_copy(update={"epochs": 1, "warmup_epochs": 0.0})
    epochs = -(-STEPS // count_steps([1] * len(inputs.rows.forget), once))
    recipe = inputs.recipe.model_copy(update={"training": once.model_copy(update={"epochs": epochs})})
    short = FineTuning(replace(inputs, recipe=recipe), workspace, listener).train(inputs.target)
    probes = Probes(inputs, inputs.target, step.folder / "probes.json")
    trials = Trials(probes, short.vectors, listener)
    goal, before = trials.goal, probes.of_point("base", inputs.earlier, ["forget"])["forget"]
    points = list(walk_grid(goal, trials.tried, LENGTHS, [0.0]))
    near = best(points).forget_scale
    chosen = best([*points, *(trials.tried(t, 0.0) for t in (near / CLOSER, near * CLOSER))])
    for name, key in short.steps.items():
        kind = f"transform-{short.transforms[-1]['name']}" if name == "transform" else f"finetune-{name}"
        workspace.step_of(kind, key).clear()
    features = {
        "t": chosen.forget_scale,
        "longer": training.epochs / epochs,
        "rehearsed": max(LEAST, goal.lost(chosen.behaviour)),
        "distance": max(NEAR, goal.distance(goal.target)),
    }
    alpha, lost = (LAWS[name].of(features) for name in ("alpha", "lost"))
    nothing, asked = goal.forgets(goal.target), "retain" in goal.target.probabilities
    most = DEAR * (1 - goal.retain_share) * goal.target.probabilities.get("retain", 0.0)
    return Forecast(
        advice=NOTHING if nothing else RETRAIN if asked and lost > most else TAKE,
        alpha=0.0 if nothing else alpha,
        lost=(0.0 if nothing else lost) if asked else None,
        target=goal.target.probabilities,
        yardstick=goal.yardstick.as_record(),
        nats=fmean(goal.target.forget) - fmean(before),
        features=features,
    )
