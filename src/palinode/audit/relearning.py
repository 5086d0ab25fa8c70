"""Relearning: how fast does the forget set come back, beside a model that learns it for the first time?

A fresh copy is fine-tuned by the one training loop, and the answer probability of forget rows that it is
not given is measured after fixed numbers of steps. A row's value is the area under its curve over the
length of the curve (trapezoids), so that the difference of two models' means is the area between their
curves, from −1 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from palinode.audit.attack import Attack, AttackResult, AttackTest, Values
from palinode.data.examples import Example
from palinode.errors import CheckpointError, DivergenceError
from palinode.metrics import answer_probabilities

if TYPE_CHECKING:
    from palinode.audit.attack import AuditBudget, Subject
    from palinode.audit.material import AuditRows

AREA = AttackTest("area", "area under the curve", more=0.1, less=0.2, missing="no token was scored")


def relearn(
    subject: Subject,
    learned: Sequence[Example],
    tested: Sequence[Example],
    budget: AuditBudget,
    *,
    label: str,
) -> AttackResult:
    """Fine-tune a fresh copy on `learned`, and return the areas under the curves of `tested`."""
    from palinode.audit.attack import likelihoods_only
    from palinode.data.tokenize import tokenize
    from palinode.models.loading import pad_token
    from palinode.training import ANSWER_LOSS, TrainingSettings, train

    model = subject.fresh()
    rows = tokenize(learned, subject.tokenizer, max_length=budget.max_length, style=subject.style)
    last = budget.relearn_steps[-1]
    settings = TrainingSettings(
        epochs=-(-last // -(-len(rows) // budget.relearn_batch)),  # enough of them for the steps
        learning_rate=budget.relearn_rate,
        batch_size=budget.relearn_batch,
        warmup_epochs=0.0,
        max_length=budget.max_length,
    )
    curves: dict[int, Values] = {}

    def look(step: int) -> None:
        if step in budget.relearn_steps:
            try:
                outcomes = subject.ask(
                    tested, likelihoods_only(budget), model=model, label=f"{label}, after {step} steps"
                )
            except CheckpointError as error:  # its likelihoods are not finite
                raise DivergenceError(f"after {step} steps of {label}: {error}") from error
            curves[step] = tuple(answer_probabilities(outcomes))

    def after(step: int, _rows: Sequence[int]) -> None:
        model.eval()
        look(step)
        model.train()

    look(0)
    train(
        model,
        rows,
        ANSWER_LOSS,
        settings,
        seed=subject.seed,
        pad_id=pad_token(subject.tokenizer),
        on_step=after,
        max_steps=last,
        say=subject.listener.say,
    )
    details = {
        "steps": list(curves),
        "curve": [_mean(values) for values in curves.values()],
        "learned_rows": len(learned),
        "tested_rows": len(tested),
    }
    return AttackResult({"area": {"forget": areas(curves)}}, details)


def areas(curves: Mapping[int, Values]) -> Values:
    """Return the area under each row's curve, divided by the number of steps; None where a point is missing.

    >>> areas({0: (0.0,), 2: (0.5,), 4: (1.0,)})
    (0.5,)
    """
    steps = list(curves)
    return tuple(_area(steps, points) for points in zip(*curves.values(), strict=True))


def _area(steps: Sequence[int], points: Sequence[float | None]) -> float | None:
    known = [point for point in points if point is not None]
    if len(known) < len(points):
        return None
    pieces = [
        (steps[place + 1] - steps[place]) * (known[place] + known[place + 1]) / 2
        for place in range(len(steps) - 1)
    ]
    return sum(pieces) / (steps[-1] - steps[0])


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def on_forget(subject: Subject, material: AuditRows, budget: AuditBudget) -> AttackResult:
    """Relearn half of the forget set, and measure the other half."""
    return relearn(
        subject, material.learned, material.held_out, budget, label="relearning part of the forget set"
    )


def on_retain(subject: Subject, material: AuditRows, budget: AuditBudget) -> AttackResult:
    """Go on training on retain rows only, and measure the forget set."""
    return relearn(subject, material.retain, material.forget, budget, label="training on retain rows")


def on_lookalikes(subject: Subject, material: AuditRows, budget: AuditBudget) -> AttackResult:
    """Train on rows in the manner of the forget set, and measure forget rows that they are not made from."""
    column = material.lookalikes_column
    tested = material.held_out if column else material.forget
    found = relearn(subject, material.lookalikes, tested, budget, label="training on look-alike rows")
    return AttackResult(
        found.tests,
        {**found.details, "lookalikes": f"{column} of the first half" if column else "given rows"},
    )


def lacks_retain(material: AuditRows, budget: AuditBudget) -> str | None:  # noqa: ARG001 - asked alike
    """Say what is missing."""
    return None if material.retain else "no retain rows were given; name them with --retain"


def lacks_lookalikes(material: AuditRows, budget: AuditBudget) -> str | None:  # noqa: ARG001 - asked alike
    """Say what is missing."""
    if material.lookalikes:
        return None
    return (
        "the forget rows have no perturbed_answer or paraphrased_answer, and no file was named with "
        "--lookalikes"
    )


RELEARN_FORGET = Attack(
    name="relearn_forget",
    title="relearning part of the forget set",
    description="fine-tuning on half of the forget set, measured on the other half",
    tests=(AREA,),
    measure=on_forget,
)
RELEARN_RETAIN = Attack(
    name="relearn_retain",
    title="training on retain rows",
    description="fine-tuning on retain rows only, measured on the forget set",
    tests=(AREA,),
    measure=on_retain,
    lacks=lacks_retain,
)
RELEARN_LOOKALIKES = Attack(
    name="relearn_lookalikes",
    title="training on look-alike rows",
    description="fine-tuning on rows in the manner of the forget set, measured on forget rows",
    tests=(AREA,),
    measure=on_lookalikes,
    lacks=lacks_lookalikes,
)
