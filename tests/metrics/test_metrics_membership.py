"""metrics.md §9 and §10: membership attacks, AUC, true positives at 1 % false positives, PrivLeak."""

import math
import zlib
from itertools import product
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_outcomes import outcome

from palinode.errors import DataError
from palinode.metrics.membership import (
    MUSE_RETRAINED,
    auc,
    gradient_norm_values,
    loss_values,
    min_k_plus_values,
    min_k_values,
    privleak,
    reference_values,
    true_positive_rate,
    zlib_values,
)
from palinode.metrics.table import ATTACKS
from palinode.records import Score

LOGPROBS = (-0.1, -2.3, -0.5, -4.0, -0.05, -1.2, -0.7)
STANDARDISED = (0.652055, 0.0, -3.461357, -3.105976)
END = -9.0
FORGET, HOLDOUT = [0.2, 0.5, 0.9, 1.1], [0.8, 1.2, 1.5, 0.4]
SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=1, max_size=8)


def row(number=0, **fields):
    return outcome(number, **{"logprobs": (*LOGPROBS, END), **fields})


# Attacks


@pytest.mark.parametrize(("k", "value"), [(0.2, 4.0), (0.4, 3.15), (0.05, 4.0), (1.0, -fmean(LOGPROBS))])
def test_min_k_spec_examples_whatever_the_end_token_is(k, value):
    assert min_k_values([row()], k) == [pytest.approx(value)]


@pytest.mark.parametrize(("k", "value"), [(0.4, 3.461357), (0.5, 3.283666)])
def test_min_k_plus_spec_examples(k, value):
    assert min_k_plus_values([row(standardised=(*STANDARDISED, END))], k) == [pytest.approx(value, abs=1e-6)]


def test_min_k_plus_from_logits():
    logits = np.array([[2, 1, 0], [0.5, 0.5, 0.5], [0, 3, -1], [1, -1, 0.5]])
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    mean = (np.exp(logprobs) * logprobs).sum(axis=1)
    variance = (np.exp(logprobs) * logprobs**2).sum(axis=1) - mean**2
    picked = logprobs[range(4), [0, 2, 0, 1]]
    standardised = (picked - mean) / np.sqrt(np.maximum(variance, 1e-6))
    assert list(picked) == pytest.approx([-0.407606, -1.098612, -3.065884, -2.554957], abs=1e-6)
    assert list(standardised) == pytest.approx(STANDARDISED, abs=1e-6)
    (value,) = min_k_plus_values([row(standardised=(*standardised, END))], 0.4)
    assert value == pytest.approx(3.461357, abs=5e-7)


def test_zlib_spec_example():
    text = "The author's full name is Hsiao Yun-Hwa."
    assert len(zlib.compress(text.encode())) == 48
    (value,) = zlib_values([outcome(loss=0.014534537, expected=text)])
    assert value == pytest.approx(3.028028e-4, rel=5e-7)


def test_loss_counts_the_end_token():
    assert loss_values([row()]) == [pytest.approx((8.85 + 9) / 8)]


def test_reference_takes_the_loss_of_the_same_row_whatever_the_order():
    ours = [outcome(row, loss=1.0) for row in range(3)]
    theirs = [outcome(row, loss=0.25 * row) for row in (2, 0, 7)]
    assert reference_values(ours, theirs) == [1.0, None, 0.5]
    assert reference_values(ours, None) == [None, None, None]


def test_gradient_norm_is_the_outcomes():
    assert gradient_norm_values([row(gradient_norm=0.5), row()]) == [0.5, None]


@pytest.mark.parametrize("name", ATTACKS)
def test_contract_of_every_attack(name):
    attack = ATTACKS[name]
    known = [row(0, standardised=(0.0, -1.0, 0.0), gradient_norm=1.0)]
    strange = [row(0, standardised=(0.0, -3.0, 0.0), gradient_norm=9.0, logprobs=(-9.0,) * 8)]
    reference = [row(0)]
    assert attack.name == name
    assert attack.missing
    assert "\n" not in attack.description
    beside = [reference] if "reference" in attack.needs else []
    less, more = attack.per_example(strange, *beside)[0], attack.per_example(known, *beside)[0]
    assert attack.per_example([]) == []
    assert less > more  # less likely a member
    assert attack.per_example([outcome(logprobs=())], *beside) == [None]
    lone = attack.per_example([row()])
    assert (lone == [None]) == bool(attack.needs)


# AUC


def test_auc_spec_example():
    score = auc(FORGET, HOLDOUT)
    assert (score.value, score.n, score.reason) == (0.6875, 8, None)
    assert 0 <= score.low < 0.6875 < score.high <= 1


def test_auc_says_members_with_one_and_over_forgotten_ones_with_zero():
    assert auc([0.1, 0.2], [0.8, 0.9]).value == 1
    assert auc([0.8, 0.9], [0.1, 0.2]).value == 0


@given(SCORES, SCORES)
@settings(deadline=None, max_examples=20)
def test_auc_is_the_share_of_ordered_pairs_with_ties_as_halves(members, others):
    pairs = [1.0 if b > a else 0.5 if a == b else 0.0 for a, b in product(members, others)]
    assert auc(members, others).value == pytest.approx(fmean(pairs), abs=1e-12)


@given(SCORES, SCORES, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20)
def test_auc_both_ways_adds_up_to_one_and_order_changes_nothing(members, others, random):
    score = auc(members, others)
    assert score.value + auc(others, members).value == pytest.approx(1, abs=1e-12)
    shuffled = random.sample(members, len(members)), random.sample(others, len(others))
    assert auc(*shuffled) == score


