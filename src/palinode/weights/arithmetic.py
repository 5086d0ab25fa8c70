"""Evaluate a weighted sum of checkpoints slice by slice, with one final rounding.

A point Σ c_i P_i with Σ c_i = 1 is computed as  A + Σ c_i (P_i − A)  for one of its own terms A: the
differences of neighbouring checkpoints are nearly exact in float32, so nothing is lost to cancellation,
and the scales need not add up to 1 in floating point. (It is float64 where an input or the output is
float64, so that such a model loses nothing.) Then each value is rounded once to the output dtype,
to nearest or stochastically (spec: msa.md, P3): stochastic rounding keeps on average the small steps that
rounding to nearest would lose.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from threading import local
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, get_args

import numpy as np
import torch

from palinode.errors import CheckpointError, InputError, MismatchError
from palinode.weights.checkpoint import (
    EMBEDDINGS,
    HEADS,
    Checkpoint,
    TensorInfo,
    by_file,
    check_unchanged,
)
from palinode.weights.direction import Direction, Point

Result = TypeVar("Result")

SLICE = 1 << 18
"""Elements handled at a time: 1 MB in float32, so that all operands stay in cache."""

WINDOW = 1024
"""Slices handed to the threads at a time, so that the list of what is to do stays short."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Rounding = Literal["auto", "nearest", "stochastic"]
"""`auto` is stochastic for 16-bit output and nearest otherwise."""


# Reading slices


