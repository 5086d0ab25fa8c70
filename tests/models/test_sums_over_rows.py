"""Moments of gradients and inputs of layers, against plain autograd and plain matrix products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from palinode import read_examples
from palinode.data.batches import pad_right
from palinode.data.tokenize import PromptStyle, TokenRow, tokenize
from palinode.errors import DataError
from palinode.models import load_model, load_tokenizer, sums
from palinode.models.sums import gradient_moment, input_spaces
from palinode.weights.vectors import basis_of


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
    monkeypatch.setattr(sums, "ROOM", 20_000)
    spaces = {space.module: space for space in input_spaces(model, rows, energy=0.9, pad_id=0)}
    assert len(spaces) == 14
    basis = spaces[name].basis
    kept = np.linalg.norm(inputs @ basis) ** 2 / np.linalg.norm(inputs) ** 2
    _, values, _ = np.linalg.svd(inputs, full_matrices=False)
    shares = np.cumsum(values**2) / np.sum(values**2)
    assert basis.shape[1] == 1 + int(np.searchsorted(shares, 0.9))
    assert kept == pytest.approx(shares[basis.shape[1] - 1], abs=1e-6)
    assert basis.T @ basis == pytest.approx(np.eye(basis.shape[1]), abs=1e-8)


def gpt2():
    """Layers that store their weights as (in, out)."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=4, n_layer=1, n_head=2, vocab_size=30, n_positions=16, bos_token_id=1, eos_token_id=1
        )
    ).eval()


def test_space_of_a_transposed_layer_is_that_of_its_inputs_too():
    """One token is one input x, whose only axis is x/|x|; its length is the number of inputs, not outputs."""
    model, caught = gpt2(), {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            module.register_forward_pre_hook(
                lambda _module, inputs, name=name: caught.update({name: inputs[0].flatten()})
            )
    spaces = list(input_spaces(model, [TokenRow((7,), 1, 0)], energy=0.999, pad_id=0))
    assert {space.module.partition("h.0.")[2]: len(space.basis) for space in spaces} == {
        "attn.c_attn": 4, "attn.c_proj": 4, "mlp.c_fc": 4, "mlp.c_proj": 16
    }  # fmt: skip
    for space in spaces:
        axis = (caught[space.module] / caught[space.module].norm()).double().numpy()
        assert space.transposed
        assert space.basis @ space.basis.T == pytest.approx(np.outer(axis, axis), abs=1e-6)


def test_padding_is_no_input():
    """Beside a row of nine tokens one of two would have seven of padding."""
    model, caught = gpt2(), {}
    rows = [TokenRow(tuple(range(5, 14)), 4, 0), TokenRow((20, 21), 1, 1)]
    handles = [
        module.register_forward_pre_hook(
            lambda _module, inputs, name=name: caught.setdefault(name, []).append(inputs[0][0])
        )
        for name, module in model.named_modules()
        if isinstance(module, Conv1D)
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.ids]))
    for handle in handles:
        handle.remove()
    for space in input_spaces(model, rows, energy=0.9, pad_id=0):
        inputs = torch.cat(caught[space.module]).double()
        expected = basis_of((inputs.T @ inputs).numpy(), energy=0.9)
        assert space.basis @ space.basis.T == pytest.approx(expected @ expected.T, abs=1e-5)
