"""Other losses on forget rows: weighted ascent (WGA, SatImp), CE-U, UNDIAL and PDU.

Each `Method` below has its formula and source, `training/losses.py` the equation. WGA and SatImp are
bounded, as tokens that are unlikely already count for little. SatImp's ratio γ : α of 10 is the paper's;
open-unlearning's YAML has it the other way round. UNDIAL is least where p_θ = q. PDU's λ is the price of
CE(B_r) ≤ ε: after each optimiser step λ ← max(0, λ + η·(CE(B_r) − ε)), but for the epochs of the dual warm-
up. It follows from the training curve, so that a resumed run has it too.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from palinode.methods.method import Method, RetainSettings, StartSettings


class WGASettings(RetainSettings):
    """The weights of both losses, and β."""

    beta: float = Field(default=1.0, gt=0)
    """β; for the unbounded limit of 0 there is grad_diff."""


WGA = Method(
    name="wga",
    summary="gradient ascent weighted by each token's own probability",
    source="Wang et al. 2025, arXiv 2502.19301",
    formula="L = −γ·mean p^β·(−log p) + α·L_r",
    needs=frozenset({"retain"}),
    settings=WGASettings,
    minimises="wga",
    training={"epochs": 5},
)


class SatImpSettings(RetainSettings):
    """The weights of both losses, β1 and β2."""

    alpha: float = Field(default=0.1, ge=0)
    """α, the weight of the retain loss."""
    beta1: float = Field(default=5.0, gt=0)
    """β1, the power of p."""
    beta2: float = Field(default=1.0, ge=0)
    """β2, the power of 1 − p; below 0 it would have a pole at p = 1."""


SATIMP = Method(
    name="satimp",
    summary="gradient ascent weighted by saturation and importance",
    source="Yang et al. 2025, arXiv 2505.11953",
    formula="L = −γ·mean p^β1·(1 − p)^β2·(−log p) + α·L_r",
    needs=frozenset({"retain"}),
    settings=SatImpSettings,
    minimises="satimp",
    training={"epochs": 5},
)


class CEUSettings(StartSettings):
    """Which tokens count."""

    ignore_first: int = Field(default=1, ge=0)
    """Answer tokens at the beginning of each row that do not count."""


CE_U = Method(
    name="ce_u",
    summary="cross entropy to the model's own distribution without the answer",
    source="arXiv 2503.01224",
    formula="L = mean −Σ q·log p_θ, q = softmax(own logits with the answer at −∞)",
    settings=CEUSettings,
    minimises="ce_u",
)


class UndialSettings(RetainSettings):
    """β, and the weights of both losses."""

    alpha: float = Field(default=0.0, ge=0)
    """α, the weight of the retain loss; by default there is none."""
    beta: float = Field(default=10.0, ge=0)
    """β, how far the logit of the label is pushed down."""
    compat: Literal["none", "ou"] = "none"
    """"ou": as open-unlearning, over all tokens of a row and with β taken off token V − 100 where a token is
    not scored; padding, whose amount depends on how rows are batched, is left out here too."""


UNDIAL = Method(
    name="undial",
    summary="self-distillation with the answer's logits pushed down",
    source="Dong et al. 2025, arXiv 2402.10052",
    formula="L = γ·mean −Σ q·log p_θ, q = softmax(z_ref − β·onehot(answer))",
    needs=frozenset({"retain", "frozen_target"}),
    settings=UndialSettings,
    minimises="undial",
    training={"learning_rate": 1e-4},
)


SLACK = 1.1
"""ε as a multiple of the first step's retain loss, where no ε is given."""


class PDUSettings(StartSettings):
    """The constraint and its price."""

    gamma: float = Field(default=1.0, ge=0)
    """γ, the weight of the forget loss."""
    price: float = Field(default=1.0, ge=0)
    """λ at the start; the forget loss is quadratic in logits, and published runs take 50 to 100."""
    price_rate: float = Field(default=1.0, ge=0)
    """η, how fast λ moves."""
    warmup_epochs: int = Field(default=5, ge=0)
    """Epochs before λ moves."""
    epsilon: float | None = Field(default=None, gt=0)
    """ε, the retain loss that is put up with, in nats a token; None: 1.1 times that of the first step."""


PDU = Method(
    name="pdu",
    summary="flat logits on the forget set, under a limit on the retain loss",
    source="Entesari et al. 2025, arXiv 2506.05314",
    formula="L = γ·mean(max z − mean z)² + λ·(CE(retain) − ε), λ ← max(0, λ + η(CE(retain) − ε))",
    needs=frozenset({"retain"}),
    settings=PDUSettings,
    minimises="pdu",
)
