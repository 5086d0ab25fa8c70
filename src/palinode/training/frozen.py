"""What the model says before training begins: computed once and kept, so that no second model is held.

Values of rows never change while the reference is frozen. Log-likelihoods are one number a row; a whole
distribution is kept as the hidden state that the output head makes it from, with one copy of the head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palinode.data.batches import Batch, pad_right
from palinode.data.tokenize import TokenRow
from palinode.models.likelihoods import answer_logits, has_plain_head, padded_batches
from palinode.training.losses import row_sums, token_nll
from palinode.training.sums import answer_places, labelled_states

BATCH_TOKENS = 4096
"""Tokens of a batch whose values are computed together."""


class Keeper(Protocol):
    """A kind of value of the frozen model: how a batch's rows are read, and how they are put together."""

    def read(self, model: PreTrainedModel, batch: Batch) -> Sequence[Tensor]:
        """Return the values of each row of a batch."""

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the values of several rows as one tensor."""


class Likelihoods:
    """Summed −log p of each row's scored tokens, [B]."""

    def read(self, model: PreTrainedModel, batch: Batch) -> Sequence[Tensor]:
        """Return one number a row."""
        logits, labels, rows = answer_logits(model, batch)
        return list(row_sums(token_nll(logits.float(), labels), rows, len(batch.ids)))

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """Return [B]."""
        return torch.stack(list(parts))


class Distributions:
    """Logits that predict each scored token, [N, V]; with `everywhere`, each token but the first."""

    def __init__(self, *, everywhere: bool = False) -> None:
        self.everywhere = everywhere
        self.head: torch.nn.Module | None = None
        self.asked = False

    def read(self, model: PreTrainedModel, batch: Batch) -> Sequence[Tensor]:
        """Return the hidden states of each row, or its logits where the model has no plain head."""
        if not self.asked:
            self.asked = True
            if has_plain_head(model, batch.ids[0][batch.mask[0] == 1][:16].tolist()):
                self.head = copy.deepcopy(model.get_output_embeddings())
        ids, mask = (torch.from_numpy(part).to(model.device) for part in (batch.ids, batch.mask))
        if self.head is None:
            values = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        else:
            values = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        places = answer_places(batch, everywhere=self.everywhere)
        return [
            row[torch.from_numpy(chosen).to(row.device)] for row, chosen in zip(values, places, strict=True)
        ]

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """Return [N, V]."""
        values = torch.cat(list(parts))
        return values if self.head is None else self.head(values)


class FrozenStates:
    """Output of one decoder block at each scored token, [N, D]."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def read(self, model: PreTrainedModel, batch: Batch) -> Sequence[Tensor]:
        """Return [n, D] for each row."""
        states, rows = labelled_states(model, batch, self.layer)
        return list(states.split(torch.bincount(rows, minlength=len(batch.ids)).tolist()))

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """Return [N, D]."""
        return torch.cat(list(parts))


class Choices:
    """The likeliest word at each scored token, [N]."""

    def read(self, model: PreTrainedModel, batch: Batch) -> Sequence[Tensor]:
        """Return [n] for each row."""
        logits, _, rows = answer_logits(model, batch)
        numbers = torch.bincount(rows, minlength=len(batch.ids)).tolist()
        return list(logits.argmax(-1).split(numbers))

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """Return [N]."""
        return torch.cat(list(parts))


class FrozenValues:
    """Values of one kind by role and place."""

    def __init__(self, keeper: Keeper, values: Mapping[tuple[str, int], Tensor]) -> None:
        self.keeper = keeper
        self.values = values

    def of(self, members: Sequence[tuple[str, int]], device: torch.device) -> Tensor:
        """Return the values of these rows as one tensor on a device."""
        with torch.no_grad():
            return self.keeper.together([self.values[member].to(device) for member in members])


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
    for members in padded_batches(
        model, list(rows.values()), pad_id=pad_id, max_tokens=BATCH_TOKENS, max_rows=64
    ):
        batch = pad_right([rows[places[member]] for member in members], pad_id=pad_id)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            read = keeper.read(model, batch)
        values.update(
            {places[member]: part.clone().cpu() for member, part in zip(members, read, strict=True)}
        )
    model.train(training)
    return FrozenValues(keeper, values)
