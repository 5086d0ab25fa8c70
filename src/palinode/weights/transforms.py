"""Transforms of a direction: pure rules on one tensor at a time, and a way to store what they make.

    sign consensus      mean(τ_i) where all τ_i have one sign, 0 elsewhere   (NegMerge, arXiv 2410.05583)
    layer scales        s(name) · τ
    projection          τ (I − U Uᵀ), off the subspace U of the inputs that retain rows make
    weighting           F_f / (F_f + g·F_r + ε) · τ, by forget and retain importance   (PerTA, 2601.22030)
    gradient mask       τ · 1[sign τ = −sign g], g the target's gradient   (GradFix, arXiv 2510.09658)

Each takes τ and returns another of its shape. Low-rank truncation is `save_vector(…, rank=…)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np

from palinode.errors import InputError, MismatchError
from palinode.weights.arithmetic import direction_tensor
from palinode.weights.direction import Direction
from palinode.weights.displacement import Displacement
from palinode.weights.kernels import rank_for
from palinode.weights.tensors import Files, TensorInfo
from palinode.weights.vectors import StoredVector, layout_of, save_vector

Rule = Callable[[str, Sequence[np.ndarray]], np.ndarray]
"""(name of a tensor, its values in each direction) → its values in the new one, of the same shape."""


def sign_consensus(values: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of several directions where they all have one sign, and 0 elsewhere.

    τ = mean_i(τ_i) · 1[sign τ_1 = … = sign τ_n ≠ 0] (NegMerge, arXiv 2410.05583).

    >>> sign_consensus([np.array([1.0, 2.0, 0.0]), np.array([3.0, -2.0, 1.0])])
    array([2., 0., 0.])
    """
    stacked = np.stack(list(values))
    agree = (stacked > 0).all(axis=0) | (stacked < 0).all(axis=0)
    return np.where(agree, stacked.mean(axis=0), 0.0).astype(stacked.dtype)


def layer_scale(name: str, scales: Mapping[str, float]) -> float:
    """Return the scale of the first pattern that matches a tensor's whole name; 1 where none does.

    >>> layer_scale("model.layers.3.mlp.up_proj.weight", {r"model\\.layers\\.[0-3]\\..*": 0.5})
    0.5
    """
    return next((scale for pattern, scale in scales.items() if re.fullmatch(pattern, name)), 1.0)


def input_basis(inputs: np.ndarray, *, energy: float = 0.99) -> np.ndarray:
    """Return U [D, k]: the fewest orthonormal directions that hold a share of the inputs [N, D].

    `energy` is the share of Σ|x|², above 0 and up to 1. Raises InputError for another, or inputs of zero.
    """
    wide = inputs.astype(np.float64)
    return basis_of(wide.T @ wide, energy=energy)


def basis_of(gram: np.ndarray, *, energy: float = 0.99) -> np.ndarray:
    """Return U [D, k] of inputs whose sum of products Σ x xᵀ [D, D] is given; see `input_basis`."""
    if not 0 < energy <= 1:
        raise InputError(f"an energy of {energy} is no share; name one above 0 and up to 1, as in 0.99")
    squares, vectors = np.linalg.eigh(gram.astype(np.float64))
    if squares[-1] <= 0:
        raise InputError("the inputs are all zero, so they span nothing; give rows that the model has read")
    kept = rank_for(squares[::-1], energy)
    basis: np.ndarray = vectors[:, ::-1][:, :kept].copy()
    return basis


