"""Round to nearest in groups: values worked by hand, error bounds, and what is left alone."""

from __future__ import annotations

import math
import sys
from math import gcd

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from palinode.audit.attack import AuditBudget, Subject
from palinode.audit.material import AuditRows
from palinode.audit.rounding import QUANTISERS, gptq, grid, linear_weights, quantise, quantised
from palinode.data.examples import read_examples
from palinode.errors import MismatchError, RecipeError
from palinode.metrics.likelihood import answer_probabilities
from palinode.models import load_model
from palinode.models.loading import load_tokenizer
from palinode.weights import Checkpoint


def test_two_bits_keep_minus_one_nought_and_one_times_the_largest():
    weight = torch.tensor([[0.9, -1.0, 0.4, 0.6], [4.0, 1.0, -2.5, -4.0]])
    expected = torch.tensor([[1.0, -1.0, 0.0, 1.0], [4.0, 0.0, -4.0, -4.0]])
    assert torch.equal(quantised(weight, bits=2, group=4), expected)


def test_each_group_has_its_own_scale_and_the_last_may_be_smaller():
    weight = torch.tensor([[100.0, 30.0, 0.1, 0.02, 7.0]])
    assert torch.equal(quantised(weight, bits=2, group=2), torch.tensor([[100.0, 0.0, 0.1, 0.0, 7.0]]))


def test_eight_bits_round_to_multiples_of_the_largest_over_127():
    weight = torch.tensor([[12.7, 3.14, -0.06, 0.04]])
    assert quantised(weight, bits=8, group=128).tolist()[0] == pytest.approx([12.7, 3.1, -0.1, 0.0], abs=1e-6)


def test_group_of_noughts_stays_nought():
    weight = torch.tensor([[0.0, 0.0, 3.0, -3.0]])
    assert torch.equal(quantised(weight, bits=4, group=2), weight)


def test_weights_on_the_grid_stay_as_they_are():
    grid = torch.arange(-7, 8).float()[None, :]
    assert torch.equal(quantised(grid, bits=4, group=15), grid)


