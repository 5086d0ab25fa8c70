"""Stored vectors, and the pure rules that make a direction better before it is stored or applied.

A stored vector is a folder of two files. `vector.safetensors` holds each tensor by its name, or, where it
is stored as the product of two thin matrices, `NAME.left` (n x r) and `NAME.right` (r x m). `vector.json`
says what it is:

    format, version    "palinode-vector", 1
    kind               "dense" or "low_rank"; with the `rank` or the `energy` that was asked for
    dtype              of the stored numbers: "float32" or "bfloat16"
    norm               |τ|, of the direction before it was stored
    relative_error     |τ − stored| / |τ|
    terms              what τ is a sum of: folder, fingerprint and coefficient of each
    tensors            by name: shape, rank (null where it is stored whole), norm, relative_error, and
                       `scale`, by which the stored numbers are multiplied, where it is not 1

Tensors in which the direction is zero are left out. A tied tensor is there once, under the embedding's name.

A transform takes τ, one tensor at a time, and returns another of its shape: s(name) · τ here, filters by what
layers read in `training/moments.py`. Low-rank truncation is `save_vector(…, rank=…)`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, Self

import numpy as np
from pydantic import BaseModel, Field

from palinode.errors import AlgebraError, CheckpointError, InputError, told_as, writing
from palinode.records import private
from palinode.weights.adapters import CONFIG, LoraAdapter
from palinode.weights.arithmetic import NAMES, SLICE, Slice, cut, direction_values, layout_of, map_slices
from palinode.weights.atomic import check_output, claimed, publish
from palinode.weights.checkpoint import Checkpoint, Direction, StoredDirection
from palinode.weights.displacement import (
    ArrayCache,
    Change,
    Factor,
    Term,
    decode,
    dense_change,
    encode,
    low_rank_change,
)
from palinode.weights.fingerprints import check_stamps, take_stamps
from palinode.weights.folders import INDEX, SINGLE
from palinode.weights.kernels import multiply, nearest_factors, squares
from palinode.weights.tensors import FLOAT_BYTES, Files, TensorInfo, header_of, read_header, read_object

FACTS = "vector.json"
WEIGHTS = "vector.safetensors"
FORMAT, VERSION = "palinode-vector", 1
CODES = {"float32": "F32", "bfloat16": "BF16"}

Kind = Literal["dense", "low_rank"]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Source:
    """One term of the sum that a stored vector was made from."""

    folder: str
    """Name of the folder, without the way to it."""
    fingerprint: str
    coefficient: Number


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What is known of one tensor of a stored vector."""

    shape: tuple[int, ...]
    rank: int | None
    """Of the factors; None where it is stored whole."""
    norm: Number
    relative_error: Number
    scale: Number = 1.0
    """What the stored numbers are multiplied by."""


