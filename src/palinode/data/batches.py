"""Which rows go together, and how they are padded: numpy arrays, no tensors yet.

Rows of like length share a batch, so that little of it is padding. Masks come from lengths, never
from ids: the padding id may well be the end token (spec/msa.md, P9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from palinode.data.tokenize import TokenRow
from palinode.errors import RecipeError

IntArray = npt.NDArray[np.int64]

IGNORED = -100
"""Label of a position that is not scored, as torch's cross entropy has it."""

WINDOW_BATCHES = 16
"""Batches that are filled together from rows sorted by length."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded on the right to one length, each array int64 [B, T]."""

    ids: IntArray
    mask: IntArray
    """1 for a token of the row, 0 for padding."""
    labels: IntArray
    """The id itself where it is scored, `IGNORED` elsewhere (not shifted)."""


def epoch_batches(lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of one epoch as row positions, every row once, the same for (seed, epoch).

    Rows are shuffled, sorted by length within windows of up to `WINDOW_BATCHES` batches, cut into
    batches, and the batches shuffled. What does not fill a batch comes last, a smaller one. Windows
    span at most a quarter of the rows: were a small set one window, every epoch would have the same
    batches.
    """
    if batch_size < 1:
        raise RecipeError(f"batch_size is {batch_size}; it must be at least 1")
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    order: list[int] = random.permutation(len(lengths)).tolist()
    full = len(order) // batch_size
    full_rows, rest = order[: full * batch_size], order[full * batch_size :]
    window = batch_size * max(1, min(WINDOW_BATCHES, full // 4))
    like_length = [
        row for rows in _chunks(full_rows, window) for row in sorted(rows, key=lengths.__getitem__)
    ]
    batches = _chunks(like_length, batch_size)
    shuffled = [batches[place] for place in random.permutation(full)]
    return [*shuffled, rest] if rest else shuffled


def budget_batches(lengths: Sequence[int], *, max_tokens: int, max_rows: int) -> list[list[int]]:
    """Return batches of row positions, longest rows first, of at most `max_tokens` with padding.

    A row longer than `max_tokens` has a batch to itself. Longest first, so that a batch too large
    for memory shows at once.
    """
    if max_tokens < 1 or max_rows < 1:
        raise RecipeError(f"max_tokens is {max_tokens} and max_rows {max_rows}; both must be at least 1")
    batches: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if room == 0:
            batches.append([])
            room = min(max_rows, max(1, max_tokens // max(1, lengths[row])))
        batches[-1].append(row)
        room -= 1
    return batches


def pad_right(rows: Sequence[TokenRow], *, pad_id: int, multiple: int = 1) -> Batch:
    """Return rows of ids as one batch, padded on the right to the longest: int64 [B, T] each.

    T is the next `multiple` of the longest row's length.
    """
    longest = max((len(row.ids) for row in rows), default=0)
    shape = (len(rows), -(-longest // multiple) * multiple)
    ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    mask = np.zeros(shape, np.int64)
    for place, row in enumerate(rows):
        length = len(row.ids)
        ids[place, :length] = row.ids
        mask[place, :length] = 1
        labels[place, row.start : length] = row.ids[row.start :]
    return Batch(ids, mask, labels)


def pad_left(prompts: Sequence[Sequence[int]], *, pad_id: int) -> tuple[IntArray, IntArray]:
    """Return prompts as ids and mask, int64 [B, T] each, padded on the left so that all end together."""
    shape = (len(prompts), max((len(prompt) for prompt in prompts), default=0))
    ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    for place, prompt in enumerate(prompts):
        begin = shape[1] - len(prompt)
        ids[place, begin:] = prompt
        mask[place, begin:] = 1
    return ids, mask


def _chunks(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[begin : begin + size]) for begin in range(0, len(rows), size)]
