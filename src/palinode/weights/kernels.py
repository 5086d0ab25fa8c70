"""The inner loops: a slice of a weighted sum, rounded and measured in one go, compiled by numba.

A slice is worked off in blocks of `BLOCK` elements, whose operands stay in the first-level cache between
the passes over them; numbers go to memory twice only, when they are read and when they are written. The
loops are plain IEEE arithmetic without fused multiply-add, so a sum has the same bits on every machine.
Only the totals of the dose may be added up in another order.

`rows` holds the operands of a block: row 0 the pivot A, every other row a difference P − A or a
displacement. float32 or float64 is the dtype of all of them, called the working dtype here.

The product of two thin matrices, row by row, and the thin matrices that come nearest to a given one.

A product is added up in float64 in the order of the inner index, without fused multiply-add: an element has
the same bits whichever rows are computed with it, on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numpy import float32, float64, int64, uint16, uint32

BLOCK = 2048
"""Elements worked off at a time: some ten rows of them fit into 128 KB."""

AS_IS, BFLOAT16, FLOAT16 = 0, 1, 2
"""What a sum is rounded to: not at all, or to a 16-bit format."""

ERROR, ASKED, MOVED, MEASURED, ALONG = 0, 1, 2, 3, 4
"""Places in the totals of the dose: |stored − exact|², |exact − target|², weights that moved, weights
measured; from `ALONG` on ⟨direction, change⟩ for each direction, then their Gram matrix, row by row."""

Function = TypeVar("Function", bound=Callable[..., Any])


def totals_of(directions: int) -> np.ndarray:
    """Return totals of the dose for that many directions, all zero."""
    return np.zeros(ALONG + directions + directions * directions)


def compiled(function: Function) -> Function:
    """Compile a loop at its first call; it runs without Python's lock, in the order it is written."""
    return _compile(function, fastmath=False)


def reduction(function: Function) -> Function:
    """Compile a loop whose sum may be taken in any order."""
    return _compile(function, fastmath={"reassoc"})


