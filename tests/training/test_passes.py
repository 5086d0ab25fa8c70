"""Batches too large for a device: parts, memory that runs out, and logits that are never whole."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from palinode.data.batches import pad_right
from palinode.data.tokenize import TokenRow
from palinode.errors import RecipeError
from palinode.methods import METHODS
from palinode.settings import TrainingSettings
from palinode.training import losses
from palinode.training.loop import train
from palinode.training.objectives import PLAIN_OBJECTIVE, Joined, draw
from waiting import largest_of

WORDS = 3_000


def model(layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=WORDS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def rows_of(count: int, seed: int = 0) -> list[TokenRow]:
    random = torch.Generator().manual_seed(seed)
    lengths = [(2 + place % 3, 3 + place % 5) for place in range(count)]
    return [
        TokenRow(tuple(torch.randint(3, WORDS, (prompt + answer,), generator=random).tolist()), prompt, place)
        for place, (prompt, answer) in enumerate(lengths)
    ]


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(epochs=2, learning_rate=1e-3, batch_size=8, precision="float32", **changes)


def after(live, rows, objective=PLAIN_OBJECTIVE, chosen=None, **others):
    """The curve of a training."""
    return train(live, rows, objective, chosen or settings(), seed=0, pad_id=0, **others)


def assert_alike(first, second):
    for before, now in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(before, now, rtol=0, atol=2e-5)


# In parts


@pytest.mark.parametrize("most", [1, 20, 50, 10_000])
def test_micro_batch_that_goes_through_in_parts_trains_as_the_whole(most):
    whole, parts = model(), model()
    sizes: list[int] = []
    parts.register_forward_pre_hook(
        lambda _model, _args, given: sizes.append(given["input_ids"].numel()), with_kwargs=True
    )
    curve = after(whole, rows_of(12))
    again = after(parts, rows_of(12), chosen=settings(tokens_per_pass=most))
    assert [point.loss for point in again] == pytest.approx([point.loss for point in curve], abs=1e-5)
    assert_alike(whole, parts)
    assert max(sizes[-4:]) <= max(most, 11)  # a row is never divided


@pytest.mark.parametrize("name", ["npo", "dpo", "kl_min", "simnpo"])
def test_rows_that_a_loss_compares_stay_together(name):
    objective = METHODS[name].objective(METHODS[name].settings(), 0)
    roles = sorted(objective.roles)
    rows = {role: rows_of(12, seed) for seed, role in enumerate(roles)}
    drawn = {
        role: draw([range(12)] * 12, role, epochs=2, seed=0) for role in roles if role != objective.anchor
    }
    whole, parts = model(), model()
    if objective.limit:
        for live in (whole, parts):
            after(live, rows[objective.anchor], chosen=settings(tokens_per_pass=1_000))
    cast = Joined(objective.anchor, rows, drawn)
    curve = after(whole, cast, objective)
    again = after(parts, cast, objective, settings(tokens_per_pass=40))
    assert [point.loss for point in again] == pytest.approx([point.loss for point in curve], abs=1e-4)
    assert_alike(whole, parts)


def test_setting_is_not_part_of_what_decides_the_result():
    assert settings(tokens_per_pass=7).key() == settings().key()


# Activations that are computed again, and blocks that are compiled


def trained(name: str, live: LlamaForCausalLM, chosen: TrainingSettings):
    """The curve of a method's training, and the bytes that its graphs held."""
    objective = METHODS[name].objective(METHODS[name].settings(), 0)
    rows = {role: rows_of(8, seed) for seed, role in enumerate(sorted(objective.roles))}
    others = rows.keys() - {objective.anchor}
    drawn = {role: draw([range(8)] * 8, role, epochs=2, seed=0) for role in others}
    held = []

    def keep(value):
        held.append(value.nbytes)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        curve = after(live, Joined(objective.anchor, rows, drawn), objective, chosen)
    return curve, sum(held)


