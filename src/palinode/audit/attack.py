"""What an attack is: a measurement of one model within a fixed budget, and how two of them are compared.

Every figure points the same way: higher means that the model knows more of the forget set. The budget is
the same for every model of an audit, stated before it starts and kept in its record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import attrgetter
from typing import Any, Literal, Self

import torch
from pydantic import Field, TypeAdapter, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palinode.audit.material import AuditRows
from palinode.data.examples import Example, Question
from palinode.data.tokenize import PromptStyle
from palinode.evaluation.ask import ask
from palinode.models.loading import load_model
from palinode.progress import Listener, NullListener
from palinode.records import Outcome, packaged_table
from palinode.settings import Asking, EvaluationLimits
from palinode.weights.checkpoint import Checkpoint

Values = tuple[float | None, ...]
"""One value for each row, None where there is none."""

Groups = Mapping[str, Values]
"""Values by set of rows: one set, mostly the forget rows, and for an AUC two, members first."""

Statistic = Literal["mean", "auc"]
"""How values become one figure: their mean over the rows, or the area under the ROC curve that tells the
first set from the second (1: all of the first are lower, 0.5: no difference)."""


@dataclass(frozen=True, slots=True)
class AttackResult:
    """What one attack found on one model; plain values, so that it can be kept and read back.

    `asdict` makes JSON values of it.
    """

    tests: Mapping[str, Groups]
    """Values by test."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Curves, counts and choices, for the record."""


RESULT = TypeAdapter(AttackResult)
"""What makes a result of its JSON values."""


@dataclass(frozen=True, slots=True)
class AttackTest:
    """One figure of an attack, and how far from the reference model's it may lie."""

    __test__ = False  # not one of pytest's

    name: str
    title: str
    missing: str
    """Why a row may have no value."""
    more: float | None = None
    """A figure above the reference model's by more than this is knowledge left; None: not judged."""
    less: float | None = None
    """A figure below the reference model's by more than this is over-forgetting; None: not judged."""
    beside_base: Mapping[str, Any] = field(default_factory=dict)
    """Other margins where the reference model is a base."""
    statistic: Statistic = "mean"
    relative: bool = False
    """Whether the reference model's values are taken off first (the Reference attack)."""


@dataclass(frozen=True, slots=True)
class AttackCost:
    """What an attack takes on one model."""

    read: int = 0
    """Rows that go through a model, each time counted."""
    answers: int = 0
    """Answers that are generated."""
    trained: int = 0
    """Rows that go through it forwards and backwards."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One kind of attack."""

    name: str
    title: str
    description: str
    """One line for readers."""
    tests: tuple[AttackTest, ...]
    measure: Callable[[Subject, AuditRows, AuditBudget], AttackResult]
    cost: Callable[[AuditRows, AuditBudget], AttackCost]
    needs: Callable[[AuditRows], Sequence[Example]] = attrgetter("forget")
    """The rows without which it cannot be run."""
    lacking: str = ""
    """What to say where they are not there."""
    beside: tuple[str, ...] = ()
    """Other models of the audit that it cannot do without."""
    looks_at: tuple[str, ...] = ()
    """Other models that it reads too where they were named."""
    unavailable: Callable[[], str] = str
    """Why it cannot be run on this machine; empty where it can."""


class AuditBudget(EvaluationLimits):
    """The size of every attack. Attacks that are given more find more, so a result holds for its budget."""

    max_rows: int = Field(default=200, ge=2)
    """Rows of each set that are used; a larger set is sampled with the audit's seed."""
    max_new_tokens: int = Field(default=100, ge=1)
    relearn_steps: list[int] = Field(default=[0, 5, 10, 20, 40], min_length=2)
    """Optimiser steps after which a relearning curve is measured."""
    relearn_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate of relearning; it decays to zero over the steps."""
    relearn_batch: int = Field(default=8, ge=1)
    """Rows in a step of relearning."""
    quantise_group: int = Field(default=128, ge=1)
    """Weights along the input of a linear layer that share one scale."""
    samples: int = Field(default=8, ge=1)
    """Answers drawn for each question."""
    leak_k: int = Field(default=4, ge=1)
    """k of leak@k: how many of the drawn answers an attacker is taken to see."""
    leak_overlap: float = Field(default=0.9, gt=0, le=1)
    """ROUGE-L recall from which a drawn answer counts as leaked."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the drawn answers."""
    opening: str = Field(default="Sure, here is the answer:", min_length=1)
    """What the model is made to begin its answer with, in the prefix-forced questions."""
    demonstrations: int = Field(default=4, ge=1)
    """Retain rows that stand before a question in few-shot recovery."""
    inside_blocks: int = Field(default=8, ge=1)
    """Decoder blocks that are looked into, evenly spaced up to the last."""
    gradient_norms: bool = False
    """Whether the GradNorm membership attack is run: one backward pass a row."""

    @property
    def likelihoods(self) -> Asking:
        """How rows are asked for the likelihood of their answers alone, without any generated one."""
        return replace(self.asking, generate=False)

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        steps = self.relearn_steps
        if steps[0] != 0 or any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError(f"relearn_steps is {steps}; it must begin with 0 and rise")
        if self.leak_k > self.samples:
            raise ValueError(f"leak_k is {self.leak_k} and samples {self.samples}; draw at least k answers")
        return self


BUDGETS = {name: AuditBudget(**facts) for name, facts in packaged_table("audit/budgets.toml").items()}
"""Presets by name."""


@dataclass(slots=True)
class Subject:
    """One of the models of an audit. All are asked with the same tokenizer, style and seed."""

    name: str
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    style: PromptStyle = field(default_factory=PromptStyle)
    seed: int = 0
    beside: Mapping[str, Checkpoint] = field(default_factory=dict)
    listener: Listener = field(default_factory=NullListener)
    _model: PreTrainedModel | None = None

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
            [*map(Question, examples)],
            asking,
            style=self.style,
            label=f"{self.name}, {label}",
            listener=self.listener,
        )
