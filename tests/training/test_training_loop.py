"""The loop: steps that do not depend on how they were cut, runs that do not depend on interruptions."""

from __future__ import annotations

import signal

import pytest
import torch
from pydantic import ValidationError
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import GPT2Config, GPT2LMHeadModel

from palinode.data.tokenize import TokenRow
from palinode.errors import DataError, DivergenceError
from palinode.models import load_model
from palinode.models.reading import answer_nll
from palinode.settings import TrainingSettings
from palinode.training.loop import count_steps, learning_rate_at, train
from palinode.training.losses import scored_tokens, summed_nll
from palinode.training.objectives import PLAIN_OBJECTIVE, Objective, Term
from palinode.training.optimizers import use_autocast

CPU = torch.device("cpu")


def rows_of(*lengths: tuple[int, int]) -> list[TokenRow]:
    """Rows of so many prompt and answer tokens, all ids different from row to row."""
    random = torch.Generator().manual_seed(0)
    return [
        TokenRow(tuple(torch.randint(3, 150, (prompt + answer,), generator=random).tolist()), prompt, place)
        for place, (prompt, answer) in enumerate(lengths)
    ]


ROWS = rows_of((3, 1), (4, 2), (2, 5), (6, 1), (3, 3), (5, 2), (1, 4), (2, 1))


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(
        **{"epochs": 3, "learning_rate": 1e-3, "batch_size": 2, "precision": "float32", **changes}
    )


@pytest.fixture
def fresh(tiny):
    """A function that loads the tiny base anew."""
    return lambda: load_model(tiny.base, device=CPU)


def dropout_model():
    """A tiny GPT-2, which has dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=200, n_positions=64, bos_token_id=1, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


def plain(name, total, weight=scored_tokens):
    """Ordinary fine-tuning on rows of one role, with this sum of contributions."""
    term = Term(name, ("rows",), lambda model, batch, _frozen: total(model, batch), weight)
    return Objective((term,), anchor="rows")


def run(model, chosen=None, *, rows=ROWS, loss=PLAIN_OBJECTIVE, seed=0, **others):
    return train(model, rows, loss, chosen or settings(), seed=seed, pad_id=0, **others)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def held_in(state, model):
    """The weights that a saved state holds of such a model."""
    held = {"model": {name: value.data for name, value in model.named_parameters()}}
    with pytest.warns(UserWarning, match="intent is to load in a single process"):
        load(held, checkpoint_id=state, no_dist=True)
    return held["model"]


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# The steps


def test_rate_rises_linearly_to_its_peak_and_falls_linearly_towards_zero():
    rates = [learning_rate_at(step, total=10, warmup=2, peak=8.0) for step in range(10)]
    assert rates == [4.0, 8.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


def test_rate_without_warm_up_begins_at_its_peak():
    assert [learning_rate_at(step, 4, 0, 1.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_rate_of_a_run_that_is_all_warm_up_never_falls():
    assert [learning_rate_at(step, 3, 3, 3.0) for step in range(3)] == [1.0, 2.0, 3.0]


def test_curve_has_the_scheduled_rates(fresh):
    curve = run(fresh(), settings(epochs=2, warmup_epochs=1.0, learning_rate=4e-4))
    assert [point.learning_rate for point in curve] == pytest.approx(
        [1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 3e-4, 2e-4, 1e-4]
    )
    assert [point.step for point in curve] == list(range(8))


@pytest.mark.parametrize(
    ("rows", "batch_size", "accumulation", "steps"),
    [(8, 2, 1, 4), (9, 2, 1, 5), (8, 2, 2, 2), (9, 2, 2, 3), (3, 4, 8, 1)],
)
def test_steps_are_counted_as_they_are_taken(fresh, rows, batch_size, accumulation, steps):
    chosen = settings(epochs=2, batch_size=batch_size, accumulation=accumulation)
    examples = (ROWS + ROWS)[:rows]
    assert count_steps([len(row.ids) for row in examples], chosen) == 2 * steps
    assert len(run(fresh(), chosen, rows=examples)) == 2 * steps


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (3, 3), (2, 4), (1, 8)])
def test_accumulated_micro_batches_give_the_weights_of_one_large_batch(fresh, batch_size, accumulation):
    """Each step holds all eight rows, whose answers have 1 to 5 tokens: a mean of means would differ."""
    large, cut = fresh(), fresh()
    whole = run(large, settings(batch_size=8))
    parts = run(cut, settings(batch_size=batch_size, accumulation=accumulation))
    assert [point.loss for point in parts] == pytest.approx([point.loss for point in whole], rel=1e-5)
    assert [point.grad_norm for point in parts] == pytest.approx(
        [point.grad_norm for point in whole], rel=1e-4
    )
    for name, value in weights(large).items():
        torch.testing.assert_close(weights(cut)[name], value, rtol=0, atol=1e-5)


def test_weight_decay_shrinks_matrices_and_nothing_else(fresh):
    """With a gradient of zero, AdamW multiplies what it decays by 1 - rate * decay."""
    still = plain("still", lambda model, batch: 0.0 * answer_nll(model, batch).sum(), lambda batch: 1.0)
    model = fresh()
    before = weights(model)
    run(
        model,
        settings(epochs=1, batch_size=8, warmup_epochs=0, learning_rate=0.1, weight_decay=0.5),
        loss=still,
    )
    for name, value in weights(model).items():
        factor = 1 - 0.1 * 0.5 if value.ndim == 2 else 1.0
        torch.testing.assert_close(value, factor * before[name], rtol=1e-6, atol=0)


def test_gradients_longer_than_the_limit_are_scaled_down_to_it(fresh):
    """The first step of AdamW moves by the rate whatever the gradient's length; the second tells."""
    loose, tight = fresh(), fresh()
    free = run(loose, settings(max_grad_norm=1e6))
    clipped = run(tight, settings(max_grad_norm=1e-3))
    assert free[0].grad_norm == clipped[0].grad_norm > 1e-3  # the curve has the length before clipping
    assert not torch.equal(weights(loose)["model.norm.weight"], weights(tight)["model.norm.weight"])


