"""Filters by least squares: what they solve, and every limit that they come to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palinode.errors import InputError
from palinode.training.moments import along, basis_of, least_squares, packed, projection, unpacked

RIDGES = pytest.mark.parametrize("ridge", ["vector", "zero"])


def inputs(seed, rows, width=6):
    """Inputs of a layer, [rows, width], of which some channels are larger than others."""
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, width)) @ random.normal(size=(width, width))


def moment(seed, rows=20, width=6):
    found = inputs(seed, rows, width)
    return found.T @ found / rows


def vector(seed, width=6, outputs=4):
    return np.random.default_rng(seed + 1000).normal(size=(outputs, width))


def delta(tau, forget, retain, **settings):
    return along(tau, least_squares(forget, retain, **settings), 1)


seeds = st.integers(0, 10_000)
weights = st.floats(0.01, 1000)


# What is solved


def objective(change, tau, forget, retain, *, mu, epsilon, ridge):
    """The sum that the filter makes least; ε in units of tr Σ_f / D."""
    off = change - tau
    kept = off if ridge == "vector" else change
    added = epsilon * np.trace(forget) / len(forget)
    harm = np.trace(change @ retain @ change.T)
    return np.trace(off @ forget @ off.T) + mu * harm + added * np.sum(kept**2)


@RIDGES
@given(seed=seeds, mu=weights, epsilon=weights)
def test_gradient_of_the_objective_is_zero_at_the_change(ridge, seed, mu, epsilon):
    tau, forget, retain = vector(seed), moment(seed), moment(seed + 1, rows=3)
    change = delta(tau, forget, retain, mu=mu, epsilon=epsilon, ridge=ridge)
    added = epsilon * np.trace(forget) / len(forget)
    terms = [(change - tau) @ forget, mu * change @ retain]
    terms.append(added * ((change - tau) if ridge == "vector" else change))
    size = sum(np.abs(term).max() for term in terms)
    assert np.abs(sum(terms)).max() < 1e-8 * size


@RIDGES
@given(seed=seeds, mu=weights, epsilon=weights, far=st.floats(1e-3, 10))
def test_no_other_change_costs_less(ridge, seed, mu, epsilon, far):
    tau, forget, retain = vector(seed), moment(seed, rows=3), moment(seed + 1)
    settings = {"mu": mu, "epsilon": epsilon, "ridge": ridge}
    change = delta(tau, forget, retain, **settings)
    least = objective(change, tau, forget, retain, **settings)
    other = change + far * np.random.default_rng(seed).normal(size=change.shape)
    assert objective(other, tau, forget, retain, **settings) > least
    assert objective(tau, tau, forget, retain, **settings) >= least * (1 - 1e-9)
    assert objective(0 * tau, tau, forget, retain, **settings) >= least * (1 - 1e-9)


def test_one_channel_is_worked_out_by_hand():
    """Σ_f = 4 and Σ_r = 1 in two channels each, μ = 3: (4 + 2)/(4 + 2 + 3) and 4/(4 + 2 + 3) at ε = ½."""
    forget, retain = np.diag([4.0, 4.0]), np.diag([1.0, 1.0])
    settings = {"mu": 3.0, "epsilon": 0.5}
    assert least_squares(forget, retain, **settings) == pytest.approx(np.diag([2 / 3, 2 / 3]))
    assert least_squares(forget, retain, ridge="zero", **settings) == pytest.approx(np.diag([4 / 9, 4 / 9]))


# Limits


@given(seed=seeds, rows=st.integers(1, 20), epsilon=st.floats(0, 1000))
def test_without_weight_on_the_retain_inputs_the_vector_stays(seed, rows, epsilon):
    found = least_squares(moment(seed, rows), moment(seed + 1), mu=0.0, epsilon=epsilon)
    assert found == pytest.approx(np.eye(6), abs=1e-6)


@given(seed=seeds, weight=weights, lam=weights)
def test_without_forget_inputs_it_is_the_soft_filter(seed, weight, lam):
    """τ(I + Σ_r/λ)⁻¹ with λ = ε/μ, in units of tr Σ_r / D."""
    retain = moment(seed)
    soft = np.linalg.inv(np.eye(6) + retain / (lam * np.trace(retain) / 6))
    for none in (None, np.zeros((6, 6))):
        found = least_squares(none, retain, mu=weight, epsilon=lam * weight)
        assert found == pytest.approx(soft, abs=1e-8)
    assert not least_squares(None, retain, mu=weight, epsilon=lam * weight, ridge="zero").any()


@given(seed=seeds, lam=weights)
def test_the_soft_filter_is_what_a_large_epsilon_comes_to_as_well(seed, lam):
    """μ/ε = 1/λ, ε → ∞: the forget inputs are no longer asked."""
    forget, retain = moment(seed), moment(seed + 1)
    unit = np.trace(forget) / 6
    soft = np.linalg.inv(np.eye(6) + retain / (lam * unit))
    assert least_squares(forget, retain, mu=1e9, epsilon=1e9 * lam) == pytest.approx(soft, abs=1e-4)


@given(seed=seeds, rows=st.integers(1, 5))
def test_the_hardest_soft_filter_is_projection_off_the_whole_span(seed, rows):
    found = inputs(seed, rows)
    retain = found.T @ found
    soft = least_squares(None, retain, mu=1.0, epsilon=1e-7)
    off = projection(basis_of(retain, energy=1.0))
    squares = np.linalg.eigvalsh(retain)[-rows:]
    within = 1e-7 * np.trace(retain) / 6 / squares.min()  # λ/(λ + σ²) on the weakest axis
    assert np.abs(soft - off).max() < 2 * within + 1e-6
    assert np.abs(found @ off).max() < 1e-6 * np.abs(found).max()


@given(seed=seeds, energy=st.floats(0.05, 1.0))
def test_hard_projection_is_the_step_function_of_the_principal_axes(seed, energy):
    """Every axis is kept whole or taken whole; those that are taken are the fewest with the share."""
    retain = moment(seed)
    squares, axes = np.linalg.eigh(retain)
    kept = np.diagonal(axes.T @ projection(basis_of(retain, energy=energy)) @ axes)[::-1]
    assert np.round(kept, 6).tolist() == sorted(np.round(kept).tolist())
    taken, squares = int(len(kept) - np.round(kept).sum()), squares[::-1]
    assert squares[:taken].sum() >= energy * squares.sum() * (1 - 1e-9)
    assert squares[: taken - 1].sum() < energy * squares.sum() * (1 + 1e-9)


@given(seed=seeds)
def test_regmean_of_the_model_without_the_vector_and_the_model_itself(seed):
    """(W_1 Σ_1 + W_2 Σ_2)(Σ_1 + Σ_2)⁻¹ of θ_D − τ on forget and θ_D on retain inputs: μ 1, to zero, ε 0."""
    target, tau, forget, retain = vector(seed + 7), vector(seed), moment(seed), moment(seed + 1)
    merged = ((target - tau) @ forget + target @ retain) @ np.linalg.inv(forget + retain)
    change = delta(tau, forget, retain, mu=1.0, epsilon=0.0, ridge="zero")
    assert target - change == pytest.approx(merged, rel=1e-4, abs=1e-5)


@RIDGES
@given(seed=seeds, mu=weights)
def test_what_cannot_be_told_apart_is_only_weakened(ridge, seed, mu):
    same = moment(seed, rows=40)
    found = least_squares(same, same, mu=mu, epsilon=0.0, ridge=ridge)
    worst = np.trace(same) / np.linalg.eigvalsh(same)[0]
    assert found == pytest.approx(np.eye(6) / (1 + mu), abs=1e-8 * worst)


@RIDGES
@given(seed=seeds, mu=weights, energy=st.floats(0.1, 1))
def test_principal_axes_of_the_retain_inputs_are_left_alone_altogether(ridge, seed, mu, energy):
    tau, forget, retain = vector(seed), moment(seed), moment(seed + 1)
    settings = {"mu": mu, "epsilon": 0.1, "ridge": ridge}
    basis = basis_of(retain, energy=energy)
    change, free = (delta(tau, forget, retain, **settings, axes=axes) for axes in (basis, None))
    assert np.abs(change @ basis).max() < 1e-9 * np.abs(tau).max()
    rest = free - free @ basis @ basis.T
    np.testing.assert_allclose(change, rest, atol=1e-9 * np.abs(tau).max())  # and all else is as it was


def test_a_large_mu_takes_all_that_acts_on_the_retain_inputs_and_nothing_else():
    retain = moment(1, rows=2)
    found = least_squares(moment(0), retain, mu=1e9, epsilon=1.0)
    basis = basis_of(retain, energy=1 - 1e-12)
    assert np.abs(found @ basis).max() < 1e-5  # Δ x = τ F x is nothing for x in the span
    change = delta(vector(0), moment(0), retain, mu=1e9, epsilon=1.0)
    assert np.abs(change @ basis).max() < 1e-5
    assert np.linalg.matrix_rank(found, tol=1e-3) == 4


@given(seed=seeds, mu=weights)
def test_harm_falls_and_so_does_the_effect_as_mu_grows(seed, mu):
    tau, forget, retain = vector(seed), moment(seed), moment(seed + 1)
    less, more = (delta(tau, forget, retain, mu=own, epsilon=0.1) for own in (mu, 2 * mu))
    assert np.trace(more @ retain @ more.T) <= np.trace(less @ retain @ less.T) * (1 + 1e-9)
    off = [(change - tau) @ forget @ (change - tau).T for change in (less, more)]
    ridge = [0.1 * np.trace(forget) / 6 * np.sum((change - tau) ** 2) for change in (less, more)]
    assert np.trace(off[0]) + ridge[0] <= (np.trace(off[1]) + ridge[1]) * (1 + 1e-9)


# What a tensor's inputs may be


@RIDGES
@given(seed=seeds, mu=weights, epsilon=weights)
def test_diagonals_are_the_matrices_that_have_them(ridge, seed, mu, epsilon):
    forget, retain = np.random.default_rng(seed).exponential(size=(2, 6))
    settings = {"mu": mu, "epsilon": epsilon, "ridge": ridge}
    found = least_squares(forget, retain, **settings)
    assert found.shape == (6,)
    whole = least_squares(np.diag(forget), np.diag(retain), **settings)
    assert np.diag(found) == pytest.approx(whole, abs=1e-9)


@given(seed=seeds, mu=weights, epsilon=weights)
def test_rows_of_an_embedding_are_weighed_by_how_often_their_tokens_come(seed, mu, epsilon):
    """Δ_t = τ_t (f_t + ε)/(f_t + ε + μ r_t)."""
    random = np.random.default_rng(seed)
    forget, retain = random.multinomial(30, np.full(8, 1 / 8), size=2) / 30
    tau, added = random.normal(size=(8, 3)), epsilon / 8  # tr Σ_f / D: frequencies add up to 1
    change = along(tau, least_squares(forget, retain, mu=mu, epsilon=epsilon), 0)
    for token, row in enumerate(tau):
        share = (forget[token] + added) / (forget[token] + added + mu * retain[token])
        assert change[token] == pytest.approx(share * row, abs=1e-7)


@RIDGES
def test_a_bias_reads_the_number_one(ridge):
    one = np.ones(1)
    factor = least_squares(one, one, mu=3.0, epsilon=0.5, ridge=ridge)
    assert along(np.array([2.0, -9.0]), factor, 0) == pytest.approx(
        {"vector": 1.5 / 4.5, "zero": 1 / 4.5}[ridge] * np.array([2.0, -9.0])
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_filter_goes_along_the_axis_that_reads(axis):
    values, factor = (
        np.random.default_rng(0).normal(size=(6, 6, 6)),
        least_squares(moment(0), moment(1), mu=1.0, epsilon=0.1),
    )
    letters = "abc"
    wanted = np.einsum(f"abc,{letters[axis]}z->{letters.replace(letters[axis], 'z')}", values, factor)
    assert along(values, factor, axis) == pytest.approx(wanted)
    weighed = np.einsum(f"abc,{letters[axis]}->abc", values, factor[0])
    assert along(values, factor[0], axis) == pytest.approx(weighed)
    assert along(values.astype(np.float32), factor, axis).dtype == np.float64


@given(seed=seeds, rank=st.integers(0, 4), mu=weights)
def test_rank_of_the_change_is_at_most_that_of_the_vector(seed, rank, mu):
    random = np.random.default_rng(seed)
    tau = random.normal(size=(6, rank)) @ random.normal(size=(rank, 6))
    change = delta(tau, moment(seed), moment(seed + 1), mu=mu, epsilon=0.1)
    assert np.linalg.matrix_rank(change, tol=1e-8 * (1 + np.abs(tau).max())) <= rank


# Moments of few rows, of none, and of all sizes


@RIDGES
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("mu", [0.0, 1.0, 100.0, 1e12])
@given(seed=seeds, rows=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_moments_of_fewer_tokens_than_channels_need_no_epsilon(ridge, kind, mu, seed, rows):
    forget, retain = (moment(seed + place, count, 24).astype(kind) for place, count in enumerate(rows))
    found = least_squares(forget, retain, mu=mu, epsilon=0.0, ridge=ridge)
    assert np.isfinite(found).all()
    unknown = projection(basis_of(forget.astype(float) + retain, energy=1 - 1e-6))
    here = found @ unknown
    if ridge == "vector":
        near = 0.3 if kind == np.float32 else 0.01
        assert here == pytest.approx(unknown, abs=near)  # τ is kept where neither set has inputs
    elif mu <= 100:
        assert np.abs(np.trace(here)) < 0.05 * np.trace(unknown)


def test_where_the_retain_rows_have_no_inputs_the_forget_inputs_keep_the_vector():
    """Subspaces that do not touch: all of τ on the one, next to nothing on the other, whatever μ is."""
    forget, retain = np.diag([1.0, 1.0, 0.0, 0.0]), np.diag([0.0, 0.0, 1.0, 1.0])
    for ridge in ("vector", "zero"):
        found = least_squares(forget, retain, mu=1e4, epsilon=1e-3, ridge=ridge)
        assert found == pytest.approx(np.diag([1.0, 1.0, 0.0, 0.0]), abs=2e-3)


@pytest.mark.parametrize("shape", [(5, 5), (5,)])
def test_where_nothing_was_read_the_vector_stays_or_goes(shape):
    nothing = np.zeros(shape)
    whole = np.eye(5) if len(shape) == 2 else np.ones(5)
    for forget in (None, nothing):
        for mu, epsilon in ((1.0, 0.1), (0.0, 0.0), (1e9, 0.0)):
            assert np.array_equal(least_squares(forget, nothing, mu=mu, epsilon=epsilon), whole)
            assert not least_squares(forget, nothing, mu=mu, epsilon=epsilon, ridge="zero").any()


@RIDGES
@given(seed=seeds, mu=weights, factor=st.floats(1e-6, 1e6), forgotten=st.booleans())
def test_the_unit_of_the_inputs_does_not_matter(ridge, seed, mu, factor, forgotten):
    forget, retain = moment(seed) * forgotten, moment(seed + 1)
    settings = {"mu": mu, "epsilon": 0.1, "ridge": ridge}
    one = least_squares(forget, retain, **settings)
    assert least_squares(factor * forget, factor * retain, **settings) == pytest.approx(one, abs=1e-7)


def test_moments_are_left_as_they_were():
    forget, retain = moment(0), moment(1)
    before = forget.copy(), retain.copy()
    least_squares(forget, retain, mu=2.0, epsilon=0.1)
    assert np.array_equal(forget, before[0])
    assert np.array_equal(retain, before[1])


@pytest.mark.parametrize("settings", [{"mu": -1.0, "epsilon": 0.1}, {"mu": 1.0, "epsilon": -0.1}])
def test_negative_weights_are_refused(settings):
    with pytest.raises(InputError, match="neither may be negative"):
        least_squares(moment(0), moment(1), **settings)


def test_moments_of_two_layers_are_refused():
    with pytest.raises(InputError, match=r"two shapes, \(6, 6\) and \(5, 5\)"):
        least_squares(moment(0), moment(1, width=5), mu=1.0, epsilon=0.1)
    with pytest.raises(InputError, match="two shapes"):
        least_squares(np.ones(6), moment(0), mu=1.0, epsilon=0.1)


# On a device


@pytest.mark.parametrize("ridge", ["vector", "zero"])
@pytest.mark.parametrize("off", [False, True])
def test_filters_made_by_torch_are_those_made_by_scipy(ridge, off):
    tau, forget, retain = vector(1), moment(2), moment(3)
    axes = basis_of(retain, energy=0.7)
    settings = {"mu": 10.0, "epsilon": 0.1, "ridge": ridge, "axes": axes if off else None}
    wanted = least_squares(forget, retain, **settings)
    found = least_squares(forget, retain, **settings, device="cpu")
    assert np.allclose(found, wanted, rtol=0, atol=1e-10)
    assert np.allclose(along(tau, found, 1, "cpu"), along(tau, wanted, 1), rtol=0, atol=1e-10)
    on_device = basis_of(retain, energy=0.7, device="cpu")
    assert np.allclose(projection(on_device, device="cpu"), projection(axes), rtol=0, atol=1e-10)


@given(width=st.integers(1, 9), seed=seeds)
def test_symmetric_matrix_comes_back_from_half_its_room_bit_for_bit(width, seed):
    rows = np.random.default_rng(seed).normal(size=(5, width)).astype(np.float32)
    whole = rows.T @ rows
    whole = np.triu(whole) + np.triu(whole, 1).T
    parts = packed(whole)
    assert np.array_equal(unpacked(**parts), whole)
    assert sum(part.size for part in parts.values()) == (width + 1) // 2 * width + width // 2
