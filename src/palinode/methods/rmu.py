"""RMU, representation misdirection (Li et al. 2024, arXiv 2403.03218).

L = γ·mean_i (1/n) Σ_t (1/d)|h_t − u|² on forget rows + α·the same with u replaced by the frozen target's
h_t on retain rows. h_t is the output of one decoder block at answer token t (d wide), and u = c·r/|r| with
r ~ U[0, 1)^d drawn once from the seed.
"""

from __future__ import annotations

from pydantic import Field

from palinode.methods.method import Method, StartSettings

USUAL_LAYER = 7
"""open-unlearning's, for models of 16 blocks and more."""


class RMUSettings(StartSettings):
    """The block, the length of the control vector, and the weights of both losses."""

    layer: int | None = Field(default=None, ge=0)
    """The block, counted from 0; None: 7, or the middle one of a model that has no more than that."""
    strength: float = Field(default=2.0, gt=0)
    """c, the length of the control vector; to be tuned with the block for each architecture."""
    gamma: float = Field(default=1.0, ge=0)
    """γ, the weight of the forget loss."""
    alpha: float = Field(default=1.0, gt=0)
    """α, the weight of the retain loss."""
    trainable: str | None = None
    r"""Pattern of whole names of the parameters that are trained, such as
    'model\.layers\.[567]\.mlp\.down_proj\.weight' (WMDP); None: all."""


RMU = Method(
    name="rmu",
    summary="representation misdirection: forget rows towards a random vector inside the model",
    source="Li et al. 2024, arXiv 2403.03218",
    formula="L = γ·mean|h(forget) − u|²/d + α·mean|h(retain) − h_ref(retain)|²/d",
    needs=frozenset({"retain", "frozen_target"}),
    settings=RMUSettings,
    minimises="rmu",
)
