"""Which rows stand behind an answer: a score for each row, from gradients of rows and question.

    product   ⟨P g_q, g_i⟩                      how far a step on row i lowers the loss of q
    cosine    the same, of lengths 1
    ridge     row i of G (GᵀG + λ I)⁻¹ g_q      what is row i's alone: what rows have in common is shared out


with g = P^½ ∇(−log p) at a checkpoint, summed over the tokens of an answer, G those of all rows, λ the mean
|g_i|², and P the identity or Adam's preconditioner 1 / √E[g²]. A score is the mean of this over checkpoints,
weighted for each row by the learning rates of the steps at which it was really seen near each, where an
exposure log or rebuilt order tells them. Gradients are projected (`reading.Projection`) and kept in the
workspace: a file for each checkpoint, float32 [rows, width], mapped into memory and read in blocks.

The signs of the projection are drawn for each of its numbers by itself, so a score is a smooth function of
sums over `width` independent terms. Its standard error is that of the infinitesimal jackknife over them: with
D_b the derivative of the score by the weight of number b, √Σ_b (D_b − mean D)².
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor
from transformers import PreTrainedModel

from palinode.data.examples import Example
from palinode.data.tokenize import TokenRow
from palinode.history.orders import Order, first_step
from palinode.history.reader import ExposureReader
from palinode.models.reading import Projection, row_backward, trained_parameters
from palinode.pipeline.workspace import Step
from palinode.progress import Advance
from palinode.records import read_json, write_json

Floats = npt.NDArray[np.float64]
Gradients = npt.NDArray[np.float32]
"""Projected gradients, [rows, width]."""
Take = Callable[[int, Gradients], None]
"""Takes the projected gradient of the row of that number."""
Measure = Literal["ridge", "cosine", "product"]

SAVED = 64
"""Rows after which an index is forced to disk."""
BLOCK = 1 << 14
"""Rows of an index that are read together."""
MOMENT_ROWS = 256
"""Rows whose gradients Adam's preconditioner is estimated from, at most."""
DAMPING = 0.01
"""What is added to √E[g²], of its mean over the weights of a tensor."""


def adam_scales(model: PreTrainedModel, rows: Sequence[TokenRow], *, pad_id: int) -> list[Tensor]:
    """Return P^½ = (√E[g²] + damping)^−½ of each parameter over these rows; 0 where no row has a gradient."""
    totals = [torch.zeros_like(parameter) for parameter in trained_parameters(model)]

    def add(number: int, gradient: Tensor) -> None:
        totals[number].addcmul_(gradient, gradient, value=1 / len(rows))

    with torch.no_grad(), row_backward(model, rows, add, pad_id=pad_id) as backward:
        for row in rows:
            backward(row)
    roots = [total.sqrt_() for total in totals]
    return [torch.where(root > 0, (root + DAMPING * root.mean()).rsqrt(), 0.0) for root in roots]


def projected(
    model: PreTrainedModel,
    groups: Sequence[Sequence[TokenRow]],
    projection: Projection,
    take: Take,
    *,
    pad_id: int,
    scales: Sequence[Tensor] | None = None,
    first: int = 0,
    by_token: bool = False,
) -> None:
    """Hand on P^½ ∇L, projected, of each example from `first` on: the sum over its pieces, or each token's.

    Rows go through the model one by one, so that none depends on its neighbours.
    """
    total = torch.zeros(projection.width, device=model.device)

    def add(number: int, gradient: Tensor) -> None:
        total.add_(projection.of(number, gradient if scales is None else gradient * scales[number]))

    rows = [row for group in groups for row in group]
    with torch.no_grad(), row_backward(model, rows, add, pad_id=pad_id) as backward:
        for place in range(first, len(groups)):
            parts: list[list[tuple[TokenRow, int | None]]] = [[(row, None) for row in groups[place]]]
            if by_token:
                parts = [[(row, token)] for row in groups[place] for token in range(row.scored)]
            found = np.empty((len(parts), projection.width), np.float32)
            for number, part in enumerate(parts):
                total.zero_()
                for row, token in part:
                    backward(row, token)
                found[number] = total.cpu().numpy()
            take(place, found if by_token else found[0])


def index_rows(step: Step, rows: int, width: int, fill: Callable[..., None], advance: Advance) -> Gradients:
    """Return a step's file of projected gradients, filled from where an interrupted call left it.

    `fill` gets what takes each row's (`take`), and the `first` row that lacks.
    """
    path, progress = step.folder / "gradients.f32", step.folder / "rows.json"
    if step.facts is None:
        step.begin()
        done = read_json(progress)["rows"] if progress.exists() else 0
        file = np.memmap(path, np.float32, "r+" if done else "w+", shape=(rows, width))

        def keep(place: int, gradient: Gradients) -> None:
            file[place] = gradient
            if (place + 1) % SAVED == 0 or place + 1 == rows:
                file.flush()
                write_json(progress, {"rows": place + 1})
            advance(1)

        advance(done)
        fill(take=keep, first=done)
        step.finish({"rows": rows, "width": width})
    return np.memmap(path, np.float32, "r", shape=(rows, width))