def test_auc_of_many_values_has_the_interval_that_delong_gives():
    generator = np.random.default_rng(5)
    members, others = generator.normal(0, 1, 300), generator.normal(0.5, 1, 200)
    ordered = others[None, :] > members[:, None]
    variance = ordered.mean(axis=1).var(ddof=1) / 300 + ordered.mean(axis=0).var(ddof=1) / 200
    score = auc(list(members), list(others))
    half = 1.96 * math.sqrt(variance)
    assert score.value == pytest.approx(ordered.mean())
    assert [score.low, score.high] == pytest.approx([score.value - half, score.value + half], abs=0.1 * half)


def test_samples_that_do_not_overlap_leave_room_below_one():
    members, others = [i / 100 for i in range(40)], [1 + i / 100 for i in range(60)]
    score = auc(members, others)
    assert (score.value, score.high) == (1, 1)
    assert score.low == pytest.approx(0.025 ** (1 / 40))
    assert auc(others, members).high == pytest.approx(1 - 0.025 ** (1 / 40))


@pytest.mark.parametrize("measure", [auc, true_positive_rate])
def test_an_empty_sample_is_flagged_not_zero(measure):
    assert measure([], [1.0]) == Score(None, 0, None, None, "there are no members")
    assert measure([1.0], [None, None]).reason == "none of 2 others has a score"
    assert measure([1.0, math.nan], [1.0]).value is None


def test_what_is_missing_is_left_out_and_said():
    score = auc([0.1, None, 0.3], [0.2])
    assert (score.value, score.n, score.low) == (0.5, 3, None)
    assert score.reason == "1 of 3 members left out: no score; one row in a sample gives no interval"
    assert auc([1.0, 1.0], [1.0, 1.0]) == Score(0.5, 4, 0.5, 0.5, "all scores are equal")


def test_same_seed_gives_the_same_interval():
    members, others = list(np.random.default_rng(1).random((2, 50)))
    assert auc(members, others, seed=1) == auc(members, others, seed=1) != auc(members, others, seed=2)


# True positives


def test_true_positives_at_one_percent_of_two_hundred_others():
    others = [float(i) for i in range(200)]  # two of them may be caught: those at 0 and 1
    members = [-1.0, 0.5, 1.0, 1.5, 2.0]
    score = true_positive_rate(members, others)
    assert (score.value, score.n, score.reason) == (0.8, 205, None)  # 2.0 would catch a third other
    assert score.low < 0.8 <= score.high


def test_true_positives_with_few_others_allow_no_false_one_and_say_so():
    score = true_positive_rate([0.1, 0.2, 0.5], [0.2, 0.9, 0.9])
    assert score.value == pytest.approx(1 / 3)  # the member at 0.2 ties with another
    assert score.reason == "with 3 others, a false positive rate of 0.01 allows none at all"


@given(SCORES, SCORES, st.sampled_from([0.0, 0.2, 0.5, 0.75]))
@settings(deadline=None, max_examples=20)
def test_true_positives_are_the_best_that_any_threshold_reaches(members, others, at):
    def share(sample, threshold):
        return fmean(value <= threshold for value in sample)

    thresholds = [-1.0, *members, *others]
    best = max(share(members, t) for t in thresholds if share(others, t) <= at)
    assert true_positive_rate(members, others, at).value == pytest.approx(best)


def test_true_positives_of_all_or_none_leave_room():
    others = [1 + i / 100 for i in range(100)]
    everything = true_positive_rate([0.1] * 20, others)
    nothing = true_positive_rate([9.0] * 20, others)
    assert (everything.low, everything.value) == (pytest.approx(0.025 ** (1 / 20)), 1)
    assert (nothing.value, nothing.high) == (0, pytest.approx(1 - 0.025 ** (1 / 20)))


def test_a_share_that_is_none_is_refused():
    with pytest.raises(DataError, match="between 0 and 1"):
        true_positive_rate([1.0], [1.0], 5)


# PrivLeak


def test_privleak_spec_example():
    assert privleak(0.6875, 0.5).value == pytest.approx(-37.5)
    score = privleak(auc(FORGET, HOLDOUT), 0.5)
    assert (score.value, score.n) == (pytest.approx(-37.5), 8)
    assert score.low == pytest.approx((0.5 - auc(FORGET, HOLDOUT).high) / 0.5 * 100)
    assert score.low < score.value < score.high


@pytest.mark.parametrize(("corpus", "most"), [("news", 109.56), ("books", 85.43)])
def test_privleak_of_muse_is_greatest_at_an_auc_of_zero(corpus, most):
    constant = MUSE_RETRAINED[corpus]["min_k"]
    assert privleak(0.0, 1 - constant).value == pytest.approx(most, abs=0.005)
    assert privleak(1.0, 1 - constant).value == pytest.approx(-100)
    assert privleak(1 - constant, 1 - constant).value == pytest.approx(0, abs=1e-9)


def test_privleak_of_the_published_news_target():
    assert privleak(1 - 0.000907, 1 - 0.4772).value == pytest.approx(-99.81, abs=0.005)


def test_privleak_without_one_of_the_two_is_unknown():
    assert privleak(auc([], HOLDOUT), 0.5).reason == "there is no AUC: there are no members"
    assert privleak(0.5, None).reason == "there is no AUC of a reference model: none was given"
    assert privleak(0.5, 1.0).value is None


def test_privleak_says_that_the_references_own_interval_is_not_in_it():
    other = auc([0.1, 0.7, 1.0], [0.2, 0.9, 1.1])
    assert privleak(auc(FORGET, HOLDOUT), other).reason == "the interval takes the reference AUC as exact"
