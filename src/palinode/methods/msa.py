"""Model State Arithmetic (arXiv 2506.20941): θ_u = θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0).

θ_0 is fine-tuned on the forget set to θ_1 and on a retain sample to θ_2, by ordinary descent; all
"ascent" is in the sign of α. With β = 0 neither θ_2 nor a retain set is needed.

Task-vector negation (Ilharco et al., arXiv 2212.04089): θ_u = θ_D − α(θ_ft − θ_D).

The same arithmetic as MSA with θ_0 := θ_D: the target itself is fine-tuned on the forget set. It needs
no earlier checkpoint; the paper reports it as clearly weaker (docs/lab-notes.md has what we saw).

Rewind-to-delete (Mu and Klabjan, arXiv 2409.09778): fine-tune an earlier checkpoint on retain rows.

L = CE(B_r) from θ_0, the checkpoint that MSA starts from. What the target learned elsewhere is lost with
it. The paper's certificate adds Gaussian noise to the weights, which is left out here.
"""

from __future__ import annotations

from pydantic import Field

from palinode.methods.gradient import RetainOnlySettings, retain_objective
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
