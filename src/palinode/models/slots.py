"""Many sequences in one key-value cache, each in a slot of its own, coming and going as they please.

A slot holds the keys and values of one sequence, from position 0 on; slots differ in length, so there is
no padding to keep, and what lies behind the end of a sequence is never seen. A sequence that ends is
replaced in its slot; what all sequences begin with is computed once and stays in every slot.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from palinode.models.alone import same_alone, unlike
from palinode.models.likelihoods import has_plain_head

GROWTH = 64
"""Positions by which the slots grow when a sequence needs more."""

TRIED = 3
"""Prompts on which a model is tried, at most."""


def slots_for(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int, longest: int, pad_id: int
) -> Slots | None:
    """Return slots for sequences that begin with one of the prompts, `longest` tokens at most.

    None where the architecture does not give the same log-probabilities in slots as in a plain row; it is
    tried on prompts of unlike length, the longest of them gone on with to `longest` tokens.
    """
    if not _may_use_slots(model, longest, prompts[0]):
        return None
    shared, probes = _common_beginning(prompts), trial_prompts(prompts, longest)

    def together() -> list[Tensor]:
        trial = Slots(model, len(probes), pad_id, shared=shared[: min(map(len, probes)) - 2])
        before = trial.admit([probe[:-1] for probe in probes])
        after = trial.step([probe[-1] for probe in probes])
        return [torch.stack(two).log_softmax(dim=-1) for two in zip(before, after, strict=True)]

    def alone(place: int) -> Tensor:
        return _last_logits(model, probes[place], 2).log_softmax(dim=-1)

    if not same_alone(model, "slots", [len(probe) for probe in probes], together, alone):
        return None
    return Slots(model, min(count, len(prompts)), pad_id, shared=shared)


def trial_prompts(prompts: Sequence[Sequence[int]], longest: int) -> list[tuple[int, ...]]:
    """Return prompts of unlike length with a token more, the first as long as any answer makes it.

    The last token of an answer is never read, so that is `longest` − 1 tokens.
    """
    most = max(longest - 1, 2)
    first, *others = (tuple(prompts[place]) for place in unlike([len(prompt) for prompt in prompts], TRIED))
    return [(first * most)[:most], *((*prompt, prompt[-1])[:most] for prompt in others)]


def _may_use_slots(model: PreTrainedModel, longest: int, ids: Sequence[int]) -> bool:
    """Return whether what is known of an architecture speaks for slots; a trial decides."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        (not isinstance(window, int) or longest <= window)
        and kinds <= {"full_attention", "sliding_attention"}
        and "position_ids" in inspect.signature(model.forward).parameters
        and has_plain_head(model, ids[:16])
    )


def _last_logits(model: PreTrainedModel, ids: Sequence[int], count: int) -> Tensor:
    """Return the logits after each of the last tokens of a plain row, [count, V]."""
    base: Any = model.base_model
    hidden = base(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden[0, -count:]).float()
    return logits


