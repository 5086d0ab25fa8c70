"""What a run minimises: a sum of terms, each the mean of a pure loss over the rows of some role.

    L = Σ_terms coefficient · Σ contributions / Σ weight        (both sums over the whole optimiser step)

A term reads its rows in one forward pass of their own and is differentiated by itself, so that the peak of
memory is that of the largest term. What the frozen model says of the rows is computed once, before training:
one number a row, or the hidden state that the output head makes a distribution from.

An epoch has one anchor after the other, in the order that plain fine-tuning would have them; rows of other
roles are joined to each. Which ones is drawn with the seed, the epoch, the role and the anchor, so that it
does not depend on batches, devices or interruptions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palinode.data.batches import Batch, pad_right
from palinode.data.examples import Example
from palinode.data.tokenize import PromptStyle, TokenRow, tokenize
from palinode.errors import DataError
from palinode.models.likelihoods import has_plain_head, padded_batches
from palinode.models.reading import answer_logits, answer_places, labelled_states, model_inputs, on_device
from palinode.training.losses import kl_to_reference, row_sums, scored_tokens, summed_nll, token_nll


class Keeper:
    """A kind of value of the frozen model: how a batch's rows are read, and how they are put together."""

    def __init__(self, read: Callable[[PreTrainedModel, Batch], Sequence[Tensor]]) -> None:
        self.read = read

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the values of several rows as one tensor."""
        return torch.cat(list(parts))


def likelihoods(model: PreTrainedModel, batch: Batch) -> Sequence[Tensor]:
    """Read summed −log p of each row's scored tokens, [1] each."""
    logits, labels, rows = answer_logits(model, batch)
    return list(row_sums(token_nll(logits.float(), labels), rows, len(batch.ids)).split(1))


def choices(model: PreTrainedModel, batch: Batch) -> Sequence[Tensor]:
    """Read the likeliest word at each scored token, [n] for each row."""
    logits, _, rows = answer_logits(model, batch)
    return _by_row(logits.argmax(-1), rows, batch)


def states_of(layer: int) -> Keeper:
    """Return what keeps the output of a decoder block at each scored token, [N, D]."""
    return Keeper(lambda model, batch: _by_row(*labelled_states(model, batch, layer), batch))


class Distributions(Keeper):
    """Logits that predict each scored token, [N, V]; with `everywhere`, each token but the first."""

    def __init__(self, *, everywhere: bool = False) -> None:
        super().__init__(self._states)
        self.everywhere = everywhere
        self.head: torch.nn.Module | None = None
        self.asked = False

    def _states(self, model: PreTrainedModel, batch: Batch) -> Sequence[Tensor]:
        """Return the hidden states of each row, or its logits where the model has no plain head."""
        if not self.asked:
            self.asked = True
            if has_plain_head(model, batch.ids[0][batch.mask[0] == 1][:16].tolist()):
                self.head = copy.deepcopy(model.get_output_embeddings())
        inputs = model_inputs(model, batch)
        whole = self.head is None
        values = model(**inputs).logits if whole else model.base_model(**inputs).last_hidden_state
        places = torch.from_numpy(answer_places(batch, everywhere=self.everywhere)).to(values.device)
        return [row[chosen] for row, chosen in zip(values, places, strict=True)]

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """Return [N, V]."""
        values = super().together(parts)
        return values if self.head is None else self.head(values)


def _by_row(values: Tensor, rows: Tensor, batch: Batch) -> Sequence[Tensor]:
    return list(values.split(torch.bincount(rows, minlength=len(batch.ids)).tolist()))


class FrozenValues:
    """Values of one kind by role and place."""

    def __init__(self, keeper: Keeper, values: Mapping[tuple[str, int], Tensor]) -> None:
        self.keeper = keeper
        self.values = values

    def of(self, members: Sequence[tuple[str, int]], device: torch.device) -> Tensor:
        """Return the values of these rows as one tensor on a device."""
        with torch.no_grad():
            return self.keeper.together([on_device(self.values[member], device) for member in members])


@torch.no_grad()
def keep(
    keeper: Keeper,
    model: PreTrainedModel,
    rows: Mapping[tuple[str, int], TokenRow],
    *,
    pad_id: int,
    autocast: bool,
) -> FrozenValues:
    """Read rows with a model as it is now, in evaluation mode, and keep what it says on the processor."""
    places = list(rows)
    values: dict[tuple[str, int], Tensor] = {}
    training = model.training
    model.eval()
    for members in padded_batches(model, list(rows.values()), pad_id=pad_id, max_tokens=4096, max_rows=64):
        batch = pad_right([rows[places[member]] for member in members], pad_id=pad_id)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            read = keeper.read(model, batch)
        values.update(
            {places[member]: part.clone().cpu() for member, part in zip(members, read, strict=True)}
        )
    model.train(training)
    return FrozenValues(keeper, values)


