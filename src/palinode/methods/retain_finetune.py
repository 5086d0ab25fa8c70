"""Retain fine-tune: minimise CE(B_r) from the target, and let what is not trained on fade."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from palinode.methods.method import Method, MethodSettings

if TYPE_CHECKING:
    from palinode.training.objectives import Objective


class RetainOnlySettings(MethodSettings):
    """How much of the retain set is trained on."""

    epoch: Literal["forget", "retain"] = "forget"
    """What an epoch is: as many retain rows as there are forget rows, drawn anew each time, which is
    what the other methods spend; or the whole retain set."""
    retain_rows: Literal["all", "sample"] = "all"
    """The rows that are drawn from: the whole retain set, or a sample as large as the forget set."""


def objective(settings: RetainOnlySettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return the cross entropy of retain rows."""
    from palinode.training.objectives import Objective, answer_term

    return Objective((answer_term("retain", "retain"),), anchor=settings.epoch)


RETAIN_FINETUNE = Method(
    name="retain_finetune",
    summary="plain fine-tuning of the target on retain rows",
    formula="L = CE(retain), from the target",
    kind="training",
    needs=frozenset({"retain"}),
    settings=RetainOnlySettings,
    objective=objective,
)
