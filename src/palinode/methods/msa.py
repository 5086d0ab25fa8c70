"""Model State Arithmetic (arXiv 2506.20941): θ_u = θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0).

θ_0 is fine-tuned on the forget set to θ_1 and on a retain sample to θ_2, by ordinary descent; all
"ascent" is in the sign of α. With β = 0 neither θ_2 nor a retain set is needed.
"""

from __future__ import annotations

from pydantic import Field

from palinode.methods.method import Method, MethodSettings
from palinode.weights.direction import Direction, Point, WeightedSum


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
