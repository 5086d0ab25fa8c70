"""The one training loop, on accelerate: a model, rows and a loss in; a trained model and a curve out.

The model's weights are float32 throughout; the forward pass runs under bfloat16 autocast where that
is faster. Each optimiser step sums its micro-batches' losses and divides once by their summed weight.
The order of rows depends on the seed and the epoch only, and dropout on the seed and the step, so that
a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import PreTrainedModel

from palinode.data.batches import Batch, epoch_batches, pad_right
from palinode.data.tokenize import TokenRow
from palinode.errors import DivergenceError, OutputError
from palinode.models.loading import check_positions
from palinode.records import write_json
from palinode.training.losses import Loss
from palinode.training.settings import TrainingSettings

AUTOCAST_FROM = 20_000_000
"""On a CPU, bfloat16 autocast pays off from about this many parameters (docs/lab-notes.md)."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One optimiser step of the training curve."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float


def train(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    loss: Loss,
    settings: TrainingSettings,
    *,
    seed: int,
    pad_id: int,
    state: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[CurvePoint]:
    """Train the model in place and return its curve.

    `state` is a folder for a resumable state: it is used when it exists, and written every
    `settings.save_minutes`, when the run is interrupted, and before a step that would not be finite.
    `on_progress` hears tokens. Raises DivergenceError when loss or gradient stop being finite.
    """
    check_positions(model.config, rows)
    accelerator = Accelerator(cpu=model.device.type == "cpu", mixed_precision="no")
    model.train()
    wrapped, optimizer = accelerator.prepare(model, _adamw(model, settings))
    run = _Run(accelerator, wrapped, optimizer, loss, settings, seed, state)
    steps = list(_steps(rows, settings, seed, accelerator.num_processes))
    run.resume(on_progress, steps, rows)
    saved_at = time.monotonic()
    try:
        for step in range(len(run.curve), len(steps)):
            run.step([pad_right([rows[i] for i in part], pad_id=pad_id) for part in steps[step]], step, steps)
            if on_progress:
                on_progress(sum(len(rows[i].ids) for part in steps[step] for i in part))
            if time.monotonic() - saved_at > 60 * settings.save_minutes:
                run.save()
                saved_at = time.monotonic()
    except (KeyboardInterrupt, DivergenceError):
        run.save()
        raise
    model.eval()
    return run.curve


def count_steps(lengths: Sequence[int], settings: TrainingSettings) -> int:
    """Return the number of optimiser steps of a run on one device."""
    batches = math.ceil(len(lengths) / settings.batch_size)
    return settings.epochs * math.ceil(batches / settings.accumulation)


def learning_rate_at(step: int, total: int, warmup: int, peak: float) -> float:
    """Return the rate of one optimiser step: linear from 0 to `peak`, then linear to 0.

    >>> [learning_rate_at(step, 4, 2, 1.0) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / max(1, total - warmup)


def use_autocast(model: PreTrainedModel, settings: TrainingSettings) -> bool:
    """Tell whether the forward pass runs in bfloat16."""
    if settings.precision != "auto":
        return settings.precision == "bfloat16"
    if model.device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(supported) and model.device.type == "cpu" and model.num_parameters() >= AUTOCAST_FROM


def _steps(
    rows: Sequence[TokenRow], settings: TrainingSettings, seed: int, processes: int
) -> Iterator[list[list[int]]]:
    """Yield, for each optimiser step, its micro-batches as lists of row indices."""
    lengths = [len(row.ids) for row in rows]
    together = settings.accumulation * processes
    for epoch in range(settings.epochs):
        batches = epoch_batches(lengths, batch_size=settings.batch_size, seed=seed, epoch=epoch)
        for start in range(0, len(batches), together):
            yield batches[start : start + together]


def _adamw(model: PreTrainedModel, settings: TrainingSettings) -> torch.optim.AdamW:
    """Return AdamW (β .9, .999, ε 1e-8) with decay on matrices only, as transformers' Trainer has it."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=model.device.type in ("cpu", "cuda"))


class _Run:
    """A training run in progress: what has to be saved to go on later."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        settings: TrainingSettings,
        seed: int,
        state: Path | None,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.settings = settings
        self.seed = seed
        self.state = state
        self.curve: list[CurvePoint] = []
        self.autocast = use_autocast(accelerator.unwrap_model(model), settings)

    def step(self, batches: Sequence[Batch], step: int, steps: Sequence[object]) -> None:
        """Take one optimiser step over micro-batches; the weights stay as they were if it is not finite."""
        per_epoch = len(steps) // self.settings.epochs
        torch.manual_seed(self.seed + step)
        rate = learning_rate_at(
            step, len(steps), round(self.settings.warmup_epochs * per_epoch), self.settings.learning_rate
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        value = self._backward(batches)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm))
        if not (math.isfinite(value) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise DivergenceError(self._why_not_finite(step, len(steps)))
        with _undisturbed():
            self.optimizer.step()
            self.curve.append(CurvePoint(step, value, rate, norm))
        self.optimizer.zero_grad()

    def _why_not_finite(self, step: int, total: int) -> str:
        if step == 0:
            return (
                "the training loss is not a finite number before the first step is taken; "
                "does the checkpoint hold NaN or infinity?"
            )
        kept = f"; the state before that step is kept in {self.state}" if self.state else ""
        return (
            f"the training loss stopped being a finite number at step {step + 1} of {total}; "
            f"lower the learning rate (now {self.settings.learning_rate:g}){kept}"
        )

    def _backward(self, batches: Sequence[Batch]) -> float:
        """Add up the gradients of Σ total / Σ weight over all micro-batches of all processes."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        weight = sum(self.loss.weight(batch) for batch in batches)
        own = list(batches[rank::processes])
        idle = not own  # fewer micro-batches than processes: take part in the exchange, add nothing
        total = torch.zeros((), device=self.accelerator.device)
        for batch in own or batches[:1]:
            with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.autocast):
                part = self.loss.total(self.model, batch) * (0.0 if idle else 1.0)
            self.accelerator.backward(part * processes / weight)  # data-parallel gradients are averaged
            total += part.detach()
        return float(self.accelerator.reduce(total, "sum")) / weight

    def save(self) -> None:
        """Save weights, optimiser, random states and curve so that a reader sees all of it or none."""
        if self.state is None or not self.curve:
            return
        partial = self.state.with_name(f".{self.state.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        logging.getLogger("accelerate").setLevel(logging.ERROR)  # or it tells of tied weights at every save
        try:
            self.accelerator.save_state(str(partial))
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors have their own kinds
            raise OutputError(f"{partial} cannot be written ({error}); make room") from error
        write_json(partial / "curve.json", [asdict(point) for point in self.curve])
        old = _replaced(self.state)
        shutil.rmtree(old, ignore_errors=True)
        if self.state.exists():
            self.state.replace(old)
        partial.replace(self.state)
        shutil.rmtree(old, ignore_errors=True)

    def resume(
        self,
        on_progress: Callable[[int], None] | None,
        steps: Sequence[Sequence[Sequence[int]]],
        rows: Sequence[TokenRow],
    ) -> None:
        """Go on from a saved state where there is one."""
        if self.state is None:
            return
        if not self.state.exists() and _replaced(self.state).exists():  # killed while the new one came in
            _replaced(self.state).replace(self.state)
        if not (self.state / "curve.json").exists():
            return
        self.accelerator.load_state(str(self.state))
        points = json.loads((self.state / "curve.json").read_text(encoding="utf-8"))
        self.curve = [CurvePoint(**point) for point in points]
        if on_progress:
            done = steps[: len(self.curve)]
            on_progress(sum(len(rows[i].ids) for step in done for part in step for i in part))


def _replaced(state: Path) -> Path:
    """Return where the last state lies while a new one takes its place."""
    return state.with_name(f".{state.name}.old")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block is done, so that no step is left half taken."""
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread
        yield
        return
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, _frame: caught.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])
