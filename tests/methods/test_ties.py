"""TIES: trim, elect a sign, average what has it; by hand, and as the whole method saves it."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from palinode.methods.two_runs import merge, trim


def test_trim_keeps_the_share_that_moved_most():
    change = np.array([[0.5, -3.0], [2.0, -0.1]])
    assert trim(change, 0.5).tolist() == [[0.0, -3.0], [2.0, 0.0]]
    assert trim(change, 1.0).tolist() == change.tolist()
    assert trim(change, 0.01).tolist() == [[0.0, -3.0], [0.0, 0.0]]  # one at least
    assert trim(np.array([1.0, -1.0, 0.5]), 1 / 3).tolist() == [1.0, -1.0, 0.0]  # as far as the last one


def test_merge_averages_the_changes_of_the_elected_sign():
    """Sums 4, −1, 3, 0 and 0: the sign of each, then the mean of what has it; a tie moves nothing."""
    over = np.array([3.0, -2.0, 3.0, 1.0, 0.0])
    under = np.array([1.0, 1.0, 0.0, -1.0, 0.0])
    assert merge([over, under], density=1.0).tolist() == [2.0, -2.0, 3.0, 0.0, 0.0]


def test_merge_trims_each_change_before_signs_are_elected():
    """Untrimmed the second weight would be elected positive: −2 + 2.5; trimmed away, −2 stands alone."""
    over, under = np.array([3.0, -2.0]), np.array([4.0, 2.5])
    assert merge([over, under], density=1.0).tolist() == [3.5, 2.5]
    assert merge([over, under], density=0.5).tolist() == [3.5, 0.0]
    assert merge([np.array([0.0, -2.0]), under], density=0.5).tolist() == [4.0, -2.0]


@pytest.mark.parametrize("lora", [False, True])
def test_saved_model_is_the_target_and_the_merged_change_of_both_models(
    recipe_of, sections, tiny, tmp_path, lora
):
    from palinode.pipeline.run import unlearn

    content = sections("ties")
    content["method_settings"] = {"density": 0.3, "strength": 0.5}
    content["training"] = {"epochs": 1} | ({"lora": {"rank": 2}} if lora else {})
    done = unlearn(recipe_of(tmp_path / "out", **content))
    assert set(done.record["training"]) == {"over", "under"}
    assert done.record["scales"] is None
    if lora:
        return
    target = load_file(tiny.target.folder / "model.safetensors")
    ends = [
        load_file(next((tmp_path / "out.workspace").glob(f"finetune-{name}-*/model/model.safetensors")))
        for name in ("over", "under")
    ]
    for name, value in load_file(done.output / "model.safetensors").items():
        wanted = target[name] + 0.5 * merge([end[name] - target[name] for end in ends], density=0.3)
        assert np.allclose(value, wanted, atol=1e-6), name
    assert any((ends[0][name] != ends[1][name]).any() for name in target)
