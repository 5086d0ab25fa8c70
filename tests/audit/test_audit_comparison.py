"""Figures, differences and verdicts, from values made by hand."""

from __future__ import annotations

import math

import pytest

from palinode.audit.attack import AttackTest as AuditTest
from palinode.audit.findings import compare, judge, paired
from palinode.records import Score

MEAN = AuditTest("probability", "answer probability", more=0.1, less=0.1, missing="no token was scored")
AUC = AuditTest("loss", "AUC of LOSS", more=0.1, less=0.1, missing="no token", statistic="auc")
REFERENCE = AuditTest("ref", "AUC", more=0.1, less=0.1, missing="-", statistic="auc", relative=True)


def found(test, values, reference, **changes):
    options = {"more": test.more, "less": test.less, "min_rows": 4, "seed": 0, **changes}
    return compare(test, values, reference, **options)


def difference(value, low, high):
    return Score(value, 40, low, high)


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (0.3, 0.2, 0.4, "knows more"),
        (0.3, 0.01, 0.6, "knows more"),
        (0.3, -0.01, 0.6, "unclear"),
        (0.0, 0.0, 0.0, "within"),
        (0.05, 0.02, 0.1, "within"),
        (0.05, 0.02, 0.11, "unclear"),
        (-0.05, -0.1, 0.0, "within"),
        (-0.3, -0.5, -0.01, "knows less"),
        (-0.3, -0.5, 0.01, "unclear"),
        (-0.09, -0.2, -0.01, "unclear"),
    ],
)
def test_verdict_follows_from_the_margin_and_the_interval(value, low, high, verdict):
    assert judge(difference(value, low, high), more=0.1, less=0.1, rows=40, min_rows=10)[0] == verdict


def test_side_without_a_margin_is_not_judged():
    assert judge(difference(5.0, 4.0, 6.0), more=None, less=1.0, rows=40, min_rows=10)[0] == "within"
    assert judge(difference(-5.0, -6.0, -4.0), more=0.1, less=None, rows=40, min_rows=10)[0] == "within"
    assert judge(difference(-5.0, -6.0, -4.0), more=None, less=1.0, rows=40, min_rows=10)[0] == "knows less"
    assert judge(difference(-5.0, -6.0, -4.0), more=None, less=None, rows=40, min_rows=10)[0] == "not judged"


def test_few_rows_are_unclear_and_none_are_not_tested():
    assert judge(difference(0.9, 0.8, 1.0), more=0.1, less=0.1, rows=9, min_rows=10) == (
        "unclear",
        "9 rows are too few; 10 are asked for",
    )
    assert judge(Score(None, 0, None, None, "no row"), more=0.1, less=0.1, rows=0, min_rows=10) == (
        "not tested",
        "no row",
    )


def test_difference_of_means_is_the_mean_of_differences():
    finding = found(MEAN, {"forget": (0.9, 0.7, 0.8, 0.6)}, {"forget": (0.1, 0.3, 0.2, 0.0)})
    assert finding.score.value == pytest.approx(0.75)
    assert finding.reference.value == pytest.approx(0.15)
    assert finding.difference.value == pytest.approx(0.6)
    assert finding.difference.n == 4
    assert finding.verdict == "knows more"


def test_rows_are_drawn_in_pairs():
    """Rows of very different difficulty, all better by the same amount: the interval has no width."""
    finding = found(MEAN, {"forget": (0.1, 0.5, 0.9, 0.3)}, {"forget": (0.0, 0.4, 0.8, 0.2)})
    assert (finding.difference.low, finding.difference.high) == pytest.approx((0.1, 0.1))
    assert finding.score.high - finding.score.low > 0.3


def test_rows_without_a_value_on_either_side_are_left_out():
    ours, theirs = paired({"forget": (1.0, None, 3.0)}, {"forget": (None, 2.0, 4.0)})
    assert (ours, theirs) == ({"forget": (3.0,)}, {"forget": (4.0,)})


def test_no_row_with_a_value_is_not_tested_and_says_why():
    finding = found(MEAN, {"forget": (None, None)}, {"forget": (0.1, 0.2)})
    assert finding.verdict == "not tested"
    assert finding.reason == "no token was scored"
    assert finding.score.value is None
    finding = found(AUC, {"forget": (1.0,), "holdout": (None,)}, {"forget": (1.0,), "holdout": (1.0,)})
    assert (finding.verdict, finding.reason) == ("not tested", "no token (holdout rows)")


def test_difference_of_areas_is_the_worked_example():
    """0.6875 (spec: metrics.md §9) less one half, where the reference model tells nothing apart."""
    ours = {"forget": (0.2, 0.5, 0.9, 1.1), "holdout": (0.8, 1.2, 1.5, 0.4)}
    finding = found(AUC, ours, {"forget": (1.0,) * 4, "holdout": (1.0,) * 4})
    assert finding.score.value == pytest.approx(0.6875)
    assert finding.reference.value == pytest.approx(0.5)
    assert finding.difference.value == pytest.approx(0.1875)
    assert finding.difference.low < 0.1875 < finding.difference.high


def test_area_far_below_one_half_knows_less():
    strange = {"forget": tuple(5.0 + i for i in range(20)), "holdout": tuple(i / 20 for i in range(20))}
    usual = {"forget": tuple(i + 0.0 for i in range(20)), "holdout": tuple(i + 0.0 for i in range(20))}
    assert found(AUC, strange, usual).verdict == "knows less"
    assert found(AUC, usual, strange).verdict == "knows more"
    assert found(AUC, strange, strange).verdict == "within"


def test_reference_attack_takes_the_other_loss_off_first():
    """The loss fell on the forget rows only; holdout rows are as hard as ever, if far harder."""
    theirs = {"forget": (1.0, 2.0, 3.0, 4.0), "holdout": (0.1, 0.2, 9.0, 8.0)}
    ours = {"forget": (0.5, 1.5, 2.5, 3.5), "holdout": (0.1, 0.2, 9.0, 8.0)}
    finding = found(REFERENCE, ours, theirs)
    assert finding.score.value == 1.0
    assert finding.reference.value == 0.5
    assert finding.difference.value == 0.5


def test_same_seed_gives_the_same_interval():
    wave = [math.sin(7 * i) for i in range(60)]
    values = {"forget": tuple(wave[:29]), "holdout": tuple(wave[29:])}
    other = {"forget": tuple(wave[31:]), "holdout": tuple(wave[:31])}
    assert found(AUC, values, other) == found(AUC, values, other)
    assert found(AUC, values, other).difference != found(AUC, values, other, seed=1).difference
