"""Greedy answers: plain argmax, whatever the batch and whatever the model's own generation config says."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from palinode.data.tokenize import PromptStyle
from palinode.errors import DataError
from palinode.models import generate, generation, load_model, load_tokenizer
from palinode.models.generation import Sampling, draw_tokens, slots_for, stops_of
from waiting import waits_of

PROMPTS = [[5], [6, 7, 8, 9, 10, 11, 12], [13, 14, 15], [16, 17], [20, 21, 22, 23, 24]]
EOS = 1


@pytest.fixture
def model(tiny):
    return load_model(tiny.target, device=torch.device("cpu"))


@torch.no_grad()
def by_hand(model, prompt: list[int], count: int) -> list[int]:
    """Append the likeliest token, again and again, from the whole sequence each time."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == EOS:
            break
        ids.append(token)
    return ids[len(prompt) :]


def answers(model, prompts=PROMPTS, **changes):
    return generate(model, prompts, **{"pad_id": 0, "stop_ids": [EOS], "max_new_tokens": 6, **changes})


def test_answers_are_the_likeliest_tokens_one_by_one(model):
    assert answers(model) == [by_hand(model, prompt, 6) for prompt in PROMPTS]


def test_padding_on_the_left_changes_no_answer(model):
    assert answers(model) == [answers(model, [prompt])[0] for prompt in PROMPTS]
    assert answers(model) == answers(model, batch_rows=2)
    assert answers(model) == answers(model, pad_id=EOS)


def test_answers_come_in_the_order_of_the_prompts(model):
    assert answers(model, PROMPTS[::-1]) == answers(model)[::-1]


def test_answer_ends_before_the_first_stop_token(model):
    (free,) = answers(model, [[6, 7, 8]], stop_ids=[], max_new_tokens=5)
    (stopped,) = answers(model, [[6, 7, 8]], stop_ids=[free[3]], max_new_tokens=5)
    assert stopped == free[: free.index(free[3])]


def test_answers_end_with_what_the_generation_config_names_as_well(model, tiny):
    tokenizer, style = load_tokenizer(tiny.target), PromptStyle()
    turn, other = tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("always")
    for named in ([turn, other, 10**9, "x", [1]], turn):  # `other` is a word, and ends nothing
        model.generation_config.eos_token_id = named
        stops = stops_of(model, tokenizer, ["question", "document"], style)
        assert stops == sorted({tokenizer.eos_token_id, turn})


def test_no_prompts_give_no_answers(model):
    assert answers(model, []) == []


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"do_sample": True, "temperature": 5.0},
        {"suppress_tokens": [5, 6, 7]},
        {"min_new_tokens": 6},
        {"max_length": 3},
    ],
)
def test_generation_config_of_the_model_has_no_say(model, own, capfd):
    expected = answers(model)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert answers(model) == expected
    for name, value in own.items():
        assert getattr(model.generation_config, name) == value
    assert capfd.readouterr() == ("", "")


def test_answer_ends_where_the_positions_of_the_model_end():
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=10, bos_token_id=1, eos_token_id=1
    )
    model = GPT2LMHeadModel(config).eval()
    (answer,) = answers(model, [[5, 6, 7, 8]], stop_ids=[], max_new_tokens=50)
    assert len(answer) == 7  # the last one is said, and never read
    (last,) = answers(model, [[5] * 10], stop_ids=[], max_new_tokens=50)
    assert len(last) == 1


def test_progress_counts_every_prompt_once(model):
    heard = []
    answers(model, batch_rows=2, on_progress=heard.append)
    assert sum(heard) == len(PROMPTS)


def test_prompt_longer_than_the_positions_is_refused():
    with pytest.raises(DataError, match="a prompt has 33 tokens and the model takes at most 32"):
        answers(built("gpt2"), [[5] * 33])


# Other architectures, in slots or not


