"""The order of OLMo-core's fixed-length loader over token files (NumpyFSLDataset, NumpyFSLDataLoader).

Each token file is cut into instances of `sequence_length` tokens; what is left of a file is not used. An
epoch's global indices are the instances shuffled by numpy's PCG64 seeded seed + epoch (epochs count from
1); the loader keeps them in a file of bare uint32. A step takes the next global batch of them.
Documents end at the end token (before a BOS, if there is one) and are numbered over all files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from palinode.errors import DataError
from palinode.history.orders.order import check_positive, check_step
from palinode.history.segments import Ints
from palinode.records import ordinary

DTYPES = ("uint8", "uint16", "uint32", "uint64")
Tokens = npt.NDArray[np.unsignedinteger[Any]]

SCAN = 1 << 24
"""Tokens that are looked through for ends of documents at a time."""


@dataclass(frozen=True)
class OlmoCoreOrder:
    """Which documents each step of an OLMo-core training saw."""

    files: tuple[Path, ...]
    """Token files in the data set's order: bare arrays, whatever their suffix."""
    sequence_length: int
    global_batch_size: int
    """In tokens, as OLMo-core counts it."""
    eos_id: int
    epochs: int = 1
    seed: int | None = 0
    """The loader's seed; None where it does not shuffle."""
    indices: tuple[Path, ...] = ()
    """The loader's `global_indices_….npy`, one an epoch; without them they are made from the seed."""
    bos_id: int | None = None
    dtype: str = "uint16"
    chunk_size: int = 1
    """Instances that stay together: max_target_sequence_length / sequence_length, unless it was set."""
    max_target_sequence_length: int | None = None
    resumed_from: int = 0
    """The step after which this order holds."""
    first_batch: int = 0
    """Batches of this size taken by then; other than `resumed_from` when the size changed."""

    def __post_init__(self) -> None:
        check_positive(sequence_length=self.sequence_length, chunk_size=self.chunk_size, epochs=self.epochs)
        if self.dtype not in DTYPES:
            raise DataError(f"dtype is {self.dtype!r}; token files have one of {', '.join(DTYPES)}")
        if self.global_batch_size < 1 or self.global_batch_size % self.sequence_length:
            raise DataError(
                f"global_batch_size is {self.global_batch_size} tokens; it must be a multiple of the "
                f"sequence length, {self.sequence_length}"
            )
        if self.indices and len(self.indices) != self.epochs:
            raise DataError(
                f"there are {len(self.indices)} index files for {self.epochs} epochs; give one each"
            )
        if not self.epoch_steps:
            raise DataError(
                f"the token files hold {self.instance_count:,} instances, less than one batch of "
                f"{self.batch_rows:,}"
            )

    @property
    def batch_rows(self) -> int:
        """Instances of a batch."""
        return self.global_batch_size // self.sequence_length

    @property
    def instance_count(self) -> int:
        """Instances of all files."""
        return int(self._instance_ends[-1]) if self.files else 0

    @property
    def epoch_steps(self) -> int:
        """Batches of an epoch; instances that fill none are dropped."""
        kept = self.instance_count // self.chunk_size * self.chunk_size
        return kept // self.batch_rows

    @property
    def steps(self) -> int:
        """The last step."""
        return self.resumed_from + self.epochs * self.epoch_steps - self.first_batch

    def instances(self, step: int) -> list[int]:
        """Return the instances of a step's batch, numbered over all files."""
        check_step(step, self.resumed_from + 1, self.steps)
        epoch, number = divmod(self.first_batch + step - self.resumed_from - 1, self.epoch_steps)
        order = self._epoch_order(epoch + 1)
        found: list[int] = order[number * self.batch_rows : (number + 1) * self.batch_rows].tolist()
        return found

    def rows(self, step: int) -> list[int]:
        """Return the documents of which a step's batch holds a part, instance by instance."""
        return [document for instance in self.instances(step) for document in self.documents_in(instance)]

    def documents_in(self, instance: int) -> range:
        """Return the numbers of the documents that lie in an instance, in whole or in part."""
        file = int(np.searchsorted(self._instance_ends, instance, "right"))
        local = instance - (int(self._instance_ends[file - 1]) if file else 0)
        begin = local * self.sequence_length
        ends = self._document_ends[file]
        first, last = np.searchsorted(ends, [begin, begin + self.sequence_length - 1], "right")
        before = self._documents_before[file]
        return range(before + int(first), before + int(last) + 1)

    @cached_property
    def _instance_ends(self) -> Ints:
        longest = self.max_target_sequence_length or self.sequence_length
        if longest % self.sequence_length:
            raise DataError(
                f"max_target_sequence_length {longest} is no multiple of the sequence length "
                f"{self.sequence_length}"
            )
        counts = [
            len(self._tokens(file)) // longest * (longest // self.sequence_length) for file in self.files
        ]
        return np.cumsum(np.array(counts, np.int64))

    @cached_property
    def _document_ends(self) -> list[Ints]:
        return [document_ends(self._tokens(file), self.eos_id, self.bos_id) for file in self.files]

    @cached_property
    def _documents_before(self) -> list[int]:
        counts = [len(ends) for ends in self._document_ends]
        return [0, *np.cumsum(counts).tolist()]

    def _tokens(self, file: Path) -> Tokens:
        return read_array(file, self.dtype)

    def _epoch_order(self, epoch: int) -> Tokens:
        if self._last.get("epoch") != epoch:
            self._last.clear()
            self._last.update(epoch=epoch, order=self._read_or_make(epoch))
        order: Tokens = self._last["order"]
        return order

    def _read_or_make(self, epoch: int) -> Tokens:
        if not self.indices:
            return global_indices(
                self.instance_count, None if self.seed is None else self.seed + epoch, self.chunk_size
            )
        path = self.indices[epoch - 1]
        found = read_array(path, "uint32")
        expected = self.instance_count // self.chunk_size * self.chunk_size
        if len(found) != expected or (len(found) and int(found.max()) >= self.instance_count):
            raise DataError(
                f"{path} orders {len(found):,} instances where the token files hold {expected:,}; are they "
                "of the same data set, sequence length and chunk size?"
            )
        return found

    @cached_property
    def _last(self) -> dict[str, Any]:
        return {}