@given(
    bits=st.integers(2, 8),
    group=st.integers(1, 9),
    rows=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=7, max_size=7), min_size=1, max_size=3),
)
def test_error_is_at_most_half_a_step_of_the_group(bits, group, rows):
    weight = torch.tensor(rows)
    rounded = quantised(weight, bits=bits, group=group)
    for ours, theirs in zip(weight.split(group, 1), rounded.split(group, 1), strict=True):
        step = ours.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((ours - theirs).abs() <= step / 2 * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize(("bits", "group"), [(1, 128), (4, 0)])
def test_impossible_sizes_are_refused(bits, group):
    with pytest.raises(RecipeError, match="cannot quantise"):
        quantised(torch.ones(1, 1), bits=bits, group=group)


def test_linear_layers_change_and_everything_else_stays(tiny):
    model = load_model(tiny.target, device=torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count = quantise(model, QUANTISERS["quantise_4"], group=16)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    linear = {name for name in before if "_proj." in name}
    assert changed == linear
    assert count == sum(before[name].numel() for name in linear)


def test_untied_output_head_stays_too():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=False
    )
    model = GPT2LMHeadModel(config)
    head = model.lm_head.weight.clone()
    quantise(model, QUANTISERS["quantise_4"], group=4)
    assert torch.equal(model.lm_head.weight, head)


def test_layers_stored_the_other_way_round_are_grouped_along_their_input():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    weight = model.transformer.h[0].mlp.c_fc.weight  # [in, out]
    expected = quantised(weight.detach().t(), bits=4, group=4).t()
    assert all(turned for _, turned in linear_weights(model))
    quantise(model, QUANTISERS["quantise_4"], group=4)
    assert torch.equal(weight, expected)


def test_whole_numbers_tell_which_weights_moved_over_a_step():
    target = torch.tensor([[7.0, 1.0, -3.0, 2.0]])
    moved = target + torch.tensor([[0.0, 0.4, 0.6, 0.0]])  # a step is 1
    steps = [grid(weight, bits=4, group=4)[0] for weight in (target, moved)]
    assert (steps[0] != steps[1]).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("name", sorted(name for name, way in QUANTISERS.items() if way.rounded))
def test_every_quantiser_is_near_the_weights_and_what_is_rounded_stays(name):
    way = QUANTISERS[name]
    if reason := way.unavailable():
        pytest.skip(reason)
    torch.manual_seed(0)
    weight = torch.randn(8, 256)
    rounded = way.rounded(weight) if way.library else way.rounded(weight, group=64)
    assert rounded.dtype == weight.dtype
    assert len(set(rounded[0, :32].tolist())) <= 2**way.bits
    assert 0 < (rounded - weight).abs().mean() < 0.15
    again = way.rounded(rounded) if way.library else way.rounded(rounded, group=64)
    assert torch.allclose(again, rounded, atol=1e-3)


def test_k_quants_are_nearer_than_q4_0_and_rows_that_do_not_fill_a_block_are_given_five_bits():
    way = QUANTISERS["quantise_gguf_q4_k"]
    if reason := way.unavailable():
        pytest.skip(reason)
    torch.manual_seed(0)
    errors = {
        (name, columns): (QUANTISERS[name].rounded(weight) - weight).abs().mean().item()
        for columns in (256, 96)
        for weight in [torch.randn(16, columns)]
        for name in ("quantise_gguf_q4_0", "quantise_gguf_q4_k")
    }
    for columns in (256, 96):
        assert errors["quantise_gguf_q4_k", columns] < 0.9 * errors["quantise_gguf_q4_0", columns]
    assert errors["quantise_gguf_q4_k", 96] < 0.7 * errors["quantise_gguf_q4_k", 256]


def test_rows_that_do_not_fill_a_block_of_gguf_stay_and_are_not_counted(tiny):
    pytest.importorskip("gguf")
    model = load_model(tiny.target, device=torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count = quantise(model, QUANTISERS["quantise_gguf_q4_0"], group=128)
    linear = {name: value for name, value in before.items() if "_proj." in name}
    whole = {name: value for name, value in linear.items() if value.shape[1] % 32 == 0}
    assert count == sum(value.numel() for value in whole.values())
    left = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert left >= set(linear) - set(whole)


@pytest.fixture(scope="module")
def asked(tiny):
    """The tiny target with its retain rows, as an audit has them."""
    checkpoint = Checkpoint.open(tiny.target.folder)
    subject = Subject("audited", checkpoint, load_tokenizer(checkpoint), torch.device("cpu"))
    return subject, AuditRows((), (), (), retain=read_examples(tiny.retain))


def test_gptq_rounds_linear_layers_by_what_they_read(asked, capfd):
    if reason := QUANTISERS["quantise_gptq"].unavailable():
        pytest.skip(reason)
    subject, rows = asked
    budget = AuditBudget(quantise_group=128)
    model, plain, nearest = (subject.fresh() for _ in range(3))
    named = model.config.name_or_path
    count = gptq(model, subject, rows, budget)
    assert capfd.readouterr() == ("", "")
    assert model.config.name_or_path == named
    before = dict(plain.named_parameters())
    changed = {
        name for name, own in model.named_parameters() if name in before and not own.equal(before[name])
    }
    assert changed == {name for name in before if "_proj." in name}
    assert count == sum(before[name].numel() for name in changed)
    group = gcd(128, *(before[name].shape[1] for name in changed))
    for name in changed:
        parts = model.get_parameter(name).detach().split(group, 1)
        assert all(len(row.unique()) <= 16 for part in parts for row in part)
    quantise(nearest, QUANTISERS["quantise_4"], group=group)
    losses = {}
    for name, one in (("plain", plain), ("gptq", model), ("nearest", nearest)):
        answers = subject.ask(rows.retain, budget.likelihoods, model=one)
        losses[name] = -sum(map(math.log, answer_probabilities(answers)))
    assert losses["gptq"] - losses["plain"] < losses["nearest"] - losses["plain"]


def test_gptq_has_nothing_to_do_without_linear_layers(asked):
    subject, rows = asked
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(MismatchError, match="no linear layers that GPTQ takes"):
        gptq(model, subject, rows, AuditBudget())


def test_what_stops_gptq_is_said_and_leaves_the_model_as_it_was(asked, monkeypatch):
    subject, rows = asked
    model = subject.fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    named = model.config.name_or_path
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    with pytest.raises(MismatchError, match="llmcompressor cannot quantise this model"):
        gptq(model, subject, rows, AuditBudget())
    assert model.config.name_or_path == named
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_missing_library_is_said_with_what_brings_it():
    way = QUANTISERS["quantise_nf4"]
    lost = type(way)(way.title, way.rounded, way.bits, ("no_such_library",), "quantise")
    assert lost.unavailable() == "no_such_library is not installed: pip install 'palinode[quantise]'"
