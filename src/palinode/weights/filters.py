"""Filters of a vector by what its layers read: take from the forget inputs, leave the retain inputs.

For a layer y = W x, with Σ_f = E[x xᵀ] over the tokens of the forget rows and Σ_r over those of retain rows,
the change Δ that is taken off in place of τ solves

    min_Δ  tr (Δ−τ) Σ_f (Δ−τ)ᵀ + μ tr Δ Σ_r Δᵀ + ε ‖Δ−τ‖²      Δ = τ (Σ_f + εI)(Σ_f + εI + μΣ_r)⁻¹

which keeps τ where nothing is known; with ε ‖Δ‖² instead nothing is kept: Δ = τ Σ_f (Σ_f + μΣ_r + εI)⁻¹.
ε is in units of tr Σ_f / D. What both sets share is only weakened, and a larger α makes up for it; so Δ can
be kept off the principal axes U of Σ_r altogether: τ(Σ_f + εI)(Σ_f + εI + μΣ_r)⁻¹(I − UUᵀ). Its limits are
the other filters of the field:

    μ = 0                      τ
    Σ_f = 0                    the soft filter τ (I + Σ_r/λ)⁻¹, λ = ε/μ      (SAGE, arXiv 2606.18309)
    Σ_f = 0, λ → 0             off the whole span of the retain inputs; a step at a share of their energy is
                               gradient projection memory               (`projection`, arXiv 2103.09762)
    μ = 1, ε‖Δ‖², ε = 0        RegMean of θ_D − τ on forget and θ_D on retain inputs     (arXiv 2212.09849)
    Σ_f = Σ_r, ε = 0           τ / (1 + μ): what cannot be told apart is only weakened

Every tensor has its own input: the rows of an embedding the frequencies of their tokens, the scale of a norm
the mean squares of what it scales, a bias the number 1. Their moments are diagonals. All in float64, by numpy
and scipy; or by torch where a device is named.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from palinode.errors import InputError
from palinode.weights.kernels import rank_for

Ridge = Literal["vector", "zero"]
"""What is kept where neither set has inputs: τ, or nothing."""

SINGULAR = 1e-9
"""The least ε, relative to the mean of what it is added to, that keeps a sum of moments invertible.

It is more for moments in float32, whose rounding leaves eigenvalues below zero.
"""


def least_squares(
    forget: np.ndarray | None,
    retain: np.ndarray,
    *,
    mu: float,
    epsilon: float,
    ridge: Ridge = "vector",
    energy: float = 0.0,
    device: str | None = None,
) -> np.ndarray:
    """Return the filter F, so that Δ = τF: [D, D] of moments [D, D], or [D] of diagonals [D].

    `forget` None, or zero, is Σ_f = 0: the soft filter with λ = ε/μ, in units of tr Σ_r / D. Raises
    InputError for a negative μ or ε, and for moments of two shapes. With an `energy` ΔU = 0 as well, U the
    principal axes of Σ_r [D, D] that hold this share.
    """
    if mu < 0 or epsilon < 0:
        raise InputError(f"mu is {mu} and epsilon {epsilon}; neither may be negative")
    if forget is not None and forget.shape != retain.shape:
        raise InputError(
            f"the moments have two shapes, {forget.shape} and {retain.shape}; are they of one layer?"
        )
    diagonal = retain.ndim == 1
    ours = np.zeros(retain.shape) if forget is None else forget.astype(np.float64)
    theirs = mu * retain.astype(np.float64)
    own, other, heavy = (
        float(np.mean(part if diagonal else np.diagonal(part))) for part in (ours, retain, theirs)
    )
    unit = own or other or 1.0
    least = max(SINGULAR, 4 * float(np.finfo(retain.dtype).eps) * len(retain) ** 0.5)
    added = max(epsilon * unit, least * (own + heavy)) or 1.0  # nothing was read: τ stays, or goes
    kept = added if ridge == "vector" else 0.0
    if diagonal:
        return (ours + kept) / (ours + added + theirs)
    whole = ours + theirs
    whole[np.diag_indices(len(whole))] += added
    ours[np.diag_indices(len(ours))] += kept
    # F = (Σ_f + εI) A⁻¹ with A symmetric, so Fᵀ solves A Fᵀ = Σ_f + εI.
    found = _solved(whole, ours, device).T
    if energy and other > 0:
        basis = basis_of(retain, energy=energy, device=device)
        found -= _product(_product(found, basis, device), basis.T, device)
    return found


def _on(device: str, array: np.ndarray) -> Any:
    import torch

    return torch.as_tensor(np.ascontiguousarray(array), dtype=torch.float64, device=device)


def _product(left: np.ndarray, right: np.ndarray, device: str | None) -> np.ndarray:
    found: np.ndarray = (
        (_on(device, left) @ _on(device, right)).cpu().numpy()
        if device
        else np.asarray(left, np.float64) @ right
    )
    return found


def _solved(whole: np.ndarray, right: np.ndarray, device: str | None) -> np.ndarray:
    """Return X of A X = B, A symmetric and positive definite."""
    from scipy.linalg import solve  # takes half a second, so only when it is used

    if device:
        from torch.linalg import cholesky

        factor = cholesky(_on(device, whole))
        return _on(device, right).cholesky_solve(factor).cpu().numpy()  # type: ignore[no-any-return]
    return solve(whole, right, assume_a="pos", overwrite_a=True, check_finite=False)  # type: ignore[no-any-return]


def projection(retain: np.ndarray, *, energy: float, device: str | None = None) -> np.ndarray:
    """Return I − UUᵀ, U the fewest principal axes of Σ_r [D, D] that hold a share of the inputs' Σ|x|²."""
    basis = basis_of(retain, energy=energy, device=device)
    rest: np.ndarray = np.eye(len(retain)) - _product(basis, basis.T, device)
    return rest


def basis_of(moment: np.ndarray, *, energy: float = 0.99, device: str | None = None) -> np.ndarray:
    """Return U [D, k] of inputs whose moment Σ x xᵀ [D, D] is given.

    `energy` is a share, above 0 and up to 1. Raises InputError for another, or inputs of zero.
    """
    if not 0 < energy <= 1:
        raise InputError(f"an energy of {energy} is no share; name one above 0 and up to 1, as in 0.99")
    from scipy.linalg import eigh

    if device:
        from torch.linalg import eigh as axes

        squares, vectors = (part.cpu().numpy() for part in axes(_on(device, moment)))
    else:
        squares, vectors = eigh(moment.astype(np.float64), driver="evd", check_finite=False)
    if squares[-1] <= 0:
        raise InputError("the inputs are all zero, so they span nothing; give rows that the model has read")
    kept = rank_for(squares[::-1], energy)
    basis: np.ndarray = vectors[:, ::-1][:, :kept].copy()
    return basis


def along(values: np.ndarray, factor: np.ndarray, axis: int, device: str | None = None) -> np.ndarray:
    """Return values times a filter or moment, a matrix or a diagonal, along the axis that reads its inputs.

    A diagonal of one number stands for any length. In float64.
    """
    wide = np.moveaxis(values, axis, -1)
    made = wide.astype(np.float64) * factor if factor.ndim == 1 else _product(wide, factor, device)
    found: np.ndarray = np.moveaxis(made, -1, axis)
    return found
