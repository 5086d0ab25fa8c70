"""What a method is: a line for the list, what it needs, its own settings, and what it minimises.

Nothing heavy is imported here; an objective is built when a run asks for it.

Which rows an objective is given: forget and retain rows, refusals, other answers, by their roles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from palinode.data.examples import Example
from palinode.errors import DataError
from palinode.records import read_bytes
from palinode.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from palinode.training.objectives import Objective
    from palinode.training.roles import Material

Kind = Literal["arithmetic", "training", "inference"]
"""Weights added up; weights trained; or two models read together, with no weights of its own."""

Need = Literal["retain", "refusals", "base", "frozen_target", "alternates"]
"""Retain rows, refusal lines, an earlier checkpoint, values of the frozen target (which are kept, so no
second model is held), or other answers that the target is asked for first."""


class MethodSettings(BaseModel):
    """A method's own hyper-parameters; this method has none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @property
    def retain_free(self) -> bool:
        """Whether, so set, a method that needs retain rows does without."""
        return False

    def sample_size(self, forget_rows: int) -> int:
        """Return how many retain rows a retain sample has, for so many forget rows."""
        return forget_rows

    @property
    def from_base(self) -> bool:
        """Whether training starts at the base, and the target is given the change that it makes there."""
        return False


class StartSettings(MethodSettings):
    """Where a method that trains with a forget loss starts."""

    start: Literal["target", "base"] = "target"
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


def start_from_target(target: Checkpoint, base: Checkpoint | None) -> Checkpoint:  # noqa: ARG001
    """Return the target."""
    return target


@dataclass(frozen=True, slots=True)
class Method:
    """A method of unlearning."""

    name: str
    summary: str
    source: str = ""
    """Paper, by arXiv number where it has one."""
    formula: str = ""
    """One line."""
    kind: Kind = "arithmetic"
    needs: frozenset[Need] = frozenset()
    settings: type[MethodSettings] = MethodSettings
    start: Callable[[Checkpoint, Any], Checkpoint] = start_from_target
    """(target, base) → the checkpoint that is trained, to the unlearned model or to the ends of vectors."""
    objective: Callable[[Any, int], Objective] | None = None
    """(settings, seed) → what training minimises; None where the method is arithmetic."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Training settings that its source sets otherwise than ours; a recipe's own come before them."""

    def check_settings(self, given: Mapping[str, Any]) -> MethodSettings:
        """Return the method's settings with its defaults filled in; raises pydantic's ValidationError."""
        return self.settings.model_validate(dict(given))

    def start_of(self, settings: MethodSettings, target: Checkpoint, base: Checkpoint | None) -> Checkpoint:
        """Return the checkpoint that is trained with these settings."""
        if settings.from_base:
            assert base is not None  # `lacks` has seen to it
            return base
        return self.start(target, base)

    def lacks(self, settings: MethodSettings, *, retain: bool, refusals: bool, base: bool) -> str | None:
        """Say what is missing of what the method needs, and which option names it; None if nothing is."""
        missing = {
            "base": not base and "an earlier checkpoint of the target; name models.base (--base)",
            "retain": not (retain or settings.retain_free) and "retain rows; name data.retain (--retain)",
            "refusals": not refusals and "a file of refusals, one a line; name data.refusals (--refusals)",
        }
        needs = self.needs | ({"base"} if settings.from_base else set())
        found = [text for need, text in missing.items() if need in needs and text]
        started = ' with method_settings.start = "base"' if settings.from_base else ""
        return f"the method {self.name}{started} needs {found[0]}" if found else None


def gather(
    objective: Objective,
    *,
    forget: Sequence[Example],
    retain: Sequence[Example] = (),
    refusals: Sequence[str] = (),
    alternates: Sequence[tuple[int, str]] = (),
) -> Material:
    """Return the examples of the roles that an objective names, and which of them go together.

    A refusal may go with any forget question and becomes its answer; an alternate is (position of its
    forget example, text). Raises DataError for a role without examples.
    """
    from palinode.training.roles import Material

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


def read_refusals(location: str | Path) -> list[str]:
    """Return the refusals of a file: one a line, plain or as a JSON string. Raises DataError."""
    try:
        lines = read_bytes(Path(location).expanduser()).decode("utf-8-sig").splitlines()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"the refusals {location} cannot be read ({error}); name a text file") from None
    found = [_said(line.strip()) for line in lines if line.strip()]
    if not found:
        raise DataError(f"{location} holds no refusals; write one a line")
    return list(dict.fromkeys(found))


def _said(line: str) -> str:
    """Return what a line says; lines such as "I do not know." in quotes are JSON."""
    if not line.startswith('"'):
        return line
    try:
        value = json.loads(line)
    except ValueError:
        return line
    return value if isinstance(value, str) and value.strip() else line
