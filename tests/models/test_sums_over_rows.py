"""Moments of gradients of single rows, against plain autograd."""

from __future__ import annotations

import pytest
import torch

from palinode import read_examples
from palinode.data.batches import pad_right
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.errors import DataError
from palinode.models import load_model, load_tokenizer
from palinode.models.sums import gradient_moment


@pytest.fixture(scope="module")
def live(tiny):
    model = load_model(tiny.base, device=torch.device("cpu"))
    rows = tokenize(
        read_examples(tiny.retain)[:5], load_tokenizer(tiny.base), max_length=64, style=PromptStyle()
    )
    return model, rows


def row_gradients(model, rows, name):
    """The gradient of each row's mean answer loss, by transformers' own loss."""
    found = []
    for row in rows:
        batch = pad_right([row], pad_id=0)
        ids, labels = torch.from_numpy(batch.ids), torch.from_numpy(batch.labels)
        loss = model(input_ids=ids, labels=labels).loss
        (gradient,) = torch.autograd.grad(loss, [model.get_parameter(name)])
        found.append(gradient)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("moment", "rule"),
    [
        ("signed", lambda found: found.mean(0)),
        ("magnitude", lambda found: found.abs().mean(0)),
        ("fisher", lambda found: found.square().mean(0)),
    ],
)
def test_moment_is_the_mean_over_rows_of_what_it_says(live, moment, rule):
    model, rows = live
    found = gradient_moment(model, rows, moment, pad_id=0)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        torch.testing.assert_close(found[name], rule(row_gradients(model, rows, name)), rtol=1e-3, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_left_on_the_model_when_a_row_cannot_be_read(live):
    model, _ = live
    with pytest.raises(DataError, match="no rows"):
        gradient_moment(model, [], "fisher", pad_id=0)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
