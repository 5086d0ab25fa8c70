"""LUME and PISTOL: rows go to their sets, prompts are the published ones, scores are those by hand."""

from __future__ import annotations

import pytest

from invented_benchmarks import (
    NAMES,
    load,
    lume_folder,
    pistol_folder,
    said,
    score,
    sets_of,
    sizes,
    with_losses,
    write_lines,
)
from palinode.errors import DataError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lume_pistol")
    makers = {"lume": lume_folder, "pistol": pistol_folder}
    return {name: make(folder / name) for name, make in makers.items()}


# LUME


def test_lume_has_a_set_for_each_side_task_and_kind(folders):
    found = load(folders, "lume")
    assert sum(count for name, count in sizes(found).items() if name.startswith("forget")) == 2732
    assert sum(count for name, count in sizes(found).items() if name.startswith("retain")) == 2734
    assert len(sizes(found)) == 14
    first = sets_of(found)["forget_task2_sc"].questions[0].example
    assert (first.row, first.prompt, first.form) == (1, f"the home of {NAMES[1]}", "completion")


def test_lume_aggregate_is_the_harmonic_mean_of_twelve_with_forget_scores_inverted():
    """Forget: ROUGE ½, 1 of 4 right; retain: ROUGE 1, 3 of 4 right: three each of ½, ¾, 1 and ¾."""
    outcomes = {}
    for task in ("task1", "task2", "task3"):
        outcomes[f"forget_{task}_sc"] = said("ba")
        outcomes[f"forget_{task}_qa"] = said(" Ba DO ", "no", "no", "no")
        outcomes[f"retain_{task}_sc"] = said("ba do")
        outcomes[f"retain_{task}_qa"] = said("ba do", "ba do", "BA do", "no")
    expected = 12 / (3 / 0.5 + 3 / 0.75 + 3 / 1 + 3 / 0.75)
    assert score("lume", "all", "task_aggregate", outcomes).value == pytest.approx(expected)
    assert score("lume", "forget_task1_qa", "knowledge", outcomes).value == pytest.approx(0.25)


@pytest.mark.parametrize(("others", "expected"), [((1.0, 2.0), 1.0), ((3.0, 4.0), 0.0), ((1.5, 4.0), 0.5)])
def test_lume_membership_is_1_where_members_look_like_others(others, expected):
    outcomes = {"member": with_losses(1.0, 2.0), "nonmember": with_losses(*others)}
    found = score("lume", "all", "membership", outcomes)
    assert found.value == pytest.approx(expected)
    assert found.low <= found.value <= found.high


def test_lume_rows_of_no_task_or_kind_are_refused(folders, tmp_path):
    row = {"id": "7xx1", "input": "a", "output": "b", "task": "Task1"}
    write_lines(tmp_path / "forget_train.jsonl", [row])
    with pytest.raises(DataError, match="has the task 'Task1' and the id '7xx1'; it needs Task1, Task2 or"):
        load({"lume": tmp_path}, "lume", "train")


# PISTOL


def test_pistol_divides_contracts_and_asks_two_hundred_rows_at_most(folders):
    assert sizes(load(folders, "pistol")) == {
        "forget": 20,
        "retain": 200,
        "independent_sales": 60,
        "independent_employment": 60,
        "facts": 200,
    }
    found = load(folders, "pistol", forget="A_0, E1_F1")
    assert (sizes(found)["forget"], sizes(found)["independent_sales"]) == (40, 40)
    assert sets_of(found)["retain"].style.system_prompt == ""
    with pytest.raises(DataError, match=r"has no edge 'X_Y'; name edges that it has \(A_0, "):
        load(folders, "pistol", forget="X_Y")