def built(name: str):
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": 64}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **tokens))
    elif name == "bloom":
        model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, **tokens))
    else:
        window = 5 if name == "sliding" else None
        config = MistralConfig(**small, **tokens, intermediate_size=32, head_dim=8, sliding_window=window)
        model = MistralForCausalLM(config)
    with torch.no_grad():  # so that answers are no repetitions of one token
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@torch.no_grad()
def from_transformers(model, prompt: list[int], **config) -> list[int]:
    """Return what `model.generate` makes of one prompt."""
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=[EOS], **config
    )
    ids = torch.tensor([prompt])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    said = output[0, len(prompt) :].tolist()
    return said[: said.index(EOS)] if EOS in said else said


@pytest.mark.parametrize(
    ("name", "in_slots"), [("gpt2", True), ("mistral", True), ("sliding", False), ("bloom", False)]
)
@pytest.mark.parametrize("batch_rows", [1, 2, 32])
def test_answers_are_those_of_transformers(name, in_slots, batch_rows):
    model = built(name)
    slots = slots_for(model, [tuple(prompt) for prompt in PROMPTS], batch_rows, 19, 0)
    assert (slots is not None) is in_slots
    expected = [from_transformers(model, prompt) for prompt in PROMPTS]
    assert answers(model, max_new_tokens=12, batch_rows=batch_rows) == expected
    assert len(set(map(tuple, expected))) >= 4  # not all say the same


def test_answers_of_the_tiny_llama_are_those_of_transformers(model):
    assert answers(model, max_new_tokens=12) == [from_transformers(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["mistral", "bloom"])
def test_no_answer_ends_before_its_least_length(name):
    model = built(name)
    stop = [from_transformers(model, prompt)[2] for prompt in PROMPTS]
    found = answers(model, stop_ids=stop, min_new_tokens=4, max_new_tokens=8)
    assert all(len(answer) >= 4 for answer in found)
    assert answers(model, stop_ids=stop, max_new_tokens=8) != found
    assert not any(set(answer) & set(stop) for answer in found)


def test_stop_token_beyond_the_vocabulary_is_never_said(model):
    beyond = model.config.vocab_size
    found = answers(model, stop_ids=[beyond], min_new_tokens=2)
    assert found == answers(model, stop_ids=[], min_new_tokens=2)


@pytest.mark.parametrize("name", ["mistral", "bloom"])
def test_prompts_that_begin_alike_or_are_equal_are_answered_as_if_alone(name):
    model = built(name)
    prompts = [[7, 8, 9, *prompt] for prompt in PROMPTS] * 2
    found = answers(model, prompts, batch_rows=4)
    assert found == [answers(model, [prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("name", ["mistral", "bloom"])
def test_answers_may_be_begun_with_what_is_known_of_them(name):
    model = built(name)
    whole = answers(model, stop_ids=[])
    begun = [answer[:place] for place, answer in enumerate(whole)]
    assert answers(model, stop_ids=[], begun=begun) == whole
    assert answers(model, begun=[[*answer[:2], EOS] for answer in whole]) == [answer[:2] for answer in whole]
    assert answers(model, stop_ids=[], max_new_tokens=1, begun=whole) == [answer[:1] for answer in whole]


@pytest.mark.parametrize("name", ["mistral", "bloom"])
def test_answer_ends_when_it_is_said_to_be_over(name):
    model = built(name)
    whole = answers(model, stop_ids=[])
    found = answers(model, stop_ids=[], ended=lambda tokens: len(tokens) >= 3)
    assert found == [answer[:3] for answer in whole]


# Sampling


def sampled(model, prompts, seeds, **changes):
    sampling = Sampling(changes.pop("temperature", 1.0), changes.pop("top_p", 1.0), seeds)
    return answers(model, prompts, sampling=sampling, stop_ids=[], **changes)


@pytest.mark.parametrize("name", ["mistral", "bloom"])
def test_draw_of_a_prompt_depends_on_its_seed_and_on_nothing_else(name):
    model = built(name)
    prompts, seeds = [*PROMPTS, *PROMPTS], list(range(10))
    together = sampled(model, prompts, seeds)
    assert sampled(model, prompts[::-1], seeds[::-1])[::-1] == together
    assert sampled(model, prompts, seeds, batch_rows=3) == together
    assert [sampled(model, [p], [s])[0] for p, s in zip(prompts, seeds, strict=True)] == together
    assert together[:5] != together[5:]


def test_draws_in_slots_are_those_of_the_fallback(monkeypatch):
    model = built("mistral")
    in_slots = sampled(model, PROMPTS, range(5))
    monkeypatch.setattr("palinode.models.generation.slots_for", lambda *_: None)
    assert sampled(model, PROMPTS, range(5)) == in_slots


def test_cold_draws_and_narrow_ones_are_greedy():
    model = built("mistral")
    assert sampled(model, PROMPTS, range(5), temperature=1e-4) == answers(model, stop_ids=[])
    assert sampled(model, PROMPTS, range(5), top_p=1e-6) == answers(model, stop_ids=[])


def test_draw_falls_where_the_cumulative_probability_says():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3]]))
    draws = [0.0, 0.49, 0.51, 0.69, 0.71, 0.99]
    assert [draw_tokens(logits, [u], 1.0, 1.0)[0] for u in draws] == [0, 0, 1, 1, 2, 2]
    # 0.5 is not enough, 0.5 + 0.3 is: token 1 is left out, and the others have 0.5 / 0.8 and 0.3 / 0.8
    assert [draw_tokens(logits, [u], 1.0, 0.6)[0] for u in [0.0, 0.62, 0.63, 0.99]] == [0, 0, 2, 2]
    # at temperature 1/2 probabilities are squared: 0.25, 0.04, 0.09 of 0.38
    assert [draw_tokens(logits, [u], 0.5, 1.0)[0] for u in [0.65, 0.66, 0.76, 0.77]] == [0, 1, 1, 2]


