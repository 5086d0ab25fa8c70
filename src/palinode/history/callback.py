"""Logging exposures from transformers' Trainer, and from any loop over a PyTorch loader.

Which rows are in a batch is known by their token ids. Where the loader puts rows together (in its worker
processes, if it has any) the collator is wrapped: it hashes each row's ids as the data set gave them,
before padding, packing or masking, and sends hash and length along in the batch as one more tensor,
`CARRIED`, int64 [B, 3]. So they go wherever the batch goes: through prefetching, accelerate's sharding
and dispatch, and onto the device. In the main process the tensor is taken out again, and the hash of the
ids looked up in a table made once ahead of training, which leads to the row's content hash. Rows with
the same ids are the same row to the model.

Thin the checkpoints that transformers' Trainer saves, so that a budget is kept and every age has one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from palinode.errors import DataError, RecipeError
from palinode.history.duplicates import Hashes, as_hashes, fingerprint_rows, fingerprint_tokenizer
from palinode.history.exposures import ExposureLog
from palinode.history.plan import Wish, thin

CARRIED = "palinode_rows"
"""Key of the batch under which the rows' ids hashes and lengths travel."""

Ids = Callable[[Any], Sequence[int]]
"""Returns the token ids of one item of a data set."""


def ids_of(item: Any) -> Sequence[int]:
    """Return an item's token ids: its `input_ids`, its first part, or the item itself."""
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise DataError(
                f"rows have {', '.join(map(str, item)) or 'nothing'} but no input_ids to tell them apart by; "
                "give ids=, a function that returns a row's ids"
            )
        item = item["input_ids"]
    elif isinstance(item, tuple) and item:
        item = item[0]
    found: Sequence[int] = item
    return found


def ids_key(ids: Sequence[int]) -> tuple[int, int]:
    """Return BLAKE3-128 of token ids as two signed 64-bit numbers, which a tensor can hold."""
    content = np.ascontiguousarray(ids, dtype="<i8").tobytes()
    first, second = np.frombuffer(blake3.blake3(content).digest(length=16), "<i8").tolist()
    return first, second


class RowTable:
    """From the token ids of a data set's rows to their content hashes; made once ahead of training.

    `dataset` has a length and is gone through by number.
    """

    def __init__(self, dataset: Any, hashes: Hashes | Sequence[bytes], *, ids: Ids = ids_of) -> None:
        self.hashes = as_hashes(hashes)
        if len(dataset) != len(self.hashes):
            raise DataError(
                f"there are {len(self.hashes):,} hashes for {len(dataset):,} rows of the data set; give one "
                "for each row, in the data set's order"
            )
        keys = np.array([ids_key(ids(dataset[row])) for row in range(len(dataset))], np.int64).reshape(-1, 2)
        self._order = np.lexsort((keys[:, 1], keys[:, 0]))
        self._keys = keys[self._order]
        same = (self._keys[1:] == self._keys[:-1]).all(axis=1)
        texts = self.hashes[self._order]
        differ = same & (texts[1:] != texts[:-1]).any(axis=1)
        if differ.any():  # most likely they were cut off
            first, second = sorted(self._order[np.flatnonzero(differ)[0] :][:2].tolist())
            raise DataError(
                f"rows {first + 1} and {second + 1} have the same token ids but other texts, so that a batch "
                "does not tell which it holds; are they cut off at the same place? Log them with "
                "ExposureLog.record, or with LoggedLoader(rows=…)"
            )

    def find(self, keys: npt.NDArray[np.int64]) -> Hashes:
        """Return the content hashes of rows by their keys, int64 [n, 2]; raise DataError for unknown ones."""
        if not len(self._keys):
            return self.hashes
        places = np.searchsorted(self._keys[:, 0], keys[:, 0])
        places = np.minimum(places, len(self._keys) - 1)
        unknown = int((self._keys[places] != keys).any(axis=1).sum())
        if unknown:
            raise DataError(
                f"{unknown} of {len(keys)} rows of a batch are not in the data set that was hashed; it "
                "was given with other token ids than the training uses, or its rows change when they are read"
            )
        found: Hashes = self.hashes[self._order[places]]
        return found


