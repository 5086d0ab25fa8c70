"""Thin the checkpoints that transformers' Trainer saves, so that a budget is kept and every age has one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from palinode.errors import RecipeError
from palinode.history.plan import Wish, thin

NAME = re.compile(r"checkpoint-(\d+)")


class ThinningCallback(TrainerCallback):
    """Remove saved checkpoints as a plan says; set the Trainer's own save_total_limit to None.

    With `kept`, the steps of a schedule, every other checkpoint goes; without, each save beyond the wish's
    budget throws out the one that is missed least (`plan.thin`). The newest checkpoint always stays, because
    an interrupted training goes on from it, and so does the best one where the Trainer looks for it.
    """

    def __init__(self, wish: Wish, kept: Collection[int] | None = None) -> None:
        self.wish = wish
        self.kept = None if kept is None else frozenset(kept)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Refuse a Trainer that removes checkpoints by a rule of its own."""
        del state, control
        if args.save_total_limit is not None:
            raise RecipeError(
                f"save_total_limit is {args.save_total_limit}: the Trainer would remove checkpoints besides "
                "the plan; set it to None"
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Remove what the plan does not keep."""
        del control
        if not state.is_world_process_zero:
            return
        best = state.best_model_checkpoint
        saved = saved_steps(Path(str(args.output_dir)))
        for step in sorted(saved.keys() - self.keep(saved, state.global_step)):
            if best is None or saved[step].resolve() != Path(best).resolve():
                shutil.rmtree(saved[step])

    def keep(self, saved: Collection[int], now: int) -> set[int]:
        """Return which of the saved steps stay when the training stands at `now`."""
        newest = {max(saved)} if saved else set()
        if self.kept is not None:
            return newest | (self.kept & set(saved))
        return set(thin(sorted(saved), self.wish.room, self.wish, now=now))


def saved_steps(folder: Path) -> dict[int, Path]:
    """Return the checkpoints that a Trainer left in its output folder, by step."""
    named = ((NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*") if path.is_dir())
    return {int(match.group(1)): path for match, path in named if match}
