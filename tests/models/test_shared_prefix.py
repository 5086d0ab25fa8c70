"""Rows in one tree: every common beginning once, and the likelihoods of plain rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from palinode.data.tokenize import TokenRow
from palinode.models import likelihoods, load_model, score_rows
from palinode.models.likelihoods import grow_trees, has_plain_head

ANSWERS = ((10, 11, 12, 2), (10, 11, 20, 21, 22, 2), (10, 11, 12, 30, 2), (40, 2))
ROWS = [
    *(TokenRow((5, 6, 7, *answer), 3, place) for place, answer in enumerate(ANSWERS)),
    *(TokenRow((5, 6, 8, 9, 9, *answer), 5, 4 + place) for place, answer in enumerate(ANSWERS[:2])),
    TokenRow((50, 51, 52, 53, 54, 55), 1, 6),
]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, **TOKENS)
    )


def mistral(window: int):
    config = MistralConfig(
        **SMALL, **TOKENS, intermediate_size=32, num_key_value_heads=1, sliding_window=window, head_dim=8
    )
    return MistralForCausalLM(config)


def bloom():
    return BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=64, **TOKENS))


def gemma2():
    """Its logits are capped, so that they are not the head's."""
    config = Gemma2Config(
        **SMALL, **TOKENS, intermediate_size=32, num_key_value_heads=1, head_dim=8, sliding_window=64,
        attn_implementation="eager", final_logit_softcapping=0.05,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def mamba():
    """It has no attention, so that no mask keeps the branches apart."""
    return MambaForCausalLM(
        MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64, state_size=4, **TOKENS)
    )


ARCHITECTURES = {
    "gpt2": gpt2,
    "mistral": lambda: mistral(64),
    "sliding": lambda: mistral(4),
    "bloom": bloom,
    "gemma2": gemma2,
    "mamba": mamba,
}


def built(name: str):
    torch.manual_seed(0)
    return ARCHITECTURES[name]().eval()


@torch.no_grad()
def plain(model, row: TokenRow) -> list[float]:
    """Score a row by itself, in double precision from the logits on."""
    logprobs = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(dim=-1)
    return [logprobs[place - 1, row.ids[place]].item() for place in range(row.start, len(row.ids))]


# Trees


def test_common_beginnings_are_in_a_tree_once():
    first, second, document = grow_trees(ROWS)
    assert first.ids.tolist() == [5, 6, 7, 10, 11, 12, 20, 21, 22, 30, 40]
    assert first.positions.tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 7, 6, 3]
    assert first.rows == (0, 1, 2, 3)
    assert [path.tolist() for path in first.paths] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 6, 7, 8],
        [0, 1, 2, 3, 4, 5, 9],
        [0, 1, 2, 10],
    ]
    assert second.rows == (4, 5)
    assert (first.branched, second.branched, document.branched) == (True, True, False)
    assert document.ids.tolist() == [50, 51, 52, 53, 54]


def test_token_sees_its_own_path_and_nothing_else():
    (tree, *_) = grow_trees(ROWS)
    seen = tree.visible()
    for path in tree.paths:
        for place, node in enumerate(path):
            assert set(np.flatnonzero(seen[node])) == set(path[: place + 1])


def test_row_that_begins_another_adds_nothing():
    rows = [TokenRow((5, 6, 7, 8, 9), 2, 0), TokenRow((5, 6, 7, 8), 2, 1), TokenRow((5, 6, 7, 8, 9), 2, 2)]
    (tree,) = grow_trees(rows)
    assert tree.ids.tolist() == [5, 6, 7, 8]
    assert tree.branched is False
    assert [path.tolist() for path in tree.paths] == [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3]]


def test_rows_that_would_make_too_large_a_tree_get_several(monkeypatch):
    monkeypatch.setattr(likelihoods, "TREE_TOKENS", 12)
    trees = grow_trees(ROWS[:4])
    assert [tree.rows for tree in trees] == [(0,), (1,), (2, 3)]


def test_without_sharing_every_row_is_its_own_tree():
    trees = grow_trees(ROWS, share=False)
    assert [tree.ids.tolist() for tree in trees] == [list(row.ids[:-1]) for row in ROWS]
    assert not any(tree.branched for tree in trees)


# Likelihoods


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_scores_as_in_plain_rows(name):
    model = built(name)
    for row, scores in zip(ROWS, score_rows(model, ROWS, pad_id=0), strict=True):
        assert scores.logprobs == pytest.approx(plain(model, row), abs=2e-5)


@pytest.mark.parametrize(
    ("name", "shares"),
    [("gpt2", True), ("mistral", True), ("sliding", False), ("bloom", False), ("mamba", False)],
)
def test_trees_are_used_where_they_give_the_plain_scores_and_nowhere_else(name, shares):
    model, read = built(name), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    score_rows(model, ROWS * 3, pad_id=0)  # rows that come again cost nothing in a tree
    assert (read[-1] == 3 * 11) is shares  # three trees, padded to the largest
    assert (read[-1] >= 21 * 5) is not shares  # 21 rows


def test_tree_check_has_something_to_find():
    """Were the mask ignored, as this architecture does, the scores would be others."""
    model = built("mamba")
    (tree, *_) = grow_trees(ROWS)
    whole = TokenRow((*tree.ids.tolist(), 2), 3, 0)
    (found,) = score_rows(model, [whole], pad_id=0)
    assert found.logprobs[6] != pytest.approx(plain(model, ROWS[1])[4], abs=1e-4)


def test_capped_logits_are_not_taken_for_those_of_the_head():
    assert has_plain_head(built("gpt2"), (5, 6, 7)) is True
    assert has_plain_head(built("gemma2"), (5, 6, 7)) is False


def test_scores_do_not_depend_on_order_batch_or_chunk(tiny, monkeypatch):
    model = load_model(tiny.target, device=torch.device("cpu"))
    together = score_rows(model, ROWS, pad_id=0, standardise=True)
    backwards = score_rows(model, ROWS[::-1], pad_id=7, standardise=True)[::-1]
    monkeypatch.setattr(likelihoods, "LOGIT_BYTES", 1)  # one position at a time
    monkeypatch.setattr(likelihoods, "BATCH_TOKENS", 1)  # one tree at a time
    apart = score_rows(model, ROWS, pad_id=0, standardise=True)
    for place, row in enumerate(ROWS):
        (alone,) = score_rows(model, [row], pad_id=0, standardise=True)
        for other in (together, backwards, apart):
            assert other[place].logprobs == pytest.approx(alone.logprobs, abs=1e-5)
            assert other[place].standardised == pytest.approx(alone.standardised, rel=1e-5, abs=1e-4)
            assert other[place].hits == alone.hits
