"""NPO, negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868).

L = γ·(2/β)·mean_i[−log σ(β(nll_i − nll_ref,i))] + α·L_r, with nll_i = −log p of the whole answer of forget
row i and nll_ref the frozen target's. Its gradient fades as the answer becomes less likely than it was.

SimNPO (Fan et al. 2024, arXiv 2410.07163): NPO without a reference, by length.

L = γ·(2/β)·mean_i[−log σ(β(nll_i / n_i − δ))] + α·L_r, with n_i the number of answer tokens of forget row
i. The paper writes the margin outside of β: its γ is β·δ.

IdkDPO (TOFU, arXiv 2401.06121): direct preference optimisation of a refusal over the true answer.

L = γ·s·mean_i[−log σ(β·h_i)] + α·L_r with h = (nll_ref − nll)(x, refusal) − (nll_ref − nll)(x, y). s is 2/β
in open-unlearning and 1 in TOFU and in DPO itself. Each forget question is given a refusal drawn anew in
every epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from palinode.methods.method import Method, RetainSettings

if TYPE_CHECKING:
    from torch import Tensor

    from palinode.training.objectives import Objective, Seen


class NPOSettings(RetainSettings):
    """The weights of both losses, and β."""

    beta: float = Field(default=0.1, gt=0)
    """β; near 0 it is gradient ascent."""


def npo_objective(settings: NPOSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return NPO over forget rows plus the retain loss."""
    from palinode.methods.parts import npo_term, with_retain

    return with_retain(settings, npo_term(beta=settings.beta, gamma=settings.gamma))


NPO = Method(
    name="npo",
    summary="negative preference optimisation: the target's own answers become less preferred",
    source="Zhang et al. 2024, arXiv 2404.05868",
    formula="L = γ·(2/β)·mean[−log σ(β(nll − nll_ref))] + α·L_r",
    needs=frozenset({"retain", "frozen_target"}),
    settings=NPOSettings,
    objective=npo_objective,
)


class SimNPOSettings(RetainSettings):
    """The weights of both losses, β and δ; the defaults are open-unlearning's."""

    gamma: float = Field(default=0.125, ge=0)
    """γ, the weight of the forget loss."""
    beta: float = Field(default=4.5, gt=0)
    """β."""
    delta: float = Field(default=0.0, ge=0)
    """δ, in nats a token."""


def simnpo_objective(settings: SimNPOSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return SimNPO over forget rows plus the retain loss."""
    from palinode.methods.parts import forget_term, nll, with_retain
    from palinode.training.losses import row_means, simnpo

    def loss(seen: Seen) -> Tensor:
        means = row_means(nll(seen), seen.rows, seen.count)
        return simnpo(means, beta=settings.beta, delta=settings.delta)

    return with_retain(settings, forget_term(loss, per="row", gamma=settings.gamma))


SIMNPO = Method(
    name="simnpo",
    summary="NPO by length and without a reference",
    source="Fan et al. 2024, arXiv 2410.07163",
    formula="L = γ·(2/β)·mean[−log σ(β(nll/n − δ))] + α·L_r",
    needs=frozenset({"retain"}),
    settings=SimNPOSettings,
    objective=simnpo_objective,
)


class DPOSettings(RetainSettings):
    """The weights of both losses, and β."""

    beta: float = Field(default=0.1, gt=0)
    """β."""
    scaled: bool = True
    """Multiply by 2/β as open-unlearning does; false: DPO as TOFU has it."""


def dpo_objective(settings: DPOSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return DPO of refusals over forget rows plus the retain loss."""
    from palinode.methods.parts import preference_term, with_retain

    forget = preference_term("refusal", beta=settings.beta, gamma=settings.gamma, scaled=settings.scaled)
    return with_retain(settings, forget)


DPO = Method(
    name="dpo",
    summary="IdkDPO: refusals are preferred to the answers of the forget set",
    source="TOFU, arXiv 2401.06121",
    formula="L = γ·(2/β)·mean[−log σ(β·h)] + α·L_r, h = (nll_ref − nll)(refusal) − (nll_ref − nll)(answer)",
    needs=frozenset({"retain", "refusals", "frozen_target"}),
    settings=DPOSettings,
    objective=dpo_objective,
)
