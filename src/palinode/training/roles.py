"""Rows by the role they play, and which of them go together in a step.

An epoch has one anchor after the other, in the order that plain fine-tuning would have them; rows of
other roles are joined to each. Which ones is drawn with the seed, the epoch, the role and the anchor, so
that it does not depend on batches, devices or interruptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from palinode.data.examples import Example
from palinode.data.tokenize import PromptStyle, TokenRow, tokenize
from palinode.errors import DataError

if TYPE_CHECKING:
    from palinode.training.objectives import FrozenValues

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
    draws: dict[str, Draws] = {
        role: draw(
            [range(len(rows[role]))] * count,
            role,
            epochs=epochs,
            seed=seed,
            together=material.together.get(role, 1),
        )
        for role in free
    }
    for role in bound:
        drawn = draw(material.candidates[role], role, epochs=epochs, seed=seed)
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
        shares = random.random((together, len(candidates))).T.tolist()
        drawn.append(
            [
                tuple(own[int(share * len(own))] for share in row)
                for own, row in zip(candidates, shares, strict=True)
            ]
        )
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
