"""What the objectives of several methods share; imported only when an objective is built."""

from __future__ import annotations

from torch import Tensor

from palinode.methods.method import RetainSettings
from palinode.training.objectives import Seen, Term, answer_term, halves, kl_term, term


def retain_terms(settings: RetainSettings) -> tuple[Term, ...]:
    """Return α·L_r over retain rows; nothing where α is 0."""
    if settings.alpha == 0:
        return ()
    build = kl_term if settings.retain_loss == "kl" else answer_term
    return (build("retain", "retain", coefficient=settings.alpha),)


def ascent_term(gamma: float) -> Term:
    """Return −γ·CE over forget rows."""
    from palinode.training.losses import gradient_ascent, token_nll

    return term(
        "forget",
        ("forget",),
        lambda seen: gradient_ascent(token_nll(seen.logits, seen.labels)),
        per="token",
        coefficient=gamma,
    )


def npo_term(*, beta: float, gamma: float) -> Term:
    """Return γ·(2/β)·mean_i[−log σ(β(nll_i − nll_ref,i))] over forget rows."""
    from palinode.training.losses import npo, row_sums, token_nll
    from palinode.training.objectives import Likelihoods

    def loss(seen: Seen) -> Tensor:
        nll = row_sums(token_nll(seen.logits, seen.labels), seen.rows, seen.count)
        return npo(nll, seen.reference, beta=beta)

    return term(
        "forget",
        ("forget",),
        loss,
        per="row",
        coefficient=gamma,
        keeper=lambda _model: Likelihoods(),
    )


def preference_term(win: str, *, beta: float, gamma: float, scaled: bool) -> Term:
    """Return DPO with the rows of `win` over the forget rows; `scaled` by 2/β as open-unlearning does."""
    from palinode.training.losses import dpo, row_sums, token_nll
    from palinode.training.objectives import Likelihoods

    def loss(seen: Seen) -> Tensor:
        nll = row_sums(token_nll(seen.logits, seen.labels), seen.rows, seen.count)
        (better, worse), (better_before, worse_before) = halves(nll), halves(seen.reference)
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
