"""A policy: how far from the reference model a model may lie, and what the audit may spend. Strict TOML.

unclear = "fail"                    # a test that could not tell fails the audit too
require = ["membership"]            # attacks that must have been run

[budget]
preset = "quick"
samples = 16

[margins.questions.probability]
more = 0.05
less = false                        # that side is not judged
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator

from palinode.audit.attack import BUDGETS, AuditBudget
from palinode.audit.attacks import ATTACKS, tests_by_key
from palinode.errors import RecipeError
from palinode.records import dotted, packaged_table
from palinode.settings import StrictModel, read_settings

Kind = Literal["retrained", "base"]
"""What the reference model is: one retrained without the forget set, or the checkpoint before it was seen."""

Margin = Annotated[float, Field(ge=0)] | bool
"""How far a figure may lie from the reference model's on one side; false: that side is not judged."""


class Margins(StrictModel):
    """The margins of one test."""

    more: Margin
    less: Margin

    @field_validator("more", "less")
    @classmethod
    def _is_a_distance(cls, margin: Margin) -> Margin:
        if margin is True:
            raise ValueError("give a distance of 0 or more, or false for a side that is not judged")
        return margin

    @property
    def above(self) -> float | None:
        """The margin above the reference model, None where that side is not judged."""
        return None if self.more is False else self.more

    @property
    def below(self) -> float | None:
        """The margin below the reference model, None where that side is not judged."""
        return None if self.less is False else self.less


class Policy(StrictModel):
    """When an audit passes."""

    unclear: Literal["pass", "fail"] = "pass"
    """What a test that could not tell does to the audit."""
    require: list[str] = Field(default=[])
    """Attacks that must have been run; any other may be missing, and is named."""
    min_rows: int = Field(default=10, ge=2)
    """Rows with a value below which a test is unclear in any case."""
    preset: Literal["quick", "standard", "full"] = "standard"
    """The preset that the budget was made from."""
    budget: AuditBudget = AuditBudget()
    margins: dict[str, Margins] = Field(default={})
    """Margins of every test, by `attack.test`."""


class ToldRight(NamedTuple):
    """Of models that know the forget rows, how many a test failed; of models that never saw them, how few."""

    found: int
    knowing: int
    alarms: int
    never: int

    def __str__(self) -> str:
        """Return it in words."""
        return f"found {self.found} of {self.knowing}, {self.alarms} false alarms in {self.never}"


@cache
def told_right() -> Mapping[str, ToldRight]:
    """Return how often each test that judges whether a model knows more told right, by `attack.test`."""
    told = packaged_table("audit/told_right.toml")
    return {key: ToldRight(*counts) for key, counts in told.items()}


def load_policy(path: Path | None, *, preset: str | None = None, kind: Kind = "retrained") -> Policy:
    """Return the policy of a TOML file, or the built-in one; `preset` is laid under the file's budget.

    `kind` says what models are held against, which decides the margins that nobody has set.

    Raises RecipeError naming the key, and the nearest one that exists.
    """
    content = read_settings(path, "policy") if path else {}
    return build_policy(content, preset=preset, kind=kind)


def build_policy(
    content: Mapping[str, Any], *, preset: str | None = None, kind: Kind = "retrained"
) -> Policy:
    """Check plain nested values and return the policy they describe; raises RecipeError."""
    _check_keys(content)
    own = dict(content.get("budget", {}))
    named = own.pop("preset", None)
    chosen = preset or named or "standard"
    if chosen not in BUDGETS:
        raise RecipeError(f"there is no budget {chosen!r}; choose one of {', '.join(BUDGETS)}")
    margins, given = {}, content.get("margins", {})  # a test's own, or beside a base, under what is given
    for key, (attack, test) in tests_by_key().items():
        sides = {"more": test.more, "less": test.less}
        usual = {side: False if margin is None else margin for side, margin in sides.items()}
        if kind == "base":
            usual |= test.beside_base
        margins[key] = usual | given.get(attack.name, {}).get(test.name, {})
    try:
        return Policy.model_validate(
            {
                **{name: content[name] for name in ("unclear", "require", "min_rows") if name in content},
                "preset": chosen,
                "budget": BUDGETS[chosen].model_dump() | own,
                "margins": margins,
            }
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("constrained-float", "bool"))
        reason = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], Mapping) else f" ({first['input']!r} was given)"
        raise RecipeError(f"{key or 'the policy'} cannot be used: {reason}{got}") from None


def known_keys() -> list[str]:
    """Return every key a policy may have, dotted."""
    return [
        "unclear",
        "require",
        "min_rows",
        "budget",
        "budget.preset",
        *(f"budget.{name}" for name in AuditBudget.model_fields),
        "margins",
        *(f"margins.{name}" for name in ATTACKS),
        *(f"margins.{key}{side}" for key in tests_by_key() for side in ("", ".more", ".less")),
    ]


def _check_keys(content: Mapping[str, Any]) -> None:
    """Refuse a key that no policy has, a value where a section belongs, and an attack that does not exist."""
    known = known_keys()
    sections = {key for key in known if any(other.startswith(f"{key}.") for other in known)}
    for key, value in dotted(content):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise RecipeError(f"the policy has an unknown key {key!r}; did you mean {near[0]!r}?")
        if key in sections and not isinstance(value, Mapping):
            raise RecipeError(f"{key} is {value!r} in the policy; it must be a section, [{key}]")
    required = content.get("require", [])
    for name in required if isinstance(required, list) else []:
        if name not in ATTACKS:
            raise RecipeError(f"require names {name!r}; the attacks are {', '.join(ATTACKS)}")
