"""MUSE: ten-shot prompts, cut answers, PrivLeak with its constants, folds that follow one another."""

from __future__ import annotations

import json

import pytest

from invented_benchmarks import muse_folder, qa
from palinode.benchmarks.muse import MUSE, folds, ten_shot
from palinode.errors import DataError
from palinode.evaluation.benchmark import Exam, Measured, Places, score_cell
from palinode.records import Outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return muse_folder(tmp_path_factory.mktemp("muse"), folds=True)


def sets_of(folder, **options):
    loaded = MUSE.load(Places(str(folder)), "news", MUSE.check_options(options))
    return {questions.name: questions for questions in loaded.sets}


def cell(name, metric):
    return next(cell for cell in MUSE.cells if (cell.set, cell.metric) == (name, metric))


def test_ten_shot_prompt_is_the_published_one():
    rows = [{"question": "who", "answer": "ba"}, {"question": "what", "answer": "ka"}]
    assert ten_shot("where", rows) == (
        "Question: who\nAnswer: ba\n\nQuestion: what\nAnswer: ka\n\nQuestion: where\nAnswer: "
    )


def test_knowledge_is_asked_ten_shot_and_cut_where_another_question_begins(folder):
    retain = sets_of(folder)["knowmem_r"]
    assert len(retain.questions) == 100
    assert retain.questions[0].example.prompt.count("Question:") == 11
    assert qa(300)["question"] in retain.questions[0].example.prompt
    assert retain.shown[0] == qa(200)["question"]
    assert (retain.asking.max_new_tokens, retain.asking.stop_texts) == (
        32,
        ("\n\n", "\nQuestion", "Question:"),
    )


def test_memorised_texts_are_continued_by_128_tokens_and_compared_with_as_many(folder):
    verbmem = sets_of(folder)["verbmem"]
    assert (verbmem.asking.max_new_tokens, verbmem.answer_tokens) == (128, 128)
    assert verbmem.questions[1].example.prompt == "the home of 1"


def test_sets_without_their_files_are_told_missing(folder, tmp_path):
    whole = muse_folder(tmp_path)
    (whole / "knowmem" / "retain_qa_icl.json").unlink()
    (whole / "privleak" / "holdout.json").unlink()
    loaded = MUSE.load(Places(str(whole)), "news", MUSE.check_options({}))
    assert set(loaded.missing) == {"knowmem_r", "privleak_holdout"}
    assert "holds no knowmem/retain_qa_icl" in loaded.missing["knowmem_r"]


def test_wrong_number_of_texts_is_refused(tmp_path):
    (tmp_path / "sust").mkdir()
    (tmp_path / "sust" / "forget_1.json").write_text(json.dumps([{"text": "a text"}] * 4))
    message = r"sust/forget_1\.json has 4 rows, but the published sust/forget_1 has 889"
    with pytest.raises(DataError, match=message):
        folds(str(tmp_path), "sust")


# Scores


def texts(*losses):
    """Outcomes of one-token documents with these losses, the end token after them."""
    return [Outcome(row, "", "ba", None, (-loss, 0.0), (True, True)) for row, loss in enumerate(losses)]


@pytest.mark.parametrize(("corpus", "retrained"), [("news", 0.4772), ("books", 0.5393)])
def test_privleak_uses_the_constant_of_its_corpus(corpus, retrained):
    """metrics.md §9: AUC 0.6875; PrivLeak = ((1 - AUC) - A) / A."""
    sets = {"privleak_forget": texts(0.2, 0.5, 0.9, 1.1), "privleak_holdout": texts(0.8, 1.2, 1.5, 0.4)}
    found = Measured(Exam("muse", {}, split=corpus), sets)
    score = score_cell(cell("privleak_forget", "privleak_published"), found)
    assert score.value == pytest.approx((0.3125 - retrained) / retrained * 100, abs=1e-6)
    assert score_cell(cell("privleak_forget", "auc_min_k"), found).value == pytest.approx(0.6875)


def test_stemmer_is_off_as_in_muse_and_on_if_asked():
    """metrics.md §3: rL F 0.5 with the stemmer, 1/3 without."""
    said = Outcome(
        0, "q", "She writes novels about sailing", "She wrote a novel on sailing boats", (-1.0,), (True,)
    )
    for stemmer, expected in {"off": 1 / 3, "on": 0.5}.items():
        exam = Exam("muse", {}, options=MUSE.check_options({"stemmer": stemmer}))
        found = Measured(exam, {"knowmem_f": [said]})
        assert score_cell(cell("knowmem_f", "rouge_l_f"), found).value == pytest.approx(expected, abs=1e-6)


# Folds


def test_folds_are_cumulative_for_scalability_and_follow_one_another_for_sustainability(folder):
    assert [len(rows) for rows in folds(str(folder), "scal")] == [889, 1778, 2667, 3554]
    parts = folds(str(folder), "sust")
    assert [len(rows) for rows in parts] == [889, 889, 889, 887]
    assert len({example.answer for rows in parts for example in rows}) > 3000
