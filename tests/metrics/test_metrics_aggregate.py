"""A mean with n, an interval, and a reason for whatever is missing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from palinode.metrics import mean_score
from palinode.records import Score

VALUES = st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12)


def test_mean_n_and_interval():
    score = mean_score([0.0, 0.0, 1.0, 1.0])
    assert (score.value, score.n, score.reason) == (0.5, 4, None)
    assert score.low == 0.0  # 1 resample in 16 is all zeros, more than 2.5 %
    assert score.high == 1.0


def test_interval_agrees_with_the_normal_one_on_many_values():
    values = np.random.default_rng(1).normal(0.4, 0.1, size=2000)
    score = mean_score(list(values))
    half = norm.ppf(0.975) * values.std() / np.sqrt(values.size)
    assert score.low == pytest.approx(score.value - half, abs=0.1 * half)
    assert score.high == pytest.approx(score.value + half, abs=0.1 * half)


def test_less_confidence_gives_a_narrower_interval():
    values = [0.1, 0.2, 0.4, 0.7, 0.9]
    wide, narrow = mean_score(values), mean_score(values, confidence=0.5)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_same_seed_gives_the_same_interval_and_another_seed_the_same_value():
    values = list(np.random.default_rng(2).random(50))
    assert mean_score(values, seed=3) == mean_score(values, seed=3)
    assert mean_score(values, seed=3).value == mean_score(values, seed=4).value
    assert mean_score(values, seed=3).low != mean_score(values, seed=4).low


def test_no_values_is_not_zero():
    assert mean_score([]) == Score(None, 0, None, None, "there are no examples")
    assert mean_score([None, None], missing="too short") == Score(
        None, 0, None, None, "none of 2 examples: too short"
    )


def test_one_value_has_no_interval():
    assert mean_score([0.25]) == Score(0.25, 1, None, None, "one example gives no interval")


def test_equal_values_have_an_interval_of_no_width():
    assert mean_score([0.25, 0.25, 0.25]) == Score(0.25, 3, 0.25, 0.25)
    tenths = mean_score([0.1] * 7)
    assert tenths.low == tenths.value == tenths.high


def test_missing_values_are_left_out_and_counted():
    score = mean_score([0.5, None, 1.0, 0.0], missing="too short")
    assert (score.value, score.n) == (0.5, 3)
    assert score.reason == "1 of 4 examples left out: too short"


def test_both_reasons_are_given():
    reason = "1 of 2 examples left out: too short; one example gives no interval"
    assert mean_score([None, 0.5], missing="too short") == Score(0.5, 1, None, None, reason)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_reported_not_averaged(bad):
    score = mean_score([0.5, bad, None])
    assert score == Score(None, 0, None, None, "1 of 3 values are not finite numbers")


@settings(deadline=None, max_examples=40)
@given(VALUES, st.randoms(use_true_random=False))
def test_order_changes_nothing(values, random):
    shuffled = random.sample(values, len(values))
    assert mean_score(shuffled) == mean_score(values)


@settings(deadline=None, max_examples=40)
@given(VALUES)
def test_score_is_whole(values):
    score = mean_score(values)
    assert score.n == sum(value is not None for value in values)
    assert (score.value is None) == (score.n == 0)
    assert (score.low is None) == (score.high is None) == (score.n < 2)
    if score.n >= 2:
        assert 0 <= score.low <= score.high <= 1 + 1e-12
