"""metrics.md §7: exact memorisation and extraction strength."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palinode.metrics.membership import exact_memorizations, extraction_strengths
from palinode.metrics.table import score_outcomes
from palinode.records import Outcome

HITS = st.lists(st.booleans(), min_size=3, max_size=12)


def outcome(hits):
    return Outcome(0, "", "", None, tuple(-1.0 for _ in hits), tuple(hits))


def strength(hits, **options):
    (value,) = extraction_strengths([outcome(hits)], **options)
    return value


def memorization(hits):
    (value,) = exact_memorizations([outcome(hits)])
    return value


SPEC_EXAMPLES = {  # right (1) or wrong (0) at labels 5, 6, 7, 8, 9: ES, EM
    "all right": ("11111", 1.0, 1.0),
    "first wrong": ("01111", 0.8, 0.8),
    "third wrong": ("11011", 0.4, 0.8),
    "last wrong": ("11110", 0.2, 0.8),
    "all wrong": ("00000", 0.2, 0.0),
    "only last right": ("00001", 0.2, 0.2),
}


@pytest.mark.parametrize("end_token_right", [True, False])
@pytest.mark.parametrize(("right", "es", "em"), SPEC_EXAMPLES.values(), ids=SPEC_EXAMPLES)
def test_spec_examples_whatever_the_end_token_is(right, es, em, end_token_right):
    hits = [*(mark == "1" for mark in right), end_token_right]
    assert strength(hits) == pytest.approx(es, abs=1e-12)
    assert memorization(hits) == pytest.approx(em, abs=1e-12)


def test_strict_strength_is_zero_when_the_last_token_is_wrong():
    assert strength([True, True, False, True], strict=True) == 0.0
    assert strength([False, True, True, True], strict=True) == strength([False, True, True, True])


@pytest.mark.parametrize("hits", [[], [True], [False]])
def test_with_at_most_the_end_token_scored_there_is_no_value(hits):
    assert strength(hits) is None
    assert memorization(hits) is None


@given(HITS)
def test_values_lie_between_zero_and_one(hits):
    assert 0 <= memorization(hits) <= 1
    assert 0 < strength(hits) <= 1


@given(HITS)
def test_strict_strength_never_exceeds_memorization(hits):
    assert strength(hits, strict=True) <= memorization(hits) + 1e-12


@given(HITS)
def test_strength_is_the_definition_searched_for_by_hand(hits):
    answer = hits[:-1]
    first_k = next((k for k in range(len(answer)) if all(answer[k:])), len(answer) - 1)
    assert strength(hits) == pytest.approx(1 - first_k / len(answer), abs=1e-12)


def test_one_token_tells_nothing_of_extraction_strength_and_has_no_value():
    """The search for k* ends at n − 1 = 0, so that it would be 1 for a right token and a wrong one."""
    assert [strength([right, True]) for right in (True, False)] == [None, None]
    assert [strength([right, True], strict=True) for right in (True, False)] == [1.0, 0.0]
    assert [strength([right, True], single=1.0) for right in (True, False)] == [1.0, 1.0]
    assert [memorization([right, True]) for right in (True, False)] == [1.0, 0.0]


def test_rows_of_one_token_leave_the_score_blank_and_the_reason_says_why():
    long, short = outcome([True, False, True]), outcome([False, True])
    assert score_outcomes([long, long])["extraction_strength"].reason is None
    mixed = score_outcomes([long, short, long])["extraction_strength"]
    assert (mixed.value, mixed.n) == (0.5, 2)
    assert mixed.reason.startswith("1 of 3 examples left out")
    blank = score_outcomes([short, short])["extraction_strength"]
    assert blank.value is None
    assert "one token, for which it is 1 whatever the model does" in blank.reason
