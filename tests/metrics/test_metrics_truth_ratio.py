"""metrics.md §4: the truth ratio, its two forms and its three transforms."""

import math
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_outcomes import outcome

from palinode.metrics.aggregate import mean_score
from palinode.metrics.likelihood import forget_truth_ratios, retain_truth_ratios, right_shares, truth_ratios

PARAPHRASED = [1.2, 2.0, 0.5]
PERTURBED = [[1.5, 2, 2.5, 1, 3], [1, 1.2, 1.4, 1.6, 1.8], [3, 3.5, 4, 2.5, 3]]
SPEC = [
    outcome(row, paraphrased=right, perturbed=wrong)
    for row, (right, wrong) in enumerate(zip(PARAPHRASED, PERTURBED, strict=True))
]
LOSSES = st.floats(0.001, 30)
TRANSFORMS = [truth_ratios, forget_truth_ratios, retain_truth_ratios, right_shares]


def near(*values):
    return pytest.approx(values[0] if len(values) == 1 else list(values), abs=6e-7)


def test_spec_example_of_the_geometric_form():
    assert truth_ratios(SPEC) == near(0.449329, 1.822119, 0.067206)
    assert fmean(forget_truth_ratios(SPEC)) == near(0.355115)
    assert fmean(retain_truth_ratios(SPEC)) == near(0.494489)
    assert right_shares(SPEC) == near(0.689974, 0.354344, 0.937027)
    assert fmean(right_shares(SPEC)) == near(0.660448)


def test_spec_example_of_the_arithmetic_form():
    assert truth_ratios(SPEC, form="arithmetic") == near(0.569876, 1.895834, 0.075898)


def test_published_log_of_a_forget_row():
    wrong = (3.355818272, 3.690197229, 3.719407558, 4.432241917, 2.973668098)
    (ratio,) = truth_ratios([outcome(paraphrased=2.228723049, perturbed=wrong)])
    assert ratio == pytest.approx(0.245233715, abs=1e-8)  # the log was written in float32


@pytest.mark.parametrize("form", ["geometric", "arithmetic"])
def test_when_all_answers_are_equally_likely_the_ratio_is_one(form):
    alike = [outcome(paraphrased=2.0, perturbed=[2.0] * 5)]
    found = [transform(alike, form=form) for transform in TRANSFORMS]
    assert found == [[1.0], [1.0], [0.0], [0.5]]


def test_the_answer_in_the_data_can_stand_for_the_paraphrase():
    row = outcome(loss=0.5, paraphrased=9.0, perturbed=[1.5])
    assert truth_ratios([row], right="expected") == [pytest.approx(math.exp(-1.0))]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_without_a_right_or_a_wrong_answer_there_is_no_ratio(transform):
    rows = [outcome(perturbed=[1.0]), outcome(paraphrased=1.0), SPEC[0]]
    assert transform(rows)[:2] == [None, None]
    assert transform(rows)[2] is not None


def test_extreme_ratios_stay_in_their_ranges():
    rows = [outcome(paraphrased=2000.0, perturbed=[0.0]), outcome(paraphrased=0.0, perturbed=[2000.0])]
    assert truth_ratios(rows) == [math.inf, 0.0]
    assert forget_truth_ratios(rows) == [0.0, 0.0]
    assert retain_truth_ratios(rows) == [0.0, 1.0]
    assert right_shares(rows) == [0.0, 1.0]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_loss_that_is_not_a_number_is_reported_not_counted_as_zero(transform):
    score = mean_score(transform([SPEC[0], outcome(paraphrased=math.nan, perturbed=[1.0])]))
    assert score.value is None
    assert "not finite" in score.reason


@given(LOSSES, st.lists(LOSSES, min_size=1, max_size=5))
def test_arithmetic_ratio_is_never_below_the_geometric_one(right, wrong):
    rows = [outcome(paraphrased=right, perturbed=wrong)]
    assert truth_ratios(rows, form="arithmetic")[0] >= truth_ratios(rows)[0] * (1 - 1e-9)


@given(LOSSES, LOSSES)
def test_swapping_right_and_wrong_inverts_the_ratio_and_keeps_the_forget_transform(right, wrong):
    rows = [outcome(paraphrased=right, perturbed=[wrong])]
    back = {"right": "perturbed", "wrong": "paraphrased"}
    assert truth_ratios(rows)[0] * truth_ratios(rows, **back)[0] == pytest.approx(1)
    assert forget_truth_ratios(rows)[0] == pytest.approx(forget_truth_ratios(rows, **back)[0])
    assert right_shares(rows)[0] + right_shares(rows, **back)[0] == pytest.approx(1)
