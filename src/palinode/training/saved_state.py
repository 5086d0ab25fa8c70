"""The state of a training on disk: what is trained, the optimiser's moments, and the curve so far.

It is a torch distributed checkpoint: whatever number of processes wrote it, any number reads it. A reader
sees all of it or none.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer
from transformers import PreTrainedModel

from palinode.errors import first_line, unwritable
from palinode.processes import said_by_all, world
from palinode.records import beside, read_json, write_json
from palinode.training.objectives import CurvePoint

TRAINED = state_dict.StateDictOptions(ignore_frozen_params=True, strict=False)
"""A state holds what is trained; the rest is that of the start."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """The place of a state; where weights are `divided`, every process writes and reads its own."""

    folder: Path
    divided: bool

    def write(
        self, model: PreTrainedModel, optimizer: Optimizer, kind: str, curve: Sequence[CurvePoint]
    ) -> None:
        """Save all of it in the old one's place; `kind` says which optimiser it is (`kind_of`)."""
        rank = world()[0]
        if rank and not self.divided:
            return
        partial = beside(self.folder)
        if not rank:
            shutil.rmtree(partial, ignore_errors=True)
        if self.divided:
            said_by_all("it is gone")
        try:
            with _unsaid():
                writer = FileSystemWriter(partial, sync_files=False)
                save(_held(model, optimizer), storage_writer=writer, no_dist=not self.divided)
            if rank:
                return
            write_json(partial / "optimizer.json", kind)
            write_json(partial / "curve.json", [asdict(point) for point in curve])
        except (OSError, RuntimeError, CheckpointException) as error:  # torch has its own kinds
            inner = (
                [one for one, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
            )
            raise unwritable(partial, RuntimeError(first_line([*inner, error][0]))) from error
        old = beside(self.folder, ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.replace(old)
        partial.replace(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def kind(self) -> str | None:
        """Return which optimiser the state is of; None where there is no whole state.

        A state of an earlier version is none.
        """
        old = beside(self.folder, ".old")
        if not world()[0] and not self.folder.exists() and old.exists():  # killed while the new one came in
            old.replace(self.folder)
        names = (".metadata", "curve.json", "optimizer.json")
        whole = all((self.folder / name).exists() for name in names)
        return str(read_json(self.folder / "optimizer.json")) if said_by_all(whole)[0] else None

    def read(self, model: PreTrainedModel, optimizer: Optimizer) -> list[CurvePoint]:
        """Bring model and optimiser to the state, and return its curve."""
        with _unsaid():
            held = _held(model, optimizer)
            unmoved = DefaultLoadPlanner(allow_partial_load=True)  # what had no gradient has no moments
            load(held, checkpoint_id=self.folder, planner=unmoved, no_dist=not self.divided)
            states = {"model_state_dict": held["model"], "optim_state_dict": held["optimizer"]}
            state_dict.set_state_dict(model, optimizer, **states, options=TRAINED)
        return [CurvePoint(**point) for point in read_json(self.folder / "curve.json")]


def _held(model: PreTrainedModel, optimizer: Optimizer) -> dict[str, Any]:
    """Return the weights that are trained, a tied one once, and their moments."""
    weights, moments = state_dict.get_state_dict(model, optimizer, options=TRAINED)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    return {"model": {name: weights[name] for name in weights if name in trained}, "optimizer": moments}


@contextmanager
def _unsaid() -> Iterator[None]:
    """Keep torch from saying that one process alone reads or writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        yield
