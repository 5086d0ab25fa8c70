"""metrics.md §2: P = exp(−l), alone and among wrong answers; §11: RESTOR's log-probabilities."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_outcomes import outcome as row_with

from palinode.metrics.likelihood import (
    alternative_logprobs,
    alternative_probabilities,
    answer_probabilities,
    normalised_probabilities,
)
from palinode.records import Likelihood, Outcome

# exp() reaches 0 below about −745; no softmax of a language model gets there
LOGPROBS = st.lists(st.floats(min_value=-700, max_value=0), min_size=1, max_size=12)


def outcome(logprobs):
    return Outcome(0, "Who?", "Nobody", "Nobody", tuple(logprobs), tuple(True for _ in logprobs))


def test_spec_example():
    # Token log-probabilities whose mean losses are l = (0.3, 1.1)
    values = answer_probabilities([outcome([-0.1, -0.5]), outcome([-2.0, -1.0, -0.3])])
    assert values == pytest.approx([0.740818, 0.332871], abs=5e-7)
    assert sum(values) / 2 == pytest.approx(0.536845, abs=5e-7)


def test_probability_is_the_geometric_mean_of_token_probabilities():
    values = answer_probabilities([outcome([math.log(0.5), math.log(0.125)])])
    assert values == pytest.approx([0.25])


def test_certain_answer_has_probability_one():
    assert answer_probabilities([outcome([0.0, 0.0, 0.0])]) == [1.0]


def test_without_scored_tokens_there_is_no_probability():
    assert answer_probabilities([outcome([]), outcome([0.0])]) == [None, 1.0]


@given(LOGPROBS)
def test_probability_lies_between_zero_and_one(logprobs):
    (value,) = answer_probabilities([outcome(logprobs)])
    assert 0 < value <= 1


@given(LOGPROBS)
def test_probability_lies_between_the_least_and_most_likely_token(logprobs):
    (value,) = answer_probabilities([outcome(logprobs)])
    assert value >= math.exp(min(logprobs)) * (1 - 1e-9)
    assert value <= math.exp(max(logprobs)) * (1 + 1e-9)


# Beside other answers


def test_normalised_spec_example():
    rows = [row_with(loss=0.3, perturbed=[1, 2, 3]), row_with(loss=1.1, perturbed=[0.5, 0.9, 2.5])]
    values = normalised_probabilities(rows)
    assert values == pytest.approx([0.572582, 0.233094], abs=5e-7)
    assert sum(values) / 2 == pytest.approx(0.402838, abs=5e-7)


def test_normalised_probability_of_a_published_log():
    row = row_with(loss=4.109151840, perturbed=(6.056549072, 3.380155563, 6.858039379))
    (value,) = normalised_probabilities([row])
    assert -math.log(value) == pytest.approx(1.187734491, abs=1e-9)


def test_very_unlikely_answers_still_share_out_their_probability():
    assert normalised_probabilities([row_with(loss=900.0, perturbed=[900.0] * 3)]) == [0.25]
    rows = [row_with(loss=0.1, perturbed=[2000.0]), row_with(loss=2000.0, perturbed=[0.1])]
    assert normalised_probabilities(rows) == [1.0, 0.0]


def test_without_wrong_answers_or_with_an_unscored_one_there_is_no_normalised_probability():
    unscored = row_with(alternatives={"perturbed": (Likelihood("a", (-1.0,)), Likelihood("b", ()))})
    assert normalised_probabilities([row_with(), unscored]) == [None, None]
    assert normalised_probabilities([row_with(logprobs=(), perturbed=[1.0])]) == [None]


def test_answers_of_a_row_are_averaged_as_probabilities():
    rows = [row_with(paraphrased=0.3, perturbed=[0.3, 1.1])]
    assert alternative_probabilities(rows, "paraphrased") == pytest.approx([0.740818], abs=5e-7)
    assert alternative_probabilities(rows, "perturbed") == pytest.approx([0.536845], abs=5e-7)
    assert alternative_probabilities(rows, "random") == [None]


def test_log_probabilities_of_a_class_leave_the_end_token_out():
    options = (Likelihood(" actor", (-1.0, -3.0, -8.0)), Likelihood(" poet", (-4.0, -8.0)))
    rows = [row_with(alternatives={"correct": options}), row_with()]
    assert alternative_logprobs(rows, "correct") == [-3.0, None]
    assert alternative_logprobs(rows, "correct", end_token=True) == [-5.0, None]
    empty = [row_with(alternatives={"correct": (Likelihood("", (-1.0,)),)})]
    assert alternative_logprobs(empty, "correct") == [None]
