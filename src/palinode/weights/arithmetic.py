"""A weighted sum of models, slice by slice in a few threads. Memory does not depend on the model.

A point Σ c_i P_i with Σ c_i = 1 is computed as  A + Σ c_i (P_i − A)  for one of its own terms A, the
pivot: the differences of neighbouring checkpoints are nearly exact in float32, so nothing is lost to
cancellation, and the scales need not add up to 1 in floating point. Displacements (an adapter, a stored
vector) are differences already. `Formula` lays a point out for the kernels: its operands in rows, its
coefficients over the rows.

The working dtype is float32, or float64 where it is asked for or an input or the output is float64. Then
each value is rounded once to the output dtype, to nearest or stochastically (spec: msa.md, P3): stochastic
rounding keeps on average the small steps that rounding to nearest would lose.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Literal, TypeVar, get_args

import numpy as np

from palinode.errors import InputError, MismatchError
from palinode.weights import kernels
from palinode.weights.displacement import NUMPY, Displacement, HasTerms, Term, check_displacements, decode
from palinode.weights.folders import ModelFolder
from palinode.weights.preflight import check_fit, complain_of_nonfinite, complain_of_twins
from palinode.weights.tensors import Files, TensorInfo, is_embedding, is_head, map_parts

Result = TypeVar("Result")

SLICE = 1 << 18
"""Elements read, summed and written at a time: 512 KB of bfloat16 from each checkpoint."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements [start, start + count) of one tensor of the anchor's layout."""

    info: TensorInfo
    start: int
    count: int
    alone: bool = False
    """Rows of an embedding that only the anchor has: its own values, nothing added."""


