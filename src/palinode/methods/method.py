"""What a method is: what it needs, its own settings, the fine-tunings it takes, and what their ends come to.

    runs(settings, given)    →  [MethodRun(name, start, material, objective), …], in the order they are done
    point(settings, ends)    →  Vectors(forget, retain), whose scales are still open; or the unlearned point

Costs, fine-tuning, the search for scales and comparisons follow from these two. Nothing heavy is
imported here; an objective is built when a run asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from palinode.data.examples import Example
from palinode.errors import DataError, told_as
from palinode.records import read_bytes
from palinode.weights.checkpoint import Checkpoint, Direction, Point, WeightedSum

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from palinode.training.objectives import FrozenValues, Joined, Material, Objective

Kind = Literal["arithmetic", "training", "inference"]
"""Vectors added up by scales; weights trained; or two models read together, with no weights of its own."""

Need = Literal["retain", "refusals", "base", "frozen_target", "alternates", "given"]
"""Retain rows, refusal lines, an earlier checkpoint, values of the frozen target (which are kept, so no
second model is held), other answers that the target is asked for first, or an unlearned model."""

Start = Literal["target", "base"]
"""The target θ_D, or the base θ_0."""

Alternates = Sequence[tuple[int, str]]
"""Other answers to forget questions, as (position of the example, text)."""


NAMED_BY: Mapping[Need, str] = {
    "base": "an earlier checkpoint of the target; name models.base (--base)",
    "retain": "retain rows; name data.retain (--retain)",
    "refusals": "a file of refusals, one a line; name data.refusals (--refusals)",
    "given": "an unlearned model; name models.given (palinode filter --unlearned)",
}
NO_RETAIN_VECTOR = "there is no retain vector here, so scales.retain has to be 0; leave it out"

# What a run is


@dataclass(frozen=True, slots=True)
class Given:
    """What a method has to work with, beside its settings."""

    forget: Sequence[Example]
    retain: Sequence[Example] = ()
    sample: Sequence[Example] = ()
    """Retain rows drawn for a retain vector, or for replay."""
    refusals: Sequence[str] = ()
    retain_scale: float | None = None
    """β where it is fixed; 0 asks for no retain vector. None: it will be chosen."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """Other answers that the target is asked for before a run, which makes its material of them."""

    count: int
    """Answers in all."""
    sampling: Sequence[Any]
    """What decides how they are drawn."""
    draw: Callable[..., list[tuple[int, str]]]
    """(model, tokenizer; by name seed, max_length, style, listener) → the answers."""
    material: Callable[[Alternates], Material]


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One fine-tuning: from where, on which rows, and what it minimises."""

    name: str
    start: Start
    material: Material
    """The rows by role; as they are expected, where other answers are asked for first."""
    objective: Objective | None = None
    """None: the cross entropy of the answers of the anchor's rows."""
    label: str = ""
    """What a plan calls it."""
    decides: Mapping[str, Any] = field(default_factory=dict)
    """What decides the objective, as plain values."""
    whole: bool = False
    """Whether its end is loaded or trained on, so that a low-rank run has to be merged."""
    asked: Asked | None = None
    reads: Sequence[str] = ()
    """Earlier runs whose ends `frozen` loads."""
    frozen: (
        Callable[[Callable[[str], PreTrainedModel]], Callable[[Joined, int], Mapping[str, FrozenValues]]]
        | None
    ) = None
    """(loads the target, or the end of a run, by name) → makes what terms need of models other than the
    start."""

    @property
    def anchors(self) -> Sequence[Example]:
        """The rows that an epoch goes through."""
        return self.material.examples[self.material.anchor]


@dataclass(frozen=True, slots=True)
class Vectors:
    """Directions whose scales are still open, each perhaps the difference of any two points."""

    forget: Direction
    retain: Direction | None
    """None where β is 0 for good."""

    def taken_off(self, target: Point, alpha: float, beta: float) -> WeightedSum:
        """Return θ_D − α·forget + β·retain as a formula; where β is 0 the retain vector takes no part."""
        point = target - alpha * self.forget
        return point if self.retain is None or not beta else point + beta * self.retain

    def along(self, beta: float) -> dict[str, Direction]:
        """Return the directions that the dose of such a point is measured along."""
        retain = {} if self.retain is None or not beta else {"retain": self.retain}
        return {"forget": -1.0 * self.forget} | retain