def _common_beginning(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return what all prompts begin with, less than the whole of any."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    columns = zip(*(prompt[:shortest] for prompt in prompts), strict=True)
    return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


class _Places:
    """Where the tokens of the current pass belong; the layers of a cache share it."""

    def __init__(self, count: int):
        self.count = count
        self.slots: Tensor = torch.empty(0)
        """Slot of each row of the pass, int64 [B]."""
        self.front = True
        """Whether these are the slots 0 to B − 1, whose contents need no copy."""
        self.positions: Tensor = torch.empty(0)
        """Position of each token in its sequence, int64 [B, T]."""
        self.length = 0
        """Positions that the pass can see."""


class _SlotLayer(DynamicLayer):
    """Keys and values of one layer: [slots, heads, positions, width], written where the pass says."""

    def __init__(self, places: _Places):
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = places

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, [B, heads, T, width]; return those that the rows can see."""
        if not self.is_initialized or self.length < self.places.length:
            self._grow(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return self._put(self.keys, key_states), self._put(self.values, value_states)

    def get_seq_length(self) -> int:
        """Return how many positions there are before the pass, at most."""
        return self.places.length

    @property
    def length(self) -> int:
        """Positions for which there is room."""
        return 0 if self.keys is None else self.keys.shape[2]

    def _put(self, stored: Tensor, states: Tensor) -> Tensor:
        places = self.places
        slots = places.slots[:, None]
        stored[slots, :, places.positions] = states.transpose(1, 2)
        if places.front:
            return stored[: states.shape[0], :, : places.length]
        return stored[places.slots, :, : places.length]

    def _grow(self, key_states: Tensor, value_states: Tensor) -> None:
        size = -(-self.places.length // GROWTH) * GROWTH
        old = (self.keys, self.values) if self.is_initialized else (None, None)
        grown = []
        for states, before in zip((key_states, value_states), old, strict=True):
            shape = (self.places.count, states.shape[1], size, states.shape[3])
            new = torch.zeros(shape, dtype=states.dtype, device=states.device)
            if before is not None:
                new[:, :, : before.shape[2]] = before
            grown.append(new)
        self.keys, self.values = grown
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True


class Slots:
    """A model with the sequences that it is continuing, in slots 0, 1, … without gaps."""

    def __init__(self, model: PreTrainedModel, count: int, pad_id: int, *, shared: Sequence[int] = ()):
        self.model, self.count, self.pad_id, self.shared = model, count, pad_id, tuple(shared)
        self.lengths: list[int] = []
        """Tokens read of the sequence in each slot in use."""
        self.places = _Places(count)
        depth = model.config.get_text_config().num_hidden_layers
        self.layers = [_SlotLayer(self.places) for _ in range(depth)]
        self.cache = Cache(layers=[*self.layers])
        if self.shared:
            self._run([0], [self.shared], begin=0)
            for stored in self._stored():
                stored[1:, :, : len(self.shared)] = stored[:1, :, : len(self.shared)]

    def admit(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Read sequences into free slots and return the logits after each, float32 [B, V].

        Every sequence must begin with `shared` and go on; equal ones are read once.
        """
        first: dict[tuple[int, ...], int] = {}
        begin = len(self.lengths)
        for number, sequence in enumerate(sequences):
            first.setdefault(tuple(sequence), number)
        slots = [begin + number for number in first.values()]
        after = self._run(slots, [row[len(self.shared) :] for row in first], begin=len(self.shared))
        order = {sequence: place for place, sequence in enumerate(first)}
        for number, sequence in enumerate(sequences):
            source = first[tuple(sequence)]
            if source != number:
                self._copy(begin + source, begin + number, len(sequence))
            self.lengths.append(len(sequence))
        return after[[order[tuple(sequence)] for sequence in sequences]]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one token more of each sequence and return the logits after it, float32 [B, V]."""
        after = self._run(list(range(len(tokens))), [(token,) for token in tokens], begin=self.lengths)
        self.lengths = [length + 1 for length in self.lengths]
        return after

    def leave(self, slot: int) -> None:
        """Free a slot; the sequence in the last one moves into it."""
        last = len(self.lengths) - 1
        if slot != last:
            self._copy(last, slot, self.lengths[last])
            self.lengths[slot] = self.lengths[last]
        self.lengths.pop()

    def _run(self, slots: Sequence[int], rows: Sequence[Sequence[int]], begin: int | Sequence[int]) -> Tensor:
        """Read rows of tokens into slots, from position `begin` on, and return the logits after each."""
        device, width = self.model.device, max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[self.pad_id] * (width - len(row))] for row in rows], device=device)
        begins = torch.tensor([begin] * len(rows) if isinstance(begin, int) else list(begin), device=device)
        # What pads a row lies behind its end, where nothing sees it until it is written over.
        positions = begins[:, None] + torch.arange(width, device=device)
        start = begin if isinstance(begin, int) else max(begin)
        self.places.slots, self.places.positions = torch.tensor(slots, device=device), positions
        self.places.front = list(slots) == list(range(len(slots)))
        self.places.length = start + width
        seen = torch.arange(start + width, device=device) <= positions[:, None, :, None]  # [B, 1, T, length]
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=device)
        base: Any = self.model.base_model
        hidden = base(
            input_ids=ids,
            attention_mask=mask.masked_fill_(~seen, torch.finfo(self.model.dtype).min),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        ends = torch.tensor([len(row) - 1 for row in rows], device=device)
        last = hidden[torch.arange(len(rows), device=device), ends]
        logits: Tensor = self.model.get_output_embeddings()(last).float()
        return logits

    def _copy(self, source: int, target: int, length: int) -> None:
        for stored in self._stored():
            stored[target, :, :length] = stored[source, :, :length]

    def _stored(self) -> list[Tensor]:
        """Return keys and values of every layer."""
        parts = (part for layer in self.layers for part in (layer.keys, layer.values))
        return [part for part in parts if part is not None]
