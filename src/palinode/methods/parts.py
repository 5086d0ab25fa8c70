"""What the objectives of several methods share; imported only when an objective is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from palinode.methods.method import RetainSettings
from palinode.training.losses import dpo, npo, row_sums, token_nll
from palinode.training.objectives import (
    Keeper,
    Likelihoods,
    Limit,
    Objective,
    Seen,
    Term,
    answer_term,
    halves,
    kl_term,
    term,
)


def nll(seen: Seen) -> Tensor:
    """Return −log p of each scored token, [N]."""
    return token_nll(seen.logits, seen.labels)


def answer_nll(seen: Seen) -> Tensor:
    """Return −log p of each row's whole answer, [count]."""
    return row_sums(nll(seen), seen.rows, seen.count)


def forget_term(
    loss: Callable[[Seen], Tensor],
    *,
    per: Literal["token", "row"],
    gamma: float = 1.0,
    keeper: Callable[[], Keeper] | None = None,
) -> Term:
    """Return γ times the mean of a loss over forget rows; `keeper` makes what keeps frozen values."""
    kept = None if keeper is None else lambda _model: keeper()
    return term("forget", ("forget",), loss, per=per, coefficient=gamma, keeper=kept)


def retain_terms(settings: RetainSettings) -> tuple[Term, ...]:
    """Return α·L_r over retain rows; nothing where α is 0."""
    if settings.alpha == 0:
        return ()
    build = kl_term if settings.retain_loss == "kl" else answer_term
    return (build("retain", "retain", coefficient=settings.alpha),)


def with_retain(settings: RetainSettings, forget: Term, limit: Limit | None = None) -> Objective:
    """Return a forget term plus α·L_r."""
    return Objective((forget, *retain_terms(settings)), limit=limit)


def npo_term(*, beta: float, gamma: float) -> Term:
    """Return γ·(2/β)·mean_i[−log σ(β(nll_i − nll_ref,i))] over forget rows."""

    def loss(seen: Seen) -> Tensor:
        return npo(answer_nll(seen), seen.reference, beta=beta)

    return forget_term(loss, per="row", gamma=gamma, keeper=Likelihoods)


def preference_term(win: str, *, beta: float, gamma: float, scaled: bool) -> Term:
    """Return DPO with the rows of `win` over the forget rows; `scaled` by 2/β as open-unlearning does."""

    def loss(seen: Seen) -> Tensor:
        (better, worse), (better_before, worse_before) = halves(answer_nll(seen)), halves(seen.reference)
        found = dpo(better, worse, better_before, worse_before, beta=beta)
        return (2 / beta) * found if scaled else found

    return term(
        "forget",
        (win, "forget"),
        loss,
        per="pair",
        coefficient=gamma,
        keeper=lambda _model: Likelihoods(),
    )
