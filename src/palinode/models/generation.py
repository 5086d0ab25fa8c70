"""The model's own answers: greedy, or drawn at random so that each draw is the row's own affair.

Rows share a batch as slots of one key-value cache. A slot holds the keys and values of one sequence, from
position 0 on; slots differ in length, so there is no padding to keep, and what lies behind the end of a
sequence is never seen. A finished row leaves its slot at once and the next prompt takes it, so that no step
is spent on answers that are over; what all prompts begin with, and a prompt that is answered several times,
is read once. Where an architecture cannot be run so, the rows go through `model.generate`, padded on the
left, and where padding changes them, one by one.

One answer can also be had as it comes, for somebody who reads along: greedy, and token by token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicLayer

from palinode.data.batches import budget_batches, pad_left
from palinode.data.sources import Form
from palinode.data.tokenize import PromptStyle, end_id
from palinode.errors import DataError
from palinode.models.likelihoods import Say, has_plain_head, same_alone, tell, unlike
from palinode.models.loading import check_known, pad_token, position_limit
from palinode.models.reading import on_device
from palinode.processes import divided
from palinode.weights.foreign import quiet_transformers

GROWTH = 64
"""Positions by which the slots grow when a sequence needs more."""

TRIED_PROMPTS = 3
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
        base, ids = model.base_model, torch.tensor([probes[place]], device=model.device)
        hidden = base(input_ids=ids, use_cache=False).last_hidden_state
        logits: Tensor = model.get_output_embeddings()(hidden[0, -2:])
        return logits.float().log_softmax(dim=-1)

    if not same_alone(model, "slots", [len(probe) for probe in probes], together, alone):
        return None
    return Slots(model, min(count, len(prompts)), pad_id, shared=shared)


def trial_prompts(prompts: Sequence[Sequence[int]], longest: int) -> list[tuple[int, ...]]:
    """Return prompts of unlike length with a token more, the first as long as any answer makes it.

    The last token of an answer is never read, so that is `longest` − 1 tokens.
    """
    most = max(longest - 1, 2)
    first, *others = (
        tuple(prompts[place]) for place in unlike([len(prompt) for prompt in prompts], TRIED_PROMPTS)
    )
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
        after: list[Tensor] = []

        def keep(logits: Tensor, _ahead: int) -> Tensor:
            after.append(logits)
            return logits.argmax(dim=-1)

        self.go_on(tokens, keep, 1)
        return after[0]

    def go_on(
        self, tokens: Sequence[int], choose: Callable[[Tensor, int], Tensor], count: int
    ) -> list[list[int]]:
        """Read `count` tokens more of each sequence: those given, then what `choose` makes of the logits.

        It is called with float32 [B, V] and how often it was before, and gives int64 [B]. What it chose comes
        from the device at the end.
        """
        device, chosen = self.model.device, []
        ids, begins = (on_device(np.array(part, np.int64), device) for part in (tokens, self.lengths))
        slots = torch.arange(len(tokens), device=device)
        for ahead in range(count):
            start = max(self.lengths) + ahead
            hidden = self._read(slots, ids[:, None], begins + ahead, start, front=True)
            ids = choose(self._logits(hidden[:, 0]), ahead)
            chosen.append(ids)
        self.lengths = [length + count for length in self.lengths]
        found: list[list[int]] = torch.stack(chosen, dim=1).tolist()
        return found

    def leave(self, slot: int) -> None:
        """Free a slot; the sequence in the last one moves into it."""
        last = len(self.lengths) - 1
        if slot != last:
            self._copy(last, slot, self.lengths[last])
            self.lengths[slot] = self.lengths[last]
        self.lengths.pop()

    def _run(self, slots: Sequence[int], rows: Sequence[Sequence[int]], begin: int) -> Tensor:
        """Read rows of tokens into slots, from position `begin` on, and return the logits after each."""
        device, width = self.model.device, max(len(row) for row in rows)
        # What pads a row lies behind its end, where nothing sees it until it is written over.
        ids = np.array([[*row, *[self.pad_id] * (width - len(row))] for row in rows], np.int64)
        ends = np.array([len(row) - 1 for row in rows])
        given, own, last = (on_device(part, device) for part in (ids, np.array(slots, np.int64), ends))
        begins, front = torch.full_like(own, begin), list(slots) == list(range(len(slots)))
        hidden = self._read(own, given, begins, begin, front=front)
        return self._logits(hidden[torch.arange(len(rows), device=device), last])

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden).float()
        return logits

    def _read(self, slots: Tensor, ids: Tensor, begins: Tensor, start: int, *, front: bool) -> Tensor:
        """Return the hidden states of tokens [B, T] read from positions `begins` on, none beyond `start`.

        `front` tells that the slots are the first ones.
        """
        device, width = self.model.device, ids.shape[1]
        positions = begins[:, None] + torch.arange(width, device=device)
        self.places.slots, self.places.positions, self.places.front = slots, positions, front
        self.places.length = start + width
        seen = torch.arange(start + width, device=device) <= positions[:, None, :, None]  # [B, 1, T, length]
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=device)
        base: Any = self.model.base_model
        hidden: Tensor = base(
            input_ids=ids,
            attention_mask=mask.masked_fill_(~seen, torch.finfo(self.model.dtype).min),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden

    def _copy(self, source: int, target: int, length: int) -> None:
        for stored in self._stored():
            stored[target, :, :length] = stored[source, :, :length]

    def _stored(self) -> list[Tensor]:
        """Return keys and values of every layer."""
        parts = (part for layer in self.layers for part in (layer.keys, layer.values))
        return [part for part in parts if part is not None]


AHEAD = {"cuda": 8}
"""By device, where it is more than one: tokens of each answer before the host looks whether it is over. What
comes after its end is thrown away."""

TRIAL_STEPS = 3
"""Tokens after each prompt on which a left-padded batch is tried."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn at random."""

    temperature: float
    """Divides the logits."""
    top_p: float
    """Draw among the likeliest tokens that together have this probability."""
    seeds: Sequence[int]
    """One for each prompt: with the prompt it fixes the answer, whatever else is drawn."""


