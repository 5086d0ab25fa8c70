"""What to ask of a model: which figures and answers an evaluation needs. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from palinode.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Asking:
    """How a model is asked; the defaults follow the TOFU evaluation (spec: metrics.md §1).

    The likelihood of every given answer is always measured. Raises RecipeError for impossible values.
    """

    generate: bool = True
    """Whether the model gives its own greedy answer to each question."""
    max_new_tokens: int = 200
    """Length limit of an answer that the model gives."""
    stop_texts: tuple[str, ...] = ()
    """Texts that end an answer of the model; it is cut before the first of them."""
    standardise: bool = False
    """Whether to standardise the log-probabilities of the right answer over the vocabulary (Min-K++)."""
    gradient_norms: bool = False
    """Whether to measure the norm of the loss's gradient on each right answer (GradNorm)."""
    samples: int = 0
    """Answers drawn at random for each question."""
    temperature: float = 1.0
    """Divides the logits before sampling; greedy answers take no notice of it."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    min_new_tokens: int = 0
    """Tokens before which no answer of the model ends."""
    seed: int = 0
    """Seed of the samples; with the prompt and the sample's number it fixes each of them."""
    max_length: int = 512
    """Tokens of a row, prompt included, in likelihoods."""
    batch_rows: int = 32
    """Prompts that are answered at a time."""
    answer_prefix: str = ""
    """Text put at the beginning of the model's own answers, which they then continue."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise RecipeError(f"{name} is {value}; it must be at least {least}")
        if not self.temperature > 0:
            raise RecipeError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not all(self.stop_texts):
            raise RecipeError("stop_texts holds an empty text, which would end every answer; leave it out")
        if self.min_new_tokens > self.max_new_tokens:
            raise RecipeError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}; "
                "an answer cannot be longer than its limit"
            )


_LEAST = {"max_new_tokens": 1, "samples": 0, "min_new_tokens": 0, "max_length": 2, "batch_rows": 1}
