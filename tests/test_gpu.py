"""What a GPU does beside what a processor does. Left out where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palinode.data.examples import read_examples
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.models import generate, load_model, load_tokenizer, put, score_rows
from palinode.models.inplace import LiveModel
from palinode.models.loading import pad_token
from palinode.settings import TrainingSettings
from palinode.training import optimizers
from palinode.training.loop import train
from palinode.training.moments import basis_of, input_moments, least_squares
from palinode.training.objectives import PLAIN_OBJECTIVE
from palinode.weights import save_vector

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def rows(tiny):
    tokenizer, examples = load_tokenizer(tiny.target), read_examples(tiny.retain)
    return tokenize(examples, tokenizer, max_length=64, style=PromptStyle()), pad_token(tokenizer)


def bits(model):
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def assert_same(one, other):
    found, wanted = bits(one), bits(other)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sums_formed_there_have_the_bits_of_the_kernels(tiny, tmp_path, dtype, rounding):
    target, base, retrained = tiny.target, tiny.base, tiny.retrained
    stored = save_vector(retrained - base, tmp_path / "vector", rank=2)
    plain, kept = (load_model(target, device=place) for place in (CPU, GPU))
    live = LiveModel(kept)
    for seed, point in enumerate(
        [target - 0.5 * (retrained - base), target - 1.5 * (retrained - base), target - 0.3 * stored, target]
    ):
        live.put(point, dtype=dtype, rounding=rounding, seed=seed)
        put(point, plain, dtype=dtype, rounding=rounding, seed=seed)
        assert_same(kept, plain)


def test_a_further_sum_waits_for_it_once(tiny):
    live = LiveModel(load_model(tiny.target, device=GPU))
    live.put(tiny.target - 0.5 * (tiny.retrained - tiny.base))
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        live.put(tiny.target - 0.75 * (tiny.retrained - tiny.base))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::_local_scalar_dense"] == 1


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("size", [1 << 6, 1 << 25])
def test_weights_in_host_memory_move_as_on_a_processor(tiny, monkeypatch, size, narrow):
    """Gradients come and weights go in pieces, beside the arithmetic: not one is late or left out."""
    monkeypatch.setattr(optimizers, "PIECE", size)
    plain, there = (load_model(tiny.target, device=place) for place in (CPU, GPU))
    kind = torch.bfloat16 if narrow else None
    both = [
        optimizers.HostAdamW(one, [{"params": list(one.parameters())}], 1e-2, kind) for one in (plain, there)
    ]
    for step in range(4):
        torch.manual_seed(step)
        for one, other in zip(plain.parameters(), there.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.to(GPU)
        for optimizer in both:
            optimizer.step()
        for one, other in zip(plain.parameters(), there.parameters(), strict=True):
            assert torch.equal(one, other.cpu())
    assert_same(there, plain)


def test_no_step_of_training_waits_for_it(tiny, rows):
    live = load_model(tiny.target, device=GPU)
    chosen = TrainingSettings(epochs=1, batch_size=8, learning_rate=1e-3)
    train(live, rows[0], PLAIN_OBJECTIVE, chosen, seed=0, pad_id=rows[1])
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as heard:
            train(live, rows[0], PLAIN_OBJECTIVE, chosen, seed=0, pad_id=rows[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    steps = len(rows[0]) // 8
    assert len(heard) < steps  # at the beginning and the end, and when figures are fetched


@pytest.mark.parametrize("optimizer", ["device", "host", "8bit"])
def test_training_there_leads_nearly_to_the_same_weights(tiny, rows, optimizer):
    if optimizer == "8bit":
        pytest.importorskip("bitsandbytes")
    chosen = TrainingSettings(
        epochs=2, batch_size=8, learning_rate=1e-3, precision="float32", optimizer=optimizer
    )
    moved = []
    for place in (CPU, GPU):
        live = load_model(tiny.target, device=place)
        before = torch.cat([value.flatten() for value in bits(live).values()])
        settings = chosen if place == GPU else chosen.model_copy(update={"optimizer": "device"})
        curve = train(live, rows[0], PLAIN_OBJECTIVE, settings, seed=0, pad_id=rows[1])
        moved.append((torch.cat([value.flatten() for value in bits(live).values()]) - before, curve[-1].loss))
    (plain, loss), (there, again) = moved
    assert again == pytest.approx(loss, rel=0.02)
    assert torch.cosine_similarity(plain, there, dim=0) > (0.9 if optimizer == "8bit" else 0.99)


def test_answers_and_likelihoods_are_alike(tiny, rows):
    plain, there = (load_model(tiny.target, device=place) for place in (CPU, GPU))
    prompts = [row.ids[: row.start] for row in rows[0]]
    limits = {"max_new_tokens": 4, "pad_id": rows[1], "stop_ids": []}
    found, wanted = (generate(one, prompts, **limits) for one in (there, plain))
    assert sum(one == other for one, other in zip(found, wanted, strict=True)) > 0.95 * len(wanted)
    scored, known = (score_rows(one, rows[0], pad_id=rows[1]) for one in (there, plain))
    for one, other in zip(scored, known, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-3)


def test_filters_made_there_are_those_of_a_processor(tiny, rows):
    found, wanted = (
        {
            key: value.double().cpu().numpy()
            for group in input_moments(load_model(tiny.target, device=place), rows[0], pad_id=rows[1])
            for key, value in group.values.items()
        }
        for place in (GPU, CPU)
    )
    for key, value in wanted.items():
        assert np.allclose(found[key], value, rtol=0, atol=1e-5 * np.abs(value).max())
        if value.ndim == 2:
            settings = {"mu": 10.0, "epsilon": 0.1}
            here, there = (
                least_squares(value, value, **settings),
                least_squares(value, value, **settings, device="cuda"),
            )
            assert np.allclose(here, there, rtol=0, atol=1e-9)
            axes, others = basis_of(value, energy=0.9), basis_of(value, energy=0.9, device="cuda")
            assert np.allclose(axes @ axes.T, others @ others.T, rtol=0, atol=1e-6)
