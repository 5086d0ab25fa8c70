"""The yardstick from history: worked by hand, and against truths drawn from the very model it assumes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from palinode.errors import DataError
from palinode.evaluation.yardstick import FEWEST_ROWS, Unseen, Yardstick, estimate_yardstick
from palinode.records import Score

SCORE = Score(None, 0, None, None, "not asked for")


def logs(*probabilities: float) -> list[float]:
    return [math.log(probability) for probability in probabilities]


def unseen(base, target, source="holdout") -> Unseen:
    return Unseen(source, list(base), list(target))


def test_base_alone_is_the_yardstick_where_nothing_unseen_is_there():
    found = estimate_yardstick(logs(0.1, 0.3))
    assert found.source == "base"
    assert found.probability.value == pytest.approx(0.2)
    assert found.quantiles() == pytest.approx([0.1, 0.3])


def test_distance_is_the_mean_gap_between_sorted_probabilities_on_either_side():
    found = estimate_yardstick(logs(0.1, 0.3))
    assert found.distance(logs(0.5, 0.2)) == pytest.approx((0.1 + 0.2) / 2)  # knows more: .2 and .5
    assert found.distance(logs(0.05, 0.05)) == pytest.approx((0.05 + 0.25) / 2)  # knows less: as bad
    assert found.distance(logs(0.3, 0.1)) == pytest.approx(0, abs=1e-12)
    assert found.distance(logs(0.4), rows=[1]) == pytest.approx(0.1)


def test_exact_linear_drift_is_found_exactly():
    """target = −1 + 0.5 · base on unseen rows, so −2 of the base becomes −2, and −4 becomes −3."""
    base = np.linspace(-6, -1, 20)
    found = estimate_yardstick([-2.0, -4.0], unseen(base, -1 + 0.5 * base))
    assert found.slope == pytest.approx(0.5)
    assert found.middles == pytest.approx([-2.0, -3.0])
    assert found.rests == pytest.approx(np.zeros(20), abs=1e-9)
    assert found.probability.value == pytest.approx((math.exp(-2) + math.exp(-3)) / 2)
    assert found.tolerance == pytest.approx(0, abs=1e-9)


def test_rests_spread_the_estimate_over_what_rows_do():
    """No slope, rests of −1 and +1 by halves: a forget row lies at −3 or −1, whatever the base made of it."""
    base = np.tile([-5.0, -2.0], 20)
    target = np.repeat([-3.0, -1.0], 20)
    found = estimate_yardstick([-9.0, -1.0], unseen(base, target))
    assert found.slope == pytest.approx(0)
    assert found.quantiles() == pytest.approx([math.exp(-3), math.exp(-1)])


def test_no_answer_is_more_than_certain():
    generator = np.random.default_rng(0)
    base = generator.normal(-0.5, 0.4, 50)
    found = estimate_yardstick([-0.01, -0.1], unseen(base, np.minimum(0, base + generator.normal(0, 1, 50))))
    assert found.quantiles().max() <= 1


def test_slope_is_never_below_zero():
    base = np.linspace(-4, -1, 20)
    assert estimate_yardstick([-1.0, -4.0], unseen(base, -base - 6)).slope == 0


def test_interval_holds_the_truth_and_the_tolerance_its_distance_about_as_often_as_they_say():
    """Sixty worlds in which retrained and base are linked as assumed; few rows make both a little narrow."""
    generator = np.random.default_rng(7)
    inside = near = 0
    for seed in range(60):
        base, asked = generator.normal(-4, 1, 60), generator.normal(-4, 1, 40)

        def drifted(values):
            return -1 + 0.6 * values + generator.normal(0, 0.5, len(values))

        found = estimate_yardstick(asked, unseen(base, drifted(base)), seed=seed)
        truth = drifted(asked)
        inside += found.probability.low <= np.exp(truth).mean() <= found.probability.high
        near += found.distance(truth) <= found.tolerance
    assert inside >= 51
    assert 51 <= near < 60


def test_rows_that_say_the_same_thing_count_as_one():
    """Each row three times over: by groups the interval is that of the single rows, else far too narrow."""
    generator = np.random.default_rng(3)
    base, asked = generator.normal(-3, 1, 60), generator.normal(-3, 1, 40)
    target = np.minimum(0, -1 + 0.6 * base + generator.normal(0, 0.7, 60))

    def width(copies, grouped):
        rows, wanted = np.repeat(np.stack([base, target]), copies, axis=1), np.repeat(asked, copies)
        groups = [np.repeat(np.arange(size), copies).tolist() if grouped else [] for size in (60, 40)]
        found = estimate_yardstick(wanted, Unseen("holdout", *rows.tolist(), groups[0]), groups=groups[1])
        return found.probability.high - found.probability.low

    assert width(3, grouped=True) == pytest.approx(width(1, grouped=False), rel=0.1)
    assert width(3, grouped=False) < 0.7 * width(1, grouped=False)


def test_drift_makes_the_estimate_better_than_the_base_alone_where_there_is_drift():
    generator = np.random.default_rng(1)
    base, asked = generator.normal(-2, 1, 80), generator.normal(-2, 1, 40)
    truth = -2 + 0.5 * asked
    found = estimate_yardstick(asked, unseen(base, -2 + 0.5 * base + generator.normal(0, 0.2, 80)))
    assert found.distance(truth) < 0.3 * estimate_yardstick(asked).distance(truth)


def test_too_few_unseen_rows_say_nothing():
    few = [-2.0 - place / 10 for place in range(FEWEST_ROWS - 1)]
    assert estimate_yardstick([-1.0], unseen(few, few)).source == "base"
    assert estimate_yardstick([-1.0], unseen([*few, -5], [*few, -5])).source == "holdout"


def test_same_seed_gives_the_same_interval():
    base = np.linspace(-5, -1, 30)
    rows = unseen(base, np.sin(base) - 2)
    one, two, other = (estimate_yardstick(logs(0.1, 0.2), rows, seed=seed) for seed in (0, 0, 1))
    assert one == two
    assert one.probability.low != other.probability.low


@pytest.mark.parametrize(
    ("forget", "rows", "said"),
    [
        ([], None, "there are none"),
        ([math.nan], None, "forget rows is not a finite number"),
        ([-1.0], unseen([-1.0] * 9, [-1.0] * 8), "must be asked the same ones"),
        ([-1.0], unseen([-1.0] * 9, [-math.inf] * 9), r"holdout \(target\) rows is not a finite number"),
    ],
)
def test_what_cannot_be_used_is_refused(forget, rows, said):
    with pytest.raises(DataError, match=said):
        estimate_yardstick(forget, rows)


def test_distance_wants_as_many_rows_as_the_yardstick_has():
    with pytest.raises(DataError, match="3 rows were measured, and the yardstick is of 2"):
        estimate_yardstick(logs(0.1, 0.3)).distance(logs(0.1, 0.2, 0.3))


def test_record_says_what_was_assumed_and_holds_nothing_row_by_row():
    found = estimate_yardstick(logs(*[0.1] * 50), unseen(logs(*[0.2] * 40), logs(*[0.3] * 40))).as_record()
    assert set(found) == {
        "source", "assumes", "unseen_rows", "slope", "tolerance", "answer_probability", "quantiles",
    }  # fmt: skip
    assert found["unseen_rows"] == 40
    assert found["assumes"].startswith("the holdout rows are like the forget rows")
    assert len(found["quantiles"]) == 21
    assert set(found["answer_probability"]) == {"value", "n", "low", "high", "reason"}


def test_quantiles_are_the_pooled_values_at_k_minus_a_half_over_n():
    """One middle of ½ and rests of −2, −1, 0 by thirds: one row of forget is the middle of the three values.

    Two rows over six pooled values are those at places 6 · ¼ = 1.5 and 6 · ¾ = 4.5: the second and the fifth.
    """
    one = Yardstick("holdout", 9, (math.log(0.5),), (-2.0, -1.0, 0.0), 0.0, SCORE, 0.0)
    assert one.quantiles() == pytest.approx([0.5 * math.exp(-1)])
    two = replace(one, middles=(math.log(0.5), math.log(0.6)))
    pooled = sorted(middle * math.exp(rest) for middle in (0.5, 0.6) for rest in (-2.0, -1.0, 0.0))
    assert two.quantiles() == pytest.approx([pooled[1], pooled[4]])
    assert two.distance([math.log(pooled[0]), math.log(pooled[5])]) == pytest.approx(
        (pooled[1] - pooled[0] + pooled[5] - pooled[4]) / 2
    )