@dataclass(slots=True)
class _Answer:
    """An answer on its way."""

    prompt: tuple[int, ...]
    room: int
    """Tokens that it may have."""
    known: Sequence[int] = ()
    """Tokens known to be its first."""
    said: list[int] = field(default_factory=list)
    over: bool = False
    random: np.random.Generator | None = None


@dataclass(frozen=True, slots=True)
class _Rules:
    """When an answer ends, and how its tokens are chosen."""

    stop_ids: frozenset[int]
    min_new_tokens: int
    ended: Callable[[Sequence[int]], bool] | None
    sampling: Sampling | None

    def take(self, answer: _Answer, token: int) -> None:
        """Add a token to an answer, or end it there."""
        if token in self.stop_ids:
            answer.over = True
            return
        answer.said.append(token)
        full = len(answer.said) >= answer.room
        ended = self.ended is not None and len(answer.said) >= self.min_new_tokens and self.ended(answer.said)
        answer.over = full or ended

    def begin(self, answer: _Answer) -> None:
        """Give an answer the tokens that are known to be its first."""
        for token in answer.known:
            early = token in self.stop_ids and len(answer.said) < self.min_new_tokens
            if answer.over or early:
                return
            self.take(answer, token)

    def go_on(self, answers: Sequence[_Answer], logits: Tensor) -> list[int]:
        """Choose the next token of each answer, give it to those that are not over, and return all."""
        chosen: list[int] = self.choose(answers, logits).tolist()
        for answer, token in zip(answers, chosen, strict=True):
            if not answer.over:
                self.take(answer, token)
        return chosen

    def choose(self, answers: Sequence[_Answer], logits: Tensor, ahead: int = 0) -> Tensor:
        """Return the next token of each answer, int64 [B], where so many are chosen that it lacks as yet."""
        young = [row for row, one in enumerate(answers) if len(one.said) + ahead < self.min_new_tokens]
        stops = sorted(token for token in self.stop_ids if token < logits.shape[-1])
        if young and stops:
            logits = logits.clone()
            rows, columns = (on_device(np.array(part), logits.device) for part in (young, stops))
            logits[rows[:, None], columns] = -torch.inf
        if self.sampling is None:
            return logits.argmax(dim=-1)
        draws = [answer.random.random() for answer in answers if answer.random is not None]
        return draw_tokens(logits, draws, self.sampling.temperature, self.sampling.top_p)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    min_new_tokens: int = 0,
    batch_rows: int = 32,
    begun: Sequence[Sequence[int]] | None = None,
    sampling: Sampling | None = None,
    ended: Callable[[Sequence[int]], bool] | None = None,
    on_progress: Callable[[int], None] | None = None,
    say: Say | None = None,
) -> list[list[int]]:
    """Return the continuation of each prompt, without its stop token, in the order given.

    Greedy, or drawn as `sampling` says. `begun` are tokens known to be the first of each answer, a stop
    token at their end included; `ended` tells from an answer's tokens whether it is over. An answer also
    ends where the model's positions end. `say` hears where prompts go one by one; what they begin with is
    then left to the model. Raises DataError for a prompt longer than its positions.
    """
    rules = _Rules(frozenset(stop_ids), min_new_tokens, ended, sampling)
    answers = [_Answer(tuple(prompt), _room(model, prompt, max_new_tokens)) for prompt in prompts]
    for place, answer in enumerate(answers):
        if sampling:
            answer.random = np.random.Generator(np.random.PCG64(sampling.seeds[place]))
        if begun:
            answer.known = begun[place]
    return _answered(
        model, answers, rules=rules, pad_id=pad_id, batch_rows=batch_rows, on_progress=on_progress, say=say
    )