@dataclass(frozen=True, slots=True, eq=False)
class Rung:
    """Gradients of rows and questions at one checkpoint, as a measure holds them together."""

    rows: Gradients
    measure: Measure
    asked: Floats
    """g_q of each question, of length 1 but for the product."""
    wanted: Floats
    """What scores are inner products of rows with: the same, or √λ (GᵀG + λ I)⁻¹ of it."""
    solve: Callable[[Floats], tuple[Floats, float]] | None

    def scores(self) -> Floats:
        """Return how each row and each question go together, [rows, questions]."""
        found = np.empty((len(self.rows), len(self.wanted)))
        for begin in range(0, len(self.rows), BLOCK):
            found[begin : begin + BLOCK] = self._measured(self.rows[begin : begin + BLOCK]) @ self.wanted.T
        return found

    def spread(self, top: Sequence[int], question: int) -> Floats:
        """Return the derivatives of the scores of some rows by the weight of each number, [rows, width]."""
        own, asked = self._measured(self.rows[top]), self.asked[question]
        scores = (own @ self.wanted[question])[:, None]
        if self.solve is not None:
            solved, root = self.solve(own)
            return np.asarray(root * solved * self.wanted[question] - scores / 2 * asked**2)
        lengths = scores / 2 * (own**2 + asked**2)
        return np.asarray(own * asked - (lengths if self.measure == "cosine" else 0))

    def parts(self, row: int, question: int, tokens: Gradients) -> Floats:
        """Return what each token of a row has of its score, given their gradients; they add up to it."""
        length = np.linalg.norm(self.rows[row]) if self.measure == "cosine" else 1.0
        return np.asarray(tokens @ self.wanted[question] / max(length, 1e-30))

    def _measured(self, rows: Gradients) -> Floats:
        found = rows.astype(np.float64)
        return unit(found) if self.measure == "cosine" else found


def relate(rows: Gradients, questions: Gradients, measure: Measure) -> Rung:
    """Hold rows and questions at one checkpoint together."""
    asked = questions.astype(np.float64)
    asked = asked if measure == "product" else unit(asked)
    solve = _decorrelation(rows) if measure == "ridge" else None
    return Rung(rows, measure, asked, asked if solve is None else solve(asked)[0], solve)


def unit(vectors: Floats) -> Floats:
    """Return vectors at length 1; one of length 0 stays."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30))


def _decorrelation(rows: Gradients) -> Callable[[Floats], tuple[Floats, float]]:
    """Return what makes √λ (GᵀG + λ I)⁻¹ v of vectors, with λ the mean |g_i|²; it gives √λ too."""
    dual = len(rows) <= rows.shape[1]  # (GᵀG + λ)⁻¹ v = (v − Gᵀ (GGᵀ + λ)⁻¹ G v) / λ
    side = rows.T if dual else rows
    gram = np.zeros((side.shape[1], side.shape[1]))
    for begin in range(0, len(side), BLOCK):
        block = side[begin : begin + BLOCK].astype(np.float64)
        gram += block.T @ block
    ridge = max(float(np.trace(gram)) / len(rows), 1e-30)
    factor = cho_factor(gram + ridge * np.eye(len(gram)), overwrite_a=True)

    def solve(vectors: Floats) -> tuple[Floats, float]:
        if not dual:
            return np.asarray(ridge**0.5 * cho_solve(factor, vectors.T).T), ridge**0.5
        inner = cho_solve(factor, rows.astype(np.float64) @ vectors.T)
        return np.asarray((vectors - inner.T @ rows) / ridge**0.5), ridge**0.5

    return solve


Seen = list[tuple[int, int, float]]
"""(position of a row, step in which it was, how much it counted there)."""


def seen_in_log(
    log: ExposureReader, rows: Sequence[Example], rates: Callable[[int], float], *, salt: bytes = b""
) -> Seen:
    """Return the exposures of rows by a log: the learning rate over the rows of the step."""
    sizes = dict(zip(log.steps.step.tolist(), log.steps.rows.tolist(), strict=True))
    found = log.find(rows, salt=salt)
    return [(one.row, one.step, one.times * rates(one.step) / sizes[one.step]) for one in found]


def seen_in_order(
    order: Order, data: Sequence[Example], rows: Sequence[Example], rates: Callable[[int], float]
) -> Seen:
    """Return the exposures of rows by an order whose numbers point into `data`."""
    places = defaultdict(list)
    for place, row in enumerate(rows):
        places[row.key].append(place)
    found = []
    for step in range(first_step(order), order.steps + 1):
        members = order.rows(step)
        found += [
            (place, step, rates(step) / len(members))
            for number in members
            for place in places.get(data[number].key, ())
        ]
    return found


def exposure_weights(steps: Sequence[int], seen: Seen, rows: int) -> Floats:
    """Return how much each row was trained near each checkpoint, [rows, checkpoints]; on average 1 a row.

    A step counts for the two checkpoints that it lies between, linearly, and weighs on θ as it was before it.
    """
    weights, last = np.zeros((rows, len(steps))), len(steps) - 1
    for row, step, amount in seen:
        place = float(np.interp(step - 1, steps, np.arange(len(steps))))
        before = min(int(place), max(last - 1, 0))
        weights[row, before] += amount * (1 - (place - before))
        weights[row, min(before + 1, last)] += amount * (place - before)
    return weights * (rows / max(float(weights.sum()), 1e-30))
