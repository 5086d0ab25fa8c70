"""The settings of an evaluation."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EvaluationSettings(BaseModel):
    """How models are asked and scored; the defaults follow the TOFU evaluation (spec: metrics.md §1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    max_rows: int = Field(default=400, ge=1)
    """Rows of each set that are evaluated; a larger set is sampled with the run's seed."""
    max_new_tokens: int = Field(default=200, ge=1)
    """Length limit of a generated answer."""
    batch_rows: int = Field(default=32, ge=1)
    """Prompts that are answered at a time."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of a row, prompt included, in likelihoods."""
