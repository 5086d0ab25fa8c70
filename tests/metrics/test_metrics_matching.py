"""Answers that match an accepted one (RESTOR without a judge; metrics.md §11)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_outcomes import outcome

from palinode.metrics.matching import accepted_sample_values, accepted_values, is_accepted, normalise
from palinode.metrics.table import score_outcomes


def value(generated, *accepted, **fields):
    (found,) = accepted_values([outcome(generated=generated, accepted=accepted, **fields)])
    return found


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Beatles!", "beatles"),
        ("STRASSE", normalise("Straße")),
        ("the ﬁlm ①", "film 1"),
        ("author’s", "authors"),
        ("Yun-Hwa", "yun hwa"),
        ("J. R. R. Tolkien", normalise("JRR Tolkien")),
        ("a U.S. senator", "us senator"),
        ("3.5", "3 5"),
        ("The The", "the the"),
        (" ?! ", ""),
        ("Ωmega_3", "ωmega 3"),
    ],
)
def test_normal_form(text, normal):
    assert normalise(text) == normal


@given(st.text(max_size=20))
def test_normal_form_is_its_own(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("generated", "accepted", "right"),
    [
        ("politician", ["Politician"], 1.0),
        (" He was an American politician, and more.", ["actor", "politician"], 1.0),
        ("He studied politics", ["politician"], 0.0),
        ("He was in Parisian circles", ["Paris"], 0.0),  # whole words only
        ("Yun Hwa Hsiao", ["Hsiao Yun-Hwa"], 0.0),  # in their order
        ("New town in York", ["New York"], 0.0),  # side by side
        ("", ["politician"], 0.0),
        ("American", ["American politician"], 0.0),  # a part of an accepted answer is not one
    ],
)
def test_accepted(generated, accepted, right):
    assert value(generated, *accepted) == right


def test_without_accepted_answers_the_answer_in_the_data_counts():
    assert value("it is blue.", expected="Blue") == 1.0
    assert value("it is red.", expected="Blue") == 0.0


def test_wikidata_ids_are_left_out_and_said():
    rows = [
        outcome(0, generated="Q42", accepted=("Q42", "writer")),
        outcome(1, generated="Q7", accepted=("Q7", "Q8")),
        outcome(2, generated="Q and A", accepted=("Q and A",)),
    ]
    assert accepted_values(rows) == [0.0, None, 1.0]
    score = score_outcomes(rows, names=["accepted_answer"])["accepted_answer"]
    assert (score.value, score.n) == (0.5, 2)
    assert "1 of 3 examples left out" in score.reason
    assert "raw Wikidata ids among the accepted answers left out: 3, in 2 questions" in score.reason


def test_what_was_not_generated_or_has_no_text_to_match_is_unknown():
    assert value(None, "politician") is None
    assert value("something", "?!") is None


def test_samples_give_the_share_that_is_accepted():
    rows = [
        outcome(accepted=("Paris",), samples=("in Paris", "in Rome", "Paris")),
        outcome(accepted=("Paris",)),
        outcome(accepted=("Q90",), samples=("Paris",)),
    ]
    assert accepted_sample_values(rows) == [pytest.approx(2 / 3), None, None]


@pytest.mark.parametrize(
    ("accepted", "said", "right"),
    [
        ("东京", "他于1964年出生在东京。", True),  # no spaces between words: letter by letter
        ("东京", "他出生在东北。", False),
        ("1964", "他于1964年出生", True),
        ("กรุงเทพ", "เกิดที่กรุงเทพ", True),
        ("किताब", "यह किताब है", True),
        ("किताब", "यह कुतुब है", False),  # the vowels are marks, and count
        ("Άθήνα", "στην Άθήνα", True),
    ],
)
def test_scripts_without_spaces_or_with_marks_are_compared_letter_by_letter(accepted, said, right):
    assert is_accepted(outcome(expected=accepted), said) is right
