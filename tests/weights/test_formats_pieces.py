"""Tensors in pieces: any range of them equals the same range of the tensor, with little memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_disk import read

from palinode.errors import CheckpointError
from palinode.weights import TensorInfo
from palinode.weights.formats import pieces as pieces_module
from palinode.weights.formats.pieces import Piece, PiecedTensor, boxes, pieced, row_major
from palinode.weights.tensors import Files

lengths = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@given(lengths, st.data())
def test_boxes_are_the_range_in_order(shape, data):
    size = int(np.prod(shape))
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first + 1, size))
    numbers = np.arange(size).reshape(shape)
    found = []
    for corner, sides in boxes(shape, first, last):
        part = numbers[tuple(slice(a, a + n) for a, n in zip(corner, sides, strict=True))]
        assert part.size > 0
        found += part.reshape(-1).tolist()
    assert found == list(range(first, last))


def cut(draw, shape):
    """Some ways to cut a box into boxes: along one axis, and then each half again."""
    if draw(st.booleans()) or all(length == 1 for length in shape):
        return [((0,) * len(shape), shape)]
    axis = draw(st.sampled_from([axis for axis, length in enumerate(shape) if length > 1]))
    place = draw(st.integers(1, shape[axis] - 1))
    near, far = list(shape), list(shape)
    near[axis], far[axis] = place, shape[axis] - place
    shifted = [
        ((*corner[:axis], corner[axis] + place, *corner[axis + 1 :]), sides)
        for corner, sides in cut(draw, tuple(far))
    ]
    return cut(draw, tuple(near)) + shifted


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), st.data())
def test_any_cutting_and_any_order_of_axes_reads_as_the_tensor(tmp_path_factory, shape, data):
    place = tmp_path_factory.mktemp("cut", numbered=True)
    values = np.arange(np.prod(shape), dtype="<u2").reshape(shape)
    parts = []
    for number, (corner, sides) in enumerate(cut(data.draw, shape)):
        box = values[tuple(slice(a, a + n) for a, n in zip(corner, sides, strict=True))]
        order = data.draw(st.permutations(range(len(shape))))
        stored = np.ascontiguousarray(box.transpose(order))
        own = dict(zip(order, stored.strides, strict=True))
        file = place / f"{number}"
        file.write_bytes(b"??" + stored.tobytes())
        parts.append(Piece(corner, sides, file, 2, tuple(own[axis] for axis in range(len(shape)))))
    info = pieced("w", "U16", shape, 2, data.draw(st.permutations(parts)))
    start = data.draw(st.integers(0, info.nbytes - 1))  # in bytes: it may cut an element
    stop = data.draw(st.integers(start, info.nbytes))
    out = bytearray(stop - start)
    with Files() as files:
        info.read(files, start, memoryview(out))
    assert out == values.tobytes()[start:stop]


def test_bytes_in_one_run_are_a_plain_tensor(tmp_path):
    file = tmp_path / "w"
    file.write_bytes(bytes(range(24)))
    piece = Piece((0, 0, 0), (1, 3, 4), file, 0, (999, 8, 2))  # along a length of 1 there is no distance
    assert type(pieced("w", "F16", (1, 3, 4), 2, [piece])) is TensorInfo
    gaps = Piece((0, 0), (3, 2), file, 0, (8, 2))
    info = pieced("w", "F16", (3, 2), 2, [gaps])
    assert type(info) is PiecedTensor
    assert read(info) == bytes([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19])


def box(corner, shape, file="f"):
    return Piece(corner, shape, file, 0, row_major(shape, 2))


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [box((0, 0), (4, 5))],
        [box((0, 0), (4, 3)), box((0, 2), (4, 4))],  # overlap
        [box((0, 0), (4, 3)), box((0, 4), (4, 2))],  # a gap
        [box((0, 0), (4, 6)), box((0, 0), (4, 6))],
        [box((0, 0), (2, 6)), box((1, 0), (2, 6))],  # as large as the tensor, but in the wrong places
        [box((0, 0), (2, 6)), box((3, 0), (2, 6))],  # beyond the end
        [box((0,), (24,))],
        [box((0, 0), (2, 3)), box((0, 3), (2, 3)), box((2, 0), (2, 3)), box((2, 2), (2, 3))],
    ],
)
def test_pieces_that_do_not_cover_exactly(parts):
    with pytest.raises(CheckpointError, match="leave a gap or overlap"):
        pieced("w", "F16", (4, 6), 2, parts)


def test_a_pinwheel_covers():
    parts = [
        box((0, 0), (1, 2)),
        box((0, 2), (2, 1)),
        box((2, 1), (1, 2)),
        box((1, 0), (2, 1)),
        box((1, 1), (1, 1)),
    ]
    assert len(pieced("w", "F16", (3, 3), 2, parts).pieces) == 5
    with pytest.raises(CheckpointError):
        pieced("w", "F16", (3, 3), 2, parts[:-1])


def test_too_many_pieces_are_refused_at_once():
    parts = [box((i,), (1,)) for i in range(pieces_module.MAX_PIECES + 1)]
    with pytest.raises(CheckpointError):
        pieced("w", "F16", (len(parts),), 2, parts)


@pytest.mark.parametrize("turned", [True, False])
def test_memory_stays_small_however_large_the_tensor(tmp_path, turned):
    rows, columns = 1000, 1500
    file = tmp_path / "w"
    values = np.arange(rows * columns, dtype="<u4").reshape(rows, columns)
    stored = np.ascontiguousarray(values.T) if turned else values
    file.write_bytes(stored.tobytes())
    if turned:
        parts = [Piece((0, 0), (rows, columns), file, 0, (4, 4 * rows))]
    else:  # two halves of each row, as one rank of two would hold them; here beside each other
        half = columns // 2
        parts = [Piece((0, at), (rows, half), file, 4 * at, (4 * columns, 4)) for at in (0, half)]
    info = pieced("w", "U32", (rows, columns), 4, parts)
    step, out = 1 << 19, bytearray(info.nbytes)
    with Files() as files:
        tracemalloc.start()
        for start in range(0, info.nbytes, step):
            info.read(files, start, memoryview(out)[start : start + step])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert out == values.tobytes()
    assert peak < 4 * pieces_module.WINDOW


def test_a_file_that_shrinks_after_opening(tmp_path):
    file = tmp_path / "w"
    file.write_bytes(bytes(48))
    info = pieced("w", "F16", (4, 6), 2, [Piece((0, 0), (4, 6), file, 0, (2, 8))])
    read(info)
    file.write_bytes(bytes(40))
    with pytest.raises(CheckpointError, match="ended at byte 40"):
        read(info)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(info)
