"""The checkpoint series: steps from names and trainer states, order, tokens in between, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest

from palinode.errors import CheckpointError, MismatchError, RecipeError
from palinode.history.series import (
    CheckpointSeries,
    SeriesCheckpoint,
    open_series,
    read_step,
    read_tokens,
    step_of,
)


@pytest.fixture
def stairs(tiny, tmp_path):
    """A folder with copies of the tiny world's checkpoints under these names."""

    def build(*names: str):
        for name in names:
            shutil.copytree(tiny.base.folder, tmp_path / name)
        return tmp_path

    return build


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("step1000", 1000),
        ("global_step143000", 143000),
        ("stage1-step140000-tokens294B", 140000),
        ("step1000-tokens4B", 1000),
        ("iter_0001200", 1200),
        ("1200", 1200),
        ("main", None),
        ("step4B", None),
        ("llama-3-8b", None),
        ("footstep-7", None),
    ],
)
def test_step_is_read_from_the_names_that_trainers_give(name, step):
    assert read_step(name) == step


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("step1000-tokens4B", 4 * 10**9), ("tokens-1.5T", 15 * 10**11), ("step7", None), ("tokens300", 300)],
)
def test_tokens_are_read_from_names(name, tokens):
    assert read_tokens(name) == tokens


def test_folder_is_sorted_by_step_and_not_by_letter(stairs):
    folder = stairs("checkpoint-1000", "checkpoint-200", "checkpoint-30")
    assert [checkpoint.step for checkpoint in open_series(folder).checkpoints] == [30, 200, 1000]


def test_pattern_picks_folders_and_hidden_ones_are_left_out(stairs):
    folder = stairs("step1", "step2", "best-step2", ".step9.partial")
    assert [checkpoint.step for checkpoint in open_series(folder, pattern="step*").checkpoints] == [1, 2]
    with pytest.raises(RecipeError, match="both of step 2"):
        open_series(folder)


def test_steps_come_from_the_trainer_state_where_the_name_is_silent(stairs):
    folder = stairs("early", "late")
    for name, step in (("early", 40), ("late", 90)):
        state = {"global_step": step, "num_input_tokens_seen": 100 * step}
        (folder / name / "trainer_state.json").write_text(json.dumps(state))
    assert [(checkpoint.step, checkpoint.tokens) for checkpoint in open_series(folder).checkpoints] == [
        (40, 4000),
        (90, 9000),
    ]


def test_name_and_trainer_state_that_disagree_are_refused(stairs):
    folder = stairs("checkpoint-40")
    (folder / "checkpoint-40" / "trainer_state.json").write_text('{"global_step": 50}')
    with pytest.raises(RecipeError, match=r"step 40 by its name and of step 50 by its trainer_state\.json"):
        open_series(folder)


def test_unknown_step_asks_for_steps_and_given_steps_serve(stairs):
    folder = stairs("early", "late")
    with pytest.raises(RecipeError, match=r"is not known.*give all steps with --steps of locate"):
        open_series(folder)
    assert [checkpoint.step for checkpoint in open_series(folder, steps=[1, 2]).checkpoints] == [1, 2]
    with pytest.raises(RecipeError, match="3 steps were given for 2 checkpoints"):
        open_series(folder, steps=[1, 2, 3])
    with pytest.raises(RecipeError, match="out of order"):
        open_series(folder, steps=[2, 1])


def test_list_out_of_order_is_refused(stairs):
    folder = stairs("step1", "step2")
    with pytest.raises(RecipeError, match=r"out of order: step1 \(step 1\) comes after step2"):
        open_series([folder / "step2", folder / "step1"])
    named = open_series(f"{folder / 'step1'}, {folder / 'step2'}")
    assert [checkpoint.step for checkpoint in named.checkpoints] == [1, 2]


def test_checkpoints_of_different_models_are_refused(stairs):
    folder = stairs("step1", "step2")
    config = folder / "step2" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "model_type": "gpt2"}))
    with pytest.raises(MismatchError, match=r"a llama model and .*step2 a gpt2 model"):
        open_series(folder)


def test_other_shapes_are_refused(stairs, world):
    from palinode.benchmarks.demo import tiny_model

    folder = stairs("step1")
    tiny_model(folder / "step2", world.vocabulary, width=64, layers=2, seed=0)
    with pytest.raises(MismatchError, match="is not a checkpoint of the same training"):
        open_series(folder)


def test_empty_and_missing_places_are_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        open_series(tmp_path)
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere; name a folder of checkpoints"):
        open_series(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="the series is empty"):
        open_series([])
    with pytest.raises(CheckpointError, match=r"revisions of org/model could not be listed"):
        open_series("org/model@step*")


def test_hub_revisions_are_checkpoints_that_are_not_fetched_until_opened():
    series = open_series("org/model@step1000-tokens4B,org/model@step2000-tokens8B")
    assert [(checkpoint.step, checkpoint.tokens) for checkpoint in series.checkpoints] == [
        (1000, 4 * 10**9),
        (2000, 8 * 10**9),
    ]
    with pytest.raises(CheckpointError, match="org/model@step2000-tokens8B is no local folder"):
        series.open(1)


def test_last_checkpoint_before_a_step_has_not_been_through_it():
    series = CheckpointSeries(
        (SeriesCheckpoint(10, "a"), SeriesCheckpoint(20, "b"), SeriesCheckpoint(30, "c"))
    )
    assert [series.last_before(step) for step in (1, 10, 11, 20, 21, 99)] == [None, None, 0, 0, 1, 2]


def test_tokens_between_checkpoints_lie_on_straight_lines():
    series = CheckpointSeries(
        (SeriesCheckpoint(10, "a", 1000), SeriesCheckpoint(20, "b", None), SeriesCheckpoint(30, "c", 5000))
    )
    # 100 tokens a step up to step 10, then 200 a step, and so on beyond the last
    assert [series.tokens_at(step) for step in (0, 5, 10, 20, 30, 40)] == [0, 500, 1000, 3000, 5000, 7000]
    assert CheckpointSeries((SeriesCheckpoint(10, "a"),)).tokens_at(5) is None


def test_tokens_per_step_fill_in(stairs):
    series = open_series(stairs("step2", "step5"), tokens_per_step=64)
    assert [checkpoint.tokens for checkpoint in series.checkpoints] == [128, 320]
    assert series.notes == ()


def test_targets_step_is_that_of_its_checkpoint_or_name(stairs):
    folder = stairs("step2", "step5", "final")
    series = open_series(folder, pattern="step*")
    assert step_of(str(folder / "step5"), series) == 5
    assert step_of(str(folder / "final"), series) is None
    (folder / "final" / "trainer_state.json").write_text('{"global_step": 9}')
    assert step_of(str(folder / "final"), series) == 9