def slices(
    checkpoint: ModelFolder, *, size: int = SLICE, shared_rows: Mapping[str, int] | None = None
) -> Iterator[Slice]:
    """Yield the floating-point tensors of a checkpoint in pieces of at most `size` elements.

    `shared_rows` names the tensors of which only so many leading rows take part in sums.
    """
    for info in checkpoint.tensors.values():
        if info.is_float:
            rows = (shared_rows or {}).get(info.name)
            shared = info.size if rows is None else rows * (info.size // info.shape[0])
            for first, last, alone in ((0, shared, False), (shared, info.size, True)):
                for start in range(first, last, size):
                    yield Slice(info, start, min(size, last - start), alone)


def cut(info: TensorInfo) -> Iterator[Slice]:
    """Yield a whole tensor in pieces of at most `SLICE` elements."""
    for start in range(0, info.size, SLICE):
        yield Slice(info, start, min(SLICE, info.size - start))


def apart(terms: Iterable[Term]) -> tuple[tuple[ModelFolder, ...], tuple[Displacement, ...]]:
    """Return the checkpoints among the terms of a sum, and the displacements, each once."""
    known = dict.fromkeys(terms)
    checkpoints = tuple(term for term in known if isinstance(term, ModelFolder))
    return checkpoints, tuple(term for term in known if isinstance(term, Displacement))


def over_rows(lines: Iterable[Mapping[Term, float]], rows: Sequence[Term | None]) -> np.ndarray:
    """Return sums as coefficients over the terms of these rows, [lines, rows]."""
    coefficients = [line.get(row, 0.0) if row else 0.0 for line in lines for row in rows]
    return np.array(coefficients, np.float64).reshape(-1, len(rows))


def layout_of(terms: Iterable[Term]) -> list[TensorInfo]:
    """Return the tensors that a direction of these terms may change, a tied one once.

    Raises MismatchError when they do not fit together.
    """
    points, displacements = apart(terms)
    if points:
        layout = points[0]
        check_fit(layout, points[1:])
        check_displacements(layout, displacements)
        return [
            info
            for info in layout.tensors.values()
            if info.is_float and info.size and not layout.is_second_copy(info.name)
        ]
    found: dict[str, TensorInfo] = {}
    for displacement in displacements:
        for name, change in displacement.changes.items():
            own = TensorInfo(name, "F32", change.shape, displacement.folder, 0, 4 * math.prod(change.shape))
            first = found.setdefault(displacement.one_name(name), own)
            if first.shape != change.shape:
                raise MismatchError(
                    f"{first.file} and {displacement.folder} change {name} in two shapes "
                    f"({first.shape} and {change.shape}); were both made from one model?"
                )
    return list(found.values())


def map_slices(
    parts: Iterable[Slice],
    start: Callable[[], Callable[[Slice], Result]],
    *,
    collect: Callable[[Slice, Result], None] | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Do every slice in one of a few threads, each with the worker that `start` makes for it.

    `collect` takes slices and results here, in the order of the slices, so that sums over them do not depend
    on the threads. `on_progress` hears the number of elements done. The first error stops the rest
    and is raised.
    """
    with closing(map_parts(parts, start, workers=workers)) as results:
        for part, result in results:
            if collect:
                collect(part, result)
            if on_progress:
                on_progress(part.count)


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """A point as the kernels take it: operands in rows, and coefficients over the rows.

    Row 0 is the pivot A; then come the other checkpoints, less the pivot, and the displacements.
    """

    anchor: ModelFolder
    terms: Mapping[Term, float]
    checkpoints: tuple[ModelFolder, ...]
    displacements: tuple[Displacement, ...]
    order: np.ndarray
    """Rows with a coefficient, those of equal coefficients next to each other."""
    ends: np.ndarray
    """Where in `order` each group of equal coefficients ends."""
    weights: np.ndarray
    """Coefficient of each group."""
    names: tuple[str, ...]
    """Directions that the dose is measured along, and …"""
    along: np.ndarray
    """… their coefficients over the rows."""
    change: np.ndarray
    """The point less its anchor, as coefficients over the rows."""
    target: int
    """Row of the anchor; 0 where it is the pivot."""

    @property
    def operands(self) -> tuple[Term, ...]:
        """Everything that is read."""
        return (*self.checkpoints, *self.displacements)


def formula(
    anchor: ModelFolder, terms: Mapping[Term, float], along: Mapping[str, Mapping[Term, float]] | None = None
) -> Formula:
    """Lay out a point, and the directions its dose is to be measured along, for the kernels."""
    along = along or {}
    others = (term for term, _ in in_order(terms) if isinstance(term, ModelFolder))
    pivot, lines = anchor if anchor in terms else next(others), [*along.values()]
    checkpoints, displacements = apart([pivot, *terms, anchor, *(term for line in lines for term in line)])
    rows: tuple[Term, ...] = (*checkpoints, *displacements)
    row = {term: place for place, term in enumerate(rows)}
    groups = [
        (coefficient, [row[term] for term, _ in members])
        for coefficient, members in groupby(
            [term for term in in_order(terms) if term[0] != pivot], key=lambda term: term[1]
        )
    ]

    return Formula(
        anchor,
        terms,
        checkpoints,
        displacements,
        order=np.array([place for _, members in groups for place in members], np.int64),
        ends=np.cumsum([len(members) for _, members in groups], dtype=np.int64),
        weights=np.array([coefficient for coefficient, _ in groups], np.float64),
        names=tuple(along),
        along=over_rows(lines, rows),
        change=over_rows([combined(terms, -1.0, {anchor: 1.0})], rows)[0],
        target=row[anchor],
    )


def combined(first: Mapping[Term, float], factor: float, second: Mapping[Term, float]) -> dict[Term, float]:
    """Return first + factor · second, without the terms that cancel."""
    total = dict(first)
    for term, coefficient in second.items():
        total[term] = total.get(term, 0.0) + factor * coefficient
    return {term: coefficient for term, coefficient in total.items() if coefficient != 0.0}


def in_order(terms: Mapping[Term, float]) -> list[tuple[Term, float]]:
    """Return the terms in an order that does not depend on how the formula was written."""
    return sorted(terms.items(), key=lambda term: (term[1], str(term[0].folder)))


NO_HALVES = np.empty((0, 0), np.uint16)


@dataclass(frozen=True, slots=True)
class LoadedSlice:
    """The operands of one slice as the kernels take them; only the first elements of each row are set."""

    packed: bool
    """Whether the checkpoints are all bfloat16, and in `halves`; else they are in `wides`."""
    halves: np.ndarray
    wides: np.ndarray
    extras: np.ndarray
    """Displacements, in the working dtype."""

    @property
    def dtype(self) -> np.dtype:
        """The working dtype: float32 or float64."""
        return self.wides.dtype

    @property
    def operands(self) -> tuple[bool, np.ndarray, np.ndarray, np.ndarray]:
        """All of it, as the kernels are given it."""
        return self.packed, self.halves, self.wides, self.extras

    def rows(self, count: int) -> list[np.ndarray]:
        """Return the first `count` values of every operand."""
        return [row[:count] for row in (*(self.halves if self.packed else self.wides), *self.extras)]

    def finite(self, count: int) -> bool:
        """Tell whether the first `count` values of every operand are finite."""
        if self.packed:
            return not bool(((self.halves[:, :count] & 0x7F80) == 0x7F80).any())
        return bool(np.isfinite(self.wides[:, :count]).all())

    def copies(self, count: int) -> list[tuple[int, int]]:
        """Return which rows of checkpoints equal an earlier one, bit for bit: (row, the first like it)."""
        rows = (self.halves if self.packed else self.wides)[:, :count]
        heads = [row[:GLANCE].tobytes() for row in rows]
        found = []
        for later in range(1, len(rows)):
            alike = (row for row in range(later) if heads[row] == heads[later])
            first = next((row for row in alike if np.array_equal(rows[row], rows[later])), None)
            if first is not None:
                found.append((later, first))
        return found

    def is_zero(self, count: int) -> Callable[[int], bool]:
        """Return a function that tells whether a displacement, by its place, is zero all over."""
        return lambda place: not (self.extras[place, :GLANCE].any() or self.extras[place, :count].any())


class Operands:
    """Buffers of one thread for the values of checkpoints and displacements on one slice."""

    def __init__(
        self, checkpoints: Sequence[ModelFolder], displacements: Sequence[Displacement], files: Files
    ) -> None:
        self.checkpoints = tuple(checkpoints)
        self._displacements = tuple(displacements)
        self._files = files
        self._buffers: dict[str, np.ndarray] = {}
        self._found: dict[tuple[ModelFolder, str], TensorInfo] = {}

    def load(self, part: Slice, dtype: np.dtype) -> LoadedSlice:
        """Read a slice of every operand in the working dtype, or as bfloat16 where all of them are that.

        A float64 operand makes float64 of it. Raises MismatchError for a tensor that is missing or tied
        to another one, CheckpointError when a file cannot be read.
        """
        infos = [self._find(checkpoint, part) for checkpoint in self.checkpoints]
        dtype = np.dtype(np.float64) if any(info.dtype == "F64" for info in infos) else dtype
        packed = bool(infos) and dtype == np.float32 and all(info.dtype == "BF16" for info in infos)
        halves = self.buffer("halves", len(infos), part.count, np.dtype(np.uint16)) if packed else NO_HALVES
        wides = self.buffer("wides", 0 if packed else len(infos), part.count, dtype)
        if packed:
            self._read_packed(infos, part, halves)
        for place, info in enumerate(infos):
            if not packed:
                self._read(info, part, wides[place, : part.count])
            twin = self.checkpoints[place].twin(info.name)
            if twin and not self._same(info, twin, part):
                complain_of_twins(self.checkpoints[place])
        extras = self.buffer("extras", len(self._displacements), part.count, dtype)
        for place, displacement in enumerate(self._displacements):
            layout = next(iter(self.checkpoints), None)
            name = part.info.name
            change = displacement.change_of(name, layout) if layout else displacement.named(name)
            if change is None:
                extras[place, : part.count] = 0
            else:
                change.read(self._files, part.start, extras[place, : part.count])
        return LoadedSlice(packed, halves, wides, extras)

    def _find(self, checkpoint: ModelFolder, part: Slice) -> TensorInfo:
        key = checkpoint, part.info.name
        info = self._found.get(key) or checkpoint.find(part.info.name)
        if info is None:
            raise MismatchError(f"{checkpoint.folder} has no tensor {part.info.name}")
        self._found[key] = info
        return info

    def _read_packed(self, infos: Sequence[TensorInfo], part: Slice, halves: np.ndarray) -> None:
        """Fill rows with a slice of bfloat16 tensors: in one compiled loop where each lies in one piece.

        What that loop cannot read is read again in the plain way, which knows what to say.
        """
        if all(type(info) is TensorInfo for info in infos):
            handles = np.array([self._files.handle(info.file) for info in infos], np.int32)
            offsets = np.array([info.offset + part.start * 2 for info in infos], np.int64)
            if kernels.read_rows(handles, offsets, part.count * 2, halves):
                return
        for place, info in enumerate(infos):
            info.read(self._files, part.start * 2, halves[place, : part.count].view(np.uint8).data)

    def _read(self, info: TensorInfo, part: Slice, out: np.ndarray) -> None:
        """Fill `out` with the values of a slice of one tensor."""
        raw = self._bytes(info, part).view(NUMPY[info.dtype])
        out[:] = decode(raw, info.dtype) if info.dtype == "BF16" else raw

    def _bytes(self, info: TensorInfo, part: Slice) -> np.ndarray:
        size = part.count * info.itemsize
        raw = self.buffer("raw", 1, size, np.dtype(np.uint8))[0, :size]
        info.read(self._files, part.start * info.itemsize, raw.data)
        return raw

    def _same(self, info: TensorInfo, twin: TensorInfo, part: Slice) -> bool:
        if (twin.shape, twin.dtype) != (info.shape, info.dtype):
            return False
        first = self._bytes(info, part).copy()
        return np.array_equal(first, self._bytes(twin, part))

    def buffer(self, name: str, rows: int, count: int, dtype: np.dtype) -> np.ndarray:
        """Return room for rows of `count` values or more, the same one again where it is large enough."""
        found = self._buffers.get(name)
        if found is None or found.dtype != dtype or found.shape[0] != rows or found.shape[1] < count:
            found = self._buffers[name] = np.empty((rows, max(SLICE if rows else 0, count)), dtype)
        return found


# Directions


def direction_values(direction: HasTerms, part: Slice, files: Files) -> np.ndarray:
    """Return a direction on one slice in float32, or float64 where a checkpoint is; not rounded further."""
    weights = direction.terms
    checkpoints, displacements = apart(term for term, _ in in_order(weights))
    loaded = Operands(checkpoints, displacements, files).load(part, np.dtype(np.float32))
    wide = loaded.wides[:, : part.count]
    if loaded.packed:
        wide = decode(loaded.halves[:, : part.count], "BF16")
    total = np.zeros(part.count, loaded.dtype)
    for place, checkpoint in enumerate(checkpoints[1:], start=1):
        total += loaded.dtype.type(weights[checkpoint]) * (wide[place] - wide[0])
    for place, displacement in enumerate(displacements):
        total += loaded.dtype.type(weights[displacement]) * loaded.extras[place, : part.count]
    return total


SAMPLED_FROM, EVERY = 1 << 20, 8
"""Tensors from a million elements on are measured in one block of 2,048 weights out of eight, smaller ones
whole. A scale found in n weights is off by about the relative error of the rounding, divided by √n."""

GLANCE = 64
"""Elements by which rows that differ are told apart at once."""

ZERO = 1e-12
"""Coefficients below this are what rounding left of a sum that is zero."""

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NAMES = {code: name for name, code in CODES.items()}

Rounding = Literal["auto", "nearest", "stochastic"]
"""`auto` is to nearest, and stochastic for a 16-bit output where nearest would lose part of the dose."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a sum is computed and rounded; InputError for a dtype, rounding or precision that there is not."""

    dtype: str | None = None
    """Of the output; None keeps each tensor's own."""
    rounding: str = "auto"
    seed: int = 0
    """Of stochastic rounding."""
    precision: str = "float32"
    """In which sums are formed."""
    allow_nonfinite: bool = False
    """Let NaN and infinity through."""

    def __post_init__(self) -> None:
        precisions = ("float32", "float64")
        choices = {"dtype": tuple(CODES), "rounding": get_args(Rounding), "precision": precisions}
        for word, known in choices.items():
            if (value := getattr(self, word)) not in known and not (word == "dtype" and value is None):
                raise InputError(
                    f"there is no {word} {value!r} for weights; choose one of {', '.join(known)}"
                )

    @property
    def code(self) -> str | None:
        """The output dtype as safetensors has it."""
        return CODES[self.dtype] if self.dtype else None

    def is_wide(self, info: TensorInfo) -> bool:
        """Tell whether a tensor's sum is formed in float64 whatever it is made of."""
        return self.precision == "float64" or (self.code or info.dtype) == "F64"


# One slice


def every_of(info: TensorInfo) -> int:
    """Return which blocks of a tensor are measured for the dose: one in how many."""
    return EVERY if info.size >= SAMPLED_FROM else 1


def stays(form: Formula, copies: Iterable[tuple[int, int]], is_zero: Callable[[int], bool]) -> bool:
    """Tell whether the anchor stays as it is on a slice, and no measured direction moves it either.

    So it is where terms that cancel are alike, bit for bit, as in a tower that nobody trained. The sum of
    their differences might still be off by a last bit. `copies` and `is_zero` as a `LoadedSlice` has them.
    """
    left, checkpoints = np.vstack([form.change, form.along]), len(form.checkpoints)
    for later, first in copies:
        left[:, first] += left[:, later]
        left[:, later] = 0
    if np.abs(left[:, :checkpoints]).max() > ZERO:
        return False
    return all(is_zero(int(place)) for place in np.flatnonzero(left[:, checkpoints:].any(axis=0)))


class Evaluator:
    """Evaluates slices of a formula. It has buffers of its own, so every thread needs its own."""

    def __init__(self, formula: Formula, settings: Settings, files: Files, *, measure: bool = False) -> None:
        self._formula = formula
        self._settings = settings
        self._measure = measure
        self._operands = Operands(formula.checkpoints, formula.displacements, files)
        self._anchor = Operands((formula.anchor,), (), files)

    def evaluate(self, part: Slice) -> tuple[np.ndarray, np.ndarray]:
        """Return a slice rounded to the output dtype, and the totals of its dose.

        The values are one-dimensional, bfloat16 as uint16, and stay valid until the next call. Raises
        CheckpointError for inputs that are not finite, InputError when the sum is too large for its dtype.
        """
        code = self._settings.code or part.info.dtype
        operands = self._anchor if part.alone else self._operands
        wide = np.dtype(np.float64 if self._settings.is_wide(part.info) else np.float32)
        loaded = operands.load(part, wide)
        still = part.alone or stays(self._formula, loaded.copies(part.count), loaded.is_zero(part.count))
        if still and self._formula.target:  # the kernels give row 0 back
            loaded = self._anchor.load(part, wide)
        values, totals, finite = self._combine(part, loaded, code, still=still)
        if not (finite or self._settings.allow_nonfinite):
            if not loaded.finite(part.count):
                complain_of_nonfinite(operands.checkpoints)
            raise InputError(
                f"the sum has values in {part.info.name} that {NAMES[code]} cannot hold; use smaller scales "
                "or a wider dtype"
            )
        return values, totals

    def _combine(
        self, part: Slice, loaded: LoadedSlice, code: str, *, still: bool
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        form, dtype = self._formula, loaded.dtype
        half = self._operands.buffer("half", 1, part.count, np.dtype(np.uint16))[0]
        wide = self._operands.buffer("wide", 1, part.count, dtype)[0]
        totals = kernels.totals_of(len(form.names))
        measured = self._measure and not part.alone and not (still and form.target)
        kept = 0 if still else None
        kind = {"BF16": kernels.BFLOAT16, "F16": kernels.FLOAT16}.get(code, kernels.AS_IS)
        key = np.int64(name_key(self._settings.seed, part.info.name))
        finite = kernels.combine(
            loaded.operands,
            part.count,
            (form.order[:kept], form.ends[:kept], form.weights.astype(dtype)),
            (kind, self._settings.rounding == "stochastic", key),
            np.int64(part.start),
            (every_of(part.info) if measured else 0, form.target, form.along.astype(dtype), totals),
            (half, wide),
        )
        if code == "BF16":
            return half[: part.count], totals, finite
        with np.errstate(over="ignore"):  # too large a value is noticed below
            stored = wide[: part.count].astype(NUMPY[code], copy=False)
        return stored, totals, finite and (dtype == stored.dtype or bool(np.isfinite(stored).all()))


@lru_cache(maxsize=4096)
def name_key(seed: int, name: str) -> int:
    """Return 64 bits (signed) that stand for (seed, tensor name) in stochastic rounding.

    Output head and embedding share theirs: a tied pair rounds alike even where no config says it is one.
    """
    name = "embedding" if is_head(name) or is_embedding(name) else name
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
