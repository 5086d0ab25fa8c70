"""Points and directions: what adds to what, and the coefficients that come of it."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palinode.errors import AlgebraError, InputError, PalinodeError
from palinode.weights import Checkpoint, Direction, Point, WeightedSum, save


def point(name):
    return Checkpoint(Path("models") / name, {}, {})


TARGET, BASE, THETA_1, THETA_2 = map(point, ("target", "base", "theta_1", "theta_2"))


def test_point_minus_point_is_a_direction():
    direction = THETA_1 - BASE
    assert isinstance(direction, Direction)
    assert direction.terms == {THETA_1: 1.0, BASE: -1.0}


def test_the_method_has_the_coefficients_of_the_paper():
    alpha, beta = 0.75, 0.5
    unlearned = TARGET - alpha * (THETA_1 - BASE) + beta * (THETA_2 - BASE)
    assert isinstance(unlearned, WeightedSum)
    assert unlearned.terms == {TARGET: 1.0, THETA_1: -0.75, THETA_2: 0.5, BASE: 0.25}
    assert unlearned.anchor == TARGET


def test_point_plus_point_says_so():
    with pytest.raises(AlgebraError, match=r"two points were added; add a direction.*target \+ beta"):
        TARGET + BASE
    with pytest.raises(AlgebraError, match="two points"):
        (TARGET - (THETA_1 - BASE)) + BASE


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: 2 * TARGET,
        lambda: TARGET * 2,
        lambda: -TARGET,
        lambda: TARGET / 2,
        lambda: TARGET * (THETA_1 - BASE),
        lambda: -(TARGET + (THETA_1 - BASE)),
    ],
)
def test_a_multiple_of_a_point_has_no_meaning_and_says_so(mistake):
    with pytest.raises(AlgebraError, match="scale a direction instead"):
        mistake()


def test_a_direction_before_a_point_says_which_way_round():
    with pytest.raises(AlgebraError, match=r"write the point first: target \+ direction"):
        (THETA_1 - BASE) + TARGET
    with pytest.raises(AlgebraError, match="write the point first: target - direction"):
        (THETA_1 - BASE) - TARGET


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e39, -(10**400)])
def test_a_scale_must_be_a_finite_number(number):
    with pytest.raises(AlgebraError, match="must be a finite number"):
        number * (THETA_1 - BASE)


def test_scales_that_multiply_beyond_float32_say_so():
    with pytest.raises(AlgebraError, match="beyond the range of float32"):
        1e30 * (1e30 * (THETA_1 - BASE))


@pytest.mark.parametrize(
    "nonsense",
    [
        lambda: TARGET + 1,
        lambda: 1 + TARGET,
        lambda: TARGET - "x",
        lambda: (THETA_1 - BASE) + 1,
        lambda: 1 + (THETA_1 - BASE),
        lambda: (THETA_1 - BASE) * "2",
        lambda: (THETA_1 - BASE) * (THETA_2 - BASE),
    ],
)
def test_what_is_no_point_or_direction_is_a_type_error(nonsense):
    with pytest.raises(TypeError):
        nonsense()


def test_an_algebra_error_is_a_type_error_and_a_user_error():
    assert issubclass(AlgebraError, TypeError)
    assert issubclass(AlgebraError, InputError)
    assert issubclass(AlgebraError, PalinodeError)


def test_numpy_numbers_scale_a_direction():
    direction = THETA_1 - BASE
    for half in (np.float64(0.5), np.float32(0.5)):
        assert (half * direction).terms == (direction * half).terms == {THETA_1: 0.5, BASE: -0.5}


def test_directions_are_summed_by_sum():
    assert sum([THETA_1 - BASE, THETA_2 - BASE]).terms == {THETA_1: 1, THETA_2: 1, BASE: -2}


def test_the_target_is_no_term_of_its_own_difference():
    assert (TARGET - TARGET).terms == {}
    assert (TARGET - (TARGET - BASE)).terms == {BASE: 1.0}
    assert (TARGET - (TARGET - BASE)).anchor == TARGET


def test_a_zero_scale_leaves_no_term_behind():
    assert (TARGET - 0.0 * (THETA_1 - BASE)).terms == {TARGET: 1.0}
    assert (TARGET + 0.0 * (THETA_2 - BASE) - 0.5 * (THETA_1 - BASE)).terms.keys() == {TARGET, THETA_1, BASE}


def test_the_leftmost_point_is_the_anchor():
    assert (BASE + (TARGET - THETA_1)).anchor == BASE
    assert ((BASE + (TARGET - THETA_1)) - (THETA_2 - BASE)).anchor == BASE


def test_a_formula_is_not_changed_by_what_is_made_of_it():
    vector = THETA_1 - BASE
    _ = TARGET - 2 * vector, -vector, vector + vector, sum([vector, vector])
    assert vector.terms == {THETA_1: 1.0, BASE: -1.0}


def test_openings_of_one_folder_are_one_point():
    again = Checkpoint(TARGET.folder, {}, {"any": "config"})
    assert again == TARGET
    assert (TARGET - again).terms == {}


def test_a_direction_cannot_be_saved_as_a_model(tmp_path):
    with pytest.raises(AlgebraError, match="a direction is not a model"):
        save(THETA_1 - BASE, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# Random expressions. Scales are multiples of 1/8 and small, so float64 adds them without rounding.

POINTS = [TARGET, BASE, THETA_1, THETA_2]
scales = st.integers(-64, 64).map(lambda eighths: eighths / 8)
checkpoints = st.sampled_from(POINTS)
directions = st.recursive(
    st.builds(lambda a, b: a - b, checkpoints, checkpoints),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        st.builds(lambda factor, a: factor * a, st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]), inner),
        st.builds(lambda a: -a, inner),
    ),
    max_leaves=8,
)
points = st.one_of(
    checkpoints,
    st.builds(lambda p, d: p + d, checkpoints, directions),
    st.builds(lambda p, d: p - d, checkpoints, directions),
)


@given(directions)
def test_coefficients_of_a_direction_add_up_to_zero(direction):
    assert isinstance(direction, Direction)
    assert sum(direction.terms.values()) == 0


@given(points)
def test_coefficients_of_a_point_add_up_to_one(point):
    assert isinstance(point, Point)
    assert sum(point.terms.values()) == 1


@given(points, points)
def test_difference_of_any_points_is_a_direction_that_leads_back(first, second):
    assert sum((first - second).terms.values()) == 0
    assert (second + (first - second)).terms == first.terms


@given(directions, directions, directions)
def test_directions_add_in_any_order_and_grouping(a, b, c):
    assert ((a + b) + c).terms == (a + (b + c)).terms
    assert (a + b).terms == (b + a).terms
    assert (a - b).terms == (-(b - a)).terms


@given(directions, scales, scales)
def test_scales_add(direction, first, second):
    assert (first * direction + second * direction).terms == ((first + second) * direction).terms


@given(directions, directions, scales)
def test_a_scale_distributes_over_a_sum(a, b, scale):
    assert (scale * (a + b)).terms == (scale * a + scale * b).terms


@given(points, directions, directions)
def test_a_point_moves_along_directions_in_any_order(point, a, b):
    assert (point + a + b).terms == (point + b + a).terms == (point + (a + b)).terms
    assert (point + a - a).terms == point.terms
    assert (point + a - b).anchor == point.anchor


@given(points)
def test_no_coefficient_is_zero(point):
    assert all(coefficient != 0 for coefficient in point.terms.values())
