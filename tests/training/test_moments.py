"""Moments of what layers read, against plain torch: one row at a time, without padding, in whole passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from palinode.data.examples import read_examples
from palinode.data.tokenize import PromptStyle, TokenRow, tokenize
from palinode.errors import DataError
from palinode.models import load_model, load_tokenizer
from palinode.training import moments
from palinode.training.moments import input_moments
from palinode.weights.filters import basis_of


@pytest.fixture(scope="module")
def live(tiny):
    model = load_model(tiny.base, device=torch.device("cpu"))
    rows = tokenize(
        read_examples(tiny.retain)[:5], load_tokenizer(tiny.base), max_length=64, style=PromptStyle()
    )
    return model, rows


def gpt2():
    """Layers that store their weights as (in, out)."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=4, n_layer=1, n_head=2, vocab_size=30, n_positions=16, bos_token_id=1, eos_token_id=1
        )
    ).eval()


@torch.no_grad()
def inputs_alone(model, rows, names):
    """What modules read, rows one at a time without padding, [tokens, D] in float64."""
    caught: dict[str, list[torch.Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: caught.setdefault(name, []).append(inputs[0].flatten(0, -2))
        )
        for name in names
    ]
    for row in rows:
        model(input_ids=torch.tensor([row.ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(states).double().numpy() for name, states in caught.items()}


def measured(model, rows, **settings):
    """All moments and places of a model."""
    values, places = {}, {}
    for group in input_moments(model, rows, pad_id=0, **settings):
        assert not values.keys() & group.values.keys() - {"ones"}
        assert not places.keys() & group.places.keys()
        values |= group.values
        places |= group.places
    return values, places


def of_layer(found, layer):
    """The moment of a linear layer and the axis along which its weight reads."""
    values, places = found
    ((keys, axis),) = places[f"{layer}.weight"]
    (key,) = keys
    return values[key].double().numpy(), axis


def test_space_of_a_layer_is_that_of_the_inputs_it_was_given(live):
    model, rows = live
    name = "model.layers.1.mlp.down_proj"
    inputs = inputs_alone(model, rows, [name])[name]
    moment, axis = of_layer(measured(model, rows), name)
    assert axis == 1
    basis = basis_of(moment, energy=0.9)
    kept = np.linalg.norm(inputs @ basis) ** 2 / np.linalg.norm(inputs) ** 2
    _, values, _ = np.linalg.svd(inputs, full_matrices=False)
    shares = np.cumsum(values**2) / np.sum(values**2)
    assert basis.shape[1] == 1 + int(np.searchsorted(shares, 0.9))
    assert kept == pytest.approx(shares[basis.shape[1] - 1], abs=1e-6)
    assert basis.T @ basis == pytest.approx(np.eye(basis.shape[1]), abs=1e-8)


def test_all_linear_layers_of_the_blocks_have_a_place(live):
    _, places = measured(*live)
    layers = [name for name in places if name.startswith("model.layers.") and "norm" not in name]
    assert len(layers) == 14


def test_sums_in_groups_are_those_of_one_pass(live, monkeypatch):
    """The search runs in several groups where all sums at once would not fit."""
    model, rows = live
    whole = measured(model, rows)
    monkeypatch.setattr(moments, "ROOM", 20_000)
    monkeypatch.setattr(moments._Walk, "can_go_by_block", lambda _walk: False)
    values, places = measured(model, rows)
    assert places == whole[1]
    assert values.keys() == whole[0].keys()
    for key, value in values.items():
        torch.testing.assert_close(value, whole[0][key], rtol=1e-6, atol=1e-9)


def test_space_of_a_transposed_layer_is_that_of_its_inputs_too():
    """One token is one input x, whose only axis is x/|x|; its length is the number of inputs, not outputs."""
    model, rows = gpt2(), [TokenRow((7,), 1, 0)]
    layers = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    alone, found = inputs_alone(model, rows, layers), measured(model, rows)
    widths = {}
    for name in layers:
        moment, axis = of_layer(found, name)
        assert axis == 0
        basis = basis_of(moment, energy=0.999)
        widths[name.partition("h.0.")[2]] = len(basis)
        (own,) = alone[name]
        assert basis @ basis.T == pytest.approx(np.outer(own, own) / (own @ own), abs=1e-6)
    assert widths == {"attn.c_attn": 4, "attn.c_proj": 4, "mlp.c_fc": 4, "mlp.c_proj": 16}


def test_padding_is_no_input():
    """Beside a row of nine tokens one of two would have seven of padding."""
    model = gpt2()
    rows = [TokenRow(tuple(range(5, 14)), 4, 0), TokenRow((20, 21), 1, 1)]
    layers = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    alone, found = inputs_alone(model, rows, layers), measured(model, rows)
    for name in layers:
        own, (moment, _) = alone[name], of_layer(found, name)
        assert moment == pytest.approx(own.T @ own / 11, rel=1e-4, abs=1e-6)
        basis, expected = basis_of(moment, energy=0.9), basis_of(own.T @ own, energy=0.9)
        assert basis @ basis.T == pytest.approx(expected @ expected.T, abs=1e-5)


def test_there_must_be_rows(live):
    with pytest.raises(DataError, match="no rows"):
        next(input_moments(live[0], [], pad_id=0))