def _compile(function: Function, *, fastmath: bool | set[str]) -> Function:
    """Compile, and keep the machine code beside this file or in the user's cache folder where that can be."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # numba finds no folder that can be written to
        return cast(Function, numba.njit(**options)(function))


# Reading

_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@compiled
def read_rows(handles, offsets, size, rows):
    """Read `size` bytes from each open file at its offset into the beginning of a row; tell if all came."""
    for k in range(handles.size):
        address, done = rows[k].ctypes.data, 0
        while done < size:
            count = _pread(handles[k], address + done, size - done, offsets[k] + done)
            if count <= 0:
                return False
            done += count
    return True


# One value


@intrinsic
def _float_of(_context, _bits):
    """See 32 bits as a float32."""
    return types.float32(types.uint32), _bitcast


@intrinsic
def _bits_of(_context, _value):
    """See a float32 as its 32 bits."""
    return types.uint32(types.float32), _bitcast


def _bitcast(context, builder, signature, arguments):
    return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))


# Single passes over a block


@compiled
def _widen(raw, out):
    """Turn bfloat16 into float32."""
    for i in range(out.size):
        out[i] = _float_of(uint32(uint32(raw[i]) << uint32(16)))


@compiled
def _widen_and_take_off(raw, base, out):
    for i in range(out.size):
        out[i] = _float_of(uint32(uint32(raw[i]) << uint32(16))) - base[i]


@compiled
def _copy(values, out):
    for i in range(out.size):
        out[i] = values[i]


@compiled
def _take_off(base, out):
    for i in range(out.size):
        out[i] = out[i] - base[i]


@compiled
def _add(values, out):
    for i in range(out.size):
        out[i] = out[i] + values[i]


@compiled
def _scale(factor, values, out):
    for i in range(out.size):
        out[i] = factor * values[i]


@compiled
def _add_scaled(factor, values, out):
    for i in range(out.size):
        out[i] = out[i] + factor * values[i]


@compiled
def _sum(first, second, out):
    for i in range(out.size):
        out[i] = first[i] + second[i]


@reduction
def _dot(first, second):
    total = first.dtype.type(0)
    for i in range(first.size):
        total += first[i] * second[i]
    return float64(total)


@compiled
def _hash(index, low, high):
    """Return 32 pseudo-random bits for an element: two multiply-xorshift rounds of its index and a key."""
    x = uint32(uint32(index ^ low) + high)
    x = uint32(x ^ uint32(x >> uint32(16)))
    x = uint32(x * uint32(0x7FEB352D))
    x = uint32(x ^ uint32(x >> uint32(15)))
    x = uint32(x * uint32(0x846CA68B))
    return uint32(x ^ uint32(x >> uint32(16)))


# Rounding a block of float32; every value of the result is one of the 16-bit format


@compiled
def _bfloat16_bits(value, by_chance, index, low, high):
    """Return the bits of a float32 rounded to bfloat16: to the nearest, ties to even, or by chance."""
    x = _bits_of(value)
    if by_chance:
        step = uint32(_hash(index, low, high) & uint32(0xFFFF))
    else:
        step = uint32(uint32(0x7FFF) + uint32(uint32(x >> uint32(16)) & uint32(1)))
    is_nan = uint32(x & uint32(0x7FFFFFFF)) > uint32(0x7F800000)
    return uint32((uint32(x | uint32(0x400000)) if is_nan else uint32(x + step)) & uint32(0xFFFF0000))


@compiled
def _to_bfloat16(pivot, delta, alone, noise, out, halved):
    """Round pivot + delta to bfloat16.

    `alone` leaves delta out: adding a zero would turn -0.0 into 0.0. `noise` is (by chance or to nearest,
    index of the first element, low and high half of the key). Return whether all is finite.
    """
    by_chance, first, low, high = noise
    largest = uint32(0)
    for i in range(out.size):
        value = pivot[i] if alone else pivot[i] + delta[i]
        x = _bfloat16_bits(float32(value), by_chance, uint32(first + uint32(i)), low, high)
        halved[i] = uint16(uint32(x >> uint32(16)))
        out[i] = _float_of(x)
        largest = max(largest, uint32(x & uint32(0x7F800000)))
    return largest < uint32(0x7F800000)


@compiled
def _to_wide(pivot, delta, alone, halve, noise, out):
    """Set `out` to pivot + delta likewise, rounded to float16 where `halve` says so, else not at all."""
    if alone:
        _copy(pivot, out)
    else:
        _sum(pivot, delta, out)
    if halve:
        _to_float16(noise, out)
    return _all_finite(out)


@compiled
def _to_float16(noise, out):
    """Round `out` to float16 likewise, in place; it stays in the working dtype.

    Below 2^-14 float16 is evenly spaced by 2^-24. Size and sign apart there, as -0.0 must stay what it is.
    """
    by_chance, first, low, high = noise
    for i in range(out.size):
        value = float32(out[i])
        x = _bits_of(value)
        step = uint32(_hash(uint32(first + uint32(i)), low, high) & uint32(0x1FFF))
        if abs(value) < float32(2.0**-14):
            steps = float32(abs(value) * float32(2.0**24))
            if by_chance:
                steps = float32(np.floor(float32(steps + float32(float32(step) * float32(2.0**-13)))))
            value = np.copysign(float32(float32(np.rint(steps)) * float32(2.0**-24)), value)
        elif uint32(x & uint32(0x7FFFFFFF)) < uint32(0x7F800000):
            half = uint32(uint32(0xFFF) + uint32(uint32(x >> uint32(13)) & uint32(1)))
            value = _float_of(uint32(uint32(x + (step if by_chance else half)) & uint32(0xFFFFE000)))
            if abs(value) > float32(65504):
                value = np.copysign(float32(np.inf), value)
        out[i] = value


@reduction
def _all_finite(values):
    """Tell whether no value is NaN or infinite: times zero it would be NaN, and so would the sum."""
    total = values.dtype.type(0)
    for i in range(values.size):
        total += values[i] * values.dtype.type(0)
    return total == 0


# A block of operands


@compiled
def _load(packed, halves, wides, extras, start, size, rows):
    """Fill `rows` with a block: the pivot, the other checkpoints minus the pivot, the displacements.

    Checkpoints come as bfloat16 in `halves` when `packed`, else in the working dtype in `wides`.
    """
    stop = start + size
    checkpoints = halves.shape[0] if packed else wides.shape[0]
    for k in range(checkpoints):
        if packed and k == 0:
            _widen(halves[k, start:stop], rows[k, :size])
        elif packed:
            _widen_and_take_off(halves[k, start:stop], rows[0, :size], rows[k, :size])
        else:
            _copy(wides[k, start:stop], rows[k, :size])
            if k > 0:
                _take_off(rows[0, :size], rows[k, :size])
    for j in range(extras.shape[0]):
        _copy(extras[j, start:stop], rows[checkpoints + j, :size])


@compiled
def _weigh(rows, order, ends, weights, spare, out):
    """Set `out` to Σ_g weights[g] · (sum of the rows of group g); groups are runs of `order`.

    Rows of equal weight are added up first, so that the order in which they are named does not decide
    the rounding.
    """
    begin, size = 0, out.size
    for group in range(ends.size):
        values = rows[order[begin], :size]
        if ends[group] - begin > 1:
            _sum(values, rows[order[begin + 1], :size], spare)
            for place in range(begin + 2, ends[group]):
                _add(rows[order[place], :size], spare)
            values = spare
        if begin == 0:
            _scale(weights[group], values, out)
        else:
            _add_scaled(weights[group], values, out)
        begin = ends[group]
    if ends.size == 0:
        out[:] = 0


@reduction
def _moments(stored, pivot, delta, change, totals):
    """Set `change` to stored − pivot, and add up error, size and number of the changes."""
    zero = stored.dtype.type(0)
    one = stored.dtype.type(1)
    error, asked, moved = zero, zero, zero
    for i in range(stored.size):
        step = stored[i] - pivot[i]
        change[i] = step
        off = step - delta[i]
        error += off * off
        asked += delta[i] * delta[i]
        moved += one if step != zero else zero
    totals[ERROR] += error
    totals[ASKED] += asked
    totals[MOVED] += moved
    totals[MEASURED] += stored.size


@compiled
def _measure(rows, along, lines, change, totals):
    """Add up the products of every direction with the change and with each other."""
    count, size = along.shape[0], change.size
    for a in range(count):
        line = lines[a, :size]
        begun = False
        for k in range(1, rows.shape[0]):
            if along[a, k] != 0:
                if begun:
                    _add_scaled(along[a, k], rows[k, :size], line)
                else:
                    _scale(along[a, k], rows[k, :size], line)
                begun = True
        if not begun:
            line[:] = 0
        totals[ALONG + a] += _dot(line, change)
        for b in range(a + 1):
            product = _dot(line, lines[b, :size])
            totals[ALONG + count + a * count + b] += product
            if b < a:
                totals[ALONG + count + b * count + a] += product


# The short way, for bfloat16 in and out where nothing is measured: the same operations in the same order,
# without rows of float32 in between


@compiled
def _step(pivot, raw, before, grouped):
    """Return P − A for one weight; after `before`, the sum of the rows of its group so far, if it has any."""
    base = _float_of(uint32(uint32(pivot) << uint32(16)))
    step = _float_of(uint32(uint32(raw) << uint32(16))) - base
    return before + step if grouped else step


@compiled
def _gather(pivot, raw, grouped, group):
    """Add a row to the sum of its group."""
    for i in range(group.size):
        group[i] = _step(pivot[i], raw[i], group[i], grouped)


@compiled
def _begin(pivot, raw, grouped, group, factor, out):
    """Set `out` to factor · (the sum of the first group, of which this is the last row)."""
    for i in range(out.size):
        out[i] = factor * _step(pivot[i], raw[i], group[i], grouped)


@compiled
def _go_on(pivot, raw, grouped, group, factor, out):
    """Add factor · (the sum of a group, of which this is the last row) to `out`."""
    for i in range(out.size):
        out[i] = out[i] + factor * _step(pivot[i], raw[i], group[i], grouped)


@compiled
def _end(pivot, raw, grouped, group, factor, only, delta, noise, halved):
    """Add the last group and the pivot to `delta`, and round the sum; return whether all is finite."""
    by_chance, first, low, high = noise
    largest = uint32(0)
    for i in range(halved.size):
        change = factor * _step(pivot[i], raw[i], group[i], grouped)
        change = change if only else delta[i] + change
        value = _float_of(uint32(uint32(pivot[i]) << uint32(16))) + change
        x = _bfloat16_bits(value, by_chance, uint32(first + uint32(i)), low, high)
        halved[i] = uint16(uint32(x >> uint32(16)))
        largest = max(largest, uint32(x & uint32(0x7F800000)))
    return largest < uint32(0x7F800000)


@compiled
def _short_way(halves, start, size, order, ends, weights, noise, scratch, halved):
    """Do one block; `order`, `ends` and `weights` as in `_weigh`."""
    stop, begin, finite = start + size, 0, True
    pivot, delta, group = halves[0, start:stop], scratch[0, :size], scratch[1, :size]
    for number in range(ends.size):
        last = ends[number] - 1
        for place in range(begin, last):
            _gather(pivot, halves[order[place], start:stop], place > begin, group)
        raw, factor, grouped = halves[order[last], start:stop], weights[number], last > begin
        if number == ends.size - 1:
            only, out = number == 0, halved[start:stop]
            finite = _end(pivot, raw, grouped, group, factor, only, delta, noise, out)
        elif number == 0:
            _begin(pivot, raw, grouped, group, factor, delta)
        else:
            _go_on(pivot, raw, grouped, group, factor, delta)
        begin = ends[number]
    return finite


# Whole slices


@compiled
def _buffers(packed, halves, wides, extras, along):
    """Return room for a block: of every operand, of every direction, and of four more rows."""
    checkpoints = halves.shape[0] if packed else wides.shape[0]
    rows = np.empty((checkpoints + extras.shape[0], BLOCK), wides.dtype)
    lines = np.empty((along.shape[0], BLOCK), wides.dtype)
    return rows, lines, np.empty((4, BLOCK), wides.dtype)


@compiled
def combine(operands, count, groups, rounding, first, measure, out):
    """Write the pivot plus Σ weights · rows, rounded, for one slice; return whether all of it is finite.

    `operands` are (packed, halves, wides, extras) of `count` elements (see `_load`); `groups` (order, ends,
    weights) are groups of rows and their factors (see `_weigh`), and none means the pivot itself. `rounding`
    is (kind, by_chance, key): what to round to, whether stochastically, and the key of the noise; `first` is
    the slice's first element in its tensor. `out` is (halved, stored): the result goes to the first as
    bfloat16 where `kind` says so, else to the second in the working dtype. `measure` is (every, target,
    along, totals): every `every`-th block is measured into `totals`, the change from the target, which is
    the pivot (0) or row `target` away from it, along the directions whose coefficients are in `along`.
    """
    packed, halves, wides, extras = operands
    order, ends, weights = groups
    kind, by_chance, key = rounding
    every, target, along, totals = measure
    halved, stored_all = out
    rows, lines, scratch = _buffers(packed, halves, wides, extras, along)
    is_short = packed and kind == BFLOAT16 and extras.shape[0] == 0 and ends.size > 0
    finite = True
    start = 0
    while start < count:
        place = first + start
        size = min(BLOCK - place % BLOCK, count - start)  # blocks are those of the tensor, not of the slice
        index, low = uint32(place), uint32(key)
        high = uint32(uint32(key >> int64(32)) + uint32(uint32(place >> int64(32)) * uint32(0x9E3779B9)))
        noise = (by_chance, index, low, high)
        measured = every > 0 and (place // BLOCK) % every == 0
        if is_short and not measured:
            finite &= _short_way(halves, start, size, order, ends, weights, noise, scratch, halved)
            start += size
            continue
        _load(packed, halves, wides, extras, start, size, rows)
        pivot, delta, stored = rows[0, :size], scratch[0, :size], scratch[1, :size]
        spare, change = scratch[2, :size], scratch[3, :size]
        _weigh(rows, order, ends, weights, spare, delta)
        places = slice(start, start + size)
        if kind == BFLOAT16:
            finite &= _to_bfloat16(pivot, delta, ends.size == 0, noise, stored, halved[places])
        else:
            finite &= _to_wide(pivot, delta, ends.size == 0, kind == FLOAT16, noise, stored)
            _copy(stored, stored_all[places])
        if measured:
            origin = pivot
            if target > 0:
                _take_off(rows[target, :size], delta)
                _sum(pivot, rows[target, :size], spare)
                origin = spare
            _moments(stored, origin, delta, change, totals)
            _measure(rows, along, lines, change, totals)
        start += size
    return finite


@compiled
def products(operands, count, along, gram):
    """Add the inner products of directions over one slice to `gram`; `operands`, `along` as in `combine`."""
    packed, halves, wides, extras = operands
    rows, lines, _ = _buffers(packed, halves, wides, extras, along)
    totals = np.zeros(ALONG + along.shape[0] + along.shape[0] ** 2)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        _load(packed, halves, wides, extras, start, size, rows)
        _measure(rows, along, lines, rows[0, :size], totals)
    gram += totals[ALONG + along.shape[0] :].reshape(gram.shape)


TILE = 512
"""Columns worked off at a time, so that they stay in cache for all rows."""


def multiply(left: np.ndarray, right: np.ndarray, scale: float) -> np.ndarray:
    """Return scale · left · right (n x r times r x m) in float64."""
    product = np.zeros((left.shape[0], right.shape[1]))
    _multiply(np.ascontiguousarray(left), np.ascontiguousarray(right), float(scale), product)
    return product


def nearest_factors(
    matrix: np.ndarray, *, rank: int | None = None, energy: float = 1.0, most: int | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return left (n x r) and right (r x m), in float64, whose product is nearest to a matrix.

    They are the truncated singular value decomposition, the square roots of the singular values in both.
    r is `rank`, or the smallest that keeps the share `energy` of the sum of squared singular values; None is
    returned where it is more than `most`. Needs a few copies of the matrix in float64.
    """
    from scipy.linalg import eigh

    if matrix.shape[0] < matrix.shape[1]:
        turned = nearest_factors(matrix.T, rank=rank, energy=energy, most=most)
        return None if turned is None else (turned[1].T, turned[0].T)
    wide = matrix.astype(np.float64)
    gram = wide.T @ wide
    kept = rank_for(np.linalg.eigvalsh(gram)[::-1], energy) if rank is None else rank
    if most is not None and kept > most:
        return None
    _, vectors = eigh(gram, subset_by_index=[len(gram) - kept, len(gram) - 1], driver="evr")
    # Squaring the matrix lost half the digits of the small singular values. The space of the leading
    # vectors is still right, and inside it the decomposition is taken again.
    basis, _ = np.linalg.qr(wide @ vectors)
    rotation, values, right = np.linalg.svd(basis.T @ wide, full_matrices=False)
    roots = np.sqrt(values)
    return (basis @ rotation) * roots, roots[:, None] * right


