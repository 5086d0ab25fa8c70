"""The walk over a grid of scales, on behaviours small enough to check by hand."""

from __future__ import annotations

import math

import pytest

from palinode.evaluation.yardstick import estimate_yardstick
from palinode.pipeline.goal import Behaviour, Goal, TriedScales
from palinode.pipeline.search import walk_grid

GOAL = Goal(
    estimate_yardstick([math.log(0.1)] * 2), Behaviour((math.log(0.9),) * 2, (math.log(0.8),) * 2), 0.9
)
"""Every forget row at 0.1, and a retain probability of at least 0.72."""


def walk(forget_grid, retain_grid, forget_of, retain_of=lambda a, b: 0.8, beyond=()):
    """The points tried, in order, where both probabilities are functions of (α, β)."""

    def tried(alpha, beta):
        rows = [(math.log(of(alpha, beta)),) * 2 for of in (forget_of, retain_of)]
        return TriedScales(alpha, beta, Behaviour(*rows), GOAL)

    points = walk_grid(GOAL, tried, forget_grid, retain_grid, beyond)
    return [(point.forget_scale, point.retain_scale) for point in points]


def test_walk_goes_upwards_in_alpha_for_each_beta():
    assert walk([0.5, 1.0], [0.0, 0.5], lambda a, b: 0.5) == [(0.5, 0.0), (1.0, 0.0), (0.5, 0.5), (1.0, 0.5)]


def test_walk_leaves_a_beta_where_it_is_past_the_yardstick_and_gets_worse():
    def forget(alpha, beta):
        return max(0.01, 0.51 - 0.4 * alpha + 0.2 * beta)

    assert walk([0.5, 1.0, 1.5, 2.0], [0.0, 1.0], forget) == [
        (0.5, 0.0),  # 0.31
        (1.0, 0.0),  # 0.11: 0.01 off
        (1.5, 0.0),  # 0.01: past, and 0.09 off
        (0.5, 1.0),  # 0.51
        (1.0, 1.0),  # 0.31
        (1.5, 1.0),  # 0.11
        (2.0, 1.0),  # 0.01
    ]


def test_walk_tries_each_point_once_and_only_when_it_is_asked_for():
    asked = []

    def tried(alpha, beta):
        asked.append((alpha, beta))
        return TriedScales(alpha, beta, Behaviour((math.log(0.5),) * 2, (math.log(0.8),) * 2), GOAL)

    walker = walk_grid(GOAL, tried, [1.0, 2.0], [0.0])
    next(walker)
    assert asked == [(1.0, 0.0)]
    list(walker)
    assert asked == [(1.0, 0.0), (2.0, 0.0)]


@pytest.mark.parametrize(
    ("forget", "retain", "last"),
    [
        (lambda a, b: 0.5, lambda a, b: 0.8, 3.0),  # never there: to the end
        (lambda a, b: 0.5 if a < 2 else 0.05, lambda a, b: 0.8, 2.0),  # past the yardstick
        (lambda a, b: 0.5, lambda a, b: 0.8 if a < 1 else 0.5, 1.0),  # a floor is missed
    ],
)
def test_walk_goes_beyond_the_grid_while_it_forgets_too_little_and_keeps_the_floors(forget, retain, last):
    tried = walk([0.5, 1.0], [0.0], forget, retain, beyond=[2.0, 3.0])
    assert tried[-1] == (last, 0.0)
