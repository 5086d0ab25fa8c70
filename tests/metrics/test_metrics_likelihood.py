"""metrics.md §2: P = exp(−l)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palinode.metrics import answer_probabilities
from palinode.records import Outcome

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
