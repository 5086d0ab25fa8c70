"""Rivals of the filters of inputs, which look at both sides of a layer, for filters.py and filters_at.py.

For y = W x with g the gradient of the answer loss by y, over tokens of rows read at the target:

    K-FAC         δ_ij = τ_ij λ / (λ + g_i a_j) in the eigenbases of E[g gᵀ] and E[x xᵀ] on the retain rows,
                  in units of their mean eigenvalues: what changes the retain loss is damped
    RepSelect     the n largest singular directions of the forget rows' weight gradient are damped on both
                  sides, the k-th by s_n / s_k, or taken out ("hard"), which arXiv 2606.17168 does to the
                  gradient; no retain rows are read. Here it is done to a vector instead
    both          least squares of the inputs (μ 100, ε 1, energy .9), then (I + E[g gᵀ]/λ)⁻¹ on the outputs

Tensors that are no linear layer of a block are dropped, as they are by the other filters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palinode.data.batches import pad_right
from palinode.data.tokenize import TokenRow
from palinode.models.reading import answer_nll, linear_layers
from palinode.training.moments import basis_of, least_squares
from palinode.weights import Direction
from palinode.weights.vectors import transform


@dataclass(frozen=True)
class Sides:
    """What linear layers read, what reaches their outputs, and their weights' gradient, by tensor."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    gradients: Mapping[str, np.ndarray]
    _known: dict[tuple[str, str], tuple[np.ndarray, ...]] = field(default_factory=dict)

    def principal(self, side: str, name: str) -> tuple[np.ndarray, ...]:
        """Return eigenvalues in units of their mean and eigenvectors of a moment, or a gradient's SVD."""
        if (side, name) not in self._known:
            own = getattr(self, side)[name]
            known = (
                np.linalg.svd(own.astype(np.float64), full_matrices=False)
                if side == "gradients"
                else np.linalg.eigh(unit(own))
            )
            self._known[side, name] = tuple(known)
        return self._known[side, name]


def read(model: Any, rows: Sequence[TokenRow], *, pad_id: int = 0) -> Sides:
    """Return both sides of every linear layer over some rows."""
    sums: tuple[dict[str, torch.Tensor], ...] = ({}, {})
    handles = []

    def add(side: int, name: str, values: torch.Tensor) -> None:
        flat = values.detach().reshape(-1, values.shape[-1]).double()
        sums[side][name] = sums[side].get(name, 0) + flat.T @ flat

    for name, module in linear_layers(model):
        key = f"{name}.weight"
        handles += [
            module.register_forward_pre_hook(lambda _m, found, key=key: add(0, key, found[0])),
            module.register_full_backward_hook(lambda _m, _in, found, key=key: add(1, key, found[0])),
        ]
    model.zero_grad()
    for row in rows:  # each by itself, so that none weighs more for being long
        with torch.enable_grad():
            answer_nll(model, pad_right([row], pad_id=pad_id)).mean().backward()
    for handle in handles:
        handle.remove()
    inputs, outputs = ({key: value.numpy() for key, value in own.items()} for own in sums)
    gradients = {key: model.get_parameter(key).grad.float().numpy() / len(rows) for key in inputs}
    model.zero_grad()
    return Sides(inputs, outputs, gradients)


Rival = Callable[[str, np.ndarray, Sides, Sides], np.ndarray]
"""What becomes of a tensor, by its name and what was read on forget and retain rows."""


def kfac(name: str, values: np.ndarray, _forget: Sides, retain: Sides, *, strength: float) -> np.ndarray:
    (a, right), (g, left) = (retain.principal(side, name) for side in ("inputs", "outputs"))
    kept = strength / (strength + np.outer(g.clip(0), a.clip(0)))
    return left @ (kept * (left.T @ values @ right)) @ right.T


def repselect(
    name: str, values: np.ndarray, forget: Sides, _retain: Sides, *, most: int, hard: bool = False
) -> np.ndarray:
    left, sizes, right = forget.principal("gradients", name)
    most = min(most, len(sizes))
    lost = np.ones(most) if hard else 1 - sizes[most - 1] / sizes[:most]
    left, right = left[:, :most], right[:most]
    values = values - left @ (lost[:, None] * (left.T @ values))
    return values - ((values @ right.T) * lost) @ right


def both(name: str, values: np.ndarray, forget: Sides, retain: Sides, *, strength: float) -> np.ndarray:
    spared = unit(retain.inputs[name])
    axes = basis_of(spared, energy=0.9)
    found = values @ least_squares(unit(forget.inputs[name]), spared, mu=100.0, epsilon=1.0, axes=axes)
    g, left = retain.principal("outputs", name)
    kept: np.ndarray = left @ ((left.T @ found) * (strength / (strength + g.clip(0)))[:, None])
    return kept


def unit(moment: np.ndarray) -> np.ndarray:
    """Return a moment in units of its mean eigenvalue."""
    found: np.ndarray = moment * (len(moment) / np.trace(moment))
    return found


RIVALS: Mapping[str, Rival] = {
    **{f"K-FAC {size:g}": partial(kfac, strength=size) for size in (10.0, 1.0, 0.1, 0.01)},
    **{f"RepSelect {most}": partial(repselect, most=most) for most in (4, 16)},
    **{f"RepSelect {most}, hard": partial(repselect, most=most, hard=True) for most in (4, 16)},
    **{f"both sides {size:g}": partial(both, strength=size) for size in (100.0, 10.0, 1.0)},
}


def filtered(vector: Direction, rule: Rival, forget: Sides, retain: Sides, folder: Path) -> Direction:
    """Return a vector as a rival leaves it, with its length along itself given back; it is written there."""
    before = after = 0.0

    def one(name: str, found: Sequence[np.ndarray]) -> np.ndarray:
        nonlocal before, after
        values = found[0]
        if name not in forget.inputs:
            return np.zeros_like(values)
        made = rule(name, values.astype(np.float64), forget, retain)
        before, after = before + float(np.vdot(values, values)), after + float(np.vdot(values, made))
        return made.astype(values.dtype)

    made = transform([vector], one, folder, label=f"rival {folder.name}")
    return (before / after) * made
