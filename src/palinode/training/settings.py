"""The settings of a fine-tuning run; the defaults are the paper's (spec: msa.md §4)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainingSettings(BaseModel):
    """How θ_1 and θ_2 are fine-tuned from the base checkpoint; both in the same way."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    epochs: int = Field(default=10, ge=1)
    """Passes over the data."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW."""
    batch_size: int = Field(default=4, ge=1)
    """Rows in a micro-batch, on each device."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches that make one optimiser step."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """Epochs of linear warm-up; a linear decay to zero follows."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decay; not applied to biases and norms."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this are scaled down to it."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of a row, prompt included; longer answers are cut, documents split."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; weights, gradients and optimiser are float32 in any case."""
    save_minutes: float = Field(default=5.0, gt=0)
    """How often a resumable state is saved while training."""