# Tokens that are fetched together


@pytest.mark.parametrize("ahead", [3, 8])
@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_answers_are_the_same_however_many_tokens_are_fetched_together(monkeypatch, name, ahead):
    model = built(name)
    prompts = [[place % 7 + 3, place + 5, *range(3, 3 + place % 5)] for place in range(11)]
    plain = answers(model, prompts, max_new_tokens=12, stop_ids=[])
    ways = [
        {"stop_ids": sorted({row[3] for row in plain})},
        {"stop_ids": sorted({row[1] for row in plain}), "min_new_tokens": 5},
        {"ended": lambda said: sum(said) % 3 == 0},
        {"sampling": Sampling(1.5, 0.9, range(11))},
        {"begun": [row[:2] for row in plain]},
    ]
    before = [answers(model, prompts, **{"max_new_tokens": 12, "batch_rows": 4} | way) for way in ways]
    monkeypatch.setitem(generation.AHEAD, "cpu", ahead)
    after = [answers(model, prompts, **{"max_new_tokens": 12, "batch_rows": 4} | way) for way in ways]
    assert after == before


def test_answers_that_run_ahead_stay_within_the_positions_of_the_model(monkeypatch):
    model = built("gpt2")
    limit = model.config.n_positions
    prompts = [[5] * (limit - 9), [7, 8, 9]]
    before = answers(model, prompts, max_new_tokens=20)
    monkeypatch.setitem(generation.AHEAD, "cpu", 8)
    assert answers(model, prompts, max_new_tokens=20) == before


@pytest.mark.parametrize("sampling", [None, Sampling(1.0, 0.9, range(5))])
def test_token_of_an_answer_waits_for_nothing(monkeypatch, sampling):
    model = built("mistral")
    monkeypatch.setitem(generation.AHEAD, "cpu", 8)
    answers(model, max_new_tokens=25)  # whether it can be run in slots is found out once
    short, long = (
        waits_of(lambda count=count: answers(model, max_new_tokens=count, stop_ids=[], sampling=sampling))
        for count in (9, 25)
    )
    assert long == short