@divided
@torch.inference_mode()
def _answered(
    model: PreTrainedModel,
    answers: Sequence[_Answer],
    *,
    rules: _Rules,
    pad_id: int,
    batch_rows: int,
    on_progress: Callable[[int], None] | None = None,
    say: Say | None = None,
) -> list[list[int]]:
    """Return the tokens of each answer, once it is over."""
    if not answers:
        return []
    prompts = [answer.prompt for answer in answers]
    longest = max(len(answer.prompt) + answer.room for answer in answers)
    slots = slots_for(model, prompts, batch_rows, longest, pad_id) if len(prompts) > 1 else None
    apart = not slots and not _may_be_padded(model, prompts, longest, pad_id)
    if apart:
        tell(model, "answers", say)
    else:
        for answer in answers:
            rules.begin(answer)
    open_answers = [answer for answer in answers if not answer.over]
    report = on_progress or (lambda _count: None)
    if len(open_answers) < len(answers):
        report(len(answers) - len(open_answers))
    if slots:
        _answer_in_slots(slots, open_answers, rules, report)
    elif open_answers:
        _answer_in_batches(model, open_answers, rules, pad_id, 1 if apart else batch_rows, report)
    return [answer.said for answer in answers]


def _may_be_padded(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], longest: int, pad_id: int
) -> bool:
    """Return whether prompts of unlike length, padded on the left, are gone on with as each is alone."""
    if len(prompts) < 2:
        return True
    probes = [probe[: max(1, longest - TRIAL_STEPS)] for probe in trial_prompts(prompts, longest)]

    def heard(rows: Sequence[Sequence[int]]) -> list[Tensor]:
        said = list[Tensor]()

        def listen(scores: Tensor) -> list[int]:
            said.append(scores.float().log_softmax(dim=-1))
            return [row[0] for row in rows]  # it goes on with one token again and again

        _run(model, rows, listen, [], TRIAL_STEPS, pad_id)
        return list(torch.stack(said, dim=1))

    lengths = [len(probe) for probe in probes]
    return same_alone(
        model, "padded on the left", lengths, lambda: heard(probes), lambda place: heard([probes[place]])[0]
    )


def draw_tokens(logits: Tensor, draws: Sequence[float], temperature: float, top_p: float) -> Tensor:
    """Return one token a row, int64 [B]: where its draw falls in the row's cumulative probability.

    Draws are uniform in [0, 1). Probabilities are float32; they are summed in the order of the vocabulary, in
    float64, over the likeliest tokens that together have at least `top_p`.
    """
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        unlikely = ordered.cumsum(dim=-1) - ordered >= top_p  # what stands before it is already enough
        probabilities = probabilities.masked_fill(unlikely.scatter(-1, order, unlikely), 0.0)
    reached = probabilities.double().cumsum(dim=-1)
    wanted = on_device(np.array(draws), reached.device)[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, wanted, right=True)[:, 0]


def _room(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int) -> int:
    """Return how many tokens an answer may have; the last one is said and never read."""
    limit = position_limit(model.config)
    if limit is None:
        return max_new_tokens
    if len(prompt) > limit:
        raise DataError(
            f"a prompt has {len(prompt)} tokens and the model takes at most {limit}; shorten or drop it"
        )
    return min(max_new_tokens, limit + 1 - len(prompt))


