"""Model State Arithmetic (arXiv 2506.20941): θ_u = θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0).

θ_0 is fine-tuned on the forget set to θ_1 and on a retain sample to θ_2, by ordinary descent; all
"ascent" is in the sign of α. With β = 0 neither θ_2 nor a retain set is needed.

Task-vector negation (Ilharco et al., arXiv 2212.04089): θ_u = θ_D − α(θ_ft − θ_D).

The same arithmetic as MSA with θ_0 := θ_D: the target itself is fine-tuned on the forget set. It needs
no earlier checkpoint; the paper reports it as clearly weaker (docs/lab-notes.md has what we saw).

Rewind-to-delete (Mu and Klabjan, arXiv 2409.09778): fine-tune an earlier checkpoint on retain rows.

L = CE(B_r) from θ_0, the checkpoint that MSA starts from. What the target learned elsewhere is lost with
it. The paper's certificate adds Gaussian noise to the weights, which is left out here.

Paired vectors (ours): θ_u = θ_D − α(θ_1 − θ_c) + β(θ_c − s), from a start s that is θ_0 or θ_D.

    θ_1 = fine-tune(s; replay + forget rows), θ_c = fine-tune(s; replay), the same replay rows at each step

θ_1 − θ_0 of MSA holds what the forget rows taught and what any short fine-tuning does to all the rest; the
control θ_c holds the latter alone, so that it cancels. Without replay rows there is no control, θ_c = s, and
the method is MSA from θ_0 and the task vector from θ_D. The second term comes free, and is left out unless
its scale is given: in the demo's world it did harm (docs/paired-vectors.md).

Given: θ_u = θ_D − α(θ_D − θ_given), the change that some tool made, which can be filtered (docs/filters.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from palinode.methods.gradient import RetainOnlySettings
from palinode.methods.method import (
    NO_RETAIN_VECTOR,
    Ends,
    Given,
    Method,
    MethodRun,
    MethodSettings,
    Start,
    Vectors,
    gather,
    plain_material,
)


class VectorSettings(MethodSettings):
    """How the run that makes the forget vector is held to its start."""

    retain_kl: float = Field(default=0.0, ge=0)
    """λ in CE(forget) + λ·KL(p_s ‖ p_θ) on retain rows, s being the start; with 0 no retain row is read."""

    def clash(self, *, retain: bool, retain_scale: float | None) -> str | None:  # noqa: ARG002
        """Say that the KL has no rows."""
        if self.retain_kl and not retain:
            return "method_settings.retain_kl needs retain rows; name data.retain (--retain)"
        return None


class MSASettings(VectorSettings):
    """Those of a vector from the base."""

    home: ClassVar[Start] = "base"
    """θ_0, which had not seen the forget set."""


def vector_runs(settings: VectorSettings, given: Given) -> list[MethodRun]:
    """Return the run to θ_1, and the one to θ_2 where β may be other than 0."""
    runs = [forget_run(settings, given)]
    if weight := settings.retain_kl:  # CE(forget) + λ·KL(p_s ‖ p_θ) on retain rows, held to its start s
        from palinode.training.objectives import Objective, answer_term, kl_term

        held = Objective((answer_term("forget", "forget"), kl_term("retain", "retain", coefficient=weight)))
        material = gather(held, forget=given.forget, retain=given.sample)
        label, decides = "fine-tune on the forget set, held on retain rows", {"retain_kl": weight}
        runs = [MethodRun("forget", settings.starts_at, material, held, label, decides)]
    if given.retain_scale != 0:
        material = plain_material("retain", given.sample)
        runs.append(MethodRun("retain", settings.starts_at, material, label="fine-tune on the retain sample"))
    return runs


def forget_run(settings: MethodSettings, given: Given) -> MethodRun:
    """Return the run on the forget set alone."""
    material = plain_material("forget", given.forget)
    return MethodRun("forget", settings.starts_at, material, label="fine-tune on the forget set")


def vectors(settings: Any, ends: Ends) -> Vectors:  # noqa: ARG001 - methods are built alike
    """Return θ_1 − s and, if there is a θ_2, θ_2 − s."""
    return Vectors(ends.change("forget"), ends.change("retain") if "retain" in ends.points else None)


MSA = Method(
    name="msa",
    summary="Model State Arithmetic: vectors from a checkpoint that had not seen the forget set",
    source="arXiv 2506.20941",
    formula="θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0)",
    needs=frozenset({"base"}),
    settings=MSASettings,
    own_runs=vector_runs,
    own_point=vectors,
    has_scales=True,
)


TASK_VECTOR = Method(
    name="task_vector",
    summary="task-vector negation: vectors from the target itself",
    source="Ilharco et al. 2023, arXiv 2212.04089",
    formula="θ_D − α(θ_ft − θ_D)",
    needs=frozenset({"base"}),  # for the goal that chooses the scales
    settings=VectorSettings,
    own_runs=vector_runs,
    own_point=vectors,
    has_scales=True,
)


class RewindSettings(RetainOnlySettings):
    """Those of a fine-tuning on retain rows, from the base."""

    home: ClassVar[Start] = "base"
    """θ_0, which had not seen the forget set."""


REWIND = Method(
    name="rewind",
    summary="rewind-to-delete: plain fine-tuning of the base checkpoint on retain rows",
    source="Mu and Klabjan, arXiv 2409.09778",
    formula="L = CE(retain), from the base checkpoint",
    needs=frozenset({"retain", "base"}),
    settings=RewindSettings,
    minimises="retain_finetune",
)


class PairedSettings(MethodSettings):
    """Where both runs start, and what they rehearse."""

    sample_use: ClassVar[str] = "replay"
    """What the retain sample is for."""
    retain_scale: ClassVar[float | None] = 0.0
    """The second term is left out unless its scale is given."""
    start: Start = "base"
    """s: the base checkpoint θ_0, or the target θ_D."""
    replay_rows: int | None = Field(default=None, ge=0)
    """Retain rows that replay is drawn from, or all where there are no more; None: as many as forget rows;
    0: no replay, hence no control."""
    replay_ratio: int = Field(default=3, ge=1)
    """Replay rows beside each forget row. A step has training.batch_size forget rows and so many times
    as many replay rows in a micro-batch; memory grows with it."""
    forget_weight: float | None = Field(default=None, gt=0)
    """λ in L_1 = CE(replay) + λ·CE(forget); None: 1 / replay_ratio, so that all rows count alike."""

    @property
    def weight(self) -> float:
        """Return λ."""
        return 1 / self.replay_ratio if self.forget_weight is None else self.forget_weight

    @property
    def retain_free(self) -> bool:
        """Whether nothing is rehearsed."""
        return self.replay_rows == 0

    def sample_size(self, forget_rows: int) -> int:
        """Return how many retain rows replay is drawn from."""
        return forget_rows if self.replay_rows is None else self.replay_rows

    def clash(self, *, retain: bool, retain_scale: float | None) -> str | None:  # noqa: ARG002
        """Say that there is no control run whose change could be added."""
        if not self.retain_free or not retain_scale:
            return None
        return (
            f"a retain scale of {retain_scale:g} adds what the control run learned, and with "
            "method_settings.replay_rows = 0 there is none; leave one of the two out"
        )


def paired_runs(settings: PairedSettings, given: Given) -> list[MethodRun]:
    """Return the runs with the forget rows and without; that of a plain vector where none is replayed."""
    if settings.retain_free:
        return [forget_run(settings, given)]
    start, ratio = settings.starts_at, settings.replay_ratio
    from palinode.methods.minimised import paired

    exposed, control = paired(settings.weight)
    rows = gather(exposed, forget=given.forget, retain=given.sample)
    material = replace(rows, together={"retain": ratio})
    shared = {"method": "paired", "replay_ratio": ratio}
    both = {**shared, "forget_weight": settings.weight}
    return [
        MethodRun("exposed", start, material, exposed, "fine-tune on forget set and replay", both),
        MethodRun("control", start, material, control, "fine-tune on replay alone", shared),
    ]


def paired_vectors(settings: PairedSettings, ends: Ends) -> Vectors:
    """Return θ_1 − θ_c and θ_c − s."""
    if settings.retain_free:
        return Vectors(ends.change("forget"), None)
    return Vectors(ends.points["exposed"] - ends.points["control"], ends.change("control"))


PAIRED = Method(
    name="paired",
    summary="paired vectors: the difference of two runs with and without the forget rows",
    source="ours; docs/paired-vectors.md",
    formula="θ_D − α(θ_1 − θ_c) + β(θ_c − s)",
    needs=frozenset({"retain", "base"}),  # the base also for the goal that chooses the scales
    settings=PairedSettings,
    own_runs=paired_runs,
    own_point=paired_vectors,
    has_scales=True,
)


class GivenSettings(MethodSettings):
    """It has none of its own: the model is named as models.given."""

    retain_scale: ClassVar[float | None] = 0.0
    """There is no retain vector."""

    def clash(self, *, retain: bool, retain_scale: float | None) -> str | None:  # noqa: ARG002
        """Say that there is no retain vector."""
        return NO_RETAIN_VECTOR if retain_scale else None


def given_vectors(settings: GivenSettings, ends: Ends) -> Vectors:  # noqa: ARG001 - methods are built alike
    """Return θ_D − θ_given."""
    return Vectors(ends.target - ends.points["given"], None)


GIVEN = Method(
    name="given",
    summary="an unlearned model of whatever tool, whose change is taken as the vector",
    source="ours; docs/filters.md",
    formula="θ_D − α(θ_D − θ_given)",
    needs=frozenset({"given"}),
    settings=GivenSettings,
    own_runs=lambda settings, given: [],  # noqa: ARG005 - nothing is trained
    own_point=given_vectors,
    has_scales=True,
)
