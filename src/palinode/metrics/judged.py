"""Accuracies by a judge that names the candidate closest in fact to the model's answer (spec: msa.md §5).

    Acc_forget    share of forget rows where the ground truth is not among the picks
    Acc_recover   share of forget rows where the ideal (retrained) model's own answer is among them
    Acc_retain    share of retain rows where the ground truth or the ideal model's answer is among them
    accept        share of questions where an accepted answer is among them (RESTOR)

For all, higher is better. Picks need not be one: Acc_forget and Acc_recover do not add up to 1. Rows
without a readable reply are left out and said, and every score names its judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from palinode.metrics.aggregate import joined, mean_score
from palinode.records import Score, Verdict


def forget_accuracy(verdicts: Sequence[Verdict], *, seed: int = 0) -> Score:
    """Return Acc_forget: how often the judge does not find the ground truth in the answer."""
    return _share(verdicts, lambda roles: "truth" not in roles, offered={"truth"}, seed=seed)


def recover_accuracy(verdicts: Sequence[Verdict], *, seed: int = 0) -> Score:
    """Return Acc_recover: how often the judge finds the ideal model's answer in the answer.

    Rows whose candidates lack an ideal answer are left out.
    """
    return _share(verdicts, lambda roles: "ideal" in roles, offered={"ideal"}, seed=seed)


def retain_accuracy(verdicts: Sequence[Verdict], *, seed: int = 0) -> Score:
    """Return Acc_retain: how often the judge finds the ground truth or the ideal answer in the answer.

    Where no ideal answer was among the candidates only the ground truth counts, and the reason says so.
    """
    score = _share(verdicts, lambda roles: bool(roles & {"truth", "ideal"}), offered={"truth"}, seed=seed)
    without = sum(not _was_offered(verdict, {"ideal"}) for verdict in verdicts)
    if score.value is None or not without:
        return score
    alone = f"no ideal answer among the candidates of {without} of {len(verdicts)} rows"
    return replace(score, reason=joined(alone, score.reason))


def accept_accuracy(verdicts: Sequence[Verdict], *, seed: int = 0) -> Score:
    """Return how often the judge finds an accepted answer in the answer: RESTOR's accuracy, as a share."""
    return _share(verdicts, lambda roles: "accepted" in roles, offered={"accepted"}, seed=seed)


def _share(
    verdicts: Sequence[Verdict],
    succeeds: Callable[[frozenset[str]], bool],
    *,
    offered: set[str],
    seed: int,
) -> Score:
    values = [
        float(succeeds(roles))
        if (roles := verdict.roles()) is not None and _was_offered(verdict, offered)
        else None
        for verdict in verdicts
    ]
    score = mean_score(values, seed=seed, missing=_missing(verdicts, offered))
    judges = ", ".join(sorted({verdict.judge for verdict in verdicts}))
    return replace(score, reason=joined(score.reason, f"judged by {judges}" if judges else None))


def _was_offered(verdict: Verdict, roles: set[str]) -> bool:
    return any(roles.intersection(candidate_roles) for _, candidate_roles in verdict.offered)


def _missing(verdicts: Sequence[Verdict], offered: set[str]) -> str:
    """Return why rows have no value, as far as it happened."""
    causes = []
    reasons = sorted(verdict.reason or "no reason given" for verdict in verdicts if verdict.picked is None)
    if reasons:
        causes.append(f"the judge picked nothing ({reasons[0]})")
    if not all(_was_offered(verdict, offered) for verdict in verdicts):
        causes.append(f"no {' or '.join(sorted(offered))} answer among the candidates")
    return ", or ".join(causes)
