"""metrics.md §6: forget quality, the p-value of the two-sample Kolmogorov-Smirnov test."""

import math
from dataclasses import replace
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_outcomes import outcome

from palinode.errors import DataError
from palinode.metrics.aggregate import forget_quality, ks_test

TABLE = {  # n: {D·n: p}
    40: {
        4: 0.990019, 5: 0.918805, 6: 0.765931, 7: 0.578600, 8: 0.404587, 9: 0.265687, 10: 0.164973,
        11: 0.0970748, 12: 0.0541411, 14: 0.0143015, 16: 0.00301818, 17: 0.00127081, 18: 5.03944e-4,
        19: 1.87911e-4, 20: 6.57689e-5,
    },
    200: {
        23: 0.142075, 25: 0.0878383, 49: 1.11504e-5, 51: 4.02481e-6, 77: 1.32611e-13, 78: 5.8673e-14,
        194: 1.06429e-106,
    },
    300: {119: 1.834066e-21, 114: 1.096624e-19, 104: 2.194274e-16, 106: 5.100357e-17},
    400: {
        25: 0.415789, 43: 0.0195948, 107: 5.41855e-13, 138: 1.66232e-21, 149: 4.34620e-25, 379: 1.47344e-198,
    },
    100: {39: 3.569034e-07, 41: 6.617358e-08},
}  # fmt: skip
DISJOINT = {40: 1.860340e-23, 200: 1.942643e-119, 300: 1.480298e-179, 400: 1.063590e-239}
VALUES = st.lists(st.floats(0.01, 100), min_size=2, max_size=30)


def digits(figure):
    """Half a unit in the last of the six or seven digits given, relative."""
    return pytest.approx(figure, rel=1e-5)


@pytest.mark.parametrize(("n", "gap", "p"), [(n, k, p) for n, row in TABLE.items() for k, p in row.items()])
def test_spec_table(n, gap, p):
    test = ks_test([float(i) for i in range(n)], [i + gap - 0.5 for i in range(n)])
    assert (test.statistic, test.method) == (pytest.approx(gap / n), "exact")
    assert test.p == digits(p)


@pytest.mark.parametrize(("n", "p"), DISJOINT.items())
def test_disjoint_samples(n, p):
    test = ks_test(range(n), range(n, 2 * n))
    assert test.statistic == 1
    assert test.p == digits(p)
    assert test.p == pytest.approx(2 / comb(2 * n, n), rel=1e-9)


def test_spec_example():
    test = ks_test([0.2, 0.5, 0.9, 1.3, 0.7], [0.6, 1.1, 1.5, 0.8, 2.0])
    assert (test.statistic, test.p) == (pytest.approx(0.4), pytest.approx(0.873016, abs=5e-7))


def test_method_is_exposed_where_the_sample_is_too_large_for_the_exact_one():
    assert ks_test([float(i) for i in range(10_001)], [0.5, 2.5]).method == "asymptotic"


@pytest.mark.parametrize("samples", [([], [1.0]), ([1.0], []), ([1.0, math.nan], [1.0])])
def test_samples_that_cannot_be_tested_are_refused(samples):
    with pytest.raises(DataError, match="sample"):
        ks_test(*samples)


@settings(deadline=None, max_examples=40)
@given(VALUES, VALUES)
def test_ratio_and_inverse_ratio_give_the_same_p(a, b):
    ranked = {value: rank for rank, value in enumerate(sorted({*a, *b}), 1)}  # 1/x may make two values one
    a, b = [float(ranked[x]) for x in a], [float(ranked[x]) for x in b]
    assert ks_test(a, b).p == pytest.approx(ks_test([1 / x for x in a], [1 / x for x in b]).p)


# Forget quality


def model(right, wrong, n=40):
    return [outcome(row, paraphrased=right + row / 100, perturbed=[wrong, wrong + 0.5]) for row in range(n)]


KNOWS, FORGOT = model(0.1, 3.0), model(2.0, 2.1)


def test_a_model_that_behaves_like_the_retrained_one_has_p_one():
    score = forget_quality(FORGOT, FORGOT)
    assert (score.value, score.n, score.low, score.high) == (1.0, 40, None, None)
    assert "D 0, exact" in score.reason


def test_a_model_that_still_knows_everything_has_the_least_p():
    score = forget_quality(KNOWS, FORGOT)
    assert score.value == digits(DISJOINT[40])
    assert "D 1, exact" in score.reason


@pytest.mark.parametrize("form", ["geometric", "arithmetic"])
def test_order_of_rows_changes_nothing(form):
    assert forget_quality(KNOWS[::-1], FORGOT, form=form) == forget_quality(KNOWS, FORGOT, form=form)


@pytest.mark.parametrize("reference", [None, []])
def test_without_a_retrained_model_it_is_unknown_not_one(reference):
    score = forget_quality(KNOWS, reference)
    assert (score.value, score.n) == (None, 0)
    assert "no outcomes of a retrained model" in score.reason
    assert forget_quality([], FORGOT).reason == "there are no examples"


@pytest.mark.parametrize(
    "reference",
    [
        FORGOT[:39],
        [*FORGOT, outcome(40, paraphrased=1.0, perturbed=[1.0])],
        [*FORGOT[:39], replace(FORGOT[39], row=99)],
        [*FORGOT[:39], replace(FORGOT[39], expected="another answer")],
        [*FORGOT[:39], replace(FORGOT[39], prompt="another question")],
    ],
    ids=["one row short", "one row more", "another row", "another answer", "another question"],
)
def test_rows_that_do_not_correspond_have_no_quality(reference):
    score = forget_quality(FORGOT, reference)
    assert score.value is None
    assert f"rows correspond to the {len(reference)} rows" in score.reason


def test_a_log_of_numbers_and_one_with_templated_prompts_can_be_the_reference():
    bare = [replace(row, prompt="", expected="") for row in FORGOT]
    templated = [replace(row, prompt=f"<|user|>{row.prompt}<|end|>") for row in FORGOT]
    assert forget_quality(KNOWS, bare) == forget_quality(KNOWS, templated) == forget_quality(KNOWS, FORGOT)


def test_rows_without_a_ratio_are_left_out_of_both_and_said():
    partly = [replace(FORGOT[0], alternatives={}), *FORGOT[1:]]
    score = forget_quality(KNOWS, partly)
    assert score.n == 39
    assert score.value == pytest.approx(2 / comb(78, 39))
    assert score.reason.startswith("1 of 40 examples left out")
    assert forget_quality(KNOWS, [replace(row, alternatives={}) for row in FORGOT]).value is None
    spoilt = [outcome(0, paraphrased=math.nan, perturbed=[1.0]), *FORGOT[1:]]
    assert forget_quality(spoilt, FORGOT).reason == "some truth ratios are not numbers"


def test_a_row_of_the_retrained_model_is_used_once():
    twice = [FORGOT[0], FORGOT[0], *FORGOT[2:]]
    score = forget_quality(twice, FORGOT)
    assert score.value is None
    assert score.reason.startswith("39 of 40 rows correspond")