@dataclass(frozen=True, slots=True)
class Ends:
    """Where the runs of a method ended, by name, and where they started."""

    target: Checkpoint
    start: Checkpoint
    points: Mapping[str, Point]

    def change(self, name: str) -> Direction:
        """Return what a run did: its end less its start."""
        return self.points[name] - self.start


def plain_material(role: str, rows: Sequence[Example]) -> Material:
    """Return rows of one role, for a run on their answers alone."""
    from palinode.training.objectives import Material

    return Material(role, {role: rows})


# Settings


class MethodSettings(BaseModel):
    """A method's own hyper-parameters; this method has none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    home: ClassVar[Start] = "target"
    """Where the method's runs start, unless a setting `start` says so."""
    sample_use: ClassVar[str] = "the retain vector"
    """What the retain sample is for."""
    retain_scale: ClassVar[float | None] = None
    """β where the recipe says nothing; None: it is chosen."""

    @property
    def starts_at(self) -> Start:
        """Where the method's runs start."""
        start: Start = getattr(self, "start", self.home)
        return start

    @property
    def from_base(self) -> bool:
        """Whether the target is given the change that training makes at the base."""
        return False

    @property
    def retain_free(self) -> bool:
        """Whether, so set, a method that needs retain rows does without."""
        return False

    def sample_size(self, forget_rows: int) -> int:
        """Return how many retain rows a retain sample has, for so many forget rows."""
        return forget_rows

    def clash(self, *, retain: bool, retain_scale: float | None) -> str | None:  # noqa: ARG002
        """Say why these settings cannot go with the rows or the β that there are; None if they can."""
        return None


class StartSettings(MethodSettings):
    """Where a method that trains with a forget loss starts."""

    start: Start = "target"
    """The checkpoint s that is trained, and that is meant by "frozen": the target θ_D; or the base θ_0, and
    the unlearned model is θ_D + (θ_trained − θ_0)."""

    @property
    def from_base(self) -> bool:
        """Whether s is the base."""
        return self.start == "base"


class RetainSettings(StartSettings):
    """The weights of L = γ·L_f + α·L_r, and what L_r is."""

    gamma: float = Field(default=1.0, ge=0)
    """γ, the weight of the forget loss."""
    alpha: float = Field(default=1.0, ge=0)
    """α, the weight of the retain loss; with 0 no retain rows are needed."""
    retain_loss: Literal["nll", "kl"] = "nll"
    """L_r: cross entropy, or KL from the frozen target, over answer tokens."""
    retain_rows: Literal["all", "sample"] = "all"
    """The rows that are drawn from: the whole retain set, or a sample as large as the forget set."""

    @property
    def retain_free(self) -> bool:
        """Whether the retain loss has no weight."""
        return self.alpha == 0


# Methods

MINIMISED = "palinode.methods.minimised"
"""The module with what methods minimise; it takes torch, so that it is loaded by name, and late."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method of unlearning.

    An ordinary one names what it `minimises`: it takes one run, and its end is the unlearned model. Any other
    says with `own_runs` what it takes, and with `own_point` what that comes to.
    """

    name: str
    summary: str
    source: str = ""
    """Paper, by arXiv number where it has one."""
    formula: str = ""
    """One line."""
    needs: frozenset[Need] = frozenset()
    settings: type[MethodSettings] = MethodSettings
    training: Mapping[str, Any] = field(default_factory=dict)
    """Training settings that its source sets otherwise than ours; a recipe's own come before them."""
    minimises: str | Callable[[Any, int], Objective] = ""
    """(settings, seed) → what its one run minimises, or its last one; or the name of that in `MINIMISED`."""
    own_runs: Callable[[Any, Given], list[MethodRun]] | None = None
    own_point: Callable[[Any, Ends], Vectors | Point] | None = None
    has_scales: bool = False
    """Whether its runs come to vectors, for which α and β are chosen."""

    @property
    def kind(self) -> Kind:
        """What sort of method it is."""
        if self.has_scales:
            return "arithmetic"
        return "training" if self.minimises or self.own_runs else "inference"

    def check_settings(self, given: Mapping[str, Any]) -> MethodSettings:
        """Return the method's settings with its defaults filled in; raises pydantic's ValidationError."""
        return self.settings.model_validate(dict(given))

    def objective(self, settings: Any, seed: int) -> Objective:
        """Return what its one run minimises, or its last one."""
        named = self.minimises
        build: Any = getattr(import_module(MINIMISED), named) if isinstance(named, str) else named
        objective: Objective = build(settings, seed)
        return objective

    def runs(self, settings: Any, given: Given) -> list[MethodRun]:
        """Return the fine-tunings that it takes. Raises DataError for a role without rows."""
        if self.own_runs is not None:
            return self.own_runs(settings, given)
        objective = self.objective(settings, given.seed)
        material = gather(
            objective, forget=given.forget, retain=drawn_from(settings, given), refusals=given.refusals
        )
        return [trained_run(self.name, settings, material, objective)]

    def point(self, settings: Any, ends: Ends) -> Vectors | Point:
        """Return what its runs come to: vectors, or the unlearned model as it lies there or as a formula."""
        if self.own_point is not None:
            return self.own_point(settings, ends)
        return ends.target + ends.change(self.name) if settings.from_base else ends.points[self.name]

    def adds_vectors(self, transforms: Sequence[Any]) -> bool:
        """Tell whether a run with these transforms has scales: where they change a training, it has too."""
        return self.has_scales or bool(transforms)

    def vectors(self, settings: Any, ends: Ends) -> Vectors:
        """Return the vectors of a run that has scales: its own; or what training changed, taken off."""
        found = self.point(settings, ends)
        return found if isinstance(found, Vectors) else Vectors(ends.target - found, None)

    def lacks(self, settings: MethodSettings, there: Set[str], retain_scale: float | None) -> str | None:
        """Say what is missing of what the method needs, and which option names it; None if nothing is."""
        spared = there | ({"retain"} if settings.retain_free else set())
        needs = (self.needs | ({"base"} if settings.from_base else set())) - spared
        if found := [text for need, text in NAMED_BY.items() if need in needs]:
            started = ' with method_settings.start = "base"' if settings.from_base else ""
            return f"the method {self.name}{started} needs {found[0]}"
        return settings.clash(retain="retain" in there, retain_scale=retain_scale)


