"""Greedy answers: plain argmax, whatever the batch and whatever the model's own generation config says."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from palinode.models import generate, load_model

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
    assert heard == [2, 2, 1]
