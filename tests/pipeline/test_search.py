"""The choice of scales, on grids small enough to check by hand."""

from __future__ import annotations

import pytest

from palinode.pipeline.grid import GridPoint, Probe, Rule, as_record, choose, nearest, walk_grid

RULE = Rule(base_forget=0.10, target_retain=0.80, retain_share=0.9)
"""Forget probability at least 0.10, retain probability at least 0.72."""
FORGET_ONLY = Rule(base_forget=0.10, target_retain=None, retain_share=0.9)


def points(*rows: tuple[float, float, float, float | None]) -> list[GridPoint]:
    """Points from (α, β, forget probability, retain probability)."""
    return [GridPoint(alpha, beta, Probe(forget, retain)) for alpha, beta, forget, retain in rows]


def scales(point: GridPoint | None) -> tuple[float, float] | None:
    return (point.forget_scale, point.retain_scale) if point else None


# The rule


def test_floor_is_the_stated_share_of_what_the_target_retains():
    assert RULE.retain_floor == pytest.approx(0.72)
    assert FORGET_ONLY.retain_floor is None


@pytest.mark.parametrize(
    ("forget", "retain", "allowed"),
    [
        (0.10, 0.72, True),  # both floors may be touched
        (0.50, 0.80, True),
        (0.0999, 0.80, False),  # over-forgetting
        (0.10, 0.7199, False),  # costs too much
        (0.05, 0.10, False),
        (0.50, None, False),  # not measured is not kept
    ],
)
def test_rule_allows_points_that_neither_over_forget_nor_cost_too_much(forget, retain, allowed):
    assert (
        Rule(base_forget=0.10, target_retain=0.72, retain_share=1.0).allows(Probe(forget, retain)) == allowed
    )


def test_without_retain_rows_only_over_forgetting_is_refused():
    assert FORGET_ONLY.allows(Probe(0.10, None))
    assert not FORGET_ONLY.allows(Probe(0.09, None))


def test_rule_says_itself_with_its_numbers():
    assert str(RULE) == (
        "the least forget-set probability not below the base checkpoint's 0.100, with a retain probability "
        "of at least 0.720 (90% of the target's 0.800)"
    )
    assert str(FORGET_ONLY) == "the least forget-set probability not below the base checkpoint's 0.100"


# The choice


def test_least_forget_probability_among_the_allowed_points_is_chosen():
    found = points((0.5, 0, 0.30, 0.79), (0.75, 0, 0.15, 0.75), (1, 0, 0.11, 0.60), (1.5, 0, 0.05, 0.78))
    assert scales(choose(found, RULE)) == (0.75, 0)


def test_points_below_the_base_are_never_chosen_however_well_they_retain():
    found = points((0.5, 0, 0.60, 0.79), (1, 0, 0.02, 0.80))
    assert scales(choose(found, RULE)) == (0.5, 0)


def test_smaller_scales_win_a_tie():
    found = points((1, 1, 0.2, 0.8), (1, 0.5, 0.2, 0.8), (0.5, 1, 0.2, 0.8))
    assert scales(choose(found, RULE)) == (0.5, 1)
    assert scales(choose(found[:2], RULE)) == (1, 0.5)


def test_nothing_is_chosen_where_no_point_keeps_the_rule():
    assert choose(points((0.5, 0, 0.05, 0.8), (1, 0, 0.3, 0.5)), RULE) is None
    assert choose([], RULE) is None


def test_forget_only_takes_the_point_nearest_above_the_base():
    found = points((0.5, 0, 0.40, None), (1, 0, 0.12, None), (1.5, 0, 0.03, None))
    assert scales(choose(found, FORGET_ONLY)) == (1, 0)


# The nearest point, where none keeps the rule


def test_nearest_point_has_the_smallest_relative_shortfall():
    """On retain (0.72 - 0.54) / 0.72 = 0.25 and 0.125; on forget (0.10 - 0.08) / 0.10 = 0.2."""
    found = points((0.5, 0, 0.30, 0.54), (1, 0, 0.08, 0.80), (0.25, 0, 0.50, 0.63))
    assert scales(nearest(found, RULE)) == (0.25, 0)


def test_larger_of_the_two_shortfalls_counts():
    found = points((0.5, 0, 0.09, 0.36), (1, 0, 0.06, 0.72))  # 0.1 and 0.5 against 0.4 and 0
    assert scales(nearest(found, RULE)) == (1, 0)


def test_nearest_point_of_a_tie_has_the_smaller_scales():
    found = points((1, 0.5, 0.05, 0.8), (0.5, 1, 0.05, 0.8), (0.5, 0.5, 0.05, 0.8))
    assert scales(nearest(found, RULE)) == (0.5, 0.5)


def test_nearest_in_a_forget_only_run_over_forgets_least():
    assert scales(nearest(points((0.5, 0, 0.02, None), (0.25, 0, 0.07, None)), FORGET_ONLY)) == (0.25, 0)


def test_nearest_of_points_with_a_base_that_gives_the_rows_no_chance():
    rule = Rule(0.0, 0.0, 0.9)
    assert scales(nearest(points((1, 0, 0.0, 0.0)), rule)) == (1, 0)


# The walk


def walk(forget_grid, retain_grid, forget_of, rule=RULE):
    """The points tried, in order, where the forget probability is a function of (α, β)."""
    tried = walk_grid(forget_grid, retain_grid, lambda a, b: Probe(forget_of(a, b), 0.8), rule)
    return [scales(point) for point in tried]


def test_walk_goes_upwards_in_alpha_for_each_beta():
    assert walk([1.0, 0.5], [0.5, 0.0], lambda a, b: 0.5) == [(0.5, 0.0), (1.0, 0.0), (0.5, 0.5), (1.0, 0.5)]


def test_walk_leaves_a_beta_at_its_first_point_below_the_base():
    def forget(alpha, beta):
        return 0.51 - 0.4 * alpha + 0.2 * beta

    assert walk([0.5, 1.0, 1.5, 2.0], [0.0, 1.0], forget) == [
        (0.5, 0.0),  # 0.31
        (1.0, 0.0),  # 0.11: not below
        (1.5, 0.0),  # -0.09: below, and seen
        (0.5, 1.0),  # 0.51
        (1.0, 1.0),  # 0.31
        (1.5, 1.0),  # 0.11
        (2.0, 1.0),  # -0.09
    ]


def test_walk_tries_each_point_once_and_only_when_it_is_asked_for():
    asked = []

    def probe(alpha, beta):
        asked.append((alpha, beta))
        return Probe(0.5, 0.8)

    walker = walk_grid([1.0, 2.0], [0.0], probe, RULE)
    next(walker)
    assert asked == [(1.0, 0.0)]
    list(walker)
    assert asked == [(1.0, 0.0), (2.0, 0.0)]


def test_record_of_the_points_says_which_were_allowed_and_which_was_chosen():
    found = points((0.5, 0, 0.30, 0.79), (1, 0, 0.05, 0.79))
    assert as_record(found, RULE, found[0]) == [
        {
            "forget": 0.5,
            "retain": 0,
            "forget_probability": 0.30,
            "retain_probability": 0.79,
            "allowed": True,
            "chosen": True,
        },
        {
            "forget": 1,
            "retain": 0,
            "forget_probability": 0.05,
            "retain_probability": 0.79,
            "allowed": False,
            "chosen": False,
        },
    ]