def trained_run(
    name: str, settings: MethodSettings, material: Material, objective: Objective, **others: Any
) -> MethodRun:
    """Return the run of a method that trains the model itself; `others` are further fields of MethodRun."""
    # The step knows the start by its weights.
    decides = {"method": name, "settings": settings.model_dump(mode="json", exclude={"start"})}
    usual = {"label": f"train by {name}", "decides": decides, "whole": not settings.from_base}
    return MethodRun(name, settings.starts_at, material, objective, **{**usual, **others})


def drawn_from(settings: Any, given: Given) -> Sequence[Example]:
    """Return the retain rows that a method draws from: all, or the sample where its settings say so."""
    return given.sample if getattr(settings, "retain_rows", "all") == "sample" else given.retain


def gather(
    objective: Objective,
    *,
    forget: Sequence[Example],
    retain: Sequence[Example] = (),
    refusals: Sequence[str] = (),
    alternates: Alternates = (),
) -> Material:
    """Return the examples of the roles that an objective names, and which of them go together.

    A refusal may go with any forget question and becomes its answer; an alternate is (position of its
    forget example, text). Raises DataError for a role without examples.
    """
    from palinode.training.objectives import Material

    roles = objective.roles
    examples: dict[str, Sequence[Example]] = {"forget": forget, "retain": retain}
    candidates: dict[str, Sequence[Sequence[int]]] = {}
    if "refusal" in roles:
        examples["refusal"] = [replace(one, answer=line) for one in forget for line in refusals]
        count = len(refusals)
        candidates["refusal"] = [range(at * count, (at + 1) * count) for at in range(len(forget))]
    if "alternate" in roles:
        examples["alternate"] = [replace(forget[at], answer=text) for at, text in alternates]
        candidates["forget"] = [(at,) for at, _ in alternates]
    for role in sorted(roles):
        if not examples[role]:
            raise DataError(f"there are no {role} rows, and this method is trained on them")
    return Material(objective.anchor, {role: examples[role] for role in sorted(roles)}, candidates)


def read_refusals(location: str | Path | None) -> list[str]:
    """Return the refusals of a file, if any: one a line, plain or as a JSON string. Raises DataError."""
    if not location:
        return []
    with told_as(DataError, f"the refusals {location} cannot be read", "name a text file"):
        lines = read_bytes(Path(location).expanduser()).decode("utf-8-sig").splitlines()
    found = []
    for line in filter(None, map(str.strip, lines)):
        value = line
        if line.startswith('"'):  # lines such as "I do not know." in quotes are JSON
            with suppress(ValueError):
                value = json.loads(line)
        found.append(value if value.strip() else line)
    if not found:
        raise DataError(f"{location} holds no refusals; write one a line")
    return list(dict.fromkeys(found))
