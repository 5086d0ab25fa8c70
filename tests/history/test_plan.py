"""The planner: distances worked by hand, the solver against brute force, and thinning as training goes on."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from palinode.errors import RecipeError
from palinode.history.plan import Wish, expected_distance, plan, solved_steps, thin, uniform_steps


def wish(**changes) -> Wish:
    return Wish(**{"steps": 100, "every": 10, "checkpoint_bytes": 10, "budget_bytes": 30, **changes})


def test_expected_distance_of_equal_parts_is_half_a_part():
    # ten parts of 10 steps, exposures anywhere: 5 steps on average
    assert expected_distance(wish(), list(range(10, 100, 10))) == pytest.approx(5.0)
    # parts of 25 and 75: (25² + 75²) / (2 · 100)
    assert expected_distance(wish(), [25]) == pytest.approx((25**2 + 75**2) / 200)


def test_expected_distance_for_recent_interest_is_the_integral():
    recent = wish(interest="recent", half_life=20.0)
    at = np.linspace(0, 100, 200_001)
    density = np.exp2(-(100 - at) / 20)
    before = np.where(at >= 60, 60, np.where(at >= 30, 30, 0))
    by_sum = ((at - before) * density).sum() / density.sum()
    assert expected_distance(recent, [30, 60]) == pytest.approx(by_sum, rel=1e-4)


@pytest.mark.parametrize("interest", ["uniform", "recent"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_solved_schedule_is_the_best_there_is(interest, count):
    wanted = wish(interest=interest, half_life=15.0)
    best = min(expected_distance(wanted, kept) for kept in combinations(wanted.saves, count))
    assert expected_distance(wanted, solved_steps(wanted, count)) == pytest.approx(best)


def test_uniform_schedules_by_hand():
    assert uniform_steps(wish(), 4) == [20, 40, 60, 80]


def test_budget_is_kept_and_the_best_schedule_comes_first():
    schedules = plan(wish(budget_bytes=45))
    assert {schedule.name for schedule in schedules} == {"uniform", "thinning", "solved"}
    assert all(len(schedule.kept) == 4 and schedule.bytes == 40 for schedule in schedules)
    assert schedules[0].expected == min(schedule.expected for schedule in schedules)
    solved = next(schedule for schedule in schedules if schedule.name == "solved")
    assert (solved.kept, solved.worst) == ((20, 40, 60, 80), 20)
    assert solved.expected == pytest.approx(10.0)
    assert solved.without == pytest.approx(0.2)


def test_more_budget_than_saves_keeps_every_save():
    schedules = plan(wish(budget_bytes=10_000))
    assert {schedule.kept for schedule in schedules} == {tuple(range(10, 100, 10))}


def test_recent_interest_keeps_more_of_the_end():
    uniform, recent = (solved_steps(wish(interest=name, half_life=10.0), 3) for name in ("uniform", "recent"))
    assert sum(recent) > sum(uniform)


def test_thinning_throws_out_the_one_that_is_missed_least_and_keeps_the_newest():
    # leaving out 30 costs (30 − 20)·(40 − 30), the least: 20 would cost (20 − 0)·(30 − 20)
    assert thin([20, 30, 40, 100], 3, wish(), now=100) == [20, 40, 100]
    assert thin([20, 30], 1, wish(), now=30) == [30]
    assert thin([20, 30], 5, wish(), now=30) == [20, 30]


def test_thinning_never_holds_more_than_the_budget_and_spreads_over_the_training():
    wanted = wish(steps=1000, every=10, budget_bytes=80)
    kept: list[int] = []
    for step in wanted.saves:
        kept = thin([*kept, step], wanted.room, wanted, now=step)
        assert len(kept) <= 8
        assert kept[-1] == step
    assert expected_distance(wanted, kept) < 2 * expected_distance(wanted, solved_steps(wanted, 8))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget_bytes": 5}, "no room for one"),
        ({"every": 200}, "a save every 200 steps is none before the end"),
        ({"every": 100}, "save more often"),
        ({"interest": "old"}, "no interest 'old'; say uniform or recent"),
        ({"half_life": 0.0}, "half-life is 0"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_impossible_wishes_are_refused(changes, said):
    with pytest.raises(RecipeError, match=said):
        wish(**changes)


def test_callback_thins_what_a_real_trainer_saves(tmp_path, tiny):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from palinode.history.callback import ThinningCallback, saved_steps

    def train(folder, callback, **options):
        model = AutoModelForCausalLM.from_pretrained(tiny.base.folder)
        data = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 12, "labels": [[3, 4, 5]] * 12})
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=12,
            save_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            **options,
        )
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        return sorted(saved_steps(folder))

    wanted = Wish(steps=12, every=2, checkpoint_bytes=1, budget_bytes=3)
    kept = train(tmp_path / "thin", ThinningCallback(wanted))
    assert len(kept) == 3
    assert kept[-1] == 12
    assert train(tmp_path / "plan", ThinningCallback(wanted, kept=[4, 8])) == [4, 8, 12]
    with pytest.raises(RecipeError, match="save_total_limit is 2"):
        train(tmp_path / "both", ThinningCallback(wanted), save_total_limit=2)
