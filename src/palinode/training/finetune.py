"""Fine-tune a checkpoint into another: θ_0 → θ_1 on the forget set, θ_0 → θ_2 on a retain sample."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from palinode.data.examples import Example
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.errors import CheckpointError, InputError, RecipeError
from palinode.models.loading import (
    check_positions,
    load_config,
    load_model,
    load_tokenizer,
    pad_token,
    pick_device,
    stored_names,
)
from palinode.processes import sharded
from palinode.progress import Listener, NullListener, record
from palinode.records import private, write_json
from palinode.settings import TrainingSettings
from palinode.training.loop import count_steps, train
from palinode.training.lora import add_adapter, load_frozen, write_adapter
from palinode.training.objectives import (
    CURVE,
    PLAIN_OBJECTIVE,
    CurvePoint,
    Objective,
)
from palinode.training.roles import Joined, Material, join, plain
from palinode.weights.adapters import LoraAdapter
from palinode.weights.atomic import check_output, claimed, publish
from palinode.weights.checkpoint import Checkpoint, WeightedSum
from palinode.weights.fingerprints import check_stamps, take_stamps
from palinode.weights.store import OutputFiles, copy_companions, plan_files, write_index


@dataclass(frozen=True, slots=True)
class Finetuned:
    """A fine-tuned checkpoint, or the adapter that leads to it, and how its training went."""

    start: Checkpoint
    saved: Checkpoint | LoraAdapter
    """What lies in the output folder."""
    curve: Sequence[CurvePoint]
    tokens: int
    """Tokens that went through the model, over all steps."""
    seconds: float
    """Wall time of this call; a resumed run counts its last part only."""
    planned_steps: int = 0
    """Steps that would have been taken had the objective's limit not ended the run."""
    seen: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """By role: the positions of the examples that the run was trained on."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The fine-tuned checkpoint; raises InputError for a low-rank run, which leaves an adapter."""
        if isinstance(self.saved, Checkpoint):
            return self.saved
        raise InputError(f"{self.saved.folder} is an adapter and no whole model; take `point`, or save that")

    @property
    def point(self) -> Checkpoint | WeightedSum:
        """Where training ended: the checkpoint, or start + adapter as a formula."""
        return self.saved if isinstance(self.saved, Checkpoint) else self.start + self.saved

    @property
    def stopped(self) -> bool:
        """Whether the objective's limit ended the run early."""
        return len(self.curve) < self.planned_steps


@dataclass(frozen=True, slots=True)
class Watch:
    """What a run is called, who hears of its steps, and what is kept of the model on the way."""

    label: str = "fine-tuning"
    """Its name on a bar and in a curve."""
    on_step: Callable[[int, Sequence[int]], None] | None = None
    """Hears, after each optimiser step, how many are done and the positions of the anchor examples in it."""
    leave: Mapping[int, Path] = field(default_factory=dict)
    """By number of steps done: where the whole model is written as it is then (a resumed run leaves those
    still to come)."""


@private()
def finetune(
    base: Checkpoint,
    examples: Sequence[Example] | Material,
    output: Path | str,
    settings: TrainingSettings | None = None,
    *,
    seed: int = 0,
    style: PromptStyle | None = None,
    reader: Checkpoint | None = None,
    device: str = "auto",
    loss: Objective = PLAIN_OBJECTIVE,
    state: Path | None = None,
    listener: Listener | None = None,
    watch: Watch | None = None,
) -> Finetuned:
    """Fine-tune `base` on the examples and write the result to `output` in float32.

    With `settings.lora` the result is an adapter folder in peft's format; else it is a whole model. The
    folder appears under its name only when it is whole; it holds the rows as the weights know them, and only
    its owner can read it. An objective with roles takes its examples as `Material`. `reader` is the
    checkpoint whose tokenizer and chat template put the rows into tokens (default: the base's own). `state`
    is where an interrupted run leaves what it needs to go on. Raises DivergenceError when the loss stops
    being finite.
    """
    settings, output = settings or TrainingSettings(), Path(output)
    check_output(output, [base.folder], needs=0 if settings.lora else 4 * base.parameters)
    started, stamps = time.monotonic(), take_stamps([base])
    tokenizer = load_tokenizer(reader or base)
    cast = _cast(examples, base, tokenizer, settings, seed=seed, style=style or PromptStyle())
    model = _load(base, settings, loss, device=device, seed=seed)
    pad_id, following = pad_token(tokenizer), _Following(model, base, watch or Watch(), listener)
    curve = following.train(cast, loss, settings, seed=seed, pad_id=pad_id, state=state)
    check_stamps(stamps, [base])
    if settings.lora:
        write_adapter(model, output, curve)
    else:
        write_model(model, base, output, curve)
    if state is not None:
        shutil.rmtree(state, ignore_errors=True)
    return Finetuned(
        base,
        LoraAdapter.open(output) if settings.lora else Checkpoint.open(output),
        curve,
        following.tokens,
        time.monotonic() - started,
        count_steps([len(row.ids) for row in cast.anchors], settings),
        {
            role: frozenset(cast.rows[role][place].example for place in cast.used(role))
            for role in (cast.anchor, *cast.draws)
        },
    )


