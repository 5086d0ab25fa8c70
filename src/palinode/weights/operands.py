"""What checkpoints and displacements hold on one slice, read into buffers that are used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from palinode.errors import MismatchError
from palinode.weights import kernels
from palinode.weights.checkpoint import Checkpoint, TensorInfo
from palinode.weights.direction import Direction
from palinode.weights.displacement import Displacement
from palinode.weights.files import Files
from palinode.weights.formulas import in_order
from palinode.weights.preflight import complain_of_twins
from palinode.weights.slices import SLICE, Slice

STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""How values of each dtype lie in numpy."""

NO_HALVES = np.empty((0, 0), np.uint16)


@dataclass(frozen=True, slots=True)
class Loaded:
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

    def finite(self, count: int) -> bool:
        """Tell whether the first `count` values of every operand are finite."""
        if self.packed:
            return not bool(((self.halves[:, :count] & 0x7F80) == 0x7F80).any())
        return bool(np.isfinite(self.wides[:, :count]).all())


class Operands:
    """Buffers of one thread for the values of checkpoints and displacements on one slice."""

    def __init__(
        self, checkpoints: Sequence[Checkpoint], displacements: Sequence[Displacement], files: Files
    ) -> None:
        self.checkpoints = tuple(checkpoints)
        self._displacements = tuple(displacements)
        self._files = files
        self._raw = np.empty(0, np.uint8)
        self._buffers: dict[str, np.ndarray] = {}
        self._found: dict[tuple[Checkpoint, str], TensorInfo] = {}

    def load(self, part: Slice, dtype: np.dtype) -> Loaded:
        """Read a slice of every operand in the working dtype, or as bfloat16 where all of them are that.

        A float64 operand makes float64 of it. Raises MismatchError for a tensor that is missing or tied
        to another one, CheckpointError when a file cannot be read.
        """
        infos = [self._find(checkpoint, part) for checkpoint in self.checkpoints]
        dtype = np.dtype(np.float64) if any(info.dtype == "F64" for info in infos) else dtype
        packed = bool(infos) and dtype == np.float32 and all(info.dtype == "BF16" for info in infos)
        halves = self._buffer("halves", len(infos), part.count, np.dtype(np.uint16)) if packed else NO_HALVES
        wides = self._buffer("wides", 0 if packed else len(infos), part.count, dtype)
        if packed:
            self._read_packed(infos, part, halves)
        for place, info in enumerate(infos):
            if not packed:
                self._read(info, part, wides[place, : part.count])
            twin = self.checkpoints[place].twin(info.name)
            if twin and not self._same(info, twin, part):
                complain_of_twins(self.checkpoints[place])
        extras = self._buffer("extras", len(self._displacements), part.count, dtype)
        for place, displacement in enumerate(self._displacements):
            layout = next(iter(self.checkpoints), None)
            name = part.info.name
            change = displacement.change_of(name, layout) if layout else displacement.named(name)
            if change is None:
                extras[place, : part.count] = 0
            else:
                change.read(self._files, part.start, extras[place, : part.count])
        return Loaded(packed, halves, wides, extras)

    def _find(self, checkpoint: Checkpoint, part: Slice) -> TensorInfo:
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
        raw = self._bytes(info, part)
        if info.dtype == "BF16":
            out[:] = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            out[:] = raw.view(STORED[info.dtype])

    def _bytes(self, info: TensorInfo, part: Slice) -> np.ndarray:
        size = part.count * info.itemsize
        if len(self._raw) < size:
            self._raw = np.empty(max(SLICE * info.itemsize, size), np.uint8)
        info.read(self._files, part.start * info.itemsize, self._raw[:size].data)
        return self._raw[:size]

    def _same(self, info: TensorInfo, twin: TensorInfo, part: Slice) -> bool:
        if (twin.shape, twin.dtype) != (info.shape, info.dtype):
            return False
        first = self._bytes(info, part).copy()
        return np.array_equal(first, self._bytes(twin, part))

    def _buffer(self, name: str, rows: int, count: int, dtype: np.dtype) -> np.ndarray:
        found = self._buffers.get(name)
        if found is None or found.dtype != dtype or found.shape[0] != rows or found.shape[1] < count:
            found = self._buffers[name] = np.empty((rows, max(SLICE if rows else 0, count)), dtype)
        return found


# Directions


def direction_values(direction: Direction, part: Slice, files: Files) -> np.ndarray:
    """Return a direction on one slice in float32, or float64 where a checkpoint is; not rounded further."""
    terms = in_order(direction.terms)
    checkpoints = [term for term, _ in terms if isinstance(term, Checkpoint)]
    displacements = [term for term, _ in terms if isinstance(term, Displacement)]
    loaded = Operands(checkpoints, displacements, files).load(part, np.dtype(np.float32))
    wide = loaded.wides[:, : part.count]
    if loaded.packed:
        wide = (loaded.halves[:, : part.count].astype(np.uint32) << 16).view(np.float32)
    total = np.zeros(part.count, loaded.dtype)
    weights = direction.terms
    for place, checkpoint in enumerate(checkpoints[1:], start=1):
        total += loaded.dtype.type(weights[checkpoint]) * (wide[place] - wide[0])
    for place, displacement in enumerate(displacements):
        total += loaded.dtype.type(weights[displacement]) * loaded.extras[place, : part.count]
    return total


def direction_tensor(direction: Direction, info: TensorInfo, files: Files) -> np.ndarray:
    """Return a direction's values on a whole tensor in one dimension; dtype as in `direction_values`."""
    return direction_values(direction, Slice(info, 0, info.size), files)
