"""The order of GPT-NeoX (and so Pythia): the index files that it keeps beside a packed data set.

    …_doc_idx.npy       int32 [documents · epochs]   documents in the order in which they are strung together
    …_sample_idx.npy    int32/64 [samples + 1, 2]    where each sample begins: place in doc_idx, token in it
    …_shuffle_idx.npy   uint32/int64 [samples]       in which order the samples are taken

Sample i of the training is number shuffle_idx[i]; it runs to the first token of the next one, that token
included, which it is only asked to predict. Step k takes the samples (k − 1)·B to k·B − 1. Blends of several
weighted data sets are not rebuilt.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from palinode.errors import DataError
from palinode.history.orders.order import check_positive, check_step
from palinode.history.segments import Ints
from palinode.records import ordinary, read_bytes

INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEAD = struct.Struct("<9sQBQQ")

Indices = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class NeoxOrder:
    """Which documents each step of a GPT-NeoX training saw."""

    doc_idx: Indices
    sample_idx: Indices
    shuffle_idx: Indices
    batch_size: int
    """`train_batch_size`: samples of a step over all processes."""
    resumed_from: int = 0
    """The step after which this order holds."""
    first_sample: int = 0
    """Samples taken by then; other than resumed_from · batch_size when the batch size changed."""

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size)
        if self.doc_idx.ndim != 1 or self.sample_idx.shape[1:] != (2,) or self.shuffle_idx.ndim != 1:
            shapes = [self.doc_idx.shape, self.sample_idx.shape, self.shuffle_idx.shape]
            raise DataError(
                f"document, sample and shuffle index have the shapes {', '.join(map(str, shapes))} where "
                "[n], [n, 2] and [n] are needed; are they given in this order?"
            )
        if len(self.shuffle_idx) != len(self.sample_idx) - 1:
            raise DataError(
                f"the shuffle index orders {len(self.shuffle_idx):,} samples and the sample index has "
                f"{len(self.sample_idx) - 1:,}; are they of the same data set and settings?"
            )
        if len(self.sample_idx) and int(self.sample_idx[-1, 0]) >= len(self.doc_idx):
            raise DataError(
                f"the sample index points to place {int(self.sample_idx[-1, 0]):,} of a document index of "
                f"{len(self.doc_idx):,}; are they of the same data set and settings?"
            )

    @classmethod
    def open(
        cls, prefix: str | Path, *, batch_size: int, resumed_from: int = 0, first_sample: int = 0
    ) -> NeoxOrder:
        """Open PREFIX_doc_idx.npy, PREFIX_sample_idx.npy and PREFIX_shuffle_idx.npy, without reading them."""
        parts = [_open(Path(f"{prefix}_{name}_idx.npy")) for name in ("doc", "sample", "shuffle")]
        doc_idx, sample_idx, shuffle_idx = parts
        return cls(doc_idx, sample_idx, shuffle_idx, batch_size, resumed_from, first_sample)

    @property
    def sample_count(self) -> int:
        """Samples that the data set hands out: NeoX leaves out the last one."""
        return max(0, len(self.shuffle_idx) - 1)

    @property
    def steps(self) -> int:
        """The last step."""
        return self.resumed_from + (self.sample_count - self.first_sample) // self.batch_size

    def samples(self, step: int) -> list[int]:
        """Return the samples of a step's batch, by their number in the sample index."""
        check_step(step, self.resumed_from + 1, self.steps)
        begin = self.first_sample + (step - self.resumed_from - 1) * self.batch_size
        found: list[int] = self.shuffle_idx[begin : begin + self.batch_size].tolist()
        return found

    def rows(self, step: int) -> list[int]:
        """Return the documents of which a step's batch holds at least a token, sample by sample."""
        return [document for sample in self.samples(step) for document in self.documents_in(sample)]

    def documents_in(self, sample: int) -> list[int]:
        """Return the documents that lie in a sample, in whole or in part."""
        bounds = [int(place) for place in self.sample_idx[sample : sample + 2, 0]] if sample >= 0 else []
        if len(bounds) < 2 or not 0 <= bounds[0] <= bounds[1] < len(self.doc_idx):
            raise DataError(
                f"sample {sample:,} of the shuffle index is not in the sample index, or its documents are "
                "not in the document index; are the three files whole and of one data set?"
            )
        found: list[int] = self.doc_idx[bounds[0] : bounds[1] + 1].tolist()
        return found


def build_indices(
    sizes: Indices, *, sequence_length: int, samples: int, seed: int
) -> tuple[Indices, Indices, Indices]:
    """Return document, sample and shuffle index as NeoX makes them for packed data of documents of `sizes`.

    `samples` is train_iters · train_batch_size; it decides how many epochs are strung together. Raises
    DataError when there are no tokens.
    """
    tokens = int(sizes.sum())
    if tokens < 1:
        raise DataError("the documents hold no tokens; give the data set that was trained on")
    epochs = max(
        1, -(-(samples * sequence_length + 1) // tokens)
    )  # (epochs · tokens − 1) // length ≥ samples
    random = np.random.RandomState(seed)
    doc_idx = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    random.shuffle(doc_idx)
    count = (epochs * tokens - 1) // sequence_length
    ends = np.cumsum(sizes[doc_idx], dtype=np.int64)
    begins = np.arange(count + 1, dtype=np.int64) * sequence_length
    places = np.searchsorted(ends, begins, "right")
    sample_idx: Indices = np.stack([places, begins - (ends[places] - sizes[doc_idx[places]])], axis=1)
    wide = count >= np.iinfo(np.uint32).max - 1
    shuffle_idx: Indices = np.arange(count).astype(np.int64 if wide else np.uint32)
    random.shuffle(shuffle_idx)
    return doc_idx, sample_idx, shuffle_idx


def read_sizes(path: str | Path) -> Ints:
    """Return the tokens of each document from a Megatron index file (`….idx`)."""
    place = Path(path)
    try:
        content = read_bytes(place)
        magic, version, _, count, _ = _INDEX_HEAD.unpack_from(content)
    except (OSError, struct.error) as error:
        raise DataError(f"{place} cannot be read ({error}); name the data set's .idx file") from None
    if magic != INDEX_MAGIC or version != 1:
        raise DataError(f"{place} is no index of a memory-mapped Megatron data set (MMIDIDX, version 1)")
    if len(content) < _INDEX_HEAD.size + 4 * count:
        raise DataError(f"{place} is cut off: it has no room for the sizes of its {count:,} documents")
    return np.frombuffer(content, "<i4", count, _INDEX_HEAD.size).astype(np.int64)


def _open(path: Path) -> Indices:
    """Open an .npy file of whole numbers; pickled ones are refused."""
    try:
        found = np.load(ordinary(path), mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy reads the header as Python, and fails in as many ways
        raise DataError(f"{path} cannot be read ({error}); name the files that GPT-NeoX wrote") from None
    if not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"{path} holds {found.dtype}, not whole numbers")
    indices: Indices = found
    return indices
