"""Paired vectors (ours): θ_u = θ_D − α(θ_1 − θ_c) + β(θ_c − s), from a start s that is θ_0 or θ_D.

    θ_1 = fine-tune(s; replay + forget rows), θ_c = fine-tune(s; replay), the same replay rows at each step

θ_1 − θ_0 of MSA holds what the forget rows taught and what any short fine-tuning does to all the rest; the
control θ_c holds the latter alone, so that it cancels. Without replay rows there is no control, θ_c = s, and
the method is MSA from θ_0 and the task vector from θ_D. The second term comes free, and is left out unless
its scale is given: in the demo's world it did harm (docs/paired-vectors.md).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from palinode.methods.method import Method, MethodSettings
from palinode.weights.checkpoint import Checkpoint


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
