"""The order of transformers' Trainer (5.x on accelerate 1.x) for a data set with a length.

Epoch e shuffles rows with torch's generator seeded seed + e (accelerate's SeedableRandomSampler), cuts
them into batches, deals these to the processes in turn, and takes `accumulation` rounds a step; what is
left at the end of an epoch is a step of its own. Where the last round does not go around, the epoch's
first rows fill it up (`even_batches`). Resuming skips what was done of the epoch under way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from palinode.errors import DataError
from palinode.history.orders.order import check_positive, check_step
from palinode.history.segments import Ints

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class TrainerOrder:
    """Which rows each step of a Trainer saw."""

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
    """The step it went on from; the order holds after it."""
    ignore_data_skip: bool = False
    """Whether resuming began the epoch's data anew."""

    def __post_init__(self) -> None:
        check_positive(
            row_count=self.row_count,
            batch_size=self.batch_size,
            world_size=self.world_size,
            accumulation=self.accumulation,
        )
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
        check_step(step, self.resumed_from + 1, self.steps)
        before = step - 1
        if self.ignore_data_skip:  # the epoch under way begins again
            before += self.resumed_from // self.epoch_steps * self.epoch_steps - self.resumed_from
        epoch, number = divmod(before, self.epoch_steps)
        size = self.accumulation * self.round_rows
        found: list[int] = self._epoch_rows(epoch)[number * size : (number + 1) * size].tolist()
        return found

    def _epoch_rows(self, epoch: int) -> Ints:
        """Return the rows of an epoch one after the other, filled up or cut off to whole rounds."""
        if self._last.get("epoch") != epoch:
            self._last.update(epoch=epoch, rows=self._shuffled(epoch))
        found: Ints = self._last["rows"]
        return found

    def _shuffled(self, epoch: int) -> Ints:
        if self.shuffle:
            import torch

            generator = torch.Generator().manual_seed(self.seed + epoch)
            order: Ints = torch.randperm(self.row_count, generator=generator).numpy()
        else:
            order = np.arange(self.row_count)
        if self.drop_last:
            return order[: self.rounds * self.round_rows]
        if self.world_size == 1 or not self.even_batches:
            return order
        missing = self.rounds * self.round_rows - self.row_count
        first = order[: self.round_rows]
        return np.concatenate([order, np.resize(first, missing)])

    @cached_property
    def _last(self) -> dict[str, Any]:
        """The epoch that was asked for last, so that going through the steps shuffles each epoch once."""
        return {}