def test_training_lowers_the_loss_and_leaves_the_model_ready_for_use(fresh):
    model = fresh()
    curve = run(model, settings(epochs=10, learning_rate=3e-3))
    assert curve[-1].loss < 0.5 * curve[0].loss
    assert not model.training


def test_same_seed_gives_the_same_bits_and_another_seed_another_order(fresh):
    first, again, other = fresh(), fresh(), fresh()
    run(first)
    run(again)
    run(other, seed=1)
    assert_same_bits(weights(first), weights(again))
    assert not torch.equal(first.model.norm.weight, other.model.norm.weight)


def test_rows_longer_than_the_model_are_refused():
    with pytest.raises(DataError, match=r"a row has 65 tokens and the model takes at most 64"):
        run(dropout_model(), rows=rows_of((60, 5)))


# Precision


def test_weights_and_gradients_stay_float32_under_bfloat16_autocast(fresh):
    model, seen = fresh(), set()
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))

    def total(live, batch):
        value = summed_nll(live, batch)
        seen.add(value.dtype)
        return value

    run(model, settings(precision="bfloat16", epochs=1), loss=plain("watched", total))
    assert seen == {torch.bfloat16, torch.float32}  # what the head gives, and the loss
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_bfloat16_steps_smaller_than_its_spacing_are_not_lost(fresh):
    """A step of 1e-6 is far below the spacing of bfloat16 numbers near 1 (2^-7)."""
    model = fresh()
    before = weights(model)["model.norm.weight"]
    run(model, settings(precision="bfloat16", epochs=1, learning_rate=1e-6, batch_size=8, warmup_epochs=0))
    assert (weights(model)["model.norm.weight"] != before).float().mean() > 0.5


def test_autocast_is_off_for_small_models_unless_asked_for(fresh):
    model = fresh()
    assert not use_autocast(model, settings(precision="auto"))
    assert not use_autocast(model, settings(precision="float32"))
    assert use_autocast(model, settings(precision="bfloat16"))


# Interruptions


def interrupted_at(tokens: int):
    """A progress function that presses Ctrl-C once so many tokens have been trained on."""
    heard = 0

    def advance(amount: int) -> None:
        nonlocal heard
        heard += amount
        if heard >= tokens:
            raise KeyboardInterrupt

    return advance


@pytest.mark.parametrize("tokens", [1, 40, 100])
@pytest.mark.parametrize("architecture", ["llama", "gpt2 with dropout"])
def test_interrupted_run_goes_on_to_the_weights_of_an_undisturbed_one(fresh, tmp_path, tokens, architecture):
    new = fresh if architecture == "llama" else dropout_model
    undisturbed, first, second = new(), new(), new()
    whole = run(undisturbed)
    with pytest.raises(KeyboardInterrupt):
        run(first, state=tmp_path / "state", on_progress=interrupted_at(tokens))
    heard = []
    resumed = run(second, state=tmp_path / "state", on_progress=heard.append)
    assert resumed == whole
    assert_same_bits(weights(second), weights(undisturbed))
    assert sum(heard) == 3 * sum(len(row.ids) for row in ROWS)  # the bar starts where it was


def test_run_interrupted_within_a_forward_pass_goes_on_alike(tmp_path):
    undisturbed, first, second = dropout_model(), dropout_model(), dropout_model()
    run(undisturbed)
    calls = []

    def total(model, batch):
        value = summed_nll(model, batch)  # has used up random numbers
        calls.append(value)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return value

    with pytest.raises(KeyboardInterrupt):
        run(first, loss=plain("interrupted", total), state=tmp_path / "state")
    run(second, state=tmp_path / "state")
    assert_same_bits(weights(second), weights(undisturbed))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_that_comes_while_weights_are_updated_waits_for_the_end_of_the_step(fresh, tmp_path, number):
    undisturbed, first, second = fresh(), fresh(), fresh()
    whole = run(undisturbed)
    updates = []

    def hook(*_):
        updates.append(number)
        if len(updates) == 3:
            signal.raise_signal(number)

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    handle = register_optimizer_step_post_hook(hook)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(first, state=tmp_path / "state")
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        handle.remove()
        signal.signal(signal.SIGTERM, before)
    assert run(second, state=tmp_path / "state") == whole
    assert_same_bits(weights(second), weights(undisturbed))


