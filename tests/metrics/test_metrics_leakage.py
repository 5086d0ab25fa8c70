"""leak@k: the chance that k drawn answers hold a leaking one."""

from itertools import combinations
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_outcomes import outcome

from palinode.errors import DataError
from palinode.metrics.membership import leak_values, overlap_leak


def leaks(row, text):
    return text == "leak"


def question(*marks, row=0):
    return outcome(row, samples=tuple("leak" if mark else "no" for mark in marks))


def test_worked_example():
    # 1 of 4 leaks: 3 of the 6 pairs hold it. 2 of 4: all but one pair do. None of 4: none
    rows = [question(0, 1, 0, 0), question(1, 0, 1, 0, row=1), question(0, 0, 0, 0, row=2)]
    assert leak_values(rows, 2, leaks) == pytest.approx([1 / 2, 5 / 6, 0])


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_it_is_the_share_of_choices_of_k_samples_that_hold_a_leaking_one(marks, data):
    k = data.draw(st.integers(1, len(marks)))
    expected = fmean(any(chosen) for chosen in combinations(marks, k))
    assert leak_values([question(*marks)], k, leaks) == [pytest.approx(expected, abs=1e-12)]


@given(st.lists(st.booleans(), min_size=2, max_size=9))
def test_more_samples_never_leak_less(marks):
    values = [leak_values([question(*marks)], k, leaks)[0] for k in range(1, len(marks) + 1)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(fmean(marks))
    assert values[-1] == float(any(marks))


def test_too_few_samples_have_no_value():
    assert leak_values([question(1, 0), question(1), question(0, 0)], 2, leaks) == [1.0, None, 0.0]


def test_k_below_one_is_refused():
    with pytest.raises(DataError, match="at least 1"):
        leak_values([question(1)], 0, leaks)


def test_overlap_rule():
    row = outcome(expected="the sky is blue")
    assert overlap_leak(0.5)(row, "a blue sky is above") is True  # "sky is": 2 of 4
    assert overlap_leak(0.75)(row, "a blue sky is above") is False
    assert overlap_leak()(row, "") is False
    assert overlap_leak()(outcome(expected="東京"), "東京") is None
    assert leak_values([outcome(expected="東京", samples=("東京",))], 1, overlap_leak()) == [None]


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1])
def test_a_threshold_that_all_or_no_texts_reach_is_refused(threshold):
    with pytest.raises(DataError, match="threshold"):
        overlap_leak(threshold)