def project_off(matrix: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return τ(I − U Uᵀ) of a matrix [M, D] and an orthonormal basis U [D, k].

    What the matrix does to an input x = U c is then nothing, so outputs on the retain rows stay as they are.
    """
    wide = matrix.astype(np.float64)
    rest: np.ndarray = (wide - (wide @ basis) @ basis.T).astype(matrix.dtype)
    return rest


def fisher_weights(
    forget: np.ndarray, retain: np.ndarray, *, g: float = 1.0, epsilon: float = 1e-12
) -> np.ndarray:
    """Return w = F_f / (F_f + g·F_r + ε), between 0 and 1 (PerTA).

    `forget` and `retain` are mean squared gradients, or other magnitudes, of the same tensor; g says how much
    the retain rows count.
    """
    if g < 0 or epsilon <= 0:
        raise InputError(f"g is {g} and epsilon {epsilon}; g must not be negative, and epsilon above 0")
    return forget / (forget + g * retain + epsilon)


def against_gradient(values: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Return τ where it points against the gradient, and 0 elsewhere: τ · 1[sign τ = −sign g] (GradFix).

    A step −α·τ then raises the loss whose gradient g is, to first order by α·Σ|τ||g| over what is kept.

    >>> against_gradient(np.array([1.0, -2.0, 3.0]), np.array([-0.5, -0.5, 0.0]))
    array([1., 0., 0.])
    """
    opposed = ((values > 0) & (gradient < 0)) | ((values < 0) & (gradient > 0))
    return np.where(opposed, values, 0.0).astype(values.dtype)


def transform(
    directions: Sequence[Direction], rule: Rule, output: Path | str, *, label: str, dtype: str = "float32"
) -> StoredVector:
    """Apply a rule to one or several directions tensor by tensor, and write the result as a stored vector.

    `label` says what the rule is, settings included: it goes into the fingerprint, so that one label must
    stand for one rule. A whole tensor of each direction is held at a time. Raises InputError when the rule
    changes a shape, MismatchError when the directions do not fit together.
    """
    made = transformed(directions, rule, label=label)
    made_from = [term for part in directions for term in part.terms]
    return save_vector(made, output, dtype=dtype, made_from=made_from)


def transformed(directions: Sequence[Direction], rule: Rule, *, label: str) -> Displacement:
    """Return what a rule makes of directions, computed tensor by tensor as it is read; see `transform`."""
    if not directions:
        raise InputError("no direction was given; name one at least")
    inputs = tuple(
        sorted((term.fingerprint(), entry) for part in directions for term, entry in part.terms.items())
    )
    last = _Last()
    changes = {
        info.name: _Transformed(info, tuple(directions), rule, (label, *inputs), last)
        for info in _layout(directions)
    }
    return Displacement(next(iter(directions[0].terms)).folder, changes)


def _layout(directions: Sequence[Direction]) -> list[TensorInfo]:
    """Return the tensors that any of the directions may change."""
    found: dict[str, TensorInfo] = {}
    for info in (info for part in directions for info in layout_of(part)):
        if found.setdefault(info.name, info).shape != info.shape:
            raise MismatchError(
                f"the directions change {info.name} in two shapes ({found[info.name].shape} and "
                f"{info.shape}); were all made from one model?"
            )
    return list(found.values())


class _Last:
    """The tensor that was made last, as it is asked for in slices."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.name: str | None = None
        self.values = np.empty(0)


@dataclass(frozen=True, slots=True)
class _Transformed:
    """What a rule makes of one tensor, computed when it is read."""

    info: TensorInfo
    directions: tuple[Direction, ...]
    rule: Rule
    origin: tuple[object, ...]
    last: _Last = field(compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def infos(self) -> Sequence[TensorInfo]:
        return ()

    def facts(self, digests: Mapping[str, str]) -> list[object]:  # noqa: ARG002 - nothing of its own on disk
        return list(self.origin)

    def read(self, files: Files, start: int, out: np.ndarray) -> None:
        with self.last.lock:
            if self.last.name != self.info.name:
                self.last.values = self._compute(files)
                self.last.name = self.info.name
            values = self.last.values
        out[:] = values[start : start + len(out)]

    def _compute(self, files: Files) -> np.ndarray:
        tensors = [direction_tensor(part, self.info, files).reshape(self.shape) for part in self.directions]
        made = self.rule(self.info.name, tensors)
        if made.shape != self.shape:
            raise InputError(
                f"the rule made {made.shape} of {self.info.name}, which is {self.shape}; a transform must "
                "keep the shape"
            )
        return made.reshape(-1)