def rank_for(squares: np.ndarray, energy: float) -> int:
    """Return how many of the squared singular values, given in falling order, make up the share `energy`.

    >>> rank_for(np.array([16.0, 9.0, 0.0]), 0.6), rank_for(np.array([16.0, 9.0, 0.0]), 1.0)
    (1, 2)
    """
    running = np.cumsum(np.maximum(squares, 0.0))
    enough = energy * running[-1] * (1 - 1e-12)  # what rounding leaves behind the last one counts for nothing
    return 1 + int(np.searchsorted(running, enough))


@compiled
def _multiply(left, right, scale, out):
    """Set `out`, which is zero, to scale · left · right; four steps of the inner sum in one pass."""
    rank = left.shape[1]
    fours = rank - rank % 4
    for begin in range(0, out.shape[1], TILE):
        end = min(begin + TILE, out.shape[1])
        for i in range(out.shape[0]):
            row = out[i, begin:end]
            for k in range(0, fours, 4):
                a, b = np.float64(left[i, k]), np.float64(left[i, k + 1])
                c, d = np.float64(left[i, k + 2]), np.float64(left[i, k + 3])
                p, q = right[k, begin:end], right[k + 1, begin:end]
                s, t = right[k + 2, begin:end], right[k + 3, begin:end]
                for j in range(row.size):
                    row[j] = (
                        row[j]
                        + a * np.float64(p[j])
                        + b * np.float64(q[j])
                        + c * np.float64(s[j])
                        + d * np.float64(t[j])
                    )
            for k in range(fours, rank):
                a, p = np.float64(left[i, k]), right[k, begin:end]
                for j in range(row.size):
                    row[j] = row[j] + a * np.float64(p[j])
            for j in range(row.size):
                row[j] = row[j] * scale


@reduction
def squares(values, stored):
    """Return |values|² and |values − stored|² of two flat arrays."""
    size, rest = 0.0, 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        off = value - np.float64(stored[i])
        size += value * value
        rest += off * off
    return size, rest
