"""The order of the data rebuilt: which rows a step's batch held, for trainings that kept no log.

Each class says whose sampler it follows; docs/exposure-log.md says what it cannot rebuild. Steps are counted
from 1, as in the exposure log: a checkpoint of step c has seen the rows of the steps 1 to c. Rows are numbers
into the data: of the data set for the Trainer, of documents for OLMo-core and GPT-NeoX.

A TOML file can describe an order: its `kind` and the fields of its class, files from its own folder on, or
several `[[part]]` tables of these for a training that went on with other settings. A JSON file describes that
of Palinode's own loop.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from palinode.data.batches import epoch_batches
from palinode.data.examples import Example, read_examples
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.errors import DataError, RecipeError, told_as
from palinode.history.exposures import Ints
from palinode.records import ordinary, read_json, write_json
from palinode.settings import TrainingSettings, read_settings

if TYPE_CHECKING:
    from transformers import TrainingArguments

Indices = npt.NDArray[np.integer[Any]]
Tokens = npt.NDArray[np.unsignedinteger[Any]]

DTYPES = ("uint8", "uint16", "uint32", "uint64")
SCAN = 1 << 24
"""Tokens that are looked through for ends of documents at a time."""


class Order(Protocol):
    """Which rows the batch of each optimiser step held."""

    @property
    def steps(self) -> int:
        """The last step; the first is 1, or the one after `resumed_from` where it has that."""

    def rows(self, step: int) -> list[int]:
        """Return the rows of a step's batch over all processes; one that was there twice is twice."""


def first_step(order: Order) -> int:
    """Return the first step that an order holds for: that of a resumed run begins later."""
    return int(getattr(order, "resumed_from", 0)) + 1


def _check_step(order: Order, step: int) -> None:
    """Raise DataError for a step that the order does not have."""
    first = first_step(order)
    if not first <= step <= order.steps:
        raise DataError(
            f"there is no step {step:,} in this order; it has the steps {first:,} to {order.steps:,}"
        )


def _check_positive(order: Order, *names: str) -> None:
    """Raise DataError for a setting that must be at least 1 and is not."""
    for name in names:
        if getattr(order, name) < 1:
            raise DataError(f"{name} is {getattr(order, name)}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class JoinedOrder:
    """Several orders one after the other: a training that went on with other settings, or another sampler."""

    parts: tuple[tuple[int, Order], ...]
    """(step after which the order holds, order), the first from step 0; all count the training's steps."""

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.parts]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise DataError(f"the parts of an order begin after the steps {starts}; begin with 0, and grow")

    @property
    def steps(self) -> int:
        """The last step."""
        return self.parts[-1][1].steps

    def rows(self, step: int) -> list[int]:
        """Return the rows of a step, from the order that held then."""
        _check_step(self, step)
        return [order for start, order in self.parts if start < step][-1].rows(step)


