"""Paired vectors: what the forget rows alone did to a run, beside a control run without them (ours).

    θ_1 = fine-tune(s; replay + forget rows)        L_1 = CE(replay) + λ·CE(forget)
    θ_c = fine-tune(s; replay)                      L_c = CE(replay)
    v   = θ_1 − θ_c

Both runs have the same start s, seed, steps and schedule, and at each step the same replay rows: an epoch
goes through the forget rows in both, and the control draws what goes with each of them without reading
it. So what any fine-tuning does to a model takes place in both and cancels in v.
Source: spec/paired_vectors.md; figures in docs/paired-vectors.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from palinode.data.examples import Example
from palinode.data.tokenize import PromptStyle
from palinode.errors import DataError
from palinode.progress import Listener
from palinode.training.finetune import Finetuned, finetune
from palinode.training.objectives import Objective, answer_term
from palinode.training.roles import Material
from palinode.training.settings import TrainingSettings
from palinode.weights.checkpoint import Checkpoint

FORGET, REPLAY = "forget", "retain"
"""The roles of the rows; replay rows come from the retain set."""


def exposed_objective(forget_weight: float = 1.0) -> Objective:
    """Return L_1 = CE(replay) + λ·CE(forget), λ being `forget_weight`."""
    # Replay first: where the model has dropout, it then falls on the same places in both runs.
    return Objective((answer_term(REPLAY, REPLAY), answer_term(FORGET, FORGET, coefficient=forget_weight)))


def control_objective() -> Objective:
    """Return L_c = CE(replay) in epochs over the forget rows, which are not read."""
    return Objective((answer_term(REPLAY, REPLAY),))


def pair_material(forget: Sequence[Example], replay: Sequence[Example], *, replay_ratio: int) -> Material:
    """Return the rows of both runs: with each forget row, `replay_ratio` replay rows are drawn.

    Raises DataError where either set is empty.
    """
    for role, rows in (("forget", forget), ("replay", replay)):
        if not rows:
            raise DataError(
                f"there are no {role} rows, and a paired vector needs both forget and replay rows"
            )
    return Material(FORGET, {FORGET: forget, REPLAY: replay}, together={REPLAY: replay_ratio})


@dataclass(frozen=True, slots=True)
class Pair:
    """Both runs of a paired vector."""

    exposed: Finetuned
    """θ_1."""
    control: Finetuned
    """θ_c."""


def finetune_pair(
    start: Checkpoint,
    forget: Sequence[Example],
    replay: Sequence[Example],
    folder: Path | str,
    settings: TrainingSettings | None = None,
    *,
    replay_ratio: int = 3,
    forget_weight: float | None = None,
    seed: int = 0,
    style: PromptStyle | None = None,
    reader: Checkpoint | None = None,
    device: str = "auto",
    listener: Listener | None = None,
) -> Pair:
    """Fine-tune `start` twice, into `folder`/exposed and `folder`/control.

    The paired vector is `pair.exposed.point - pair.control.point`. `settings.batch_size` counts
    forget rows; a micro-batch has `replay_ratio` times as many replay rows beside. `forget_weight` is λ, by
    default 1 / `replay_ratio`, as in one mixed batch. The other arguments are those of `finetune`.
    """
    material = pair_material(forget, replay, replay_ratio=replay_ratio)
    weight = 1 / replay_ratio if forget_weight is None else forget_weight
    objectives = {"exposed": exposed_objective(weight), "control": control_objective()}
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    runs = {
        name: finetune(
            start,
            material,
            place / name,
            settings,
            seed=seed,
            style=style,
            reader=reader,
            device=device,
            loss=objective,
            label=f"fine-tuning {name}",
            listener=listener,
        )
        for name, objective in objectives.items()
    }
    return Pair(**runs)
