"""Your own data: what is there is used, what is missing is told."""

from __future__ import annotations

import pytest

from invented_benchmarks import own_files, perturbed, write_lines
from palinode.benchmarks import OWN
from palinode.data.examples import read_questions
from palinode.errors import DataError
from palinode.evaluation.benchmark import Places


def load(places):
    return OWN.load(places, "rows", {})


def test_forget_file_alone_leaves_the_other_sets_missing_with_the_option_that_gives_them(tmp_path):
    loaded = load(Places(**own_files(tmp_path, everything=False)))
    assert [questions.name for questions in loaded.sets] == ["forget"]
    assert loaded.missing == {
        "retain": "there are no retain rows; give them with --retain",
        "holdout": "there are no holdout rows, which no model has seen; give them with --holdout",
    }


@pytest.mark.parametrize("name", ["retain", "holdout"])
def test_forget_rows_in_another_set_are_refused(tmp_path, name):
    files = own_files(tmp_path)
    with pytest.raises(DataError, match=rf"6 of the 6 {name} rows are forget rows too \(first: row 1 of"):
        load(Places(**{**files, name: files["data"]}))


def test_paraphrases_and_wrong_answers_are_used_where_they_are_present(tmp_path):
    questions = read_questions(own_files(tmp_path)["data"])
    row = perturbed(2, 2)
    assert questions[2].alternatives == {
        "paraphrased": (row["paraphrased_answer"],),
        "perturbed": tuple(row["perturbed_answer"]),
    }


def test_other_answers_may_be_missing_in_some_rows_and_lists_in_others(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "paraphrased_answer": ["c", "d"]},
        {"prompt": "e", "completion": "f", "paraphrased_answer": None, "perturbed_answer": "g"},
    ]
    questions = read_questions(str(write_lines(tmp_path / "rows.jsonl", rows)))
    assert [question.alternatives for question in questions] == [
        {"paraphrased": ("c", "d")},
        {"perturbed": ("g",)},
    ]


def test_other_answer_that_is_no_text_is_refused(tmp_path):
    rows = [{"question": "a", "answer": "b", "perturbed_answer": ["c", 4]}]
    with pytest.raises(DataError, match=r"row 1 of .*: 'perturbed_answer' must be one text or a list"):
        read_questions(str(write_lines(tmp_path / "rows.jsonl", rows)))


def test_columns_may_have_other_names_and_documents_have_no_other_answers(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("Frage,Antwort,paraphrased_answer\nwho,ba,it is ba\n")
    (question,) = read_questions(str(table), columns={"question": "Frage", "answer": "Antwort"})
    assert (question.example.answer, question.alternatives) == ("ba", {"paraphrased": ("it is ba",)})
    (document,) = read_questions(str(write_lines(tmp_path / "text.jsonl", [{"text": "a whole book"}])))
    assert document.example.form == "document"
