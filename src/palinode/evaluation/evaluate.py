"""The settings of an evaluation.

Ask a model about examples: likelihood of the given answers, and its own greedy ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from palinode.data.examples import Example, plain_questions
from palinode.data.tokenize import PromptStyle
from palinode.evaluation.ask import Asking, ask
from palinode.evaluation.self_check import check_prompts
from palinode.metrics import score_outcomes
from palinode.progress import Listener, NullListener
from palinode.records import Outcome, Score
from palinode.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def evaluate(
    checkpoint: Checkpoint,
    examples: Sequence[Example],
    settings: EvaluationSettings | None = None,
    *,
    style: PromptStyle | None = None,
    device: str = "auto",
    seed: int = 0,
    listener: Listener | None = None,
) -> tuple[list[Outcome], dict[str, Score]]:
    """Load a checkpoint, observe it on the examples, and return its outcomes and scores.

    Where it knows the examples far better when asked otherwise, the listener hears so. `seed` serves the
    bootstrap intervals; the answers are greedy.
    """
    from palinode.models.loading import load_model, load_tokenizer, pick_device
    from palinode.weights.fingerprints import unchanged

    length = (settings or EvaluationSettings()).max_length
    with unchanged([checkpoint]):
        model, tokenizer = load_model(checkpoint, device=pick_device(device)), load_tokenizer(checkpoint)
        found = check_prompts(model, tokenizer, examples, style=style or PromptStyle(), max_length=length)
        if note := found and found.note("model"):
            (listener or NullListener()).say(note)
        outcomes = observe(model, tokenizer, examples, settings, style=style, listener=listener)
    return outcomes, score_outcomes(outcomes, seed=seed)


def observe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: EvaluationSettings | None = None,
    *,
    style: PromptStyle | None = None,
    label: str = "evaluating",
    listener: Listener | None = None,
) -> list[Outcome]:
    """Return what a live model does on each example, in the order given."""
    settings = settings or EvaluationSettings()
    asking = Asking(
        max_new_tokens=settings.max_new_tokens,
        batch_rows=settings.batch_rows,
        max_length=settings.max_length,
    )
    questions = plain_questions(examples)
    return ask(model, tokenizer, questions, asking, style=style, label=label, listener=listener)
