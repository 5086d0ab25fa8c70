"""Moments of gradients and inputs of layers, against plain autograd and plain matrix products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palinode import read_examples
from palinode.data.batches import pad_right
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.errors import DataError
from palinode.models import load_model, load_tokenizer
from palinode.training import subspace
from palinode.training.importance import gradient_moment
from palinode.training.subspace import input_spaces


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


def test_space_of_a_layer_is_that_of_the_inputs_it_was_given(live, monkeypatch):
    """Inputs are caught one row at a time, without padding; the search runs in several groups."""
    model, rows = live
    name = "model.layers.1.mlp.down_proj"
    caught = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _module, inputs, _output: caught.append(inputs[0][0])
    )
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.ids]))
    handle.remove()
    inputs = torch.cat(caught).double().numpy()
    monkeypatch.setattr(subspace, "ROOM", 20_000)
    spaces = {space.module: space for space in input_spaces(model, rows, energy=0.9, pad_id=0)}
    assert len(spaces) == 14
    basis = spaces[name].basis
    kept = np.linalg.norm(inputs @ basis) ** 2 / np.linalg.norm(inputs) ** 2
    _, values, _ = np.linalg.svd(inputs, full_matrices=False)
    shares = np.cumsum(values**2) / np.sum(values**2)
    assert basis.shape[1] == 1 + int(np.searchsorted(shares, 0.9))
    assert kept == pytest.approx(shares[basis.shape[1] - 1], abs=1e-6)
    assert basis.T @ basis == pytest.approx(np.eye(basis.shape[1]), abs=1e-8)
