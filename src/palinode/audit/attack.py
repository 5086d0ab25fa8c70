"""What an attack is: a measurement of one model with a fixed budget, and how two of them are compared.

Every figure points the same way: higher means that the model knows more of the forget set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from palinode.audit.budget import Budget
    from palinode.audit.material import Material
    from palinode.audit.subject import Subject

Values = tuple[float | None, ...]
"""One value for each row, None where there is none."""

Groups = Mapping[str, Values]
"""Values of the forget rows, and for membership attacks of the holdout rows too, by set."""

Statistic = Literal["mean", "auc"]
"""How values become one figure: their mean over the forget rows, or the area under the ROC curve that
tells forget from holdout rows (1: forget rows are far likelier, 0.5: no difference)."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one attack found on one model; plain values, so that it can be kept and read back."""

    tests: Mapping[str, Groups]
    """Values by test."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Curves, counts and choices, for the record."""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Measurement:
        """Return the measurement that `as_json` wrote."""
        tests = {
            test: {name: tuple(values) for name, values in groups.items()}
            for test, groups in content["tests"].items()
        }
        return cls(tests, content["details"])


@dataclass(frozen=True, slots=True)
class Test:
    """One figure of an attack, and how far from the yardstick's it may lie."""

    __test__ = False  # not one of pytest's

    name: str
    title: str
    more: float | None
    """A figure above the yardstick's by more than this is knowledge left; None: not judged."""
    less: float | None
    """A figure below the yardstick's by more than this is over-forgetting; None: not judged."""
    missing: str
    """Why a row may have no value."""
    statistic: Statistic = "mean"
    relative: bool = False
    """Whether the yardstick's values are taken off first (the Reference attack)."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One kind of attack."""

    name: str
    title: str
    description: str
    """One line for readers."""
    tests: tuple[Test, ...]
    measure: Callable[[Subject, Material, Budget], Measurement]
    lacks: Callable[[Material, Budget], str | None] = lambda material, budget: None  # noqa: ARG005
    """Why it cannot be run on these rows; None when it can."""
