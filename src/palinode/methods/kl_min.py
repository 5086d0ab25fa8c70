"""KL-min (TOFU, arXiv 2401.06121): L = −γ·CE(B_f) + α·KL(p_ref ‖ p_θ on B_r), p_ref the frozen target.

GradDiff with KL as its retain loss, averaged over answer tokens. TOFU's code takes the mean over all
positions, padding included, and MUSE's GA_KLR hands raw logits to the KL function: neither is copied.
"""

from __future__ import annotations

from typing import Literal

from palinode.methods.grad_diff import GradDiffSettings, objective
from palinode.methods.method import Method


class KLMinSettings(GradDiffSettings):
    """Those of GradDiff, with KL for the retain loss."""

    retain_loss: Literal["nll", "kl"] = "kl"
    """L_r: KL from the frozen target over answer tokens, or cross entropy."""


KL_MIN = Method(
    name="kl_min",
    summary="gradient ascent on the forget set, held to the target on retain rows",
    source="TOFU, arXiv 2401.06121",
    formula="L = −γ·CE(forget) + α·KL(p_ref ‖ p_θ on retain)",
    kind="training",
    needs=frozenset({"retain", "frozen_target"}),
    settings=KLMinSettings,
    objective=objective,
)
