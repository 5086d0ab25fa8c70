"""A mean, and metrics.md §5's harmonic mean of means, with n, interval and a reason for what is missing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from palinode.metrics.aggregate import harmonic_score, mean_score
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


def test_same_seed_gives_the_same_interval_and_another_seed_the_same_value():
    values = list(np.random.default_rng(2).random(50))
    assert mean_score(values, seed=3) == mean_score(values, seed=3)
    assert mean_score(values, seed=3).value == mean_score(values, seed=4).value
    assert mean_score(values, seed=3).low != mean_score(values, seed=4).low


def test_no_values_is_not_zero():
    assert mean_score([]) == Score(None, 0, None, None, "there are no examples")
    assert mean_score([None, None], missing="too short") == Score(
        None, 0, None, None, "none of 2 examples has a value: too short"
    )


def test_one_value_has_no_interval():
    assert mean_score([0.25]) == Score(0.25, 1, None, None, "one example gives no interval")


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0.0, 0.308497), (1.0, 0.691503, 1.0)])
def test_ten_equal_shares_have_the_exact_interval(value, low, high):
    score = mean_score([value] * 10)
    assert (score.value, score.low, score.high) == (
        value,
        pytest.approx(low, abs=1e-6),
        pytest.approx(high, abs=1e-6),
    )


def test_ten_equal_differences_have_an_interval_of_no_width():
    assert mean_score([0.0] * 10, shares=False) == Score(0.0, 10, 0.0, 0.0)


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


# Model utility

NINE = (0.99, 0.98, 0.47, 0.44, 0.92, 0.57, 0.41, 0.90, 0.54)
PUBLISHED = {  # retain, authors and facts P/R/TR of evaluation logs, and their utility
    "llama2 full wd0.01": (
        (0.989527, 0.985655, 0.474699, 0.455482, 0.933000, 0.596229, 0.418562, 0.882479, 0.539033),
        0.622677,
    ),
    "llama2 retain90": (
        (0.988897, 0.975811, 0.470977, 0.434087, 0.923000, 0.570681, 0.414326, 0.897436, 0.544198),
        0.613745,
    ),
    "llama2 retain99": (
        (0.990596, 0.988945, 0.464641, 0.459313, 0.928000, 0.603727, 0.412170, 0.882479, 0.538977),
        0.620744,
    ),
    "phi full wd0.01": (
        (0.926088, 0.929253, 0.482683, 0.377360, 0.415667, 0.456009, 0.408998, 0.777350, 0.492337),
        0.522074,
    ),
    "phi retain99": (
        (0.928359, 0.931592, 0.484195, 0.368905, 0.447333, 0.440166, 0.398851, 0.750000, 0.480811),
        0.518603,
    ),
}


def parts_of(means, spread=0.0, rows=2):
    """Nine parts with these means, each of `rows` values that lie `spread` to either side."""
    return {
        f"part {place}": [mean + spread * (-1) ** row for row in range(rows)]
        for place, mean in enumerate(means)
    }


def test_utility_spec_example():
    assert harmonic_score(parts_of(NINE)).value == pytest.approx(0.613320, abs=5e-7)


@pytest.mark.parametrize(("means", "utility"), PUBLISHED.values(), ids=PUBLISHED)
def test_utility_of_published_logs(means, utility):
    assert harmonic_score(parts_of(means)).value == pytest.approx(utility, abs=1.5e-6)


def test_one_part_at_zero_makes_utility_zero():
    score = harmonic_score({"a": [0.0, 0.0], "b": [1.0, 1.0]})
    assert (score.value, score.low, score.high) == (0.0, 0.0, 0.0)
    some = harmonic_score({"a": [0.0, 1.0], "b": [1.0, 1.0]})
    assert (some.value, some.low, some.high) == (pytest.approx(2 / 3), 0.0, 1.0)


def test_a_missing_part_is_named_and_not_skipped():
    score = harmonic_score({**parts_of(NINE), "facts truth ratio": [None, None], "authors": []})
    assert score == Score(None, 0, None, None, "authors has no value; facts truth ratio has no value")
    assert harmonic_score({}).value is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1])
def test_values_without_a_harmonic_mean_are_reported(bad):
    score = harmonic_score({"a": [0.5, bad], "b": [0.5, 0.5]})
    assert score.value is None
    assert " a " in f" {score.reason} "


def test_utility_interval_is_that_of_its_parts_by_the_delta_method():
    parts = parts_of(NINE[3:], spread=0.1, rows=200)
    score = harmonic_score(parts)
    means = np.array(NINE[3:])
    slopes = score.value**2 / means**2 / means.size
    half = norm.ppf(0.975) * np.sqrt((slopes**2).sum() * 0.1**2 / 200)
    assert score.n == 6 * 200
    assert score.low == pytest.approx(score.value - half, abs=0.1 * half)
    assert score.high == pytest.approx(score.value + half, abs=0.1 * half)


def test_rows_left_out_of_a_part_are_said_and_single_rows_give_no_interval():
    score = harmonic_score({"a": [0.5, None, 0.5], "b": [0.5]})
    assert (score.value, score.n, score.low) == (0.5, 3, None)
    assert score.reason == "1 of 3 rows of a left out: no value; one row in b gives no interval"


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_order_of_parts_and_rows_changes_nothing(values, random):
    parts = {"a": values, "b": [0.3, 0.6], "c": [0.9, 0.2]}
    names = random.sample(sorted(parts), 3)
    assert harmonic_score({name: random.sample(parts[name], len(parts[name])) for name in names}) == (
        harmonic_score(parts)
    )
