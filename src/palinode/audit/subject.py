"""A model under audit: asked as it is, or loaded afresh for an attack that changes its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palinode.audit.budget import Budget
from palinode.data.examples import Example
from palinode.data.questions import plain_questions
from palinode.data.tokenize import PromptStyle
from palinode.evaluation.ask import ask
from palinode.evaluation.asking import Asking
from palinode.models.loading import load_model
from palinode.progress import Listener, Silence
from palinode.records import Outcome
from palinode.weights.checkpoint import Checkpoint


class Subject:
    """One of the models of an audit. All are asked with the same tokenizer, style and seed."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device,
        style: PromptStyle | None = None,
        seed: int = 0,
        listener: Listener | None = None,
    ) -> None:
        self.name = name
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.device = device
        self.style = style or PromptStyle()
        self.seed = seed
        self.listener = listener or Silence()
        self._model: PreTrainedModel | None = None

    def fresh(self) -> PreTrainedModel:
        """Return the model read from disk anew; the caller may change its weights.

        The model that was held for asking is let go first, so that one is in memory at a time.
        """
        self.release()
        return load_model(self.checkpoint, device=self.device)

    def release(self) -> None:
        """Let go of the model that is held for asking."""
        self._model = None

    def ask(
        self,
        examples: Sequence[Example],
        asking: Asking,
        *,
        model: PreTrainedModel | None = None,
        label: str = "asking",
    ) -> list[Outcome]:
        """Return what the model, or the changed copy of it given, does on the rows."""
        if model is None:
            self._model = self._model or load_model(self.checkpoint, device=self.device)
            model = self._model
        return ask(
            model,
            self.tokenizer,
            plain_questions(examples),
            asking,
            style=self.style,
            label=f"{self.name}, {label}",
            listener=self.listener,
        )


def likelihoods_only(budget: Budget) -> Asking:
    """Return an asking for the likelihood of the answers, without any generated one."""
    return Asking(generate=False, max_length=budget.max_length, batch_rows=budget.batch_rows)
