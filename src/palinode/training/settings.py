"""The settings of a fine-tuning run; the defaults are the paper's (spec: msa.md §4)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class LoraSettings(_Settings):
    """Low-rank fine-tuning: the start stays frozen, and beside its linear layers s·B·A is trained."""

    rank: int = Field(ge=1)
    """r, columns of B and rows of A."""
    alpha: float | None = Field(default=None, gt=0)
    """s = alpha / rank; None: 2 · rank, so that s = 2."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a layer's inputs that its product does not see in a step."""
    targets: list[str] | None = Field(default=None, min_length=1)
    """Ends of the names of the layers, as in ["q_proj", "v_proj"]; None: every linear layer of the blocks."""
    base: Literal["float32", "bfloat16", "4bit"] = "float32"
    """How the frozen start is held while training; the product goes to the stored target in any case."""

    @property
    def scale(self) -> float:
        """Return s."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class TrainingSettings(_Settings):
    """How θ_1 and θ_2 are fine-tuned from the base checkpoint; both in the same way."""

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
    lora: LoraSettings | None = None
    """Train low-rank adapters instead of all weights (docs/lora.md)."""

    def key(self) -> dict[str, Any]:
        """Return what decides the result, as plain values for a fingerprint."""
        return self.model_dump(exclude={"save_minutes"} | ({"lora"} if self.lora is None else set()))
