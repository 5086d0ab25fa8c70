"""The Trainer's order, against real trainings (one process) and accelerate's own loaders (several)."""

from __future__ import annotations

import dataclasses
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from palinode.errors import DataError, RecipeError
from palinode.history.locating import steps_of
from palinode.history.orders import JoinedOrder, TrainerOrder, read_order

sys.path.insert(0, str(Path(__file__).parent))
import trainings
from trainings import TEXTS

ROWS = len(TEXTS)


def rebuilt(order, first=1):
    return {step: order.rows(step) for step in range(first, order.steps + 1)}


# One process: real trainings


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"num_train_epochs": 2}, TrainerOrder(ROWS, 4, epochs=2)),
        (
            {"num_train_epochs": 2, "seed": 7, "gradient_accumulation_steps": 3},
            TrainerOrder(ROWS, 4, epochs=2, seed=7, accumulation=3),
        ),
        (
            {"max_steps": 21, "data_seed": 5, "dataloader_drop_last": True},
            TrainerOrder(ROWS, 4, max_steps=21, seed=5, drop_last=True),
        ),
        (
            {"num_train_epochs": 1.5, "train_sampling_strategy": "sequential", "dataloader_num_workers": 2},
            TrainerOrder(ROWS, 4, epochs=1.5, shuffle=False),
        ),
    ],
    ids=["plain", "accumulation", "drop_last", "sequential"],
)
def test_order_of_a_real_training_batch_by_batch(tmp_path, options, order):
    assert rebuilt(order) == trainings.train(tmp_path, dict(options), log=False)
    arguments = trainings.arguments(tmp_path, options)
    assert TrainerOrder.from_arguments(arguments, ROWS).rows(3) == order.rows(3)


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 3}, {"ignore_data_skip": True}])
def test_order_of_a_resumed_training(tmp_path, more):
    saving = {"save_strategy": "steps", "save_steps": 3}
    options = {"num_train_epochs": 3, **more}
    trainings.train(tmp_path, {**options, **saving, "max_steps": 6}, log=False)
    seen = trainings.train(tmp_path, {**options, "resume": 6}, log=False)
    arguments = trainings.arguments(tmp_path, options)
    order = TrainerOrder.from_arguments(arguments, ROWS, resumed_from=6)
    assert rebuilt(order, 7) == seen


def test_order_of_a_training_that_went_on_with_another_batch_size(tmp_path):
    trainings.train(tmp_path, {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}, log=False)
    seen = trainings.train(
        tmp_path, {"num_train_epochs": 2, "per_device_train_batch_size": 5, "resume": 4}, log=False
    )
    later = TrainerOrder(ROWS, 5, epochs=2, resumed_from=4)
    order = JoinedOrder(((0, TrainerOrder(ROWS, 4, max_steps=4)), (4, later)))
    assert {step: order.rows(step) for step in seen} == seen
    assert order.rows(4) == TrainerOrder(ROWS, 4).rows(4)


# Several processes: the loaders that the Trainer would have there


def loaders(order: TrainerOrder):
    for rank in range(order.world_size):
        plain = DataLoader(
            range(order.row_count),
            batch_size=order.batch_size,
            shuffle=order.shuffle,
            drop_last=order.drop_last,
        )
        yield prepare_data_loader(
            plain,
            num_processes=order.world_size,
            process_index=rank,
            split_batches=order.split_batches,
            even_batches=order.even_batches,
            use_seedable_sampler=True,
            data_seed=order.seed,
        )