@dataclass(frozen=True)
class TrainerOrder:
    """The rows of transformers' Trainer (5.x on accelerate 1.x) for a data set with a length.

    Epoch e shuffles rows with torch's generator seeded seed + e (accelerate's SeedableRandomSampler), cuts
    them into batches, deals these to the processes in turn, and takes `accumulation` rounds a step; what is
    left at the end of an epoch is a step of its own. Where the last round does not go around, the epoch's
    first rows fill it up (`even_batches`). Resuming skips what was done of the epoch under way.
    """

    row_count: int
    """Rows of the training set."""
    batch_size: int
    """`train_batch_size`: rows of one process in one forward pass; of all, under `split_batches`."""
    max_steps: int | None = None
    epochs: float = 3.0
    """`num_train_epochs`; does not count when `max_steps` is given."""
    world_size: int = 1
    accumulation: int = 1
    seed: int = 42
    """`data_seed`, or `seed` where there is none."""
    shuffle: bool = True
    """False for `train_sampling_strategy="sequential"`."""
    drop_last: bool = False
    split_batches: bool = False
    even_batches: bool = True
    resumed_from: int = 0
    ignore_data_skip: bool = False
    """Whether resuming began the epoch's data anew."""

    def __post_init__(self) -> None:
        _check_positive(self, "row_count", "batch_size", "world_size", "accumulation")
        if self.split_batches and self.batch_size % self.world_size:
            raise DataError(
                f"batch_size {self.batch_size} cannot be split over {self.world_size} processes; "
                "name the settings that the training had"
            )
        if not self.rounds:
            raise DataError(f"{self.row_count} rows make no whole batch, and drop_last drops the rest")

    @classmethod
    def from_arguments(
        cls,
        arguments: TrainingArguments,
        row_count: int,
        *,
        world_size: int | None = None,
        resumed_from: int = 0,
    ) -> TrainerOrder:
        """Return the order that these arguments give; raise DataError where it cannot be rebuilt.

        `world_size` is that of the training, where this process is not part of it.
        """
        strategy = str(getattr(arguments, "train_sampling_strategy", "random"))
        config: Any = arguments.accelerator_config
        if strategy not in ("random", "sequential"):
            raise DataError(
                f"train_sampling_strategy is {strategy!r}: that order hangs on torch's global state"
            )
        if strategy == "random" and not config.use_seedable_sampler:
            raise DataError("use_seedable_sampler is off: the order hangs on torch's global state; use a log")
        if config.dispatch_batches:
            raise DataError("dispatch_batches is on, and that order is not rebuilt; use a log")
        return cls(
            row_count=row_count,
            batch_size=arguments.train_batch_size,
            max_steps=arguments.max_steps if arguments.max_steps > 0 else None,
            epochs=arguments.num_train_epochs,
            world_size=world_size or arguments.world_size,
            accumulation=arguments.gradient_accumulation_steps,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            shuffle=strategy == "random",
            drop_last=arguments.dataloader_drop_last,
            split_batches=config.split_batches,
            even_batches=config.even_batches,
            resumed_from=resumed_from,
            ignore_data_skip=arguments.ignore_data_skip,
        )

    @property
    def round_rows(self) -> int:
        """Rows of all processes in one forward pass."""
        return self.batch_size * (1 if self.split_batches else self.world_size)

    @property
    def rounds(self) -> int:
        """Forward passes of an epoch."""
        whole, rest = divmod(self.row_count, self.round_rows)
        return whole if self.drop_last else whole + bool(rest)

    @property
    def epoch_steps(self) -> int:
        """Optimiser steps of an epoch."""
        return math.ceil(self.rounds / self.accumulation)

    @property
    def steps(self) -> int:
        """The last step."""
        return self.max_steps or math.ceil(self.epochs * self.epoch_steps)

    def rows(self, step: int) -> list[int]:
        """Return the rows of a step: micro-batch by micro-batch, and in each process by process."""
        _check_step(self, step)
        before = step - 1
        if self.ignore_data_skip:  # the epoch under way begins again
            before += self.resumed_from // self.epoch_steps * self.epoch_steps - self.resumed_from
        epoch, number = divmod(before, self.epoch_steps)
        size = self.accumulation * self.round_rows
        found: list[int] = _trainer_epoch(self, epoch)[number * size : (number + 1) * size].tolist()
        return found


@lru_cache(maxsize=1)  # going through an order shuffles each epoch once
def _trainer_epoch(order: TrainerOrder, epoch: int) -> Ints:
    """Return the rows of an epoch one after the other, filled up or cut off to whole rounds."""
    rows: Ints = np.arange(order.row_count)
    if order.shuffle:
        import torch

        generator = torch.Generator().manual_seed(order.seed + epoch)
        rows = torch.randperm(order.row_count, generator=generator).numpy()
    if order.drop_last:
        return rows[: order.rounds * order.round_rows]
    if order.world_size == 1 or not order.even_batches:
        return rows
    missing = order.rounds * order.round_rows - order.row_count
    return np.concatenate([rows, np.resize(rows[: order.round_rows], missing)])


