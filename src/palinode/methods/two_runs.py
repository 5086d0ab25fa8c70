"""Methods that make their model of two that are trained first.

Who's Harry Potter (Eldan and Russinovich 2023, arXiv 2310.02238): v_gen = v − α·ReLU(v_re − v).

v are the target's logits and v_re those of the target reinforced on the forget set: what rises by
reinforcement is taken down. `whp` fine-tunes the target on the words that v_gen finds likeliest in the forget
rows; `whp_logits` uses v_gen itself, with both models in memory. The original also replaces names in the text
by generic ones, from a dictionary that is not to be had for other data: that is left out.

Merging an over- and an under-forgetting model (Xu et al. 2025, arXiv 2503.21088):

    θ_u = θ_D + λ·TIES(θ_over − θ_D, θ_under − θ_D)

Both minimise γ·NPO(forget) + α·(CE + KL)(retain) from the target, with a large and a small γ. TIES (Yadav et
al. 2023, arXiv 2306.01708) trims each change to its largest share, takes for each weight the sign that the
larger sum has, and averages the changes of that sign. We trim each tensor by itself, where TIES trims the
whole change, so that the sum is written one tensor at a time like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from palinode.methods.method import (
    Ends,
    Given,
    Method,
    MethodRun,
    MethodSettings,
    gather,
    plain_material,
    trained_run,
)
from palinode.weights.checkpoint import Point

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel

    from palinode.training.objectives import FrozenValues, Joined


class WHPSettings(MethodSettings):
    """α."""

    alpha: float = Field(default=1.0, gt=0)
    """α, how much of what reinforcement raises is taken off; to be tuned."""


def whp_runs(settings: WHPSettings, given: Given) -> list[MethodRun]:
    """Return the run that reinforces the target, and the one on the words that both then find likeliest."""

    def words(load: Callable[[str], PreTrainedModel]) -> Callable[[Joined, int], Mapping[str, FrozenValues]]:
        from palinode.models.inplace import CombinedLogits
        from palinode.training.objectives import Keeper, choices, keep

        def found(cast: Joined, pad_id: int) -> Mapping[str, FrozenValues]:
            combined = CombinedLogits(load("target"), load("reinforced"), settings.alpha)
            rows = {("forget", place): row for place, row in enumerate(cast.rows["forget"])}
            return {"forget": keep(Keeper(choices), combined, rows, pad_id=pad_id, autocast=False)}

        return found

    label = "reinforce the target on the forget set"
    first = MethodRun("reinforced", "target", plain_material("forget", given.forget), label=label, whole=True)
    minimised = WHP.objective(settings, given.seed)
    material = gather(minimised, forget=given.forget)
    return [first, trained_run("whp", settings, material, minimised, reads=("reinforced",), frozen=words)]


WHP = Method(
    name="whp",
    summary="Who's Harry Potter: fine-tuning on what the target would say without its reinforcement",
    source="Eldan and Russinovich 2023, arXiv 2310.02238",
    formula="L = CE(forget with labels argmax(v − α·ReLU(v_re − v)))",
    needs=frozenset({"frozen_target"}),
    settings=WHPSettings,
    minimises="whp",
    own_runs=whp_runs,
)

WHP_LOGITS = Method(
    name="whp_logits",
    summary="Who's Harry Potter at inference: two models read together; cannot be saved as one",
    source="Eldan and Russinovich 2023, arXiv 2310.02238; MUSE",
    formula="v = v_target − α·ReLU(v_reinforced − v_target)",
    settings=WHPSettings,
)


class TIESSettings(MethodSettings):
    """What the two models minimise, and how they are merged."""

    over_gamma: float = Field(default=4.0, gt=0)
    """γ, the weight of the forget loss, of the model that forgets too much."""
    under_gamma: float = Field(default=0.25, gt=0)
    """γ of the model that forgets too little."""
    alpha: float = Field(default=1.0, gt=0)
    """α, the weight of both retain losses."""
    beta: float = Field(default=0.1, gt=0)
    """β of NPO."""
    density: float = Field(default=0.8, gt=0, le=1)
    """Share of each tensor's weights that keep their change."""
    strength: float = Field(default=1.0, gt=0)
    """λ, how much of the merged change the target is given."""


def ties_runs(settings: TIESSettings, given: Given) -> list[MethodRun]:
    """Return the runs to the model that forgets too much and the one that forgets too little."""
    from palinode.methods.minimised import npo_term
    from palinode.training.objectives import Objective, answer_term, kl_term

    both = []
    for name, gamma in (("over", settings.over_gamma), ("under", settings.under_gamma)):
        alpha, beta = settings.alpha, settings.beta
        retain = answer_term("retain", "retain", coefficient=alpha)
        held = kl_term("retain KL", "retain", coefficient=alpha)
        objective = Objective((npo_term(beta=beta, gamma=gamma), retain, held))
        material = gather(objective, forget=given.forget, retain=given.retain)
        decides = {"method": "ties", "gamma": gamma, "alpha": alpha, "beta": beta}
        both.append(
            MethodRun(name, "target", material, objective, f"train the {name}-forgetting model", decides)
        )
    return both


def ties_point(settings: TIESSettings, ends: Ends) -> Point:
    """Return the target with the merged change of both models, computed as it is read."""
    from palinode.weights.vectors import transformed

    changes = [ends.change(name) for name in ("over", "under")]
    merged = transformed(
        changes,
        lambda _name, found: merge(found, density=settings.density),
        label=f"TIES of density {settings.density}",
    )
    return ends.target + settings.strength * merged


def merge(changes: Sequence[np.ndarray], *, density: float) -> np.ndarray:
    """Return the TIES merge of several changes of one tensor.

    >>> merge([np.array([3.0, -2.0, 0.1]), np.array([1.0, 1.0, 0.2])], density=0.67)
    array([ 2., -2.,  0.])
    """
    trimmed = np.stack([trim(change, density) for change in changes])
    elected = np.sign(trimmed.sum(axis=0))
    chosen = (np.sign(trimmed) == elected) & (trimmed != 0)
    count = np.maximum(chosen.sum(axis=0), 1)
    found: np.ndarray = (np.where(chosen, trimmed, 0).sum(axis=0) / count).astype(changes[0].dtype)
    return found


def trim(change: np.ndarray, density: float) -> np.ndarray:
    """Return a change with the share `density` of its weights, those that moved most, and 0 elsewhere.

    Weights that moved as far as the last one that is kept are kept too.
    """
    kept = max(1, round(density * change.size))
    sizes = np.abs(change).reshape(-1)
    least = np.partition(sizes, change.size - kept)[change.size - kept]
    return np.where(np.abs(change) >= least, change, 0).astype(change.dtype)


TIES = Method(
    name="ties",
    summary="TIES merge of a model that forgets too much and one that forgets too little",
    source="Xu et al. 2025, arXiv 2503.21088",
    formula="θ_D + λ·TIES(θ_over − θ_D, θ_under − θ_D)",
    needs=frozenset({"retain", "frozen_target"}),
    settings=TIESSettings,
    own_runs=ties_runs,
    own_point=ties_point,
)