def as_trained(order: TrainerOrder) -> dict[int, list[int]]:
    """Go through the loaders as the Trainer's loop does."""
    prepared = list(loaders(order))
    per_epoch = -(-len(prepared[0]) // order.accumulation)
    begun, done = divmod(order.resumed_from, per_epoch)
    step, found = order.resumed_from, {}
    for epoch in range(begun, int(order.epochs)):
        parts = prepared
        if epoch == begun and done:
            parts = [skip_first_batches(loader, done * order.accumulation) for loader in prepared]
        rounds = []
        for loader in parts:
            loader.set_epoch(epoch)
            rounds.append([batch.tolist() for batch in loader])
        together = [list(chain(*batches)) for batches in zip(*rounds, strict=True)]
        for begin in range(0, len(together), order.accumulation):
            step += 1
            found[step] = list(chain(*together[begin : begin + order.accumulation]))
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulation": 2},
        {"drop_last": True},
        {"world_size": 3, "batch_size": 5},
        {"row_count": 40, "world_size": 4, "batch_size": 5},
        {"row_count": 5, "world_size": 4, "batch_size": 3},
        {"split_batches": True, "batch_size": 8},
        {"split_batches": True, "batch_size": 8, "drop_last": True},
        {"shuffle": False},
        {"resumed_from": 5},
        {"resumed_from": 7, "accumulation": 2},
        {"resumed_from": 8, "world_size": 3, "batch_size": 3},
    ],
    ids=str,
)
def test_order_over_several_processes_is_that_of_accelerates_loaders(changes):
    order = dataclasses.replace(TrainerOrder(ROWS, 4, epochs=3, world_size=2), **changes)
    expected = as_trained(order)
    assert max(expected) == order.steps
    assert rebuilt(order, order.resumed_from + 1) == expected


@pytest.mark.slow
def test_order_of_a_real_training_in_two_processes(tmp_path):
    from test_callback import run_two

    parts = run_two(tmp_path, {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "log": False})
    order = TrainerOrder(ROWS, 4, epochs=2, world_size=2, accumulation=2)
    for step in range(1, order.steps + 1):
        assert sorted(order.rows(step)) == sorted(row for part in parts for row in part[str(step)])


# By hand, and refusals


def test_order_by_hand():
    shuffled = torch.randperm(5, generator=torch.Generator().manual_seed(42 + 1)).tolist()
    order = TrainerOrder(5, 2, epochs=2)
    assert (order.epoch_steps, order.steps) == (3, 6)
    assert [order.rows(step) for step in (4, 5, 6)] == [shuffled[:2], shuffled[2:4], shuffled[4:]]


def test_steps_of_rows():
    order = TrainerOrder(5, 2, epochs=2, shuffle=False)
    assert steps_of(order, [0, 3, 9]) == {0: [1, 4], 3: [2, 5], 9: []}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is 'group_by_length'"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler is off"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches is on"),
    ],
)
def test_orders_that_cannot_be_rebuilt_are_refused(tmp_path, options, words):
    with pytest.raises(DataError, match=words):
        TrainerOrder.from_arguments(trainings.arguments(tmp_path, options), ROWS)


def test_impossible_settings_are_refused():
    with pytest.raises(DataError, match="batch_size is 0"):
        TrainerOrder(5, 0)
    with pytest.raises(DataError, match="batch_size 5 cannot be split over 2"):
        TrainerOrder(5, 5, world_size=2, split_batches=True)
    with pytest.raises(DataError, match="make no whole batch"):
        TrainerOrder(5, 6, drop_last=True)
    with pytest.raises(DataError, match="there is no step 0 in this order; it has the steps 1 to 9"):
        TrainerOrder(5, 2).rows(0)
    with pytest.raises(DataError, match="begin with 0, and grow"):
        JoinedOrder(((3, TrainerOrder(5, 2)),))


def test_an_order_is_read_from_a_file(tmp_path):
    path = tmp_path / "order.toml"
    path.write_text('kind = "trainer"\nrow_count = 37\nbatch_size = 4\nepochs = 2\n')
    assert read_order(path) == TrainerOrder(37, 4, epochs=2)
    path.write_text(
        '[[part]]\nkind = "trainer"\nrow_count = 37\nbatch_size = 4\nmax_steps = 4\n'
        '[[part]]\nafter = 4\nkind = "trainer"\nrow_count = 37\nbatch_size = 5\nresumed_from = 4\n'
    )
    assert read_order(path).rows(5) == TrainerOrder(37, 5).rows(5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('kind = "sorted"', "the kinds of order are trainer, olmo_core, neox"),
        ('kind = "trainer"\nrows = 3', "trainer does not know 'rows'"),
        ('kind = "trainer"\nrow_count = 3', "missing 1 required positional argument: 'batch_size'"),
        ('kind = "trainer"\nrow_count = 3\nbatch_size = 0', "batch_size is 0"),
        ("kind = ", "is not a TOML order"),
    ],
)
def test_an_order_file_that_says_something_else_is_refused(tmp_path, content, words):
    path = tmp_path / "order.toml"
    path.write_text(content)
    with pytest.raises((RecipeError, DataError), match=words):
        read_order(path)
