"""The loss: answer and end tokens only, and sums kept apart from what they are divided by."""

from __future__ import annotations

import math

import pytest
import torch

from palinode.data.batches import pad_right
from palinode.data.tokenize import TokenRow
from palinode.models import load_model
from palinode.training.losses import scored_tokens, summed_nll


@pytest.fixture
def model(tiny):
    return load_model(tiny.base, device=torch.device("cpu"))


ROWS = (TokenRow((5, 6, 7, 8), 2, 0), TokenRow((9, 10, 11, 12, 13, 1), 4, 1))


def nll_by_hand(model, row: TokenRow) -> list[torch.Tensor]:
    """−log p of each scored token, from the whole logits of one row by itself."""
    logits = model(input_ids=torch.tensor([row.ids])).logits[0]
    return [
        torch.logsumexp(logits[place - 1], 0) - logits[place - 1, row.ids[place]]
        for place in range(row.start, len(row.ids))
    ]


def test_weight_is_the_number_of_answer_and_end_tokens():
    assert scored_tokens(pad_right(ROWS, pad_id=0)) == 4.0
    assert scored_tokens(pad_right(ROWS[:1], pad_id=0)) == 2.0


def test_total_is_the_summed_surprise_of_answer_tokens_and_of_no_prompt_token(model):
    expected = sum(value.item() for row in ROWS for value in nll_by_hand(model, row))
    assert summed_nll(model, pad_right(ROWS, pad_id=0)).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_is_that_of_the_answer_tokens_alone(model):
    summed_nll(model, pad_right(ROWS, pad_id=0)).backward()
    found = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    torch.stack([value for row in ROWS for value in nll_by_hand(model, row)]).sum().backward()
    torch.testing.assert_close(found, model.model.layers[0].mlp.up_proj.weight.grad, rtol=1e-4, atol=1e-6)


def test_padding_may_be_the_end_token_itself(model):
    """Were the mask taken from ids and not from lengths, the padding id would be hidden in the rows too."""
    with_pad_0 = summed_nll(model, pad_right(ROWS, pad_id=0))
    with_end_as_pad = summed_nll(model, pad_right(ROWS, pad_id=1))
    assert with_end_as_pad.item() == pytest.approx(with_pad_0.item(), rel=1e-6)


def test_loss_of_a_model_that_knows_nothing_is_the_logarithm_of_its_vocabulary(model):
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()  # tied to the head, so all logits are zero
    total = summed_nll(model, pad_right(ROWS, pad_id=0)).item()
    assert total / 4 == pytest.approx(math.log(model.config.vocab_size), rel=1e-6)