def global_indices(count: int, seed: int | None, chunk_size: int = 1) -> Tokens:
    """Return instances in the order of an epoch; `seed` is that of the loader plus the epoch, from 1."""
    chunks = np.arange(count // chunk_size, dtype=np.uint32)
    if seed is not None:
        np.random.Generator(np.random.PCG64(seed)).shuffle(chunks)
    within = np.arange(chunk_size, dtype=np.uint32)
    instances: Tokens = (chunks[:, None] * np.uint32(chunk_size) + within).reshape(-1)
    return instances


def document_ends(tokens: Tokens, eos_id: int, bos_id: int | None) -> Ints:
    """Return where each document ends (the place behind its end token); the last may lack an end token."""
    parts: list[Ints] = [np.empty(0, np.int64)]
    for begin in range(0, len(tokens), SCAN):
        found = np.flatnonzero(tokens[begin : begin + SCAN] == eos_id) + begin
        if bos_id is not None:
            follows = found + 1 < len(tokens)
            begins = np.ones(len(found), np.bool_)
            begins[follows] = tokens[found[follows] + 1] == bos_id
            found = found[begins]
        parts.append(found + 1)
    ends = np.concatenate(parts)
    if len(tokens) and (not len(ends) or ends[-1] != len(tokens)):
        ends = np.append(ends, len(tokens))
    return ends


def read_array(path: Path, dtype: str) -> Tokens:
    """Open a bare array of numbers; raise DataError when it is missing, cut off, or a real .npy file."""
    try:
        size = path.stat().st_size
        with ordinary(path).open("rb") as file:
            magic = file.read(6)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name OLMo-core's own file") from None
    if magic == b"\x93NUMPY":
        raise DataError(f"{path} is a file of numpy.save; OLMo-core's files are bare arrays without a header")
    if size % np.dtype(dtype).itemsize:
        raise DataError(f"{path} has {size:,} bytes, which are no whole number of {dtype}; is it cut off?")
    if not size:
        return np.empty(0, np.uint64)
    found: Tokens = np.memmap(path, dtype, "r")
    return found
