"""metrics.md §3: ROUGE-L recall with the stemmer on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palinode.metrics import rouge_l_recalls
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
    assert recall("東京 1964", "in 1964") == 1.0


@settings(deadline=None)
@given(WORDS, WORDS)
def test_recall_lies_between_zero_and_one(expected, generated):
    assert 0 <= recall(expected, generated) <= 1


@settings(deadline=None)
@given(WORDS.filter(bool))
def test_the_answer_itself_has_recall_one(text):
    assert recall(text, text) == 1.0