@dataclass(frozen=True)
class OlmoCoreOrder:
    """The documents of OLMo-core's fixed-length loader of token files (NumpyFSLDataset, NumpyFSLDataLoader).

    Each token file is cut into instances of `sequence_length` tokens; what is left of a file is not used. An
    epoch's global indices are the instances shuffled by numpy's PCG64 seeded seed + epoch (epochs count from
    1); the loader keeps them in a file of bare uint32. A step takes the next global batch of them.
    Documents end at the end token (before a BOS, if there is one) and are numbered over all files.
    """

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
    first_batch: int = 0
    """Batches of this size taken by then; other than `resumed_from` when the size changed."""

    def __post_init__(self) -> None:
        _check_positive(self, "sequence_length", "chunk_size", "epochs")
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

    def rows(self, step: int) -> list[int]:
        """Return the documents of which a step's batch holds a part, instance by instance."""
        _check_step(self, step)
        epoch, number = divmod(self.first_batch + step - self.resumed_from - 1, self.epoch_steps)
        order = _olmo_core_epoch(self, epoch + 1)
        instances = order[number * self.batch_rows : (number + 1) * self.batch_rows].tolist()
        return [document for instance in instances for document in self.documents_in(instance)]

    def documents_in(self, instance: int) -> range:
        """Return the numbers of the documents that lie in an instance, in whole or in part."""
        file = int(np.searchsorted(self._instance_ends, instance, "right"))
        local = instance - (int(self._instance_ends[file - 1]) if file else 0)
        begin = local * self.sequence_length
        ends, before = (part[file] for part in self._documents)
        first, last = np.searchsorted(ends, [begin, begin + self.sequence_length - 1], "right")
        return range(before + int(first), before + int(last) + 1)

    @cached_property
    def _instance_ends(self) -> Ints:
        longest = self.max_target_sequence_length or self.sequence_length
        if longest % self.sequence_length:
            raise DataError(
                f"max_target_sequence_length {longest} is no multiple of the sequence length "
                f"{self.sequence_length}"
            )
        each = longest // self.sequence_length
        counts = [len(_read_array(file, self.dtype)) // longest * each for file in self.files]
        return np.cumsum(np.array(counts, np.int64))

    @cached_property
    def _documents(self) -> tuple[list[Ints], list[int]]:
        """Where the documents of each file end, and how many lie in the files before it."""
        arrays = (_read_array(file, self.dtype) for file in self.files)
        ends = [_document_ends(tokens, self.eos_id, self.bos_id) for tokens in arrays]
        return ends, [0, *np.cumsum([len(own) for own in ends]).tolist()]


@lru_cache(maxsize=1)
def _olmo_core_epoch(order: OlmoCoreOrder, epoch: int) -> Tokens:
    """Return the instances in the order of an epoch, counted from 1."""
    expected = order.instance_count // order.chunk_size * order.chunk_size
    if not order.indices:
        chunks = np.arange(expected // order.chunk_size, dtype=np.uint32)
        if order.seed is not None:
            np.random.Generator(np.random.PCG64(order.seed + epoch)).shuffle(chunks)
        within = np.arange(order.chunk_size, dtype=np.uint32)
        instances: Tokens = (chunks[:, None] * np.uint32(order.chunk_size) + within).reshape(-1)
        return instances
    path = order.indices[epoch - 1]
    found = _read_array(path, "uint32")
    if len(found) != expected or (len(found) and int(found.max()) >= order.instance_count):
        raise DataError(
            f"{path} orders {len(found):,} instances where the token files hold {expected:,}; are they "
            "of the same data set, sequence length and chunk size?"
        )
    return found


def _document_ends(tokens: Tokens, eos_id: int, bos_id: int | None) -> Ints:
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


def _read_array(path: Path, dtype: str) -> Tokens:
    """Open a bare array of numbers; raise DataError when it is missing, cut off, or a real .npy file."""
    with told_as(DataError, f"{path} cannot be read", "name OLMo-core's own file"):
        size = path.stat().st_size
        with ordinary(path).open("rb") as file:
            magic = file.read(6)
    if magic == b"\x93NUMPY":
        raise DataError(f"{path} is a file of numpy.save; OLMo-core's files are bare arrays without a header")
    if size % np.dtype(dtype).itemsize:
        raise DataError(f"{path} has {size:,} bytes, which are no whole number of {dtype}; is it cut off?")
    if not size:
        return np.empty(0, np.uint64)
    found: Tokens = np.memmap(path, dtype, "r")
    return found


@dataclass(frozen=True)
class NeoxOrder:
    """The documents of GPT-NeoX (and so Pythia), by the index files that it keeps beside a packed data set.

        …_doc_idx.npy      int32 [documents · epochs]   documents in the order they are strung together in
        …_sample_idx.npy   int32/64 [samples + 1, 2]    where a sample begins: place in doc_idx, token in it
        …_shuffle_idx.npy  uint32/int64 [samples]       in which order the samples are taken

    Sample i of the training is number shuffle_idx[i]; it runs to the first token of the next one, that token
    included, which it is only asked to predict. Step k takes the samples (k − 1)·B to k·B − 1. Blends of
    several weighted data sets are not rebuilt.
    """

    doc_idx: Indices
    sample_idx: Indices
    shuffle_idx: Indices
    batch_size: int
    """`train_batch_size`: samples of a step over all processes."""
    resumed_from: int = 0
    first_sample: int = 0
    """Samples taken by then; other than resumed_from · batch_size when the batch size changed."""

    def __post_init__(self) -> None:
        _check_positive(self, "batch_size")
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
        parts = [_read_indices(Path(f"{prefix}_{name}_idx.npy")) for name in ("doc", "sample", "shuffle")]
        doc_idx, sample_idx, shuffle_idx = parts
        return cls(doc_idx, sample_idx, shuffle_idx, batch_size, resumed_from, first_sample)

    @property
    def steps(self) -> int:
        """The last step; NeoX leaves out the last sample."""
        samples = max(0, len(self.shuffle_idx) - 1)
        return self.resumed_from + (samples - self.first_sample) // self.batch_size

    def rows(self, step: int) -> list[int]:
        """Return the documents of which a step's batch holds at least a token, sample by sample."""
        _check_step(self, step)
        begin = self.first_sample + (step - self.resumed_from - 1) * self.batch_size
        samples = self.shuffle_idx[begin : begin + self.batch_size].tolist()
        return [document for sample in samples for document in self.documents_in(sample)]

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


def _read_indices(path: Path) -> Indices:
    """Open an .npy file of whole numbers; pickled ones are refused."""
    with told_as(
        DataError, f"{path} cannot be read", "name the files that GPT-NeoX wrote", Exception
    ):  # numpy reads the header as Python, and fails in as many ways
        found = np.load(ordinary(path), mmap_mode="r", allow_pickle=False)
    if not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"{path} holds {found.dtype}, not whole numbers")
    indices: Indices = found
    return indices


ORDERS: Mapping[str, Callable[..., Order]] = {
    "trainer": TrainerOrder,
    "olmo_core": OlmoCoreOrder,
    "neox": NeoxOrder.open,
}
"""What makes an order of each kind; its parameters are the settings."""


def read_order(path: str | Path) -> Order:
    """Return the order that a TOML file describes; raise RecipeError where it says what we do not know."""
    place = Path(path)
    content = read_settings(place, "order")
    parts = content.pop("part", None)
    if parts is None:
        return _build(content, place)
    if content:
        raise RecipeError(f"{place} has {', '.join(content)} beside its parts; move it into one")
    return JoinedOrder(tuple((int(part.pop("after", 0)), _build(part, place)) for part in parts))


def _build(content: dict[str, Any], place: Path) -> Order:
    kind = content.pop("kind", None)
    if kind not in ORDERS:
        raise RecipeError(f"{place} has the kind {kind!r}; the kinds of order are {', '.join(ORDERS)}")
    known = sorted(inspect.signature(ORDERS[kind]).parameters)
    if unknown := sorted(content.keys() - known):
        raise RecipeError(f"{place}: {kind} does not know {unknown[0]!r}; it knows {', '.join(known)}")
    try:
        for name in ("files", "indices"):
            if name in content:
                content[name] = tuple(place.parent / file for file in content[name])
        if "prefix" in content:
            content["prefix"] = place.parent / content["prefix"]
        return ORDERS[kind](**content)
    except (TypeError, KeyError) as error:
        raise RecipeError(f"{place}: {error}") from None


class LoggedStage(BaseModel):
    """One `finetune`: which rows of the data it had, and how it was set."""

    model_config = ConfigDict(frozen=True)

    numbers: tuple[int, ...]
    """Row numbers in the data, in the order in which the stage had the rows."""
    training: TrainingSettings
    seed: int
    processes: int = 1


@dataclass(frozen=True, slots=True)
class PalinodeOrder:
    """The rows of Palinode's own training loop; stages follow one another."""

    batches: Sequence[Sequence[int]]
    rates: Sequence[float] = ()
    """Learning rate of each step."""

    @property
    def steps(self) -> int:
        """Number of optimiser steps of all stages."""
        return len(self.batches)

    def rows(self, step: int) -> list[int]:
        """Return the row numbers of a step's batch."""
        _check_step(self, step)
        return list(self.batches[step - 1])


def rebuild(stages: Sequence[LoggedStage], data: Sequence[Example], tokenizer: Any) -> PalinodeOrder:
    """Return the order of stages over these rows; the tokenizer is that of the model trained.

    An epoch's batches follow from the rows' lengths in tokens, the batch size, the seed and the epoch.
    """
    from palinode.training.loop import learning_rate_at

    batches, rates = list[list[int]](), list[float]()
    for stage in stages:
        examples = [data[number] for number in stage.numbers]
        training, together = stage.training, stage.training.accumulation * stage.processes
        rows = tokenize(examples, tokenizer, max_length=training.max_length, style=PromptStyle())
        lengths = [len(row.ids) for row in rows]
        for epoch in range(training.epochs):
            parts = epoch_batches(lengths, batch_size=training.batch_size, seed=stage.seed, epoch=epoch)
            for start in range(0, len(parts), together):
                members = [place for part in parts[start : start + together] for place in part]
                batches.append([stage.numbers[rows[place].example] for place in members])
        total = len(batches) - len(rates)
        warmup = round(training.warmup_epochs * (total // training.epochs))
        rates += [learning_rate_at(step, total, warmup, training.learning_rate) for step in range(total)]
    return PalinodeOrder(batches, rates)


def write_stages(path: Path, stages: Sequence[LoggedStage], *, data: str, model: str) -> None:
    """Write what rebuilds the order as JSON: the stages, the file of rows, a folder with the tokenizer."""
    told = [stage.model_dump() for stage in stages]
    write_json(path, {"kind": "palinode", "data": data, "model": model, "stages": told})


def open_palinode(path: Path) -> tuple[PalinodeOrder, list[Example]]:
    """Return the order that such a file describes, and the data that its numbers point into.

    `data` and `model` are taken relative to the file. Raises DataError where it is of another form.
    """
    from palinode.models.loading import load_tokenizer
    from palinode.weights.checkpoint import Checkpoint

    with told_as(DataError, f"{path} is not an order file"):
        content = read_json(path)
        place, model = path.parent / content["data"], path.parent / content["model"]
    data = read_examples(place)
    with told_as(DataError, "the order's stages cannot be read"):
        stages = [LoggedStage.model_validate(entry) for entry in content["stages"]]
    return rebuild(stages, data, load_tokenizer(Checkpoint.open(model))), data