@dataclass(frozen=True, slots=True)
class Carrying:
    """A collator that sends along which rows it puts together."""

    collate: Callable[[list[Any]], Any]
    ids: Ids = ids_of

    def __call__(self, items: list[Any]) -> Any:
        """Return the collator's batch with `CARRIED` in it."""
        every = [self.ids(item) for item in items]
        batch = self.collate(items)
        if not hasattr(batch, "__setitem__") or isinstance(batch, list | torch.Tensor):
            raise DataError(
                f"the collator makes a batch of type {type(batch).__name__}, and rows can be sent along in a "
                "dict only; use LoggedLoader(rows=…) with a function that returns the row numbers of a batch"
            )
        batch[CARRIED] = torch.tensor([(*ids_key(ids), len(ids)) for ids in every], dtype=torch.int64)
        return batch


class _Seen:
    """Rows of the micro-batches since the last optimiser step, brought to the CPU without waiting for it."""

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []

    def add(self, carried: torch.Tensor) -> None:
        event = None
        if carried.is_cuda:
            carried = carried.detach().to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._parts.append((carried, event))

    def take(self, table: RowTable) -> tuple[Hashes, int]:
        """Return the hashes of all rows since the last call, and their tokens."""
        for _, event in self._parts:
            if event is not None:
                event.synchronize()
        whole = np.concatenate([np.empty((0, 3), np.int64), *(part.numpy() for part, _ in self._parts)])
        self._parts = []
        return table.find(whole[:, :2]), int(whole[:, 2].sum())