class _Facts(BaseModel):
    """What vector.json says of a vector, as far as it is needed."""

    kind: Kind
    dtype: Literal["float32", "bfloat16"]
    norm: Number
    relative_error: Number
    terms: tuple[Source, ...]
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class StoredVector(StoredDirection):
    """A direction that was written by `save_vector`."""

    kind: Kind = field(compare=False)
    dtype: str = field(compare=False)
    """Of the stored numbers: "float32" or "bfloat16"."""
    norm: float = field(compare=False)
    """Euclidean norm of the direction before it was stored."""
    relative_error: float = field(compare=False)
    """|direction − stored| / |direction|."""
    sources: tuple[Source, ...] = field(compare=False, repr=False)
    tensors: Mapping[str, StoredTensor] = field(compare=False, repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open a stored vector; reads headers only. Raises CheckpointError when it is missing or broken."""
        place = Path(folder).expanduser().resolve()
        if not place.is_dir():
            raise CheckpointError(f"there is no vector folder {folder}")
        content = read_object(place / FACTS)
        if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise CheckpointError(
                f"{place / FACTS} is no {FORMAT} of version {VERSION}; a newer Palinode may have written it"
            )
        with told_as(CheckpointError, f"{place / FACTS} is malformed", "store the vector again"):
            facts = _Facts.model_validate(content)
        changes = _changes(place, facts.dtype, facts.tensors, read_header(place / WEIGHTS))
        told = (facts.kind, facts.dtype, facts.norm, facts.relative_error, facts.terms, facts.tensors)
        return cls(place, changes, *told)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers on disk."""
        return sum(info.nbytes for change in self.changes.values() for info in change.infos)

    @property
    def weights(self) -> int:
        """Number of weights that it moves."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def is_direction(folder: Path | str) -> bool:
    """Tell whether a folder holds a stored vector or a LoRA adapter."""
    place = Path(folder).expanduser()
    return (place / FACTS).exists() or (place / CONFIG).exists()


def open_direction(
    folder: Path | str, *, base: Checkpoint | None = None, allow_pickle: bool = False
) -> StoredDirection:
    """Open a stored vector or a LoRA adapter, whichever a folder holds.

    `base` and `allow_pickle` are for adapters; see `LoraAdapter.open`. Raises CheckpointError when the folder
    holds neither, or is broken.
    """
    place = Path(folder).expanduser()
    if (place / FACTS).exists():
        return StoredVector.open(place)
    if (place / CONFIG).exists():
        if any((place / name).exists() for name in (SINGLE, INDEX)):
            raise CheckpointError(f"{folder} holds a whole model and an adapter; move one of them out of it")
        return LoraAdapter.open(place, base=base, allow_pickle=allow_pickle)
    if not place.is_dir():
        raise CheckpointError(f"there is no folder {folder} of a stored vector or adapter")
    raise CheckpointError(f"{folder} holds neither a stored vector ({FACTS}) nor a LoRA adapter ({CONFIG})")


def save_vector(
    direction: Direction,
    output: Path | str,
    *,
    dtype: str = "float32",
    rank: int | None = None,
    energy: float | None = None,
    made_from: Iterable[Term] = (),
    scale_of: Callable[[str], float] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> StoredVector:
    """Write a direction as a folder of its own, which only its owner can read, and open it.

    With `rank`, matrices of more than that rank are stored as their best approximation of that rank; with
    `energy` (0 to 1), of the smallest rank that keeps this share of the sum of their squared singular values.
    What would take as much room as factors is stored whole, and so are vectors (norms, biases). Memory stays
    at a few slices; at low rank a whole matrix is held, several times over. `made_from` are models and
    directions that are read besides its own terms. `scale_of` is asked for a tensor's scale by its name once
    all are stored, so that it may hang on all of them. `on_progress` hears the number of weights done.

    Raises InputError for settings that cannot be, AlgebraError when there is no direction, MismatchError when
    its terms do not fit together, OutputError when the output place cannot be used.
    """
    settings = _storing(dtype, rank, energy)
    terms = (*direction.terms, *made_from)
    stamps = take_stamps(terms)
    if not direction.terms:
        raise AlgebraError(
            "the direction is zero (a checkpoint minus itself); name two different checkpoints"
        )
    layout = layout_of(direction.terms)
    output = Path(output).expanduser().resolve()
    room = sum(info.size for info in layout) * FLOAT_BYTES[settings.code] if settings.kind == "dense" else 0
    check_output(output, [term.folder for term in direction.terms], needs=room)
    sources = [
        Source(term.folder.name, term.fingerprint(), coefficient)
        for term, coefficient in sorted(direction.terms.items(), key=lambda item: str(item[0].folder))
    ]
    tensors: dict[str, StoredTensor] = {}
    with private(), claimed(output) as partial:
        file = partial / WEIGHTS
        with writing(file), file.open("xb") as stream, Files() as files:
            writer = _Writer(stream, layout)
            for info in layout:
                if tensor := _store(direction, info, files, writer, settings):
                    tensors[info.name] = tensor
                if on_progress:
                    on_progress(info.size)
            writer.finish()
        if scale_of:
            scales = {name: scale_of(name) for name in tensors}
            tensors = {
                name: replace(one, norm=abs(scales[name]) * one.norm, scale=scales[name])
                for name, one in tensors.items()
            }
        _write_facts(partial / FACTS, settings, dtype, sources, tensors)
        check_stamps(stamps, terms)
        publish(partial, output)
    return StoredVector.open(output)


# What is asked for


@dataclass(frozen=True, slots=True)
class _Storing:
    code: str
    rank: int | None
    energy: float | None

    @property
    def kind(self) -> Kind:
        return "dense" if self.rank is None and self.energy is None else "low_rank"


def _storing(dtype: str, rank: int | None, energy: float | None) -> _Storing:
    """Return how a vector is stored; raises InputError for what cannot be."""
    if dtype not in CODES:
        raise InputError(f"a vector cannot be stored in {dtype!r}; choose one of {', '.join(CODES)}")
    if rank is not None and rank < 1:
        raise InputError(f"a rank of {rank} leaves nothing; name a rank of 1 or more")
    if energy is not None and rank is not None:
        raise InputError("a rank and an energy were given; either of them decides, so name one")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"an energy of {energy} is no share; name one above 0 and up to 1, as in 0.99")
    return _Storing(CODES[dtype], rank, energy)


# Writing


class _Writer:
    """A safetensors file that is filled tensor by tensor; its header comes last, in the room kept for it."""

    def __init__(self, stream: BinaryIO, layout: Sequence[TensorInfo]) -> None:
        self.names = {info.name for info in layout}
        self._stream = stream
        self._infos: list[TensorInfo] = []
        self._room = 72 + sum(2 * (len(json.dumps([info.name, info.shape])) + 160) for info in layout)
        self._room += -self._room % 8
        self._end = self._closed = self._room
        stream.seek(self._end)

    def write(self, values: np.ndarray) -> None:
        """Append a part of the tensor that is under way."""
        self._stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._end += values.nbytes

    def close(self, name: str, code: str, shape: tuple[int, ...]) -> None:
        """Make a tensor of what was written since the last one."""
        start, nbytes = self._closed - self._room, self._end - self._closed
        self._infos.append(TensorInfo(name, code, shape, Path(WEIGHTS), start, nbytes))
        self._closed = self._end

    def forget(self) -> None:
        """Take back what was written since the last tensor."""
        self._end = self._closed
        self._stream.seek(self._end)

    def finish(self) -> None:
        """Write the header, and fill the gap behind it with spaces."""
        self._stream.truncate(self._closed)
        self._stream.seek(0)
        self._stream.write(header_of(self._infos, self._room))


def _store(
    direction: Direction, info: TensorInfo, files: Files, writer: _Writer, settings: _Storing
) -> StoredTensor | None:
    """Append one tensor of a direction, and return what it cost; None where the direction is zero."""
    most = (info.size - 1) // max(1, sum(info.shape))  # the largest rank that saves room
    small = settings.rank is None or settings.rank <= most
    free = writer.names.isdisjoint({f"{info.name}.left", f"{info.name}.right"})
    if settings.kind == "low_rank" and len(info.shape) == 2 and small and free:
        stored = _store_factors(direction, info, files, writer, settings, most)
        if stored:
            return stored
    return _store_whole(direction, info, files, writer, settings.code)


def _store_whole(
    direction: Direction, info: TensorInfo, files: Files, writer: _Writer, code: str
) -> StoredTensor | None:
    """Append a tensor as it is, rounded, slice by slice."""
    sums: list[tuple[float, float]] = []

    def work(part: Slice) -> tuple[np.ndarray, float, float]:
        values = _finite(direction_values(direction, part, files), info)
        stored = encode(values, code)
        return stored, *squares(values, decode(stored, code))

    def collect(_part: Slice, found: tuple[np.ndarray, float, float]) -> None:
        writer.write(found[0])
        sums.append(found[1:])

    map_slices(cut(info), lambda: work, collect=collect)
    norm, error = (math.sqrt(math.fsum(column)) for column in zip(*sums, strict=True))
    if norm == 0:
        writer.forget()
        return None
    writer.close(info.name, code, info.shape)
    return _costing(info, None, norm, error, code)


def _store_factors(
    direction: Direction, info: TensorInfo, files: Files, writer: _Writer, settings: _Storing, most: int
) -> StoredTensor | None:
    """Append a matrix as two factors, rounded; None where it is zero, or factors would save no room."""
    values = _finite(direction_values(direction, Slice(info, 0, info.size), files), info).reshape(info.shape)
    energy = 1.0 if settings.energy is None else settings.energy
    factors = nearest_factors(values, rank=settings.rank, energy=energy, most=most) if values.any() else None
    if factors is None:
        return None
    code = settings.code
    left, right = (encode(factor, code) for factor in factors)
    for name, factor in (("left", left), ("right", right)):
        writer.write(factor)
        writer.close(f"{info.name}.{name}", code, factor.shape)
    wide, height = decode(right, code), max(1, SLICE // info.shape[1])
    sums = []
    for start in range(0, info.shape[0], height):
        product = multiply(decode(left[start : start + height], code), wide, 1.0)
        sums.append(squares(values[start : start + height].reshape(-1), product.reshape(-1)))
    norm, error = (math.sqrt(math.fsum(column)) for column in zip(*sums, strict=True))
    return _costing(info, left.shape[1], norm, error, code)


def _finite(values: np.ndarray, info: TensorInfo) -> np.ndarray:
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"the direction has values in {info.name} that are not finite (NaN or infinity)"
        )
    return values


def _costing(info: TensorInfo, rank: int | None, norm: float, error: float, code: str) -> StoredTensor:
    if not math.isfinite(error):
        raise InputError(f"{info.name} has values that {NAMES[code]} cannot hold; scale the direction down")
    return StoredTensor(info.shape, rank, norm, error / norm)


# What is known of it


def _write_facts(
    path: Path, settings: _Storing, dtype: str, sources: Sequence[Source], tensors: Mapping[str, StoredTensor]
) -> None:
    norm = math.hypot(*(tensor.norm for tensor in tensors.values()))
    error = math.hypot(*(tensor.norm * tensor.relative_error for tensor in tensors.values()))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "kind": settings.kind,
        "rank": settings.rank,
        "energy": settings.energy,
        "dtype": dtype,
        "norm": norm,
        "relative_error": error / norm if norm else 0.0,
        "terms": [asdict(source) for source in sources],
        "tensors": {
            name: {key: value for key, value in asdict(tensor).items() if (key, value) != ("scale", 1.0)}
            for name, tensor in tensors.items()
        },
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _changes(
    folder: Path, dtype: str, tensors: Mapping[str, StoredTensor], infos: Sequence[TensorInfo]
) -> dict[str, Change]:
    """Return the changes that vector.json promises, all of them present in the file as it says."""
    found = {info.name: info for info in infos}
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        if tensor.rank is None:
            expected[name] = tensor.shape
        else:
            expected[f"{name}.left"] = (*tensor.shape[:1], tensor.rank)
            expected[f"{name}.right"] = (tensor.rank, *tensor.shape[1:])
    if {info.name: (info.shape, info.dtype) for info in infos} != {
        name: (shape, CODES[dtype]) for name, shape in expected.items()
    }:
        raise CheckpointError(
            f"{FACTS} and {WEIGHTS} in {folder} do not belong together; store the vector again"
        )
    kept = ArrayCache()
    return {
        name: dense_change(found[name], tensor.scale)
        if tensor.rank is None
        else low_rank_change(
            Factor(found[f"{name}.left"]), Factor(found[f"{name}.right"]), tensor.scale, kept
        )
        for name, tensor in tensors.items()
    }


Rule = Callable[[str, Sequence[np.ndarray]], np.ndarray]
"""(name of a tensor, its values in each direction) → its values in the new one, of the same shape."""


def layer_scale(name: str, scales: Mapping[str, float]) -> float:
    """Return the scale of the first pattern that matches a tensor's whole name; 1 where none does.

    >>> layer_scale("model.layers.3.mlp.up_proj.weight", {r"model\\.layers\\.[0-3]\\..*": 0.5})
    0.5
    """
    return next((scale for pattern, scale in scales.items() if re.fullmatch(pattern, name)), 1.0)


def transform(
    directions: Sequence[Direction],
    rule: Rule,
    output: Path | str,
    *,
    label: str,
    dtype: str = "float32",
    scale_of: Callable[[str], float] | None = None,
) -> StoredVector:
    """Apply a rule to one or several directions tensor by tensor, and write the result as a stored vector.

    `label` says what the rule is, settings included: it goes into the fingerprint, so that one label must
    stand for one rule. A whole tensor of each direction is held at a time. Raises InputError when the rule
    changes a shape, MismatchError when the directions do not fit together. `scale_of`: see `save_vector`.
    """
    made = transformed(directions, rule, label=label)
    made_from = [term for part in directions for term in part.terms]
    return save_vector(made, output, dtype=dtype, made_from=made_from, scale_of=scale_of)


def transformed(directions: Sequence[Direction], rule: Rule, *, label: str) -> StoredDirection:
    """Return what a rule makes of directions, computed tensor by tensor as it is read; see `transform`."""
    if not directions:
        raise InputError("no direction was given; name one at least")
    terms = [one for part in directions for one in part.terms.items()]
    inputs = sorted((term.fingerprint(), coefficient) for term, coefficient in terms)
    kept = ArrayCache()
    changes = {
        info.name: _transformed(info, directions, rule, [label, *inputs], kept)
        for info in layout_of(term for term, _ in terms)
    }
    return StoredDirection(next(iter(directions[0].terms)).folder, changes)


def _transformed(
    info: TensorInfo, directions: Sequence[Direction], rule: Rule, origin: list[object], kept: ArrayCache
) -> Change:
    """Return what a rule makes of one tensor, computed when it is read, as a whole."""

    def compute(files: Files) -> np.ndarray:
        whole = Slice(info, 0, info.size)
        made = rule(
            info.name, [direction_values(part, whole, files).reshape(info.shape) for part in directions]
        )
        if made.shape != info.shape:
            raise InputError(
                f"the rule made {made.shape} of {info.name}, which is {info.shape}; a transform must keep "
                "the shape"
            )
        return made.reshape(-1)

    def read(files: Files, start: int, out: np.ndarray) -> None:
        out[:] = kept.get(info.name, lambda: compute(files))[start : start + len(out)]

    return Change(info.shape, (), lambda _digests: origin, read)  # nothing of its own is on disk
