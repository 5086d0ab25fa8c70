"""Likelihoods: the numbers of a plain loop over rows, whatever shares a batch with what."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrOCRConfig, TrOCRForCausalLM

from palinode import Checkpoint
from palinode.data.batches import pad_right
from palinode.data.tokenize import TokenRow
from palinode.errors import CheckpointError, DataError
from palinode.models import load_model, loading, score_rows
from palinode.models.loading import load_reader
from palinode.models.reading import answer_logits, answer_nll
from palinode.weights import save


def rows_of(*lengths: tuple[int, int]) -> list[TokenRow]:
    random = torch.Generator().manual_seed(0)
    return [
        TokenRow(tuple(torch.randint(3, 150, (prompt + answer,), generator=random).tolist()), prompt, place)
        for place, (prompt, answer) in enumerate(lengths)
    ]


CPU = torch.device("cpu")
ROWS = rows_of((1, 1), (9, 3), (2, 7), (5, 1), (1, 20), (3, 4), (30, 2))


def llama(tiny):
    return load_model(tiny.target, device=torch.device("cpu"))


def gpt2(_tiny):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=200, n_positions=64, bos_token_id=1, eos_token_id=1
        )
    ).eval()


def trocr(_tiny):
    """One of the few models whose forward pass cannot leave out logits."""
    torch.manual_seed(0)
    return TrOCRForCausalLM(
        TrOCRConfig(
            vocab_size=200, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32
        )
    ).eval()


MODELS = pytest.mark.parametrize("build", [llama, gpt2, trocr])


@torch.no_grad()
def plain_loop(model, row: TokenRow) -> tuple[list[float], list[bool]]:
    """Score one row by itself, in double precision from the logits on."""
    logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    places = range(row.start, len(row.ids))
    return (
        [logprobs[place - 1, row.ids[place]].item() for place in places],
        [logits[place - 1].argmax().item() == row.ids[place] for place in places],
    )


@MODELS
def test_scores_are_those_of_a_plain_loop_over_rows(tiny, build):
    model = build(tiny)
    found = score_rows(model, ROWS, pad_id=0)
    for row, scores in zip(ROWS, found, strict=True):
        expected, expected_hits = plain_loop(model, row)
        assert scores.logprobs == pytest.approx(expected, rel=1e-6, abs=1e-5)
        assert list(scores.hits) == expected_hits
        assert len(scores.logprobs) == row.scored


@MODELS
def test_scores_do_not_depend_on_what_else_is_in_the_batch(tiny, build):
    model = build(tiny)
    together = score_rows(model, ROWS, pad_id=0)
    backwards = score_rows(model, ROWS[::-1], pad_id=7)[::-1]  # nor on the order, nor on the padding
    for row, one, other in zip(ROWS, together, backwards, strict=True):
        (alone,) = score_rows(model, [row], pad_id=0)
        assert one.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert other.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_hits_are_true_where_the_model_would_have_said_the_token(tiny):
    model = llama(tiny)
    ids = [5, 6]
    for _ in range(3):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    (scores,) = score_rows(model, [TokenRow(tuple(ids), 2, 0)], pad_id=0)
    assert scores.hits == (True, True, True)
    wrong = [*ids[:4], (ids[4] + 1) % 150]
    (scores,) = score_rows(model, [TokenRow(tuple(wrong), 2, 0)], pad_id=0)
    assert scores.hits == (True, True, False)


def test_model_that_knows_nothing_gives_every_token_the_same_probability(tiny):
    model = llama(tiny)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    for scores in score_rows(model, ROWS, pad_id=0):
        assert scores.logprobs == pytest.approx([-math.log(model.config.vocab_size)] * len(scores.hits))


def test_logits_are_those_of_the_scored_tokens_with_their_rows(tiny):
    logits, labels, rows = answer_logits(llama(tiny), pad_right(ROWS[1:3], pad_id=0))
    assert logits.shape == (10, tiny.target.config["vocab_size"])
    assert labels.tolist() == [*ROWS[1].ids[9:], *ROWS[2].ids[2:]]
    assert rows.tolist() == [0] * 3 + [1] * 7


def test_nll_is_float32_whatever_the_logits_are(tiny):
    model = llama(tiny).to(torch.bfloat16)
    assert answer_nll(model, pad_right(ROWS, pad_id=0)).dtype == torch.float32


def test_progress_counts_every_row_once(tiny):
    heard = []
    score_rows(llama(tiny), ROWS, pad_id=0, on_progress=heard.append)
    assert sum(heard) == len(ROWS)


def test_no_rows_give_no_scores(tiny):
    assert score_rows(llama(tiny), [], pad_id=0) == []


def test_weights_that_are_not_numbers_are_an_error_and_not_a_score(tiny):
    model = llama(tiny)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match="likelihoods are not finite numbers"):
        score_rows(model, ROWS, pad_id=0)


def test_rows_longer_than_the_model_are_refused(tiny):
    with pytest.raises(
        DataError, match="a row has 70 tokens and the model takes at most 64; set max_length to 64"
    ):
        score_rows(gpt2(tiny), rows_of((1, 3), (60, 10)), pad_id=0)


# In another dtype


@pytest.fixture(scope="module")
def narrow(tiny, tmp_path_factory):
    """The tiny target in bfloat16."""
    place = tmp_path_factory.mktemp("narrow") / "model"
    save(tiny.target, place, dtype="bfloat16")
    return Checkpoint.open(place)


def test_model_read_in_bfloat16_says_the_same_within_a_few_hundredths(narrow):
    exact = score_rows(load_reader(narrow, device=CPU), ROWS, pad_id=0)
    coarse = score_rows(load_reader(narrow, device=CPU, precision="bfloat16"), ROWS, pad_id=0)
    apart = [
        abs(first - second)
        for one, other in zip(exact, coarse, strict=True)
        for first, second in zip(one.logprobs, other.logprobs, strict=True)
    ]
    assert max(apart) < 0.2
    assert sum(apart) / len(apart) < 0.03


def test_log_probabilities_of_a_bfloat16_model_are_float32(narrow):
    model = load_reader(narrow, device=CPU, precision="bfloat16")
    row = ROWS[1]
    (scores,) = score_rows(model, [row], pad_id=0)
    hidden = model.base_model(torch.tensor([row.ids])).last_hidden_state[0].float()
    logprobs = (hidden @ model.lm_head.weight.float().T).log_softmax(-1)
    wanted = [logprobs[place - 1, row.ids[place]].item() for place in range(row.start, len(row.ids))]
    assert scores.logprobs == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("where", "precision", "written", "dtype"),
    [
        ("cpu", "auto", None, torch.float32),
        ("cpu", "bfloat16", None, torch.bfloat16),
        ("cuda", "auto", None, torch.bfloat16),
        ("cuda", "auto", "float32", torch.float32),
        ("cuda", "float32", None, torch.float32),
    ],
)
def test_dtype_that_a_model_is_read_in(monkeypatch, narrow, where, precision, written, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert loading._reading_dtype(narrow, torch.device(where), precision, written) == dtype