def test_state_is_saved_while_training_goes_on(fresh, tmp_path):
    """What a killed run leaves: here every step, as `save_minutes` is next to nothing."""
    undisturbed, first, second = fresh(), fresh(), fresh()
    whole = run(undisturbed)
    state, kept = tmp_path / "state", tmp_path / "kept"

    def advance(_amount):
        if state.exists() and not kept.exists():
            state.rename(kept)

    run(first, settings(save_minutes=1e-9), state=state, on_progress=advance)
    assert len(list(kept.iterdir())) > 2
    assert run(second, state=kept) == whole
    assert_same_bits(weights(second), weights(undisturbed))


def test_run_killed_while_one_state_takes_the_place_of_another_goes_on_from_the_older(fresh, tmp_path):
    undisturbed, first, second = fresh(), fresh(), fresh()
    run(undisturbed)
    with pytest.raises(KeyboardInterrupt):
        run(first, state=tmp_path / "state", on_progress=interrupted_at(40))
    (tmp_path / "state").rename(tmp_path / ".state.old")
    heard = []
    run(second, state=tmp_path / "state", on_progress=heard.append)
    assert heard[0] >= 40
    assert_same_bits(weights(second), weights(undisturbed))


def test_run_interrupted_before_its_first_step_leaves_no_state(fresh, tmp_path):
    def total(model, batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(fresh(), loss=plain("interrupted", total), state=tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


# Divergence


def test_loss_that_is_not_finite_stops_the_run_at_its_step_and_keeps_the_state_before_it(fresh, tmp_path):
    calls = []

    def total(model, batch):
        calls.append(batch)
        value = summed_nll(model, batch)
        return value * float("nan") if len(calls) == 6 else value

    good, bad = fresh(), fresh()
    with pytest.raises(
        DivergenceError, match=r"at step 6 of 12; lower the learning rate \(now 0\.001\); .*state"
    ):
        run(bad, loss=plain("poisoned", total), state=tmp_path / "state")
    with pytest.raises(KeyboardInterrupt):
        run(good, on_progress=interrupted_after(5))
    assert_same_bits(weights(bad), weights(good))
    kept = held_in(tmp_path / "state", fresh())
    assert torch.equal(kept["model.norm.weight"], good.model.norm.weight)


def interrupted_after(steps: int):
    heard = []

    def advance(amount):
        heard.append(amount)
        if len(heard) == steps:
            raise KeyboardInterrupt

    return advance


def test_absurd_learning_rate_is_a_divergence_and_leaves_finite_weights(fresh, tmp_path):
    model = fresh()
    with pytest.raises(DivergenceError, match=r"at step [2-4] of 12; lower the learning rate \(now 1e\+30\)"):
        run(model, settings(learning_rate=1e30), state=tmp_path / "state")
    kept = held_in(tmp_path / "state", fresh())
    assert all(bool(torch.isfinite(value).all()) for value in kept.values())


def test_poisoned_weights_are_named_as_the_cause(fresh):
    model = fresh()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(
        DivergenceError, match=r"before the first step is taken; does the checkpoint hold NaN"
    ):
        run(model)


# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": 3},
        {"epochs": 0},
        {"epochs": 1.5},
        {"epochs": "3"},
        {"epochs": True},
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"learning_rate": "1e-5"},
        {"warmup_epochs": float("inf")},
        {"weight_decay": -0.1},
        {"batch_size": 0},
        {"accumulation": 0},
        {"max_length": 7},
        {"precision": "float16"},
        {"save_minutes": 0},
    ],
)
def test_settings_refuse_unknown_keys_and_impossible_values(wrong):
    with pytest.raises(ValidationError):
        TrainingSettings(**wrong)


def test_whole_numbers_are_taken_where_fractions_are_meant():
    assert TrainingSettings(learning_rate=1, warmup_epochs=2).learning_rate == 1.0


def test_settings_are_the_papers_unless_given():
    assert TrainingSettings().model_dump() == {
        "epochs": 10,
        "learning_rate": 1e-5,
        "batch_size": 4,
        "accumulation": 1,
        "warmup_epochs": 1.0,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "max_length": 512,
        "precision": "auto",
        "optimizer": "auto",
        "tokens_per_pass": None,
        "gradient_checkpointing": False,
        "compile": False,
        "save_minutes": 5.0,
        "lora": None,
    }
