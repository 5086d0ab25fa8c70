"""Displacements: directions that lie on disk by themselves, such as a LoRA adapter or a stored vector.

A displacement names the tensors that it changes, and gives the values of each from any element on:
as they lie on disk, or as the product of two thin matrices,

    change[i, j] = scale · Σ_k left[i, k] · right[k, j]

of which only the rows asked for are ever computed. Tensors without a change are zero in that direction.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import ClassVar, Protocol, TypeAlias

import blake3
import numpy as np

from palinode.errors import CheckpointError, MismatchError
from palinode.weights.fingerprints import tensor_digests
from palinode.weights.folders import ModelFolder
from palinode.weights.kernels import multiply
from palinode.weights.tensors import Files, TensorInfo, by_plain, plain

PIECE = 1 << 18
"""Elements handled at a time."""

KEPT = 1 << 25
"""Bytes of right-hand matrices, or whole tensors, that are kept between reads: 32 MB, or the last one."""

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""How numpy holds a stored dtype; bfloat16 is the upper half of a float32."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a displacement does to one tensor."""

    shape: tuple[int, ...]
    """Of the tensor."""
    infos: tuple[TensorInfo, ...]
    """The stored tensors that it is made of."""
    facts: Callable[[Mapping[str, str]], list[object]]
    """Returns what decides its values, as plain values, given the digests of stored tensors by name."""
    read: Callable[[Files, int, np.ndarray], None]
    """Fills an array (one dimension, float32 or float64) with the row-major values from an element on.

    They are rounded once, to the dtype of the array, and do not depend on how they are sliced. Raises
    CheckpointError when a file cannot be read.
    """
    rank: int | None = None
    """Of the product that it is; None where it is none."""


@dataclass(frozen=True, slots=True)
class Displacement:
    """A direction on disk, as it is read. Two openings of one folder are equal."""

    folder: Path
    changes: Mapping[str, Change] = field(compare=False, repr=False)
    """What is changed, by the names that tensors have in the model."""
    stands_for_both: ClassVar[bool] = True
    """Whether a change of the embedding is meant for a head that is tied to it as well."""
    names: Mapping[str, str] = field(init=False, compare=False, repr=False)
    """These names by their plain ones; see `names`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", by_plain(self.changes))

    def fingerprint(self) -> str:
        """Return a content hash (BLAKE3, 32 hex digits) of all changes; the folder's name has no part in it.

        Raises CheckpointError when a file cannot be read, or has changed since it was opened.
        """
        infos = {info.name: info for change in self.changes.values() for info in change.infos}
        digests = tensor_digests(ModelFolder(self.folder, infos, {}))
        facts = [[name, change.facts(digests)] for name, change in sorted(self.changes.items())]
        return str(blake3.blake3(json.dumps(facts).encode()).hexdigest()[:32])

    def files(self) -> Iterator[Path]:
        """Yield all files that it is read from."""
        for change in self.changes.values():
            for info in change.infos:
                yield from info.files

    def change_of(self, name: str, layout: ModelFolder) -> Change | None:
        """Return what happens to a tensor of a model, under any spelling; to a tied pair the same."""
        if layout.tied and layout.spelled(name) in layout.tied:
            head, embedding = layout.tied
            return self.named(embedding) or self.named(head)
        return self.named(name)

    def named(self, name: str) -> Change | None:
        """Return the change of a tensor, under whatever spelling it is held."""
        return self.changes.get(name) or self.changes.get(self.names.get(plain(name), ""))

    def one_name(self, name: str) -> str:
        """Return the name under which a change meets those of others: its plain one, if it is alone in it."""
        return plain(name) if self.names.get(plain(name)) == name else name

    def check_fits(self, layout: ModelFolder) -> None:
        """Raise MismatchError unless every change has a floating-point tensor of its shape in a model.

        A tied head must change as its embedding does, and with an adapter its embedding as it does.
        """
        for name, change in self.changes.items():
            info = layout.find(name)
            if info is None or not info.is_float:
                raise MismatchError(
                    f"{self.folder} changes {name}, and {layout.folder} has no such weights; "
                    "were both made from one model?"
                )
            if info.shape != change.shape:
                raise MismatchError(
                    f"{self.folder} changes {name} as {_shape(change.shape)}, and in {layout.folder} it is "
                    f"{_shape(info.shape)}; were both made from one model?"
                )
            if not (layout.tied and info.name in layout.tied) and self.named(info.name) is not change:
                raise MismatchError(
                    f"{self.folder} changes {name}, and {layout.folder} keeps it as {info.name}, put "
                    "together otherwise; make the vector from models that are saved alike"
                )
        if layout.tied:
            self._check_tied(layout, *layout.tied)

    def _check_tied(self, layout: ModelFolder, head: str, embedding: str) -> None:
        both = [self.named(name) for name in (head, embedding)]
        if both[0] is None and (both[1] is None or self.stands_for_both):
            return
        if both[0] is None or both[1] is None or not same_values(both[0], both[1]):
            raise MismatchError(
                f"{self.folder} changes {head} otherwise than {embedding}, and {layout.folder} ties the two, "
                "so that no sum can have that effect; train the adapter on neither, or on both as one "
                "(ensure_weight_tying in peft), or untie the model"
            )


Term: TypeAlias = ModelFolder | Displacement
"""What a sum is made of: a point or a direction that lies on disk."""


class HasTerms(Protocol):
    """A point or direction, as far as its terms go."""

    @property
    def terms(self) -> Mapping[Term, float]:
        """Coefficient of each term."""
        ...


def check_displacements(layout: ModelFolder, displacements: Iterable[Displacement]) -> None:
    """Raise MismatchError unless every displacement fits the model; see `Displacement.check_fits`."""
    for displacement in displacements:
        displacement.check_fits(layout)


def same_values(first: Change, second: Change) -> bool:
    """Tell whether two changes are the same, value by value in float32."""
    if first.shape != second.shape:
        return False
    size = math.prod(first.shape)
    with Files() as files:
        for start in range(0, size, PIECE):
            a, b = np.empty((2, min(PIECE, size - start)), np.float32)
            first.read(files, start, a)
            second.read(files, start, b)
            if not np.array_equal(a, b):
                return False
    return True


# Changes as they lie on disk


def dense_change(info: TensorInfo, scale: float = 1.0) -> Change:
    """Return a change that is stored in full, times a scale; in float32 unless it is stored in float64."""

    def read(files: Files, start: int, out: np.ndarray) -> None:
        for place in range(0, len(out), PIECE):
            piece = out[place : place + PIECE]
            found = _finite(read_values(info, files, start + place, len(piece)), info)
            with np.errstate(over="ignore"):  # too large for float32 is infinite, and seen by who asked
                piece[:] = found if scale == 1.0 else found * found.dtype.type(scale)

    def facts(digests: Mapping[str, str]) -> list[object]:
        return [digests[info.name], *([] if scale == 1.0 else [scale])]

    return Change(info.shape, (info,), facts, read)


def read_values(info: TensorInfo, files: Files, start: int, count: int) -> np.ndarray:
    """Return `count` elements of a tensor from `start` on; float64 where stored so, else float32."""
    raw = np.empty(count, NUMPY[info.dtype])
    info.read(files, start * info.itemsize, raw.view(np.uint8).data)
    return decode(raw, info.dtype)


def decode(raw: np.ndarray, code: str) -> np.ndarray:
    """Return stored values as float64 where they are stored so, else as float32, which holds them exactly."""
    if code == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float64 if code == "F64" else np.float32)


def encode(values: np.ndarray, code: str) -> np.ndarray:
    """Return values as they are stored, rounded to the nearest; what a dtype cannot hold becomes infinite."""
    with np.errstate(over="ignore"):
        if code != "BF16":
            return values.astype(NUMPY[code])
        bits = values.astype(np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> 16) & 1)  # ties go to the even neighbour
    return ((bits + half) >> 16).astype("<u2")


# Products of thin matrices


@dataclass(frozen=True, slots=True)
class Factor:
    """One matrix of a product, of which any rows can be read."""

    info: TensorInfo
    transposed: bool = False
    """Whether the stored tensor is its transpose."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.info.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def rows(self, files: Files, start: int, stop: int) -> np.ndarray:
        """Return the rows [start, stop) as a matrix, float64 where it is stored so, else float32.

        Raises CheckpointError where they hold NaN or infinity.
        """
        height, width = self.shape
        if not self.transposed:
            found = read_values(self.info, files, start * width, (stop - start) * width)
            return _finite(found, self.info).reshape(stop - start, width)
        if stop - start == height:
            found = read_values(self.info, files, 0, self.info.size).reshape(width, height)
        else:
            spans = [k * height + start for k in range(width)]
            found = np.array([read_values(self.info, files, span, stop - start) for span in spans])
        return _finite(found, self.info).T


