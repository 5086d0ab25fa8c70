"""Foretell what an unlearning takes and what it costs, before a vector is trained: a rehearsal of it.

    u = −g / (|g| + rms g)     g = ∇L_f(θ_0), in each tensor: the step by which the base begins to learn the rows
    θ_D − t·Δ_u                Δ_u what the filter leaves of u; ‖u‖ is a twentieth of ‖θ_D − θ_0‖

The values of t are tried on the probe rows, and one is chosen by the rule of the search (`goal.py`). What is
lost there is near to what the run will lose.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palinode.data.examples import Example, fingerprint_examples
from palinode.data.tokenize import tokenize
from palinode.methods.method import Vectors
from palinode.methods.transforms import LeastSquaresSettings
from palinode.models.inplace import live_places
from palinode.models.loading import load_model, load_tokenizer, pad_token
from palinode.models.sums import row_backward, trained_parameters
from palinode.pipeline.filtering import Measuring, MomentFiles, Weighing
from palinode.pipeline.goal import TriedScales, best
from palinode.pipeline.inputs import Work
from palinode.pipeline.scales import Probes, Trials
from palinode.pipeline.search import walk_grid
from palinode.weights import Checkpoint, profile
from palinode.weights.filters import outside_share
from palinode.weights.geometry import part_of
from palinode.weights.vectors import transform

LENGTH = 0.05
"""‖u‖ relative to ‖θ_D − θ_0‖."""
STEPS = tuple(round(0.1 * 1.25**k, 3) for k in range(26))
"""Values of t."""


class Rehearsing(Work):
    """The forecast of one run over its inputs and workspace."""

    def measure(self, settings: LeastSquaresSettings) -> dict[str, Any]:
        target, base = self.inputs.target, self.inputs.base
        measuring = Measuring(self.inputs, self.workspace, self.listener, target)
        sets = measuring.sets(settings)
        forget, spared = (
            MomentFiles(measuring.of_checkpoint(target, rows, settings.positions)) for rows in sets
        )
        weighing = Weighing(forget, spared, settings)
        step = self.workspace.step("forecast", base=base.fingerprint())
        step.clear()
        first = self.first_step(base, sets[0])
        moved = profile({"moved": target - base}).norms()["moved"]
        length = math.sqrt(sum(float(np.vdot(own, own)) for own in first.values()))
        scale = LENGTH * moved / length
        made = transform(
            [target - base],
            lambda name, _: weighing.rule(name, [scale * first[name]]),
            step.folder / "made",
            label="rehearsal",
        )
        survey = weighing.survey()
        vector = transform([made], weighing.rescale, step.folder / "vector", label="rehearsal, rescaled")
        trials = Trials(
            Probes(self.inputs, target, step.folder / "probes.json"), Vectors(vector, None), self.listener
        )
        points = list(walk_grid(trials.goal, trials.tried, STEPS, [0.0]))
        chosen = best(points)
        goal = trials.goal
        found = {
            "survives": survey["survives"],
            "harm": survey["harm"],
            "t": chosen.forget_scale,
            "lost": goal.lost(chosen.behaviour),
            "chosen_distance": goal.distance(chosen.behaviour),
            "p_chosen": chosen.behaviour.probabilities,
            "points": [
                (p.forget_scale, p.behaviour.probabilities["forget"], p.behaviour.probabilities.get("retain"),
                 goal.distance(p.behaviour)) for p in points
            ],
            "p": goal.target.probabilities,
            "yard": goal.yardstick.probability.value,
            "tolerance": goal.yardstick.tolerance,
            "distance": goal.distance(goal.target),
            "moved": moved,
        }
        return found

    def first_step(self, start: Checkpoint, rows: Sequence[Example]) -> dict[str, np.ndarray]:
        """Return u of each tensor that the model has, not yet scaled."""
        live, tokenizer = load_model(start, device=self.device), load_tokenizer(self.inputs.reader)
        own = tokenize(
            rows, tokenizer, max_length=self.recipe.training.max_length, style=self.recipe.prompts.style()
        )
        totals = [torch.zeros_like(parameter) for parameter in trained_parameters(live)]

        def add(number: int, gradient: Tensor) -> None:
            totals[number].add_(gradient)

        with torch.no_grad(), row_backward(live, own, add, pad_id=pad_token(tokenizer)) as backward:
            for row in own:
                backward(row)
        names = {id(p): n for n, p in live.named_parameters()}
        steps = {
            names[id(parameter)]: -total / (total.abs() + total.square().mean().sqrt() + 1e-30)
            for parameter, total in zip(trained_parameters(live), totals, strict=True)
        }
        return {
            name: steps[place].flatten()[start_ : start_ + info.size].reshape(info.shape).cpu().numpy()
            for name, (place, start_) in live_places(live, start).items()
            for info in [start.tensors[name]]
        }
