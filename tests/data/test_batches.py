"""Every row goes out once, with its like, and masks come from lengths."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palinode.data.batches import WINDOW_BATCHES, budget_batches, epoch_batches, pad_left, pad_right
from palinode.data.tokenize import TokenRow
from palinode.errors import RecipeError

lengths_lists = st.lists(st.integers(1, 500), max_size=200)


@given(lengths=lengths_lists, batch_size=st.integers(1, 9), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_an_epoch_holds_every_row_once_in_full_batches(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert batches == epoch_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch)


def test_epochs_and_seeds_have_their_own_order() -> None:
    lengths = list(range(100))
    orders = [epoch_batches(lengths, batch_size=4, seed=s, epoch=e) for s, e in [(0, 0), (0, 1), (1, 0)]]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_small_set_has_other_batches_each_epoch() -> None:
    def together(epoch: int) -> set[frozenset[int]]:
        batches = epoch_batches(list(range(40)), batch_size=4, seed=0, epoch=epoch)
        return {frozenset(batch) for batch in batches}

    assert together(0) != together(1)


def test_rows_of_like_length_go_together() -> None:
    lengths = [1 + place * 37 % 512 for place in range(4 * 4 * WINDOW_BATCHES)]

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    by_length = padded(epoch_batches(lengths, batch_size=4, seed=0, epoch=0))
    as_they_come = padded([list(range(at, at + 4)) for at in range(0, len(lengths), 4)])
    assert by_length < 1.1 * sum(lengths) < as_they_come


def test_batch_size_below_one_is_refused() -> None:
    with pytest.raises(RecipeError, match="batch_size is 0"):
        epoch_batches([1], batch_size=0, seed=0, epoch=0)


@given(lengths=lengths_lists, max_tokens=st.integers(1, 1000), max_rows=st.integers(1, 8))
def test_budget_batches_hold_every_row_once_within_the_budget(
    lengths: list[int], max_tokens: int, max_rows: int
) -> None:
    batches = budget_batches(lengths, max_tokens=max_tokens, max_rows=max_rows)
    order = [row for batch in batches for row in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert all(lengths[first] >= lengths[second] for first, second in pairwise(order))
    for batch in batches:
        assert len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= max_tokens


def test_budget_batches_by_hand() -> None:
    # 7 alone is over the budget of 6; 3 + 3 fills it; 2, 2, 1 pads to 6.
    assert budget_batches([3, 1, 7, 2, 3, 2], max_tokens=6, max_rows=4) == [[2], [0, 4], [3, 5, 1]]
    assert budget_batches([1, 1, 1], max_tokens=6, max_rows=2) == [[0, 1], [2]]


@pytest.mark.parametrize(("max_tokens", "max_rows"), [(0, 1), (1, 0)])
def test_budget_below_one_is_refused(max_tokens: int, max_rows: int) -> None:
    with pytest.raises(RecipeError, match="both must be at least 1"):
        budget_batches([1], max_tokens=max_tokens, max_rows=max_rows)


def test_mask_comes_from_lengths_even_when_pad_is_eos() -> None:
    eos = 2
    rows = [TokenRow((5, eos, 6, 7, eos), 3, 0), TokenRow((8, 9, eos), 1, 1)]
    batch = pad_right(rows, pad_id=eos)
    assert batch.ids.tolist() == [[5, 2, 6, 7, 2], [8, 9, 2, 2, 2]]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, -100, 7, 2], [-100, 9, 2, -100, -100]]
    assert {array.dtype for array in (batch.ids, batch.mask, batch.labels)} == {np.dtype(np.int64)}


def test_prompts_end_together() -> None:
    ids, mask = pad_left([[1, 2, 3], [4], [0, 0]], pad_id=0)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert {ids.dtype, mask.dtype} == {np.dtype(np.int64)}


def test_no_rows_make_empty_arrays() -> None:
    assert pad_right([], pad_id=0).ids.shape == (0, 0)
    assert pad_left([], pad_id=0)[0].shape == (0, 0)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=2, max_size=9), st.integers(1, 8)), min_size=1)
)
def test_labels_repeat_the_scored_ids_and_nothing_else(pairs: list[tuple[list[int], int]]) -> None:
    rows = [TokenRow(tuple(ids), min(start, len(ids) - 1), 0) for ids, start in pairs]
    batch = pad_right(rows, pad_id=0)
    for place, row in enumerate(rows):
        labels = batch.labels[place]
        assert labels[labels != -100].tolist() == list(row.ids[row.start :])
        assert batch.mask[place].sum() == len(row.ids)
        assert int((labels != -100).sum()) == row.scored