def _cast(
    examples: Sequence[Example] | Material,
    base: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainingSettings,
    *,
    seed: int,
    style: PromptStyle,
) -> Joined:
    """Return the rows in tokens, by role, with what terms need of other models."""
    length = settings.max_length
    if isinstance(examples, Material):
        cast = join(examples, tokenizer, epochs=settings.epochs, seed=seed, max_length=length, style=style)
    else:
        cast = plain(tokenize(examples, tokenizer, max_length=length, style=style))
    config = load_config(base)
    for rows in cast.rows.values():
        check_positions(config, rows, tokenizer)
    if isinstance(examples, Material) and examples.frozen:
        return replace(cast, frozen=examples.frozen(cast, pad_token(tokenizer)))
    return cast


class _Following:
    """A run, followed: its bar, its curve, and the models that are left on the way."""

    def __init__(
        self, model: PreTrainedModel, base: Checkpoint, watch: Watch, listener: Listener | None
    ) -> None:
        self.model, self.base, self.watch = model, base, watch
        self.listener = listener or NullListener()
        self.walked: list[CurvePoint] = []
        self.tokens = 0
        """Tokens that went through the model, over all steps."""

    def train(
        self,
        cast: Joined,
        objective: Objective,
        settings: TrainingSettings,
        *,
        seed: int,
        pad_id: int,
        state: Path | None,
    ) -> list[CurvePoint]:
        """Train the model and return its curve."""
        everyone = range(len(cast.anchors))
        total = sum(cast.tokens(epoch, everyone, objective.reads) for epoch in range(settings.epochs))

        def on_step(point: CurvePoint, members: Sequence[int]) -> None:
            if self.watch.on_step:
                self.watch.on_step(point.step + 1, [cast.anchors[place].example for place in members])
            record(self.listener, self.watch.label, point.step + 1, point.figures())
            self.walked.append(point)
            if (place := self.watch.leave.get(point.step + 1)) and not place.exists():
                write_model(self.model, self.base, place, self.walked)

        with self.listener.task(self.watch.label, total, "tokens") as advance:

            def on_progress(amount: int) -> None:
                self.tokens += amount
                advance(amount)

            return train(
                self.model,
                cast,
                objective,
                settings,
                seed=seed,
                pad_id=pad_id,
                state=state,
                on_progress=on_progress,
                on_step=on_step,
                exactly_at=self.watch.leave,
                say=self.listener.say,
            )


def _load(
    base: Checkpoint, settings: TrainingSettings, objective: Objective, *, device: str, seed: int
) -> PreTrainedModel:
    """Return the live model that is trained: all of it, or an adapter over the frozen start."""
    if settings.lora is None:
        return load_model(base, device=torch.device("cpu") if sharded() else pick_device(device))
    if objective.trainable is not None:
        raise RecipeError(
            "this method trains only some of the layers, in full; leave out training.lora, or its `trainable`"
        )
    model = load_frozen(base, settings.lora, device=pick_device(device))
    add_adapter(model, base, settings.lora, seed=seed)
    return model


def write_model(
    model: PreTrainedModel, origin: Checkpoint, output: Path, curve: Sequence[CurvePoint] = ()
) -> None:
    """Write a live model in float32, with the files, names and companions of the checkpoint it came from.

    What the live model makes no use of (buffers of old checkpoints, the other towers of a wrapper) is copied
    as it is, so that a vector has the same tensors at both ends. Raises CheckpointError where a weight has
    no place in the checkpoint's files, OutputError where there is no room.
    """
    state = _stored_state(model, origin)
    kept = origin.tensors.keys() - state.keys()
    files = plan_files(origin, "F32", kept=kept)
    with claimed(output := output.resolve()) as partial:  # "." has no name; a link is no place to rename to
        with ExitStack() as stack:
            out = OutputFiles(files, partial, stack)
            for name, value in state.items():
                raw = value.detach().float().cpu().contiguous().view(-1).view(torch.uint8)
                out.write(name, 0, raw.numpy().data)
            out.copy(origin.tensors[name] for name in sorted(kept))
        write_index(files, partial)
        copy_companions(origin, partial, "float32")
        write_json(partial / CURVE, [asdict(point) for point in curve])
        publish(partial, output)


def _stored_state(model: PreTrainedModel, origin: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the weights of a live model by the names that they have in the checkpoint's files."""
    live, buffers = model.state_dict(), {name for name, _ in model.named_buffers()}
    state: dict[str, torch.Tensor] = {}
    for found in (revert_weight_conversion(model, dict(live)), live):  # as saved, else as in memory
        names = stored_names(found, model, origin)
        state = {stored: found[name] for name, stored in names.items()} | state
        placed = {found[name].data_ptr() for name in names}  # a tied head shares its embedding's
        lost = [
            name for name, value in found.items() if value.data_ptr() not in placed and name not in buffers
        ]
        if not lost:
            break
    else:
        raise CheckpointError(
            f"{origin.folder} has no place for {len(lost)} weights of the model built from it "
            f"(first: {lost[0]}); are config.json and the weights of the same model?"
        )
    return {name: value for name, value in state.items() if origin.tensors[name].is_float}
