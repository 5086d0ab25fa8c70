"""Model State Arithmetic (arXiv 2506.20941): θ_u = θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0).

θ_0 is fine-tuned on the forget set to θ_1 and on a retain sample to θ_2, by ordinary descent; all
"ascent" is in the sign of α. With β = 0 neither θ_2 nor a retain set is needed.

Task-vector negation (Ilharco et al., arXiv 2212.04089): θ_u = θ_D − α(θ_ft − θ_D).

The same arithmetic as MSA with θ_0 := θ_D: the target itself is fine-tuned on the forget set. It needs
no earlier checkpoint; the paper reports it as clearly weaker (docs/lab-notes.md has what we saw).

Rewind-to-delete (Mu and Klabjan, arXiv 2409.09778): fine-tune an earlier checkpoint on retain rows.

L = CE(B_r) from θ_0, the checkpoint that MSA starts from. What the target learned elsewhere is lost with
it. The paper's certificate adds Gaussian noise to the weights, which is left out here.

Paired vectors (ours): θ_u = θ_D − α(θ_1 − θ_c) + β(θ_c − s), from a start s that is θ_0 or θ_D.

    θ_1 = fine-tune(s; replay + forget rows), θ_c = fine-tune(s; replay), the same replay rows at each step

θ_1 − θ_0 of MSA holds what the forget rows taught and what any short fine-tuning does to all the rest; the
control θ_c holds the latter alone, so that it cancels. Without replay rows there is no control, θ_c = s, and
the method is MSA from θ_0 and the task vector from θ_D. The second term comes free, and is left out unless
its scale is given: in the demo's world it did harm (docs/paired-vectors.md).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from palinode.methods.gradient import RetainOnlySettings, retain_objective
from palinode.methods.method import Method, MethodSettings
from palinode.weights.checkpoint import Checkpoint, Direction, Point, WeightedSum


class VectorSettings(MethodSettings):
    """How the run that makes the forget vector is held to its start."""

    retain_kl: float = Field(default=0.0, ge=0)
    """λ in CE(forget) + λ·KL(p_s ‖ p_θ) on retain rows, s being the start; with 0 no retain row is read."""


MSA = Method(
    name="msa",
    summary="Model State Arithmetic: vectors from a checkpoint that had not seen the forget set",
    source="arXiv 2506.20941",
    formula="θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0)",
    needs=frozenset({"base"}),
    settings=VectorSettings,
    start=lambda target, base: base,  # noqa: ARG005
)


def unlearned_point(
    target: Point,
    forget_vector: Direction,
    retain_vector: Direction | None,
    *,
    forget_scale: float,
    retain_scale: float,
) -> WeightedSum:
    """Return θ_D − α·forget + β·retain as a formula; nothing is read.

    `forget_scale` is the paper's α, `retain_scale` its β. A vector may be the difference of any two
    points. Without a retain vector, or with β = 0, θ_2 does not take part.
    """
    point = target - forget_scale * forget_vector
    return point if retain_vector is None else point + retain_scale * retain_vector


TASK_VECTOR = Method(
    name="task_vector",
    summary="task-vector negation: vectors from the target itself",
    source="Ilharco et al. 2023, arXiv 2212.04089",
    formula="θ_D − α(θ_ft − θ_D)",
    needs=frozenset({"base"}),  # for the rule that chooses the scales
    settings=VectorSettings,
    start=lambda target, base: target,  # noqa: ARG005
)


REWIND = Method(
    name="rewind",
    summary="rewind-to-delete: plain fine-tuning of the base checkpoint on retain rows",
    source="Mu and Klabjan, arXiv 2409.09778",
    formula="L = CE(retain), from the base checkpoint",
    kind="training",
    needs=frozenset({"retain", "base"}),
    settings=RetainOnlySettings,
    start=lambda target, base: base,  # noqa: ARG005
    objective=retain_objective,
)


class PairedSettings(MethodSettings):
    """Where both runs start, and what they rehearse."""

    start: Literal["base", "target"] = "base"
    """s: the base checkpoint θ_0, or the target θ_D."""
    replay_rows: int | None = Field(default=None, ge=0)
    """Retain rows that replay is drawn from, or all where there are no more; None: as many as forget rows;
    0: no replay, hence no control."""
    replay_ratio: int = Field(default=3, ge=1)
    """Replay rows beside each forget row. A step has training.batch_size forget rows and so many times
    as many replay rows in a micro-batch; memory grows with it."""
    forget_weight: float | None = Field(default=None, gt=0)
    """λ in L_1 = CE(replay) + λ·CE(forget); None: 1 / replay_ratio, so that all rows count alike."""

    @property
    def weight(self) -> float:
        """Return λ."""
        return 1 / self.replay_ratio if self.forget_weight is None else self.forget_weight

    @property
    def retain_free(self) -> bool:
        """Whether nothing is rehearsed."""
        return self.replay_rows == 0

    def sample_size(self, forget_rows: int) -> int:
        """Return how many retain rows replay is drawn from."""
        return forget_rows if self.replay_rows is None else self.replay_rows

    def start_of(self, target: Checkpoint, base: Checkpoint) -> Checkpoint:
        """Return s."""
        return base if self.start == "base" else target


PAIRED = Method(
    name="paired",
    summary="paired vectors: the difference of two runs with and without the forget rows",
    source="ours; docs/paired-vectors.md",
    formula="θ_D − α(θ_1 − θ_c) + β(θ_c − s)",
    needs=frozenset({"retain", "base"}),  # the base also for the rule that chooses the scales
    settings=PairedSettings,
    start=lambda target, base: base,  # noqa: ARG005
)
