"""metrics.md §3: ROUGE-1 and ROUGE-L, recall and F, with and without the stemmer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palinode.metrics.matching import rouge_l_recalls, rouge_values
from palinode.records import Outcome

WORDS = st.lists(st.sampled_from(["a", "novel", "on", "sailing", "boats", "1987"]), max_size=8).map(" ".join)


def recall(expected, generated):
    (value,) = rouge_l_recalls([Outcome(0, "", expected, generated, (), ())])
    return value


@pytest.mark.parametrize(
    ("expected", "generated", "value"),
    [
        (
            "The author's full name is Hsiao Yun-Hwa.",
            "The full name of the author is Hsiao Yun-Hwa.",
            0.777778,
        ),
        # "writes"/"wrote" differ; the stemmer makes "novels" and "novel" one (0.400000 without it)
        ("She writes novels about sailing", "She wrote a novel on sailing boats", 0.600000),
    ],
)
def test_spec_examples(expected, generated, value):
    assert recall(expected, generated) == pytest.approx(value, abs=5e-7)


def test_recall_counts_the_answers_words_not_the_generated_ones():
    assert recall("blue", "the sky is blue today") == 1.0
    assert recall("the sky is blue today", "blue") == 0.2


@pytest.mark.parametrize(
    ("expected", "generated"), [("a word", ""), ("", "a word"), (" \n", "a word"), ("", "")]
)
def test_empty_text_on_either_side_is_zero(expected, generated):
    assert recall(expected, generated) == 0.0


def test_nothing_generated_is_unknown_not_zero():
    assert recall("a word", None) is None


def test_answer_that_rouge_cannot_read_is_unknown_not_zero():
    assert recall("東京", "東京") is None
    assert recall("!!!", "a word") is None


@pytest.mark.parametrize(
    ("expected", "generated"),
    [
        ("她于1964年出生在东京", "1964"),  # the year is all that ROUGE would see
        ("東京 1964", "in 1964"),
        ("Она родилась в 1964 году", "Она родилась в 1964 году в Осло"),
        ("她的笔名是 Anna", "Anna"),  # 5 letters of 9
        ("Sie wohnt in Αθήνα", "Sie wohnt in Rom"),  # 5 of 15
        ("हिन्दी 1964", "1964"),
        ("in 1964", "她于1964年出生"),  # what was written counts as well
        ("Anna", "Анна, Anna"),
    ],
)
def test_text_of_which_rouge_drops_over_a_fifth_has_no_score(expected, generated):
    assert recall(expected, generated) is None


@pytest.mark.parametrize(
    ("expected", "generated", "value"),
    [
        ("Ana Müller wrote the novel Été", "Ana Müller", 3 / 8),  # ana m ller wrote the novel t, and "é" gone
        ("1964", "in 1964", 1.0),
        ("in 1964", "1964!", 0.5),
        ("a word", "🎉", 0.0),
    ],
)
def test_accents_and_signs_leave_a_score(expected, generated, value):
    assert recall(expected, generated) == pytest.approx(value, abs=0.06)


@settings(deadline=None)
@given(WORDS, WORDS)
def test_recall_lies_between_zero_and_one(expected, generated):
    assert 0 <= recall(expected, generated) <= 1


@settings(deadline=None)
@given(WORDS.filter(bool))
def test_the_answer_itself_has_recall_one(text):
    assert recall(text, text) == 1.0


# Other kinds

AUTHOR = ("The author's full name is Hsiao Yun-Hwa.", "The full name of the author is Hsiao Yun-Hwa.")
SAILING = ("She writes novels about sailing", "She wrote a novel on sailing boats")


@pytest.mark.parametrize(
    ("texts", "options", "value"),
    [
        (AUTHOR, {"kind": "rouge1"}, 0.888889),
        (AUTHOR, {}, 0.777778),
        (AUTHOR, {"measure": "f"}, 0.736842),
        (SAILING, {}, 0.600000),
        (SAILING, {"measure": "f"}, 0.500000),
        (SAILING, {"stemmer": False}, 0.400000),
        (SAILING, {"measure": "f", "stemmer": False}, 0.333333),
    ],
)
def test_spec_examples_of_every_kind(texts, options, value):
    assert rouge_values([Outcome(0, "", *texts, (), ())], **options) == [pytest.approx(value, abs=5e-7)]


def test_order_matters_to_rouge_l_only_and_added_words_to_f_only():
    swapped = [Outcome(0, "", "blue sky", "sky blue", (), ())]
    assert rouge_values(swapped, "rouge1") == [1.0]
    assert rouge_values(swapped, "rougeL") == [0.5]
    longer = [Outcome(0, "", "blue sky", "a very blue sky indeed now", (), ())]
    assert rouge_values(longer) == [1.0]
    assert rouge_values(longer, measure="f") == [pytest.approx(0.5)]


@settings(deadline=None)
@given(WORDS, WORDS, st.sampled_from(["rouge1", "rougeL"]), st.booleans())
def test_remembered_texts_give_what_the_package_gives(expected, generated, kind, stemmer):
    from rouge_score.rouge_scorer import RougeScorer

    fresh = RougeScorer([kind], use_stemmer=stemmer).score(expected, generated)[kind]
    row = [Outcome(0, "", expected, generated, (), ())]
    assert rouge_values(row, kind, "recall", stemmer=stemmer) == [fresh.recall]
    assert rouge_values(row, kind, "f", stemmer=stemmer) == [fresh.fmeasure]