class ArrayCache:
    """The arrays made last, at most `KEPT` bytes of them or one; safe to use from several threads."""

    def __init__(self) -> None:
        self._found: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[ArrayCache], tuple[()]]:
        return ArrayCache, ()  # another process has its own

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the array of that key; one thread makes it where it is not there."""
        with self._lock:
            if key not in self._found:
                self._found[key] = make()
                while len(self._found) > 1 and sum(held.nbytes for held in self._found.values()) > KEPT:
                    self._found.popitem(last=False)
            self._found.move_to_end(key)
            return self._found[key]


def low_rank_change(left: Factor, right: Factor, scale: float, kept: ArrayCache) -> Change:
    """Return a change that is stored as scale · left · right, and computed where it is asked for.

    Products are added up in float64 in the order of k, so slices, threads and machines cannot change them.
    """
    rank, width = right.shape

    def read(files: Files, start: int, out: np.ndarray) -> None:
        if not len(out):
            return
        stop = start + len(out)
        whole = kept.get(right, lambda: np.ascontiguousarray(right.rows(files, 0, rank)))
        height, last_row = max(1, PIECE // width), -(-stop // width)
        for first in range(start // width, last_row, height):
            last = min(first + height, last_row)
            begin, end, row = max(start, first * width), min(stop, last * width), first * width
            product = multiply(left.rows(files, first, last), whole, scale).reshape(-1)
            with np.errstate(over="ignore"):  # too large for float32 is infinite, and seen by who asked
                out[begin - start : end - start] = product[begin - row : end - row]

    def facts(digests: Mapping[str, str]) -> list[object]:
        factors = ([digests[factor.info.name], factor.transposed] for factor in (left, right))
        return [scale, *factors]

    return Change((left.shape[0], width), (left.info, right.info), facts, read, rank)


def _finite(values: np.ndarray, info: TensorInfo) -> np.ndarray:
    if not np.isfinite(values).all():
        raise CheckpointError(f"{info.file}: {info.name} holds values that are not finite (NaN or infinity)")
    return values


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