@pytest.mark.parametrize("name", ["dpo", "npo", "undial", "rmu"])
def test_activations_computed_again_take_less_memory_and_change_nothing(name):
    plain, spare = model(layers=3), model(layers=3)
    curve, held = trained(name, plain, settings())
    again, less = trained(name, spare, settings(gradient_checkpointing=True))
    assert again == curve
    for before, now in zip(plain.parameters(), spare.parameters(), strict=True):
        assert torch.equal(before, now)
    assert less < 0.8 * held
    assert not any("forward" in vars(block) for block in spare.model.layers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a processor with g++")
def test_compiled_blocks_train_alike_on_few_lengths():
    plain, compiled, lengths = model(), model(), set()
    compiled.register_forward_pre_hook(
        lambda _model, _args, given: lengths.add(given["input_ids"].shape[1]), with_kwargs=True
    )
    curve = after(plain, rows_of(12))
    again = after(compiled, rows_of(12), chosen=settings(compile=True))
    assert [point.loss for point in again] == pytest.approx([point.loss for point in curve], abs=1e-5)
    assert_alike(plain, compiled)
    assert max(lengths) == 64
    assert compiled.model.layers[0]._compiled_call_impl is None


# Memory that runs out


@contextmanager
def room_for(live, tokens: int):
    """A device that has room for so many tokens at a time."""

    def look(_model, _args, given):
        if given["input_ids"].numel() > tokens and live.training:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = live.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_batch_that_is_too_much_for_the_device_goes_through_in_halves_and_trains_alike():
    whole, small = model(), model()
    curve = after(whole, rows_of(12))
    said: list[str] = []
    with room_for(small, 30):
        again = after(small, rows_of(12), say=said.append)
    assert [point.loss for point in again] == pytest.approx([point.loss for point in curve], abs=1e-5)
    assert_alike(whole, small)
    assert said[0].endswith("which changes no gradient")
    assert len(said) == len(set(said)) <= 3


def test_row_that_is_too_much_for_the_device_is_refused():
    live = model()
    with room_for(live, 5), pytest.raises(RecipeError, match=r"cannot be divided, takes .* set a smaller"):
        after(live, rows_of(12))


# Logits that are never whole


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_in_parts_has_the_value_and_the_gradients_of_the_whole(monkeypatch, tied, frozen_head):
    live, batch = model(), pad_right(rows_of(8), pad_id=0)
    if not tied:
        live.lm_head.weight = torch.nn.Parameter(live.lm_head.weight.detach().clone())
        live.lm_head.weight.requires_grad_(not frozen_head)
    trained = [value for value in live.parameters() if value.requires_grad]
    wanted = losses.summed_nll(live, batch)
    slopes = torch.autograd.grad(2 * wanted, trained)
    monkeypatch.setattr(losses, "LOGIT_BYTES", 5 * 4 * WORDS)  # five positions
    monkeypatch.setattr(losses, "WHOLE", 1)
    found = losses.summed_nll(live, batch)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(2 * found, trained), slopes, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_logits_in_parts_never_exist_as_a_whole(monkeypatch):
    live, batch = model(), pad_right(rows_of(40), pad_id=0)
    whole = 4 * WORDS * int((batch.labels >= 0).sum())
    losses.summed_nll(live, batch)  # whether the head is plain is found out once
    assert largest_of(lambda: losses.summed_nll(live, batch).backward()) >= whole
    monkeypatch.setattr(losses, "LOGIT_BYTES", whole // 10)
    monkeypatch.setattr(losses, "WHOLE", 1)
    losses.summed_nll(live, batch)
    assert largest_of(lambda: losses.summed_nll(live, batch).backward()) <= max(whole // 10, 4 * WORDS * 16)


def test_loss_in_parts_under_autocast_is_as_near_as_the_whole(monkeypatch):
    live, batch = model(), pad_right(rows_of(8), pad_id=0)
    exact = losses.summed_nll(live, batch)
    with torch.autocast("cpu", torch.bfloat16):
        whole = losses.summed_nll(live, batch)
        monkeypatch.setattr(losses, "LOGIT_BYTES", 5 * 4 * WORDS)
        monkeypatch.setattr(losses, "WHOLE", 1)
        parts = losses.summed_nll(live, batch)
    assert parts.dtype == torch.float32
    assert abs(parts - exact) <= 2 * abs(whole - exact) + 0.05
    parts.backward()
    assert all(value.grad.dtype == torch.float32 for value in live.parameters())
