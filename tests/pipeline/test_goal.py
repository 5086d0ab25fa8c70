"""What the search for the scales wants, on behaviours small enough to check by hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from palinode.evaluation.yardstick import estimate_yardstick
from palinode.pipeline.goal import (
    TOLERANCE,
    Behaviour,
    Goal,
    TriedScales,
    as_record,
    best,
    front,
    sensitivity,
    warning,
)
from palinode.pipeline.search import good_enough, neighbours, step_of


def did(forget: float, retain: float | None = None, neutral: float | None = None) -> Behaviour:
    """A model that gives both forget rows, both retain rows and the neutral text these probabilities."""

    def rows(probability):
        return () if probability is None else (math.log(probability),) * 2

    return Behaviour(rows(forget), rows(retain), rows(neutral))


YARDSTICK = estimate_yardstick([math.log(0.1)] * 2)
"""Every forget row at 0.1; nothing is left to chance, so the tolerance is 0."""
GOAL = Goal(YARDSTICK, did(0.9, 0.8, 0.5), 0.9)
"""Floors: 0.72 on retain rows and 0.45 on neutral text."""


def tried(alpha: float, beta: float, behaviour: Behaviour, goal: Goal = GOAL) -> TriedScales:
    return TriedScales(alpha, beta, behaviour, goal)


def test_objective_adds_what_is_missing_on_both_sides():
    assert GOAL.objective(did(0.15, 0.75, 0.5)) == pytest.approx(0.05 + 0.05)
    assert GOAL.objective(did(0.04, 0.8, 0.5)) == pytest.approx(0.06)  # over-forgetting counts as much
    assert GOAL.objective(did(0.1, 0.85, 0.5)) == pytest.approx(0)  # gains on the retain set count nothing


def test_floors_hold_on_retain_rows_and_on_neutral_text():
    assert GOAL.keeps(did(0.1, 0.72, 0.45))
    assert not GOAL.keeps(did(0.1, 0.71, 0.5))
    assert not GOAL.keeps(did(0.1, 0.8, 0.44))
    assert GOAL.shortfalls(did(0.1, 0.36, 0.45)) == pytest.approx({"retain": 0.5, "neutral": 0})


@pytest.mark.parametrize(
    ("forget", "retain", "looked", "enough"),
    [
        (0.10, 0.79, 0.20, True),
        (0.10, 0.79, 0.103, False),  # nothing lost there, .003 from the yardstick: .007 better
        (0.10, 0.79, 0.1055, True),  # better, but no more than TOLERANCE
        (0.12, 0.79, 0.20, False),  # forgets too little, and nothing is left to chance
        (0.10, 0.71, 0.30, False),  # misses the floor
    ],
)
def test_a_point_at_the_aim_is_good_enough_where_nothing_promises_more(forget, retain, looked, enough):
    found = [tried(0.5, 0.0, did(forget, retain, 0.5))]
    assert good_enough(found, [*found, tried(0.25, 0.0, did(looked, 0.8, 0.5))]) is enough


def test_a_step_is_a_tenth_however_small_the_scale_is():
    assert [step_of(alpha) for alpha in (0.0, 0.17, 0.5, 4.0)] == pytest.approx([0.01, 0.017, 0.05, 0.4])


def test_forget_only_goal_has_no_floor_and_loses_nothing():
    goal = Goal(YARDSTICK, did(0.9), 0.9)
    assert goal.keeps(did(0.5))
    assert goal.lost(did(0.5)) == 0
    assert goal.objective(did(0.5)) == pytest.approx(0.4)


def test_best_point_keeps_the_floors_before_it_comes_near():
    near, dear = tried(1, 0, did(0.1, 0.7, 0.5)), tried(2, 0, did(0.3, 0.6, 0.5))
    far = tried(0.5, 0, did(0.4, 0.75, 0.5))
    assert best([near, dear, far]) is far
    assert best([near, dear]) is near  # none keeps the floors: the one that misses least


def test_equal_points_go_to_the_smaller_scales():
    same = did(0.2, 0.8, 0.5)
    assert best([tried(1, 1, same), tried(1, 0.5, same), tried(0.5, 1, same)]).forget_scale == 0.5


def test_of_points_within_the_tolerance_the_one_that_loses_least_is_chosen():
    """Objectives .032 and .036: no probe rows tell them apart, and the second loses nothing."""
    near, whole = tried(1, 0, did(0.112, 0.78, 0.5)), tried(2, 0, did(0.136, 0.8, 0.5))
    assert best([near, whole]) is whole
    far = tried(2, 0, did(0.132 + 2 * TOLERANCE, 0.8, 0.5))
    assert best([near, far]) is near


def test_of_points_within_the_tolerance_one_that_chance_cannot_tell_from_the_yardstick_is_chosen():
    yardstick = replace(YARDSTICK, tolerance=0.033)
    goal = Goal(yardstick, GOAL.target, 0.9)
    near, whole = (tried(1, 0, did(p, r, 0.5), goal) for p, r in ((0.132, 0.799), (0.135, 0.8)))
    assert [goal.forgets(one.behaviour) for one in (near, whole)] == [True, False]
    assert best([near, whole]) is near


def test_a_thousandth_of_forgetting_is_not_bought_with_a_twelfth_of_what_is_retained():
    """A forget distance of .072 at .92 of the retain probability, against .073 at all of it."""
    dear, cheap = tried(2, 0, did(0.172, 0.92 * 0.8, 0.5)), tried(1, 0, did(0.173, 0.8, 0.5))
    assert best([dear, cheap]) is cheap


def test_front_holds_the_points_that_no_other_beats_on_both_sides():
    points = [
        tried(0.5, 0, did(0.4, 0.8, 0.5)),
        tried(1, 0, did(0.2, 0.76, 0.5)),
        tried(1, 1, did(0.3, 0.70, 0.5)),  # farther and dearer than (1, 0)
        tried(2, 0, did(0.1, 0.60, 0.5)),
        tried(0.7, 0, did(0.2, 0.76, 0.5)),  # the same as (1, 0)
    ]
    assert [(point.forget_scale, point.retain_scale) for point in front(points)] == [(2, 0), (1, 0), (0.5, 0)]


def test_front_leaves_out_what_was_only_glanced_at():
    glance = Goal(YARDSTICK, GOAL.target, 0.9, rows=(0, 1))
    assert front([tried(1, 0, did(0.1, 0.8, 0.5), glance)]) == []


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (did(0.1, 0.8, 0.5), None),
        (did(0.4, 0.8, 0.5), "both sides: on the forget set the model is still 0.300 .* more than 0.100"),
        (did(0.05, 0.8, 0.5), "answer probability 0.050, less than 0.100"),
        (did(0.1, 0.4, 0.5), "kept 90% of what the target knew: it keeps 50% on retain probes"),
        (did(0.4, 0.4, 0.5), "either side: .* and it keeps 50% on retain probes; it keeps 100% on neutral"),
    ],
)
def test_warning_says_plainly_which_side_is_missed(behaviour, said):
    found = warning(GOAL, tried(1, 0, behaviour))
    assert found is None if said is None else re.search(said, found)


def test_goal_says_itself():
    assert str(GOAL) == (
        "the least sum of the distance to the yardstick on the forget set (answer probability 0.100, by "
        "base) and the probability lost on retain rows, keeping at least 90% of the target's probability "
        "on retain rows and 90% of the target's probability on neutral text"
    )


def test_share_of_the_yardstick_is_the_aim_where_it_is_said():
    lower = replace(GOAL, aim_share=0.5)
    assert lower.aim == pytest.approx(0.05)
    assert lower.distance(did(0.05)) == pytest.approx(0)
    assert lower.distance(did(0.1)) == pytest.approx(0.05)
    points = [tried(1, 0, did(0.1, 0.8, 0.5), lower), tried(2, 0, did(0.05, 0.79, 0.5), lower)]
    assert best(points).forget_scale == 2
    assert best([replace(point, goal=GOAL) for point in points]).forget_scale == 1
    assert "distance to 50% of the yardstick on the forget set (answer probability 0.100" in str(lower)


def test_record_and_sensitivity_state_what_happened_at_each_point():
    chosen, other = tried(1, 0, did(0.15, 0.76, 0.5)), tried(1.1, 0, did(0.12, 0.70, 0.5))
    first, second = as_record([chosen, other], chosen)
    assert first == {
        "forget": 1,
        "retain": 0,
        "rows": 2,
        "forget_probability": pytest.approx(0.15),
        "retain_probability": pytest.approx(0.76),
        "neutral_probability": pytest.approx(0.5),
        "distance": pytest.approx(0.05),
        "objective": pytest.approx(0.09),
        "allowed": True,
        "chosen": True,
    }
    assert (second["allowed"], second["chosen"]) == (False, False)
    (step,) = sensitivity(chosen, [other])
    assert step == {
        "forget": 1.1,
        "retain": 0,
        "allowed": False,
        "distance_change": pytest.approx(-0.03),
        "forget_probability_change": pytest.approx(-0.03),
        "retain_probability_change": pytest.approx(-0.06),
    }


def test_neighbours_are_the_other_points_within_a_step_each_once():
    same = did(0.2, 0.8, 0.5)
    chosen = tried(1, 0.5, same)
    places = [(1, 0.5), (1.1, 0.5), (1.1, 0.5), (0.9, 0.6), (1.2, 0.5), (1, 0.7), (1, 0.4)]
    near = neighbours(chosen, [tried(*place, same) for place in places])
    assert [(point.forget_scale, point.retain_scale) for point in near] == [(0.9, 0.6), (1, 0.4), (1.1, 0.5)]
