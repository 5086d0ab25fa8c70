"""What may be done to a forget vector before it is applied: a plain table, each with formula and source.

They are off unless a recipe names them in `[[transforms]]`, are applied in the order given, and change the
forget vector only. The rules are in weights/vectors.py, what they need of rows and models in training/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Need = Literal["retain", "inputs"]
"""Retain rows that a retain vector would see; rows whose inputs are to be spared."""


class TransformSettings(BaseModel):
    """A transform's own settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ProjectionSettings(TransformSettings):
    """How much of the retain rows' inputs is spared."""

    energy: float = Field(default=0.9, gt=0, le=1)
    """Share of the inputs' squared length that lies in the subspace."""
    at: Literal["target", "base"] = "target"
    """The model whose inputs they are."""
    rows: int = Field(default=256, ge=1)
    """Retain rows that are read, at most, of those that a retain vector would see."""
    others: Literal["keep", "drop"] = "keep"
    """What becomes of tensors that are no linear layer of a block: embeddings, norms."""


MU = 100.0
"""μ where it is not chosen."""
EPSILON_SHARE = 0.01
"""ε relative to μ: the λ of the soft filter that least squares comes to where nothing is forgotten."""


class LeastSquaresSettings(TransformSettings):
    """What is weighed against what, and which inputs count."""

    mu: float | None = Field(default=None, ge=0)
    """μ, how much the retain inputs count; None: chosen together with α, 100 where α is given."""
    epsilon: float | None = Field(default=None, ge=0)
    """ε, how much is kept where nothing is known, in units of tr Σ_f / D; None: μ / 100."""
    ridge: Literal["vector", "zero"] = "vector"
    """What is kept where nothing is known: the vector, or nothing."""
    energy: float = Field(default=0.9, ge=0, le=1)
    """Share of the retain inputs' squared length whose principal axes are left alone altogether; 0: none."""
    positions: Literal["all", "answers"] = "all"
    """Tokens whose inputs count: all, or those that predict tokens of answers."""
    rows: int = Field(default=1000, ge=1)
    """Rows of each set that are read, at most."""
    arrival: bool | None = None
    """Read the inputs once more where the model arrives, and filter the vector again; None: where held-back
    rows are better for it."""
    others: Literal["drop", "filter", "keep"] = "drop"
    """What becomes of tensors that are no linear layer of a block: they are taken out; or filtered, that is
    embeddings by the frequency of tokens, head, norms and biases by their own inputs; or left as they are."""

    @property
    def is_open(self) -> bool:
        """Whether μ is chosen with α."""
        return self.mu is None

    def weights(self) -> tuple[float, float]:
        """Return μ and ε, with their defaults filled in."""
        mu = MU if self.mu is None else self.mu
        return mu, EPSILON_SHARE * mu if self.epsilon is None else self.epsilon


class LowRankSettings(TransformSettings):
    """How much of each matrix is kept."""

    rank: int | None = Field(default=None, ge=1)
    """Singular values kept in each matrix."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """Or: the share of their squared sum."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("name a rank or an energy: one of the two")
        return self


class LayerScaleSettings(TransformSettings):
    """How strongly each part of the model moves."""

    scales: dict[str, float] = Field(min_length=1)
    """Pattern of a tensor's whole name → its scale; the first that matches counts, 1 where none does."""

    @field_validator("scales")
    @classmethod
    def _patterns(cls, scales: dict[str, float]) -> dict[str, float]:
        for pattern in scales:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no pattern ({error})") from None
        return scales


@dataclass(frozen=True, slots=True)
class Transform:
    """A rule that makes one direction of another."""

    name: str
    summary: str
    formula: str
    source: str
    settings: type[TransformSettings]
    needs: frozenset[Need] = frozenset()


TRANSFORMS: dict[str, Transform] = {
    entry.name: entry
    for entry in (
        Transform(
            "projection",
            "nothing that acts on the inputs which retain rows make",
            "τ (I − U Uᵀ), U the principal axes of each layer's inputs on retain rows",
            "gradient projection, arXiv 2103.09762",
            ProjectionSettings,
            frozenset({"retain"}),
        ),
        Transform(
            "least_squares",
            "what acts on the forget inputs, less what acts on the retain inputs",
            "τ (Σ_f + εI)(Σ_f + εI + μΣ_r)⁻¹(I − UUᵀ), Σ second moments of inputs, U main axes of Σ_r",
            "ours; docs/filters.md",
            LeastSquaresSettings,
            frozenset({"inputs"}),
        ),
        Transform(
            "low_rank",
            "each matrix as its best approximation of low rank",
            "Σ_{i ≤ r} σ_i u_i v_iᵀ",
            "truncated singular value decomposition",
            LowRankSettings,
        ),
        Transform(
            "layer_scales",
            "another strength for each part of the model",
            "s(name) · τ",
            "",
            LayerScaleSettings,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class ChosenTransforms:
    """A transform with its settings, as a recipe names it."""

    transform: Transform
    settings: Any


def check_transforms(given: Sequence[Mapping[str, Any]]) -> list[ChosenTransforms]:
    """Return the transforms that a recipe names, in order.

    Raises ValueError for a name that there is not, and pydantic's own for settings that cannot be.
    """
    chosen = []
    for entry in given:
        name = entry.get("name")
        if name not in TRANSFORMS:
            raise ValueError(f"there is no transform {name!r}; choose one of {', '.join(TRANSFORMS)}")
        transform = TRANSFORMS[name]
        own = {key: value for key, value in entry.items() if key != "name"}
        chosen.append(ChosenTransforms(transform, transform.settings.model_validate(own)))
    return chosen