CURVE = "training.json"
"""File in a fine-tuned folder that holds its curve."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One optimiser step of the training curve."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    terms: Mapping[str, float] = field(default_factory=dict)
    """The mean of each term before its coefficient, where the objective has named terms."""
    optimizer: str = "device"
    """Where AdamW held what it needed (`training.optimizer`), which may change when memory runs out."""

    def figures(self) -> dict[str, float]:
        """Return what was measured in this step, by name."""
        terms = {f"loss_{name}": value for name, value in self.terms.items()}
        measured = {"loss": self.loss, "learning_rate": self.learning_rate, "gradient_norm": self.grad_norm}
        return {**measured, **terms}


Coefficient = Callable[[Sequence[CurvePoint], int], float]
"""(curve so far, steps of an epoch) → the coefficient of a term in the next step."""

Total = Callable[[PreTrainedModel, Batch, Tensor | None], Tensor]
"""(model, batch, the frozen model's values of its rows) → the sum of a term's contributions."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a loss sees of a batch: N scored tokens of `count` rows, one role after the other."""

    logits: Tensor
    """[N, V], float32, each predicting a scored token."""
    labels: Tensor
    """[N]."""
    rows: Tensor
    """[N], the row that each token belongs to."""
    count: int
    frozen: Tensor | None
    """What the term's keeper kept of the model at the start."""

    @property
    def reference(self) -> Tensor:
        """The frozen values, for losses that cannot do without."""
        assert self.frozen is not None
        return self.frozen.float()


@dataclass(frozen=True, slots=True)
class Term:
    """One part of an objective."""

    name: str
    roles: tuple[str, ...]
    """Whose rows it reads, put one role after the other into one batch."""
    total: Total
    weight: Callable[[Batch], float]
    """The number of contributions of a batch."""
    coefficient: float | Coefficient = 1.0
    keeper: Callable[[PreTrainedModel], Keeper] | None = None
    """Makes what keeps the values of the frozen model that the loss needs."""


@dataclass(frozen=True, slots=True)
class Limit:
    """When a term that sinks without bound has sunk far enough."""

    term: str
    nll: float | None
    """Nats a token; None: ln V, the loss of a model that knows nothing."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a run minimises."""

    terms: tuple[Term, ...]
    anchor: str = "forget"
    """The role whose rows an epoch goes through."""
    limit: Limit | None = None
    """Ends training early."""
    trainable: str | None = None
    """Pattern that the whole name of a parameter matches if it is trained; None: all are."""

    @property
    def roles(self) -> frozenset[str]:
        """All roles that rows are needed for."""
        return frozenset({self.anchor, *self.reads})

    @property
    def reads(self) -> tuple[str, ...]:
        """The roles whose rows are sent through the model, once for each term that reads them."""
        return tuple(role for term in self.terms for role in term.roles)


def term(
    name: str,
    roles: tuple[str, ...],
    loss: Callable[[Seen], Tensor],
    *,
    per: Literal["token", "row", "pair"],
    coefficient: float | Coefficient = 1.0,
    keeper: Callable[[PreTrainedModel], Keeper] | None = None,
) -> Term:
    """Return a term whose loss gives one contribution a scored token, a row, or a pair of rows."""

    def total(model: PreTrainedModel, batch: Batch, frozen: Tensor | None) -> Tensor:
        logits, labels, rows = answer_logits(model, batch)
        with torch.autocast(logits.device.type, enabled=False):
            return loss(Seen(logits.float(), labels, rows, len(batch.ids), frozen)).sum()

    return Term(name, roles, total, _WEIGHTS[per], coefficient, keeper)


def answer_term(name: str, *roles: str, coefficient: float | Coefficient = 1.0) -> Term:
    """Return CE = Σ nll / Σ n over the answers of these roles, one token mean (spec: baselines.md §0)."""
    return Term(name, roles, lambda model, batch, _: summed_nll(model, batch), scored_tokens, coefficient)


PLAIN_OBJECTIVE = Objective((answer_term("answer", "rows"),), anchor="rows")
"""That of ordinary fine-tuning."""


def kl_term(name: str, *roles: str, coefficient: float | Coefficient = 1.0) -> Term:
    """Return the mean of KL(p_ref ‖ p_θ) over answer tokens, the reference being the model at the start."""
    return term(
        name,
        roles,
        lambda seen: kl_to_reference(seen.logits, seen.reference),
        per="token",
        coefficient=coefficient,
        keeper=lambda _model: Distributions(),
    )


def row_count(batch: Batch) -> float:
    """Return the number of rows of a batch."""
    return float(len(batch.ids))


def pair_count(batch: Batch) -> float:
    """Return the number of pairs of rows of a batch."""
    return len(batch.ids) / 2


_WEIGHTS = {"token": scored_tokens, "row": row_count, "pair": pair_count}


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of two roles' rows apart, in the order of the term's roles."""
    first, second = values.chunk(2)
    return first, second


# Rows by role

Draws = Sequence[Sequence[Sequence[int]]]
"""By epoch and anchor: the rows of one role that go with the anchor."""

_DRAWING = 1
"""Keeps these draws apart from those of the order of rows, which are seeded with (seed, epoch)."""


@dataclass(frozen=True, slots=True)
class Material:
    """Examples by role, and which of them may go with each anchor."""

    anchor: str
    """The role whose rows an epoch goes through."""
    examples: Mapping[str, Sequence[Example]]
    candidates: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    """For roles whose examples belong to an anchor (a refusal to its question): the positions of the examples
    that may go with each anchor, one of which is drawn. Of other roles any row may go with any anchor."""
    together: Mapping[str, int] = field(default_factory=dict)
    """For roles without candidates: how many rows are drawn for each anchor, if not one."""
    frozen: Callable[[Joined, int], Mapping[str, FrozenValues]] | None = None
    """Makes, from the rows and the padding id, what terms need of models other than the start, by term."""


@dataclass(frozen=True, slots=True)
class Joined:
    """Token rows by role, and those that go with each anchor in each epoch."""

    anchor: str
    rows: Mapping[str, Sequence[TokenRow]]
    draws: Mapping[str, Draws] = field(default_factory=dict)
    frozen: Mapping[str, FrozenValues] = field(default_factory=dict)
    """By term: what it needs of a model other than the start."""

    @property
    def anchors(self) -> Sequence[TokenRow]:
        """The rows that an epoch goes through."""
        return self.rows[self.anchor]

    def members(self, role: str, epoch: int, anchors: Sequence[int]) -> list[int]:
        """Return the places of the rows of a role that go with these anchors, anchor by anchor."""
        if role == self.anchor:
            return list(anchors)
        return [place for anchor in anchors for place in self.draws[role][epoch][anchor]]

    def used(self, role: str) -> list[int]:
        """Return the places of all rows of a role that the run will see."""
        if role == self.anchor:
            return list(range(len(self.anchors)))
        return sorted({place for epoch in self.draws[role] for drawn in epoch for place in drawn})

    def tokens(self, epoch: int, anchors: Sequence[int], roles: Iterable[str]) -> int:
        """Return the tokens of the rows of these roles that go with these anchors."""
        return sum(
            len(self.rows[role][place].ids) for role in roles for place in self.members(role, epoch, anchors)
        )


def plain(rows: Sequence[TokenRow]) -> Joined:
    """Return rows that have one role and go with nothing."""
    return Joined("rows", {"rows": rows})


def join(
    material: Material,
    tokenizer: PreTrainedTokenizerBase,
    *,
    epochs: int,
    seed: int,
    max_length: int,
    style: PromptStyle,
) -> Joined:
    """Tokenize examples by role and draw, for each epoch and anchor, rows of each other role.

    Of each role it is one row, of a free one as many as `material.together` says. Rows of a free role are
    drawn uniformly with replacement; of a role with candidates, one of the anchor's own. Raises DataError
    for a document where an answer has to go with another one.
    """
    bound = sorted(material.candidates)
    free = sorted(set(material.examples) - {material.anchor} - set(bound))

    def read(examples: Sequence[Example]) -> list[TokenRow]:
        return tokenize(examples, tokenizer, max_length=max_length, style=style)

    if bound:
        _need_answers(material)
    rows = {role: read(material.examples[role]) for role in (material.anchor, *free)}
    count = len(rows[material.anchor])
    drawing, number = partial(draw, epochs=epochs, seed=seed), material.together
    draws: dict[str, Draws] = {
        role: drawing([range(len(rows[role]))] * count, role, together=number.get(role, 1)) for role in free
    }
    for role in bound:
        drawn = drawing(material.candidates[role], role)
        used = sorted({place for epoch in drawn for group in epoch for place in group})
        place_of = {place: new for new, place in enumerate(used)}
        found = read([material.examples[role][place] for place in used])
        rows[role] = [replace(row, example=used[row.example]) for row in found]
        draws[role] = [[tuple(place_of[place] for place in group) for group in epoch] for epoch in drawn]
    return Joined(material.anchor, rows, draws)


def draw(
    candidates: Sequence[Sequence[int]], role: str, *, epochs: int, seed: int, together: int = 1
) -> Draws:
    """Return `together` candidates of each anchor for each epoch, uniformly and with replacement.

    The first ones drawn are the same however many follow.
    """
    drawn = []
    for epoch in range(epochs):
        random = np.random.Generator(np.random.PCG64([seed, epoch, _DRAWING, *role.encode()]))
        pairs = zip(candidates, random.random((together, len(candidates))).T.tolist(), strict=True)
        drawn.append([tuple(own[int(share * len(own))] for share in row) for own, row in pairs])
    return drawn


def _need_answers(material: Material) -> None:
    """Refuse documents, whose pieces answer nothing and can have no other answer."""
    examples = [
        example
        for role in (material.anchor, *material.candidates)
        for example in material.examples[role]
        if example.form == "document"
    ]
    if examples:
        raise DataError(
            f"{examples[0].place} is a document, and this method needs another answer to a question; "
            "give rows with question and answer, prompt and completion, or messages"
        )
