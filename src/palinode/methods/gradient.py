"""Descent and ascent: GradAscent, GradDiff, KL-min, IdkNLL and the retain fine-tune.

Each `Method` below has its formula and source. CE is the mean −log p of answer tokens over a batch; L_r is
CE on retain rows, or KL from the frozen target. What ascends is unbounded below: training ends where the
forget loss reaches that of a model that knows nothing, or the limit that is set. KL is averaged over answer
tokens: TOFU's code takes the mean over all positions, padding included, and MUSE's GA_KLR hands raw logits
to the KL function; neither is copied. IdkNLL is one token mean, so that short refusals weigh less than
answers, or with `separate` γ·CE(x_f, refusal) + α·CE(x_r, y_r). The retain fine-tune lets what is not
trained on fade.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from palinode.methods.method import Method, MethodSettings, RetainSettings, StartSettings


class GradAscentSettings(StartSettings):
    """When the ascent ends."""

    forget_limit: float | None = Field(default=None, gt=0)
    """Forget loss in nats a token that ends training; None: ln V, that of a model that knows nothing."""


GRAD_ASCENT = Method(
    name="grad_ascent",
    summary="gradient ascent on the forget set",
    source="Yao et al. 2023; TOFU, arXiv 2401.06121",
    formula="L = −CE(forget)",
    settings=GradAscentSettings,
    minimises="grad_ascent",
)


class GradDiffSettings(RetainSettings):
    """The weights of both losses, and when the ascent ends."""

    forget_limit: float | None = Field(default=None, gt=0)
    """Forget loss in nats a token that ends training; None: ln V, that of a model that knows nothing."""


GRAD_DIFF = Method(
    name="grad_diff",
    summary="gradient ascent on the forget set, descent on retain rows",
    source="Liu et al. 2022; TOFU, arXiv 2401.06121",
    formula="L = −γ·CE(forget) + α·CE(retain)",
    needs=frozenset({"retain"}),
    settings=GradDiffSettings,
    minimises="grad_diff",
)


class KLMinSettings(GradDiffSettings):
    """Those of GradDiff, with KL for the retain loss."""

    retain_loss: Literal["nll", "kl"] = "kl"
    """L_r: KL from the frozen target over answer tokens, or cross entropy."""


KL_MIN = Method(
    name="kl_min",
    summary="gradient ascent on the forget set, held to the target on retain rows",
    source="TOFU, arXiv 2401.06121",
    formula="L = −γ·CE(forget) + α·KL(p_ref ‖ p_θ on retain)",
    needs=frozenset({"retain", "frozen_target"}),
    settings=KLMinSettings,
    minimises="grad_diff",
)


class IdkNLLSettings(RetainSettings):
    """One mean, or two with weights of their own."""

    separate: bool = False
    """Weigh refusals and retain rows by γ and α instead of one mean over their tokens."""


IDK_NLL = Method(
    name="idk_nll",
    summary="plain fine-tuning on refusals of the forget questions, and on retain rows",
    source="TOFU, arXiv 2401.06121",
    formula="L = CE(refusals of forget questions ∪ retain)",
    needs=frozenset({"retain", "refusals"}),
    settings=IdkNLLSettings,
    minimises="idk_nll",
)


class RetainOnlySettings(MethodSettings):
    """How much of the retain set is trained on."""

    epoch: Literal["forget", "retain"] = "forget"
    """What an epoch is: as many retain rows as there are forget rows, drawn anew each time, which is
    what the other methods spend; or the whole retain set."""
    retain_rows: Literal["all", "sample"] = "all"
    """The rows that are drawn from: the whole retain set, or a sample as large as the forget set."""


RETAIN_FINETUNE = Method(
    name="retain_finetune",
    summary="plain fine-tuning of the target on retain rows",
    formula="L = CE(retain), from the target",
    needs=frozenset({"retain"}),
    settings=RetainOnlySettings,
    minimises="retain_finetune",
)
