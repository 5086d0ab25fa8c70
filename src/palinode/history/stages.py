"""The order of Palinode's own training loop, one `finetune` after the other, rebuilt from rows and settings.

An epoch's batches follow from the rows' lengths in tokens, the batch size, the seed and the epoch
(`data.batches.epoch_batches`), so the tokenizer, the rows and the settings are all that is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from palinode.data.batches import epoch_batches
from palinode.data.examples import Example, read_examples
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.errors import DataError
from palinode.history.orders import check_step
from palinode.records import read_json, write_json
from palinode.training.settings import TrainingSettings


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

    @property
    def steps(self) -> int:
        """Number of optimiser steps of all stages."""
        return len(self.batches)

    def rows(self, step: int) -> list[int]:
        """Return the row numbers of a step's batch."""
        check_step(step, 1, self.steps)
        return list(self.batches[step - 1])


def rebuild(
    stages: Sequence[LoggedStage],
    data: Sequence[Example],
    tokenizer: Any,
    *,
    style: PromptStyle | None = None,
) -> PalinodeOrder:
    """Return the order of stages over these rows; the tokenizer is that of the model trained."""
    batches: list[list[int]] = []
    for stage in stages:
        examples = [data[number] for number in stage.numbers]
        rows = tokenize(
            examples, tokenizer, max_length=stage.training.max_length, style=style or PromptStyle()
        )
        lengths = [len(row.ids) for row in rows]
        together = stage.training.accumulation * stage.processes
        for epoch in range(stage.training.epochs):
            parts = epoch_batches(lengths, batch_size=stage.training.batch_size, seed=stage.seed, epoch=epoch)
            for start in range(0, len(parts), together):
                members = [place for part in parts[start : start + together] for place in part]
                batches.append([stage.numbers[rows[place].example] for place in members])
    return PalinodeOrder(batches)


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

    try:
        content = read_json(path)
        place, model = path.parent / content["data"], path.parent / content["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not an order file ({error})") from None
    data = read_examples(place)
    try:
        stages = [LoggedStage.model_validate(entry) for entry in content["stages"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the order's stages cannot be read ({error})") from None
    return rebuild(stages, data, load_tokenizer(Checkpoint.open(model))), data