def _answer_in_slots(
    slots: Slots, answers: Sequence[_Answer], rules: _Rules, report: Callable[[int], None]
) -> None:
    """Finish all answers, as many at a time as there are slots."""
    waiting = sorted(answers, key=lambda answer: (len(answer.prompt), answer.prompt))
    active: list[_Answer] = []
    while waiting or active:
        free = slots.count - len(active)
        if waiting and (not active or free * 4 >= slots.count):
            new = [waiting.pop() for _ in range(min(free, len(waiting)))]
            logits = slots.admit([(*answer.prompt, *answer.said) for answer in new])
            active += new
            said = rules.choose(new, logits)[:, None].tolist()
        else:
            new = active
            last = [answer.said[-1] for answer in active]
            most = AHEAD.get(slots.model.device.type, 1)
            if limit := position_limit(slots.model.config):
                most = max(1, min(most, limit - max(slots.lengths)))
            said = slots.go_on(last, partial(rules.choose, active), most)
        for answer, tokens in zip(new, said, strict=True):
            for token in tokens:
                if not answer.over:
                    rules.take(answer, token)
        over = [place for place, answer in enumerate(active) if answer.over]
        for place in reversed(over):  # the last one moves into the slot that is free
            slots.leave(place)
            active[place] = active[-1]
            active.pop()
        if over:
            report(len(over))


def _answer_in_batches(
    model: PreTrainedModel,
    answers: Sequence[_Answer],
    rules: _Rules,
    pad_id: int,
    batch_rows: int,
    report: Callable[[int], None],
) -> None:
    """Finish all answers with `model.generate`, in batches of like length."""
    lengths = [len(answer.prompt) + len(answer.said) for answer in answers]
    limit = position_limit(model.config)
    for places in budget_batches(lengths, max_tokens=batch_rows * max(lengths), max_rows=batch_rows):
        members = [answers[place] for place in places]
        while members:  # once, unless padding took positions that a shorter prompt still needs
            begun = [(*answer.prompt, *answer.said) for answer in members]
            room = max(answer.room - len(answer.said) for answer in members)
            room = room if limit is None else min(room, limit + 1 - max(map(len, begun)))
            _run(model, begun, partial(rules.go_on, members), members, room, pad_id)
            members = [answer for answer in members if not answer.over]
        report(len(places))


def _run(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    choose: Callable[[Tensor], Sequence[int]],
    answers: Sequence[_Answer],
    most: int,
    pad_id: int,
) -> None:
    """Go on with rows, padded on the left, by `model.generate`; `choose` makes the next tokens of logits.

    It ends when the answers, if there are any, are over. The model's own generation config is put aside: its
    beams and penalties would enter any other.
    """

    def forced(_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.tensor(choose(scores), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)

    def ended(ids: Tensor, _scores: Tensor, **_: object) -> Tensor:
        return torch.tensor([answer.over for answer in answers], device=ids.device)

    ids, mask = (torch.from_numpy(part).to(model.device) for part in pad_left(rows, pad_id=pad_id))
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=most, pad_token_id=pad_id, eos_token_id=None, bos_token_id=None
    )
    try:
        with quiet_transformers():
            model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([forced]),
                stopping_criteria=StoppingCriteriaList([ended] if answers else []),
            )
    finally:
        model.generation_config = own


def stops_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, forms: Iterable[Form], style: PromptStyle
) -> list[int]:
    """Return the ids that end answers: what ends the rows, and the special tokens that the model names.

    Some models end a turn with what begins the next, such as `<|user|>`.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = [token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)]
    own = {tokenizer.eos_token_id, *(token for token in ids if token in tokenizer.added_tokens_decoder)}
    return sorted({end_id(form, tokenizer, style) for form in forms} | own - {None})


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    on_text: Callable[[str], None],
) -> str:
    """Return the model's greedy answer; `on_text` hears its parts as they come.

    Ctrl-C ends the answer where it is. Raises DataError when the prompt leaves no room in the model.
    """
    limit = position_limit(model.config)
    if limit is not None and len(prompt) > limit:
        raise DataError(
            f"the conversation has {len(prompt)} tokens and the model takes at most {limit}; begin a new one"
        )
    check_known(model.config, max(prompt), tokenizer)
    spoken, pad, most = Spoken(tokenizer, on_text), pad_token(tokenizer), max_new_tokens
    with suppress(KeyboardInterrupt):
        generate(model, [prompt], pad_id=pad, stop_ids=stop_ids, max_new_tokens=most, ended=spoken.hear)
    spoken.hear(spoken.ids, final=True)
    return spoken.text


class Spoken:
    """Turns the tokens of an answer into text as they come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: Sequence[int] = ()
        self.text = ""

    def hear(self, ids: Sequence[int], *, final: bool = False) -> bool:
        """Say what is new in the text of all tokens so far, which is never over: return False."""
        self.ids = list(ids)
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if final or not text.endswith("\ufffd"):  # of a letter whose last byte is still to come
            if len(text) > len(self.text):
                self.on_text(text[len(self.text) :])
            self.text = text
        return False
