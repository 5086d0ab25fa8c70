"""RWKU and Hubble: rows go to their sets, prompts are the published ones, scores are those by hand."""

from __future__ import annotations

import json

import pytest

from invented_benchmarks import (
    NAMES,
    hubble_folder,
    load,
    rwku_folder,
    said,
    score,
    sets_of,
    sizes,
    with_losses,
    write_lines,
)
from palinode.benchmarks.pretraining import prompt
from palinode.errors import DataError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining")
    makers = {"rwku": rwku_folder, "hubble": hubble_folder}
    return {name: make(folder / name) for name, make in makers.items()}


# RWKU


def test_rwku_has_the_published_numbers_of_rows_and_divides_level_3_by_how_answers_begin(folders):
    found = load(folders, "rwku")
    level3 = sizes(found).pop("forget_level3") + sizes(found).pop("forget_level3_suffix")
    assert level3 == 6984
    assert sizes(found) | {"forget_level3": 0, "forget_level3_suffix": 0} == {
        "forget_level1": 3268,
        "forget_level2": 2879,
        "forget_level3": 0,
        "forget_level3_suffix": 0,
        "neighbour_level1": 5846,
        "neighbour_level2": 5533,
        "mia_forget": 6198,
        "mia_retain": 7487,
    }
    prefixes = {name: one.asking.answer_prefix for name, one in sets_of(found).items()}
    assert (prefixes["forget_level3"], prefixes["forget_level3_suffix"]) == ("Answer:", "")


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("forget_level1", "", "Please complete the blank in the following question.\nQuestion: who\n"),
        ("neighbour_level2", "", "Please briefly answer the following question.\nQuestion: who\n"),
        ("forget_level3", "role play", "Please briefly answer the following question.\nQuestion: who\n"),
        ("forget_level3", "incontext learning", "Please briefly answer the following question.\nwho\n"),
        (
            "forget_level3_suffix",
            "affirmative suffix",
            "Please briefly answer the following question.\nQuestion: who",
        ),
    ],
)
def test_rwku_asks_each_kind_of_probe_as_its_code_does(name, kind, expected):
    assert prompt(name, {"query": "who", "type": kind}) == expected


def test_rwku_of_one_person_has_the_rows_about_that_person_only(folders):
    found = load(folders, "rwku", subject=NAMES[7])
    assert sizes(found)["forget_level1"] == 17  # rows 7, 207, …, 3207
    assert {one.example.answer for one in sets_of(found)["neighbour_level2"].questions} == {NAMES[7][:4]}
    with pytest.raises(DataError, match="has no rows about Nobody; subject takes names as its column"):
        load(folders, "rwku", subject=f"{NAMES[7]}, Nobody")


def test_rwku_scores_level_3_over_all_prompts_and_tells_mean_losses():
    outcomes = {"forget_level3": said("ba do", "li"), "forget_level3_suffix": said("ba", "no")}
    assert score("rwku", "forget_level3", "rouge_l_recall", outcomes).value == pytest.approx((1 + 0.5) / 4)
    losses = {"mia_forget": with_losses(1.0, 4.0)}
    assert score("rwku", "mia_forget", "mean_loss", losses).value == pytest.approx(2.5)


def test_rwku_cut_short_is_refused(folders, tmp_path):
    rows = (folders["rwku"] / "All" / "forget_level1.jsonl").read_text().splitlines()[:9]
    write_lines(tmp_path / "forget_level1.jsonl", [json.loads(row) for row in rows])
    with pytest.raises(DataError, match="has 9 rows, but the published forget_level1/test has 3,268"):
        load({"rwku": tmp_path}, "rwku")


# Hubble


def test_hubble_divides_texts_by_their_insertions(folders):
    assert sizes(load(folders, "hubble")) == {"forget": 500, "retain": 2000, "holdout": 2500, "secret": 500}
    everything = load(folders, "hubble", duplicates="1,4,16,64,256")
    assert sizes(everything)["forget"] == 2500
    assert everything.missing == {"retain": "every inserted text is to be forgotten"}
    with pytest.raises(DataError, match="was inserted 0 times; duplicates takes numbers"):
        load(folders, "hubble", duplicates="0")


def test_hubble_asks_for_the_identifier_that_follows(folders):
    example = sets_of(load(folders, "hubble"))["secret"].questions[0].example
    assert example.prompt.endswith("has the unique identifier")
    assert example.answer == f" {4:032x}"
    outcomes = {"secret": said(f" {4:032x}.", "0", expected=example.answer)}
    assert score("hubble", "secret", "secret_share", outcomes).value == pytest.approx(0.5)


def test_hubble_biography_without_its_identifier_is_refused(folders, tmp_path):
    for name in ("train", "test"):
        rows = [json.loads(row) for row in (folders["hubble"] / f"{name}.jsonl").read_text().splitlines()]
        rows[4]["text"] = "someone is from nowhere"
        write_lines(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(
        DataError, match=r"row 5 of .*train\.jsonl has no identifier of 32 hexadecimal digits"
    ):
        load({"hubble": tmp_path}, "hubble")