class ExposureCallback(TrainerCallback):
    """Logs every optimiser step of a transformers Trainer.

    `hashes` are those of the training rows (`hashing.hashes`) in the data set's order, made with `salt` if
    there is one. When the Trainer resumes from a checkpoint, the log goes on from its step. Each process
    writes its own rows; under DataParallel (several GPUs, one process) it refuses.
    """

    def __init__(
        self,
        folder: str | Path,
        hashes: Hashes | Sequence[bytes],
        tokenizer: PreTrainedTokenizerBase,
        *,
        run: str | None = None,
        salt: bytes = b"",
        ids: Ids = ids_of,
    ) -> None:
        self._folder = folder
        self._hashes = as_hashes(hashes)
        self._of: dict[str, Any] = {"data": fingerprint_rows(self._hashes), "run": run, "salt": salt}
        self._of["tokenizer"] = fingerprint_tokenizer(tokenizer)
        self._ids = ids
        self._seen = _Seen()
        self._micro_batch: torch.Tensor | None = None
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Make the table, open the log, and see to it that the batches say which rows they hold."""
        if args.n_gpu > 1:
            raise DataError("one process drives several GPUs (DataParallel); start one a GPU, with torchrun")
        if self._hook is not None:
            self._hook.remove()  # a training before this one was broken off
        loader = kwargs["train_dataloader"]
        self._table = RowTable(loader.dataset, self._hashes, ids=self._ids)
        place = {"start": state.global_step, "rank": args.process_index, "world_size": args.world_size}
        self._log = ExposureLog.open(self._folder, **self._of, **place)
        owner = getattr(loader, "base_dataloader", loader)  # accelerate's loaders hold the real one
        owner.collate_fn = Carrying(owner.collate_fn, self._ids)
        self._hook = kwargs["model"].register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Keep the rows of one micro-batch."""
        if self._micro_batch is not None:
            self._seen.add(self._micro_batch)
        self._micro_batch = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Record the optimiser step that has just been made."""
        self.on_substep_end(args, state, control)
        found, tokens = self._seen.take(self._table)
        if not len(found):
            raise DataError(
                f"no batch of step {state.global_step} says which rows it holds; do not replace the "
                "Trainer's loader or its collator while it trains, or log with LoggedLoader"
            )
        self._log.record(state.global_step, found, epoch=state.epoch, tokens=tokens)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Seal the log up to the checkpoint."""
        self._log.seal()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Close the log and leave the model as it was."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._log.close()

    def _before_forward(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the rows out of what the model is called with; a loss may call it twice with one batch."""
        carried = kwargs.pop(CARRIED, None)
        if carried is not None and model.training:
            self._micro_batch = carried
        return args, kwargs


class LoggedLoader(AbstractContextManager["LoggedLoader"]):
    """A PyTorch or accelerate loader that logs what it hands out, for loops of one's own.

        with LoggedLoader(loader, log, table) as batches:
            for batch in batches:
                ...
                optimizer.step()
                batches.step()

    Call `step` after each optimiser step; or give `accumulation`, the batches of a step, and let it count:
    then a step also ends with the epoch. Rows are known by their ids through a `RowTable`, or by number where
    `rows` returns the row numbers of a batch and `table` is the hashes of all rows.
    """

    def __init__(
        self,
        loader: Any,
        log: ExposureLog,
        table: RowTable | Hashes | Sequence[bytes],
        *,
        rows: Callable[[Any], Sequence[int]] | None = None,
        ids: Ids = ids_of,
        accumulation: int | None = None,
    ) -> None:
        self._table = table if isinstance(table, RowTable) else as_hashes(table)
        if isinstance(self._table, RowTable) == (rows is not None):
            raise DataError("give a RowTable, or the hashes of all rows together with rows=")
        self._loader, self._log, self._rows, self._accumulation = loader, log, rows, accumulation
        self._owner = getattr(loader, "base_dataloader", loader)
        if rows is None:
            self._owner.collate_fn = Carrying(self._owner.collate_fn, ids)
        self._seen = _Seen()
        self._numbers: list[int] = []
        self._batches = 0
        self._step = log.session.start

    def __len__(self) -> int:
        return len(self._loader)

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if self._accumulation and self._batches == self._accumulation:
                self.step()
            self._batches += 1
            if self._rows is not None:
                self._numbers += [int(row) for row in self._rows(batch)]
            elif CARRIED in batch:
                self._seen.add(batch.pop(CARRIED))
            else:
                raise DataError(
                    "a batch does not say which rows it holds; wrap the loader before its first use, when "
                    "its workers have not started yet"
                )
            yield batch
        if self._accumulation and self._batches:
            self.step()

    def step(self, *, epoch: float | None = None) -> None:
        """Record the batches handed out since the last call as the next optimiser step."""
        self._step += 1
        tokens = None
        if isinstance(self._table, RowTable):
            found, tokens = self._seen.take(self._table)
        else:
            found = self._table[np.array(self._numbers, np.int64)]
        self._log.record(self._step, found, epoch=epoch, tokens=tokens)
        self._numbers, self._batches = [], 0

    def close(self) -> None:
        """Leave the loader as it was and close the log; batches without a step are not recorded."""
        if self._rows is None:
            self._owner.collate_fn = self._owner.collate_fn.collate
        self._log.close()


class ThinningCallback(TrainerCallback):
    """Remove saved checkpoints as a plan says; set the Trainer's own save_total_limit to None.

    With `kept`, the steps of a schedule, every other checkpoint goes; without, each save beyond the wish's
    budget throws out the one that is missed least (`plan.thin`). The newest checkpoint always stays, because
    an interrupted training goes on from it, and so does the best one where the Trainer looks for it.
    """

    def __init__(self, wish: Wish, kept: Collection[int] | None = None) -> None:
        self.wish = wish
        self.kept = None if kept is None else frozenset(kept)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Refuse a Trainer that removes checkpoints by a rule of its own."""
        if args.save_total_limit is not None:
            raise RecipeError(
                f"save_total_limit is {args.save_total_limit}: the Trainer would remove checkpoints besides "
                "the plan; set it to None"
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Remove what the plan does not keep."""
        if not state.is_world_process_zero:
            return
        best = state.best_model_checkpoint
        saved = saved_steps(Path(str(args.output_dir)))
        if self.kept is not None:
            kept = {*self.kept, max(saved, default=0)}
        else:
            kept = set(thin(list(saved), self.wish.room, self.wish, now=state.global_step))
        for step in sorted(saved.keys() - kept):
            if best is None or saved[step].resolve() != Path(best).resolve():
                shutil.rmtree(saved[step])


def saved_steps(folder: Path) -> dict[int, Path]:
    """Return the checkpoints that a Trainer left in its output folder, by step."""
    places = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    return {int(path.name[11:]): path for path in places if re.fullmatch(r"checkpoint-\d+", path.name)}