class Reader:
    """Open files of the checkpoints in a sum, and read parts of tensors from them.

    Safe to use from several threads: every read names its own offset and fills its own buffer.
    """

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def open(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Open the files of these checkpoints; call it before reading from several threads."""
        infos = (info for checkpoint in checkpoints for info in checkpoint.tensors.values())
        for file, members in by_file(infos).items():
            try:
                handle = self._handles[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(
                    f"{file} cannot be read ({error.strerror}); fetch the model again"
                ) from None
            check_unchanged(file, members, size=os.fstat(handle).st_size)

    def read_bytes(self, info: TensorInfo, start: int, stop: int) -> bytearray:
        """Return the raw bytes [start, stop) of one tensor."""
        buffer = bytearray(stop - start)
        self._fill(info, memoryview(buffer), start)
        return buffer

    def read_values(self, info: TensorInfo, start: int, out: torch.Tensor) -> torch.Tensor:
        """Fill `out` (float32 or float64, one dimension) with elements from `start` on, and return it."""
        raw = torch.empty(out.numel(), dtype=DTYPES[info.dtype])
        self._fill(info, as_bytes(raw), start * info.itemsize)
        return out.copy_(raw)

    def _fill(self, info: TensorInfo, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._handles[info.file], [view[done:]], info.offset + start + done)
            if count <= 0:
                raise CheckpointError(
                    f"{info.file} ended inside {info.name}; it was cut off while being read"
                )
            done += count


def as_bytes(values: torch.Tensor) -> memoryview:
    """Return the raw bytes of a contiguous tensor, not copied."""
    raw: Any = values.view(torch.uint8).numpy()
    return memoryview(raw)


# Rounding


def name_key(seed: int, name: str) -> int:
    """Return 64 bits that stand for (seed, tensor name) in stochastic rounding.

    Output head and embedding share theirs: a tied pair rounds alike even where no config says it is one.
    """
    name = "embedding" if name in HEADS or name.endswith(EMBEDDINGS) else name
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")


def random_bits(key: int, start: int, count: int) -> torch.Tensor:
    """Return `count` pseudo-random int32 for the elements from `start` on.

    A counter-based hash (two multiply-xorshift rounds) of key and element index: the value of an
    element depends on nothing else, so slices, shards, threads and processes cannot change it.
    """
    index = np.arange(start, start + count, dtype=np.uint64)
    x = index.astype(np.uint32) ^ np.uint32(key & 0xFFFFFFFF)
    high = (index >> np.uint64(32)).astype(np.uint32) if start + count > 1 << 32 else np.uint32(0)
    x += np.uint32(key >> 32) + high * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return torch.from_numpy(x.view(np.int32))


def round_stochastic(values: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor) -> torch.Tensor:
    """Round float32 to a 16-bit dtype, up or down with probability by distance; exact values stay."""
    if dtype == torch.bfloat16:
        return _add_and_cut(values, bits, dropped=16).to(dtype)
    normal = _add_and_cut(values, bits, dropped=13)
    # Below 2^-14 float16 is evenly spaced by 2^-24. Size and sign apart, as -0.0 must stay what it is.
    chance = (bits & 0x1FFF).to(torch.float32) / 8192
    small = torch.floor(values.abs() * 2.0**24 + chance) * 2.0**-24
    return torch.where(values.abs() < 2.0**-14, small.copysign(values), normal).to(dtype)


def _add_and_cut(values: torch.Tensor, bits: torch.Tensor, *, dropped: int) -> torch.Tensor:
    """Add a random number below the last kept bit of the significand, then clear what lies below it."""
    mask = (1 << dropped) - 1
    return ((values.view(torch.int32) + (bits & mask)) & ~mask).view(torch.float32)


def round_to(
    values: torch.Tensor, dtype: torch.dtype, *, stochastic: bool, key: int, start: int
) -> torch.Tensor:
    """Round a slice of float32 or float64 once to the output dtype."""
    if not stochastic or dtype.itemsize != 2:
        return values.to(dtype)
    exact = values.to(torch.float32)
    return round_stochastic(exact, dtype, random_bits(key, start, values.numel()))


def check_rounding(rounding: str) -> None:
    """Raise InputError when there is no such rounding."""
    if rounding not in get_args(Rounding):
        raise InputError(f"there is no rounding {rounding!r}; choose one of {', '.join(get_args(Rounding))}")


def all_finite(values: torch.Tensor) -> bool:
    """Tell whether no value is NaN or infinite: their sum shows it, unless it is itself too large."""
    total = values.sum(dtype=torch.float32 if values.itemsize == 2 else None)
    return math.isfinite(float(total)) or bool(torch.isfinite(values).all())


# Pre-flight


# Two models can agree in all shapes and still read them differently.
ARCHITECTURE = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "n_head")


def check_same_shape(points: Sequence[Checkpoint], reference: Checkpoint) -> None:
    """Raise MismatchError unless every checkpoint has the reference's architecture, tensors and tying."""
    for other in points:
        for key in ARCHITECTURE:
            first, second = reference.config.get(key), other.config.get(key)
            if first != second and None not in (first, second):
                raise MismatchError(
                    f"{reference.folder} and {other.folder} are not states of one model: {key} is {first} "
                    f"in the one and {second} in the other"
                )
        problems = _differences(reference, other)
        if problems:
            raise MismatchError(
                f"{reference.folder} and {other.folder} disagree on {len(problems)} of "
                f"{len(reference.tensors)} tensors ({problems[0]}); "
                "are they states of one model, saved with the same tokenizer?"
            )


def _differences(reference: Checkpoint, other: Checkpoint) -> list[str]:
    if (reference.tied is None) != (other.tied is None):
        tied, untied = (reference, other) if reference.tied else (other, reference)
        return [f"the output head is tied to the embedding in {tied.folder} and is not in {untied.folder}"]
    problems = []
    for name, info in reference.tensors.items():
        found = other.find(name)
        if found is None:
            problems.append(f"{name} is missing in {other.folder}")
        elif found.shape != info.shape:
            problems.append(f"{name}: {_shape(info)} against {_shape(found)}")
        elif found.is_float != info.is_float:
            problems.append(f"{name}: {info.dtype} against {found.dtype}")
    extra = [name for name in other.tensors if reference.find(name) is None]
    return problems + [f"{name} is missing in {reference.folder}" for name in extra]


def _shape(info: TensorInfo) -> str:
    return "x".join(map(str, info.shape)) or "scalar"


# Sums


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements [start, start + count) of one tensor of the target's layout."""

    info: TensorInfo
    start: int
    count: int


def slices(checkpoint: Checkpoint, *, size: int = SLICE) -> Iterator[Slice]:
    """Yield the floating-point tensors of a checkpoint in pieces of at most `size` elements."""
    for info in checkpoint.tensors.values():
        if info.is_float:
            for start in range(0, info.size, size):
                yield Slice(info, start, min(size, info.size - start))


class Operands:
    """The values of several checkpoints on one slice, each read once and only if it is asked for.

    They are float32, or float64 where one of `checkpoints` or the output (`code`) is.
    """

    def __init__(
        self, reader: Reader, part: Slice, checkpoints: Iterable[Checkpoint], code: str | None = None
    ) -> None:
        self._reader = reader
        self._part = part
        found = [checkpoint.find(part.info.name) for checkpoint in checkpoints]
        wide = "F64" in (code, *(info.dtype for info in found if info))
        self._dtype = torch.float64 if wide else torch.float32
        self._values: dict[Checkpoint, torch.Tensor] = {}

    def __getitem__(self, checkpoint: Checkpoint) -> torch.Tensor:
        if checkpoint not in self._values:
            self._values[checkpoint] = self._read(checkpoint)
        return self._values[checkpoint]

    def _read(self, checkpoint: Checkpoint) -> torch.Tensor:
        name, start = self._part.info.name, self._part.start
        info, twin = checkpoint.find(name), checkpoint.twin(name)
        if info is None:
            raise MismatchError(f"{checkpoint.folder} has no tensor {name}")
        values = self._reader.read_values(info, start, torch.empty(self._part.count, dtype=self._dtype))
        if not all_finite(values):
            raise CheckpointError(
                f"{info.file}: {info.name} holds values that are not finite (NaN or infinity)"
            )
        if twin and not (
            twin.shape == info.shape
            and torch.equal(values, self._reader.read_values(twin, start, torch.empty_like(values)))
        ):
            raise MismatchError(
                f"{checkpoint.folder} ties its output head to the embedding (config.json) but holds two "
                f"different tensors, {info.name} and {twin.name}; set tie_word_embeddings to what is true"
            )
        return values

    def sum(self, terms: Mapping[Checkpoint, float], pivot: Checkpoint) -> torch.Tensor:
        """Return Σ c_i (P_i − pivot): the direction itself, or a point's distance from its pivot.

        Terms of equal coefficient are added up first, so that folder names do not decide the rounding.
        """
        base = self[pivot]
        total = torch.zeros_like(base)
        others = [term for term in in_order(terms) if term[0] != pivot]
        for coefficient, members in groupby(others, key=lambda term: term[1]):
            group = [self[checkpoint] - base for checkpoint, _ in members]
            for difference in group[1:]:
                group[0].add_(difference)
            total.add_(group[0], alpha=coefficient)
        return total

    def direction(self, direction: Direction) -> torch.Tensor:
        """Return a direction's values on this slice."""
        if not direction.terms:
            return torch.zeros(self._part.count, dtype=self._dtype)
        return self.sum(direction.terms, pivot_of(direction.terms))

    def point(self, point: Point) -> torch.Tensor:
        """Return a point's values on this slice, before rounding."""
        pivot = pivot_of(point.terms, point.anchor)
        if len(point.terms) == 1:  # adding a zero would turn -0.0 into 0.0
            return self[pivot]
        return self[pivot] + self.sum(point.terms, pivot)


def in_order(terms: Mapping[Checkpoint, float]) -> list[tuple[Checkpoint, float]]:
    """Return the terms in an order that does not depend on how the formula was written."""
    return sorted(terms.items(), key=lambda term: (term[1], str(term[0].folder)))


def pivot_of(terms: Mapping[Checkpoint, float], anchor: Checkpoint | None = None) -> Checkpoint:
    """Return the term that the others are compared with: the anchor where it takes part."""
    if anchor is not None and anchor in terms:
        return anchor
    return in_order(terms)[0][0]


# Dose


@dataclass(frozen=True, slots=True)
class Dose:
    """How much of the change asked for really arrived in the stored weights.

    `effective` holds, for each named direction, the scale found in the stored weights (least squares
    of stored − target on the directions); rounding can make it smaller than the one asked for.
    """

    effective: Mapping[str, float]
    relative_error: float
    """|stored − exact| / |exact − target|; 0 when nothing was asked for."""
    moved_share: float
    """Share of floating-point weights whose stored value differs from the target's."""
    weights: int
    """Number of floating-point weights."""


@dataclass(slots=True)
class DoseMeter:
    """Adds up, slice by slice, what `Dose` needs: products of the directions and the stored change."""

    along: Mapping[str, Direction]
    gram: np.ndarray = field(init=False)
    projection: np.ndarray = field(init=False)
    error: float = 0.0
    asked: float = 0.0
    moved: int = 0
    weights: int = 0

    def __post_init__(self) -> None:
        count = len(self.along)
        self.gram = np.zeros((count, count))
        self.projection = np.zeros(count)

    def add(
        self, operands: Operands, target: torch.Tensor, exact: torch.Tensor, stored: torch.Tensor
    ) -> None:
        """Take one slice in: the target's values, the exact sum, and what is written."""
        change = stored.to(exact.dtype) - target
        vectors = [operands.direction(direction) for direction in self.along.values()]
        self.gram += [[_dot(a, b) for b in vectors] for a in vectors] if vectors else 0.0
        self.projection += [_dot(vector, change) for vector in vectors]
        self.asked += _dot(exact - target, exact - target)
        self.error += _dot(change - (exact - target), change - (exact - target))
        self.moved += int(torch.count_nonzero(change))
        self.weights += change.numel()

    def merge(self, other: DoseMeter) -> None:
        """Take in what another thread has added up."""
        self.gram += other.gram
        self.projection += other.projection
        self.error += other.error
        self.asked += other.asked
        self.moved += other.moved
        self.weights += other.weights

    def result(self) -> Dose:
        """Return the dose of everything added so far."""
        effective = np.linalg.lstsq(self.gram, self.projection, rcond=1e-12)[0] if self.along else []
        return Dose(
            effective=dict(zip(self.along, map(float, effective), strict=True)),
            relative_error=float(np.sqrt(self.error / self.asked)) if self.asked else 0.0,
            moved_share=self.moved / self.weights if self.weights else 0.0,
            weights=self.weights,
        )


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a, b))


# Threads


def map_slices(
    parts: Sequence[Slice],
    work: Callable[[Slice], Result],
    *,
    collect: Callable[[Result], None] | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Call `work` on every slice from a few threads; torch itself stays on one thread in each.

    `collect` takes the results here, in the order of the slices, so that sums over them do not depend
    on the threads. `on_progress` hears the number of elements done. The first error stops the rest
    and is raised.
    """
    threads = torch.get_num_threads()
    state = local()

    def run(part: Slice) -> Result:
        if not getattr(state, "ready", False):
            torch.set_num_threads(1)
            state.ready = True
        return work(part)

    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
    try:
        for first in range(0, len(parts), WINDOW):
            window = parts[first : first + WINDOW]
            for part, result in zip(window, pool.map(run, window), strict=True):
                if collect:
                    collect(result)
                if on_progress:
                    on_progress(part.count)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
