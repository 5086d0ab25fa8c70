"""Who's Harry Potter (Eldan and Russinovich 2023, arXiv 2310.02238): v_gen = v − α·ReLU(v_re − v).

v are the target's logits and v_re those of the target reinforced on the forget set: what rises by
reinforcement is taken down. `whp` fine-tunes the target on the words that v_gen finds likeliest in the forget
rows; `whp_logits` uses v_gen itself, with both models in memory. The original also replaces names in the
text by generic ones, from a dictionary that is not to be had for other data: that is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from palinode.methods.method import (
    Given,
    Method,
    MethodRun,
    MethodSettings,
    gather,
    plain_material,
    trained_run,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from palinode.training.objectives import FrozenValues, Joined, Objective, Seen


class WHPSettings(MethodSettings):
    """α."""

    alpha: float = Field(default=1.0, gt=0)
    """α, how much of what reinforcement raises is taken off; to be tuned."""


def objective(settings: WHPSettings, seed: int) -> Objective:  # noqa: ARG001 - methods are built alike
    """Return the cross entropy of forget rows with the generic words for labels, which are given."""
    from palinode.training.losses import token_nll
    from palinode.training.objectives import Objective, term

    def loss(seen: Seen) -> Tensor:
        assert seen.frozen is not None  # they come from `generic_words`
        return token_nll(seen.logits, seen.frozen)

    return Objective((term("forget", ("forget",), loss, per="token"),))


def runs(settings: WHPSettings, given: Given) -> list[MethodRun]:
    """Return the run that reinforces the target, and the one on the words that both then find likeliest."""

    def words(
        load: Callable[[str], PreTrainedModel],
    ) -> Callable[[Joined, int], Mapping[str, FrozenValues]]:
        from palinode.models.inplace import CombinedLogits
        from palinode.training.objectives import Choices, keep

        def found(cast: Joined, pad_id: int) -> Mapping[str, FrozenValues]:
            combined = CombinedLogits(load("target"), load("reinforced"), settings.alpha)
            rows = {("forget", place): row for place, row in enumerate(cast.rows["forget"])}
            return {"forget": keep(Choices(), combined, rows, pad_id=pad_id, autocast=False)}

        return found

    label = "reinforce the target on the forget set"
    first = MethodRun("reinforced", "target", plain_material("forget", given.forget), label=label, whole=True)
    minimised = objective(settings, given.seed)
    material = gather(minimised, forget=given.forget)
    return [
        first,
        trained_run("whp", settings, material, minimised, reads=("reinforced",), frozen=words),
    ]


WHP = Method(
    name="whp",
    summary="Who's Harry Potter: fine-tuning on what the target would say without its reinforcement",
    source="Eldan and Russinovich 2023, arXiv 2310.02238",
    formula="L = CE(forget with labels argmax(v − α·ReLU(v_re − v)))",
    needs=frozenset({"frozen_target"}),
    settings=WHPSettings,
    objective=objective,
    own_runs=runs,
)

WHP_LOGITS = Method(
    name="whp_logits",
    summary="Who's Harry Potter at inference: two models read together; cannot be saved as one",
    source="Eldan and Russinovich 2023, arXiv 2310.02238; MUSE",
    formula="v = v_target − α·ReLU(v_reinforced − v_target)",
    settings=WHPSettings,
)
