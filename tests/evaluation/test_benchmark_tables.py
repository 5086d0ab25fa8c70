"""Where a benchmark's tables are looked for, and what is asked so that chosen metrics can be computed."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palinode.errors import DataError
from palinode.evaluation.benchmark import (
    GENERATION,
    STANDARDISED,
    Cell,
    QuestionSet,
    Table,
    find_table,
    not_computed,
    read_table,
    trim_asking,
)
from palinode.settings import Asking

ROWS = [{"question": "who", "answer": "ba"}, {"question": "what", "answer": "ka"}]
QA = {"question": None, "answer": None}
PLAIN, PART = Table("small", 2, QA), Table("know", 2, QA, "forget_qa")


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_file_of_a_table_is_found_by_its_name_and_read_by_its_content(tmp_path, suffix):
    write(tmp_path / f"small.{suffix}")
    found = read_table(PLAIN, str(tmp_path))
    assert list(found.rows) == ROWS
    assert (found.facts.config, found.facts.rows, len(found.facts.sha256)) == ("small", 2, 64)


@pytest.mark.parametrize(
    "name", ["know/forget_qa.json", "know_forget_qa.jsonl", "know/forget_qa-00000-of-00001.parquet"]
)
def test_split_of_a_config_is_found_in_the_layouts_that_are_in_use(tmp_path, name):
    write(tmp_path / name)
    assert find_table(PART, str(tmp_path)) == tmp_path / name


def test_config_without_its_split_is_not_the_table(tmp_path):
    write(tmp_path / "know.json")
    assert find_table(PART, str(tmp_path)) is None
    assert read_table(PART, str(tmp_path)) is None


def test_name_on_the_hub_is_used_where_there_is_no_such_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_table(PLAIN, "some/where") == "some/where:small#train"
    assert find_table(PART, "some/where@main") == "some/where@main:know#forget_qa"
    (tmp_path / "some" / "where").mkdir(parents=True)
    assert find_table(PLAIN, "some/where") is None


@pytest.mark.parametrize("location", ["no/such/folder", "file.json", "org/name:config"])
def test_place_that_is_neither_folder_nor_hub_data_set_is_refused(tmp_path, monkeypatch, location):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.json").write_text("[]")
    with pytest.raises(DataError, match="is not a folder with the files of a benchmark"):
        find_table(PLAIN, location)


# What is asked


def cell(*needs, name="forget", also=()):
    return Cell(name, "m", "a metric", lambda measured: not_computed("no"), also=also, needs=frozenset(needs))


SET = QuestionSet("forget", (), Asking(samples=3))


def test_nothing_is_generated_or_standardised_that_no_metric_needs():
    asked = trim_asking(SET, [cell()])
    assert (asked.generate, asked.samples, asked.standardise, asked.gradient_norms) == (
        False,
        0,
        False,
        False,
    )
    asked = trim_asking(SET, [cell(GENERATION), cell(STANDARDISED, name="retain")])
    assert (asked.generate, asked.samples, asked.standardise) == (True, 3, False)
    asked = trim_asking(SET, [cell(STANDARDISED, name="retain", also=("forget",))])
    assert (asked.generate, asked.standardise) == (False, True)


def test_set_without_answers_of_its_own_never_generates():
    documents = QuestionSet("forget", (), Asking(generate=False))
    assert not trim_asking(documents, [cell(GENERATION)]).generate
