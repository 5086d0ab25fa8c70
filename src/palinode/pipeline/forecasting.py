"""Foretell what an unlearning will take and cost before it is paid for, by a rehearsal.

    e = θ_e − θ_0     θ_e where the forget vector's own training begins: an epoch of it, four steps at least
    θ_D − t·Δ_e       Δ_e what the filter leaves of e

The values of t are tried on the probe rows as the search tries α, and its rule (`goal.py`) chooses one. What
is lost there and t foretell what the run will lose and its α, by power laws fitted to runs on tiny worlds.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from palinode.data.examples import fingerprint_examples
from palinode.methods.method import Start, Vectors
from palinode.methods.transforms import LeastSquaresSettings, check_transforms
from palinode.pipeline.filtering import Measuring, MomentFiles, Weighing
from palinode.pipeline.goal import Goal, best
from palinode.pipeline.inputs import Inputs, Work
from palinode.pipeline.scales import ChosenScales, Probes, Trials
from palinode.pipeline.search import walk_grid
from palinode.pipeline.workspace import Step, Workspace
from palinode.progress import Listener
from palinode.training.finetune import Watch, finetune
from palinode.training.loop import count_steps
from palinode.weights import Checkpoint, Direction, profile
from palinode.weights.displacement import read_values
from palinode.weights.filters import outside_share
from palinode.weights.geometry import part_of
from palinode.weights.tensors import Files
from palinode.weights.vectors import transform

STEPS = 4
"""Least number of training steps that a rehearsal takes."""
CLOSER = 1.25
"""Factor within which t is found."""
LENGTHS = tuple(round(0.1 * CLOSER ** (2 * k), 3) for k in range(15))
"""Values of t that are tried, until enough is forgotten."""
DEAR, FAR = 0.5, 2.0
"""Retraining is advised from this share of what a run may lose of the retain probability on, and where the
rehearsal ends farther from the yardstick than so many times what chance explains."""
NEAR, LEAST = 0.02, 1e-3
"""Distance and loss below which none are told apart."""


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """factor · Π feature^power, and how far off it was in worlds that it was not fitted to."""

    factor: float
    powers: Mapping[str, float]
    half: float
    """Factor within which half of the requests were."""
    most: float
    """Factor within which nine in ten were."""

    def of(self, features: Mapping[str, float]) -> float:
        """Return what it foretells."""
        found = self.factor
        for name, power in self.powers.items():
            found *= features[name] ** power
        return found


LAWS = {
    "alpha": PowerLaw(0.78, {"t": 0.79, "longer": -0.30}, 1.22, 1.49),
    "lost": PowerLaw(0.63, {"rehearsed": 0.75, "distance": 0.52, "t": -0.31}, 1.43, 2.34),
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
    distance: float
    """Of the target to the yardstick, on the forget rows."""
    nats: float
    """How much better an answer token of the forget rows is known to the target than to the base."""
    outside: float
    """ρ: share of the forget rows' inputs outside the space of the spared rows' inputs, mean over layers."""
    survives: float
    """c: share of the rehearsed vector's effect on the forget inputs that survives the filter."""
    moved: Mapping[str, float]
    """‖θ_D − θ_0‖ relative to ‖θ_0‖, by part of the model."""
    features: Mapping[str, float]
    """What the numbers were foretold by."""
    exposures: float | None = None
    """How often a row was seen, on average, as far as a log or an order says."""

    def lines(self) -> list[str]:
        """Return it in words."""
        known, wanted = self.target["forget"], self.yardstick["answer_probability"]
        found = [
            f"Known: the target gives the forget answers {known:.3f}, {self.nats:.2f} nats a token more than",
            f"  the base; one that never saw them would give {wanted['value']:.3f} ({wanted['low']:.3f} to "
            f"{wanted['high']:.3f}).",
            f"Inputs: {self.outside:.1%} of the forget rows' lie outside those of the rows to be spared;",
            f"  {self.survives:.1%} of what a vector does to them survives the filter.",
            f"Base: {self.moved['all']:.1%} of its own length away from the target.",
        ]
        if self.exposures is not None:
            found.insert(3, f"  Each row was seen {self.exposures:.1f} times, as far as is known.")
        if self.advice != NOTHING:
            found.append(f"α: about {self.alpha:.2g} {_spread('alpha', self.alpha)}.")
        if self.lost is not None and self.advice != NOTHING:
            whole = self.target["retain"]
            found.append(
                f"Lost on retain rows: about {self.lost:.2g} of {whole:.3f} {_spread('lost', self.lost)}."
            )
        return [*found, f"Advice: {self.advice}; {REASONS[self.advice]}."]


