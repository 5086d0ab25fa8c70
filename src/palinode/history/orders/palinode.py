"""The order of Palinode's own training loop: one `finetune` after the other, rebuilt from rows and settings.

An epoch's batches follow from the rows' lengths in tokens, the batch size, the seed and the epoch
(`data.batches.epoch_batches`), so the tokenizer, the rows and the settings are all that is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palinode.data.batches import epoch_batches
from palinode.data.examples import Example
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.errors import DataError
from palinode.history.orders.order import check_step
from palinode.records import read_json, write_json
from palinode.training.settings import TrainingSettings

KIND = "palinode"


@dataclass(frozen=True, slots=True)
class LoggedStage:
    """One `finetune`: which rows of the data it had, and how it was set."""

    numbers: tuple[int, ...]
    """Row numbers in the data, in the order in which the stage had the rows."""
    settings: TrainingSettings
    seed: int
    processes: int = 1


class PalinodeOrder:
    """Rows by optimiser step, the first step being 1; stages follow one another."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = batches

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
            examples, tokenizer, max_length=stage.settings.max_length, style=style or PromptStyle()
        )
        lengths = [len(row.ids) for row in rows]
        together = stage.settings.accumulation * stage.processes
        for epoch in range(stage.settings.epochs):
            parts = epoch_batches(lengths, batch_size=stage.settings.batch_size, seed=stage.seed, epoch=epoch)
            for start in range(0, len(parts), together):
                members = [place for part in parts[start : start + together] for place in part]
                batches.append([stage.numbers[rows[place].example] for place in members])
    return PalinodeOrder(batches)


def write_stages(path: Path, stages: Sequence[LoggedStage], *, data: str, model: str) -> None:
    """Write what rebuilds the order as JSON: the stages, the file of rows, a folder with the tokenizer."""
    content = {
        "kind": KIND,
        "data": data,
        "model": model,
        "stages": [
            {
                "numbers": list(stage.numbers),
                "training": stage.settings.model_dump(),
                "seed": stage.seed,
                "processes": stage.processes,
            }
            for stage in stages
        ],
    }
    write_json(path, content)


def read_stages(content: Mapping[str, Any]) -> list[LoggedStage]:
    """Return the stages of such a file's content; raises DataError where it is of another form."""
    try:
        return [
            LoggedStage(
                tuple(entry["numbers"]),
                TrainingSettings.model_validate(entry["training"]),
                entry["seed"],
                entry.get("processes", 1),
            )
            for entry in content["stages"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the order's stages cannot be read ({error})") from None


def open_palinode(path: Path) -> tuple[PalinodeOrder, list[Example]]:
    """Return the order that a file describes, and the data that its numbers point into.

    `data` and `model` are taken relative to the file.
    """
    from palinode.data.examples import read_examples
    from palinode.models.loading import load_tokenizer
    from palinode.weights.checkpoint import Checkpoint

    try:
        content = read_json(path)
        place, model = path.parent / content["data"], path.parent / content["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not an order file ({error})") from None
    data = read_examples(place)
    return rebuild(read_stages(content), data, load_tokenizer(Checkpoint.open(model))), data
