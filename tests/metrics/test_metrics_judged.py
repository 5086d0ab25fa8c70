"""msa.md §5: the judge's accuracies."""

import pytest

from palinode.metrics.matching import forget_accuracy, recover_accuracy, retain_accuracy
from palinode.records import Verdict

OFFERED = (
    ("in Paris", ("truth",)),
    ("in Rome", ("ideal",)),
    ("in Oslo", ("perturbed",)),
    ("none of these", ("none",)),
)
TRUTH, IDEAL, PERTURBED, NONE = range(4)
ALL = [forget_accuracy, recover_accuracy, retain_accuracy]


def verdict(*picked, offered=OFFERED, **fields):
    return Verdict(**{"row": 0, "judge": "overlap", "offered": offered, "picked": picked, **fields})


FOUR = [verdict(TRUTH), verdict(IDEAL), verdict(TRUTH, IDEAL), verdict(NONE)]


def test_worked_example():
    assert forget_accuracy(FOUR).value == 0.5
    assert recover_accuracy(FOUR).value == 0.5
    assert retain_accuracy(FOUR).value == 0.75
    assert forget_accuracy([verdict(PERTURBED), verdict()]).value == 1


def test_picks_are_not_exclusive():
    # msa.md: ideal model, 40 questions, truth picked in 3 and ideal in 39
    verdicts = [verdict(TRUTH, IDEAL)] * 2 + [verdict(TRUTH)] + [verdict(IDEAL)] * 37
    assert forget_accuracy(verdicts).value == pytest.approx(0.925)
    assert recover_accuracy(verdicts).value == pytest.approx(0.975)
    assert retain_accuracy(verdicts).value == 1


def test_a_candidate_that_is_both_truth_and_ideal_counts_as_both():
    same = verdict(0, offered=(("in Paris", ("truth", "ideal")), ("none of these", ("none",))))
    assert forget_accuracy([same]).value == 0
    assert recover_accuracy([same]).value == 1


def test_verdicts_without_a_pick_are_left_out_and_said():
    failed = verdict(picked=None, reason="the reply was no JSON")
    score = forget_accuracy([*FOUR, failed])
    assert (score.value, score.n) == (0.5, 4)
    assert score.reason == (
        "1 of 5 examples left out: the judge picked nothing (the reply was no JSON); judged by overlap"
    )


def test_recovery_is_unknown_where_no_ideal_answer_was_offered():
    alone = [verdict(0, offered=OFFERED[:1])] * 2
    score = recover_accuracy(alone)
    assert (score.value, score.n) == (None, 0)
    assert "no ideal answer among the candidates" in score.reason
    assert retain_accuracy(alone).value == 1
    assert "no ideal answer among the candidates of 2 of 2 rows" in retain_accuracy(alone).reason


@pytest.mark.parametrize("accuracy", ALL)
def test_every_score_names_its_judges(accuracy):
    both = [verdict(TRUTH), verdict(TRUTH, judge="https://example.org/v1 some-model")]
    assert accuracy(both).reason.endswith("judged by https://example.org/v1 some-model, overlap")


@pytest.mark.parametrize("accuracy", ALL)
def test_no_verdicts_give_no_value(accuracy):
    assert accuracy([]).value is None
    assert accuracy([]).reason == "there are no examples"


@pytest.mark.parametrize("accuracy", ALL[:3])
def test_order_changes_nothing_and_there_is_an_interval(accuracy):
    score = accuracy(FOUR)
    assert accuracy(FOUR[::-1]) == score
    assert 0 <= score.low <= score.value <= score.high <= 1
