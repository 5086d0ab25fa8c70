"""Fine-tune a checkpoint into another: θ_0 → θ_1 on the forget set, θ_0 → θ_2 on a retain sample.

Or low-rank: θ = θ_s + s·B·A beside every linear layer of the blocks, the start θ_s frozen. A is random with
the seed and B zero, so training begins at the start itself, and two runs of one seed begin with the same A.
What is kept is the adapter, in peft's format; read back it is the direction s·B·A, exactly.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from palinode.data.examples import Example
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.errors import CheckpointError, InputError, RecipeError, told_as
from palinode.models.loading import (
    check_positions,
    load_config,
    load_model,
    load_tokenizer,
    pad_token,
    pick_device,
    save_tensors,
    stored_names,
)
from palinode.models.reading import linear_layers
from palinode.processes import sharded
from palinode.progress import Listener, NullListener, record
from palinode.records import private, write_json
from palinode.settings import LoraSettings, TrainingSettings
from palinode.training.loop import count_steps, train
from palinode.training.objectives import (
    CURVE,
    PLAIN_OBJECTIVE,
    CurvePoint,
    Joined,
    Material,
    Objective,
    join,
    plain,
)
from palinode.weights.adapters import CONFIG, WEIGHTS, LoraAdapter
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
    run = partial(train, model, cast, loss, settings, seed=seed, pad_id=pad_token(tokenizer), state=state)
    total = sum(cast.tokens(epoch, range(len(cast.anchors)), loss.reads) for epoch in range(settings.epochs))
    curve, tokens = _follow(run, model, base, cast, total, watch or Watch(), listener or NullListener())
    check_stamps(stamps, [base])
    if settings.lora:
        write_adapter(model, output, curve)
    else:
        write_model(model, base, output, curve)
    if state is not None:
        shutil.rmtree(state, ignore_errors=True)
    saved = LoraAdapter.open(output) if settings.lora else Checkpoint.open(output)
    planned = count_steps([len(row.ids) for row in cast.anchors], settings)
    seen = {
        role: frozenset(cast.rows[role][place].example for place in cast.used(role))
        for role in (cast.anchor, *cast.draws)
    }
    return Finetuned(base, saved, curve, tokens, time.monotonic() - started, planned, seen)


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


def _follow(
    run: Callable[..., list[CurvePoint]],
    model: PreTrainedModel,
    base: Checkpoint,
    cast: Joined,
    total: int,
    watch: Watch,
    listener: Listener,
) -> tuple[list[CurvePoint], int]:
    """Train, with a bar of `total` tokens and models left on the way; return curve and tokens read."""
    walked, tokens = list[CurvePoint](), 0

    def on_step(point: CurvePoint, members: Sequence[int]) -> None:
        if watch.on_step:
            watch.on_step(point.step + 1, [cast.anchors[place].example for place in members])
        record(listener, watch.label, point.step + 1, point.figures())
        walked.append(point)
        if (place := watch.leave.get(point.step + 1)) and not place.exists():
            write_model(model, base, place, walked)

    with listener.task(watch.label, total, "tokens") as advance:

        def on_progress(amount: int) -> None:
            nonlocal tokens
            tokens += amount
            advance(amount)

        curve = run(on_progress=on_progress, on_step=on_step, exactly_at=watch.leave, say=listener.say)
    return curve, tokens


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
    place, held = pick_device(device), settings.lora.base
    if held == "4bit":
        model = load_model(base, device=place, quantization=_four_bit(place))
    else:
        dtype = torch.bfloat16 if held == "bfloat16" else torch.float32
        model = load_model(base, device=place, dtype=dtype)
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


# Low-rank

PREFIX = "base_model.model."
"""What peft puts before the names of the model's own modules."""


def add_adapter(model: PreTrainedModel, base: Checkpoint, settings: LoraSettings, *, seed: int) -> None:
    """Freeze the live model and put A and B beside its linear layers, in place.

    Raises RecipeError where no layer has one of the names asked for, CheckpointError where a layer has no
    weight of its own name in the checkpoint, so that the product could not be added to it.
    """
    peft = _peft()
    layers = _linear_layers(model, settings.targets)
    for name in layers:
        if base.find(f"{name}.weight") is None:
            raise CheckpointError(
                f"{base.folder} has no tensor {name}.weight, though the model built from it has that layer; "
                "its weights are renamed on loading, so train without --lora"
            )
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=_names(model, layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # A is drawn on the processor, so it is the same on every device
        peft.inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def write_adapter(model: PreTrainedModel, output: Path, curve: Sequence[CurvePoint] = ()) -> None:
    """Write the adapter of a live model as a folder that peft reads, atomically."""
    state = _peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {PREFIX + name: value.detach().cpu().contiguous() for name, value in sorted(state.items())}
    held: Any = model.peft_config["default"]
    config = {name: sorted(part) if isinstance(part, set) else part for name, part in held.to_dict().items()}
    config |= {"base_model_name_or_path": None, "inference_mode": True}  # no path of this machine
    with claimed(output := output.resolve()) as partial:
        save_tensors(tensors, partial / WEIGHTS)
        write_json(partial / CONFIG, config)
        write_json(partial / CURVE, [asdict(point) for point in curve])
        publish(partial, output)


def _linear_layers(model: PreTrainedModel, ends: Sequence[str] | None) -> dict[str, torch.nn.Module]:
    """Return the linear layers of the decoder blocks by name: those asked for, or all."""
    found = linear_layers(model)
    last = ("",) if ends is None else tuple(f".{end}" for end in ends)
    chosen = {name: module for name, module in found if f".{name}".endswith(last)}
    if not chosen:
        names = sorted({name.rpartition(".")[2] for name, _ in found})
        raise RecipeError(
            f"training.lora.targets is {ends} and no linear layer of the blocks has such a name; "
            f"there are {', '.join(names) or 'none'}"
        )
    return chosen


def _names(model: PreTrainedModel, layers: dict[str, torch.nn.Module]) -> list[str]:
    """Return the ends of the layers' names where those mean no other layer, else the whole names."""
    ends = {name.rpartition(".")[2] for name in layers}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if meant == set(layers) else layers)


def _peft() -> Any:
    """Return peft, or raise InputError that says how to get it."""
    advice = "pip install 'palinode[lora]', or leave out --lora"
    with told_as(InputError, "low-rank training needs peft", advice, ImportError):
        import peft
    return peft


def _four_bit(device: torch.device) -> Any:
    """Return the setting that holds linear layers as 4-bit normal floats; raises InputError without."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None or device.type != "cuda":
        raise InputError(
            'training.lora.base = "4bit" needs the package bitsandbytes and a CUDA device (this is '
            f'{device}); pip install bitsandbytes on such a machine, or take "bfloat16"'
        )
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