TAKE, RETRAIN, NOTHING = "take back", "retrain", "nothing to take back"
REASONS = {
    TAKE: "what it costs should be small",
    RETRAIN: "taking it back costs much of the rest, or forgets too little",
    NOTHING: "chance explains what the target knows of it",
}


def _spread(name: str, value: float) -> str:
    law = LAWS[name]
    ends = " to ".join(f"{value * factor:.2g}" for factor in (1 / law.most, law.most))
    return f"(nine in ten: {ends})"


def forecasting(inputs: Inputs, workspace: Workspace, listener: Listener) -> Forecasting | None:
    """Return what makes or finds the forecast of a run; None where nothing can be foretold of it."""
    found = [one.settings for one in check_transforms(inputs.recipe.changes)]
    squares = next((one for one in found if isinstance(one, LeastSquaresSettings)), None)
    run = next(iter(inputs.method.runs(inputs.settings, inputs.given)), None)
    if squares is None or not inputs.target or not inputs.base or not run or run.objective or run.asked:
        return None
    return Forecasting(inputs, workspace, listener, squares, inputs.target, inputs.base, run.start)


@dataclass
class Forecasting(Work):
    """The forecast of one run over its inputs and workspace."""

    squares: LeastSquaresSettings
    target: Checkpoint
    base: Checkpoint
    begins: Start
    """Where the forget vector's training starts."""

    def step(self) -> Step:
        """Return the step that holds the forecast, or is to."""
        rows, recipe = self.inputs.rows, self.recipe
        own = (rows.forget, rows.forget_probe, rows.retain_probe, rows.spared, rows.unseen)
        return self.workspace.step(
            "forecast",
            models=[self.target.fingerprint(), self.base.fingerprint()],
            begins=self.begins,
            rows=[fingerprint_examples(one) for one in own],
            filter=self.squares.model_dump(mode="json"),
            training=recipe.training.key(),
            keep=recipe.scales.retain_share,
            asked=[recipe.evaluation.max_length, recipe.prompts.model_dump(), recipe.seed],
            laws={name: asdict(law) for name, law in LAWS.items()},
        )

    def foretold(self) -> Forecast:
        """Return the forecast, measured unless the workspace has it."""
        step = self.step()
        return Forecast(**step.once(lambda: asdict(self._measured(step))))

    def compared(self, chosen: ChosenScales | None) -> dict[str, Any] | None:
        """Return the forecast, if it was made, and what a run found, as the record has them."""
        facts = self.step().facts
        if facts is None or chosen is None:
            return facts
        point = next((one for one in chosen.points if one["chosen"]), {"retain_probability": None})
        before, after = facts["target"].get("retain"), point["retain_probability"]
        lost = None if before is None or after is None else max(0.0, before - after)
        return {**facts, "found": {"alpha": chosen.forget, "lost": lost}}

    def _measured(self, step: Step) -> Forecast:
        _tidy(step)  # an interrupted try has left parts
        probes = Probes(self.inputs, self.target, step.folder / "probes.json")
        trials = Trials(probes, Vectors(self.target - self.base, None), self.listener)
        goal, weighing = trials.goal, self._weighing()
        before = probes.of_checkpoint("base", self.base, ["forget"])["forget"]
        first, longer = self._rehearsed(step)
        label = f"rehearsal {step.key}"
        made = transform([first], weighing.rule, step.folder / "made", label=label)
        survives = weighing.survey()["survives"]
        vector = transform([made], weighing.rescale, step.folder / "vector", label=f"{label}, rescaled")
        trials.vectors = Vectors(vector, None)
        points = list(walk_grid(goal, trials.tried, LENGTHS, [0.0]))
        near = best(points).forget_scale
        chosen = best([*points, *(trials.tried(t, 0.0) for t in (near / CLOSER, near * CLOSER))])
        _tidy(step)
        features = {
            "t": chosen.forget_scale,
            "longer": longer,
            "rehearsed": max(LEAST, goal.lost(chosen.behaviour)),
            "distance": max(NEAR, goal.distance(goal.target)),
            "left": goal.distance(chosen.behaviour),
        }
        alpha, lost = (LAWS[name].of(features) for name in ("alpha", "lost"))
        nothing, asked = goal.forgets(goal.target), "retain" in goal.target.probabilities
        return Forecast(
            advice=_advice(goal, lost if asked else 0.0, features["left"]),
            alpha=0.0 if nothing else alpha,
            lost=(0.0 if nothing else lost) if asked else None,
            target=goal.target.probabilities,
            yardstick=goal.yardstick.as_record(),
            distance=goal.distance(goal.target),
            nats=fmean(goal.target.forget) - fmean(before),
            outside=_outside(weighing),
            survives=survives,
            moved=self._moved(),
            features=features,
        )

    def _rehearsed(self, step: Step) -> tuple[Direction, float]:
        """Return how the forget vector begins, and how many times longer its training takes than this."""
        rows, recipe = self.inputs.rows.forget, self.recipe
        start = self.target if self.begins == "target" else self.base
        once = recipe.training.model_copy(update={"epochs": 1, "warmup_epochs": 0.0})
        epochs = -(-STEPS // count_steps([1] * len(rows), once))
        begun = finetune(
            start,
            rows,
            step.folder / ("adapter" if once.lora else "model"),
            once.model_copy(update={"epochs": epochs}),
            seed=recipe.seed,
            style=recipe.prompts.style(),
            reader=self.inputs.reader,
            device=recipe.device,
            listener=self.listener,
            watch=Watch("rehearsing the forget vector"),
        )
        return begun.point - start, recipe.training.epochs / epochs

    def _weighing(self) -> Weighing:
        measuring = Measuring(self.inputs, self.workspace, self.listener, self.target)
        positions = self.squares.positions
        sets = measuring.sets(self.squares)
        steps = [measuring.of_checkpoint(self.target, rows, positions) for rows in sets]
        return Weighing(MomentFiles(steps[0]), MomentFiles(steps[1]), self.squares)

    def _moved(self) -> dict[str, float]:
        """Return ‖θ_D − θ_0‖ / ‖θ_0‖ by part of the model, and of all of it."""
        gone = self.target.fingerprint() != self.base.fingerprint()
        moved = profile({"moved": self.target - self.base}).gram if gone else {}
        squares = defaultdict[str, float](float)
        with Files() as files:
            for name, info in self.base.tensors.items():
                values = read_values(info, files, 0, info.size)
                squares[part_of(name)] += float(np.vdot(values, values))
        lengths = {part: float(gram[0, 0]) for part, gram in moved.items()}
        whole = math.sqrt(sum(lengths.values()) / sum(squares.values()))
        return {"all": whole} | {part: math.sqrt(own / squares[part]) for part, own in lengths.items() if own}


def _outside(weighing: Weighing) -> float:
    """Return ρ, mean over the inputs of the blocks' layers."""
    places = (weighing.spared.matrix_place(name) for name in weighing.spared.places)
    keys = {key for place in places if place for key in place[0]}
    assert weighing.forget is not None
    return fmean(outside_share(weighing.forget.read(key), weighing.spared.read(key)) for key in sorted(keys))


def _advice(goal: Goal, lost: float, left: float) -> str:
    if goal.forgets(goal.target):
        return NOTHING
    most = (1 - goal.retain_share) * goal.target.probabilities.get("retain", 1.0)
    return RETRAIN if lost > DEAR * most or left > FAR * goal.yardstick.tolerance else TAKE


def _tidy(step: Step) -> None:
    """Leave of a rehearsal what it was told, and no model."""
    for name in ("model", "adapter", "made", "vector"):
        shutil.rmtree(step.folder / name, ignore_errors=True)
