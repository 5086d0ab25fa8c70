"""Fine-tune a checkpoint into another: θ_0 → θ_1 on the forget set, θ_0 → θ_2 on a retain sample."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel

from palinode.data.examples import Example
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.errors import OutputError
from palinode.models.loading import load_model, load_tokenizer, pad_token, pick_device, quiet_transformers
from palinode.progress import Listener, Silence
from palinode.records import write_json
from palinode.training.loop import CurvePoint, train
from palinode.training.losses import ANSWER_LOSS, Loss
from palinode.training.settings import TrainingSettings
from palinode.weights.atomic import check_output
from palinode.weights.checkpoint import INDEX, SINGLE, Checkpoint

CURVE = "training.json"
"""File in a fine-tuned folder that holds its curve."""


@dataclass(frozen=True, slots=True)
class Finetuned:
    """A fine-tuned checkpoint and how its training went."""

    checkpoint: Checkpoint
    curve: Sequence[CurvePoint]
    tokens: int
    """Tokens that went through the model, over all epochs."""
    seconds: float
    """Wall time of this call; a resumed run counts its last part only."""


def finetune(
    base: Checkpoint,
    examples: Sequence[Example],
    output: Path | str,
    settings: TrainingSettings | None = None,
    *,
    seed: int = 0,
    style: PromptStyle | None = None,
    reader: Checkpoint | None = None,
    device: str = "auto",
    loss: Loss = ANSWER_LOSS,
    state: Path | None = None,
    label: str = "fine-tuning",
    listener: Listener | None = None,
) -> Finetuned:
    """Fine-tune `base` on the examples and write the result to `output` in float32.

    The folder appears under its name only when it is whole. `reader` is the checkpoint whose tokenizer
    and chat template put the rows into tokens (default: the base's own). `state` is where an interrupted run
    leaves what it needs to go on. Raises DivergenceError when the loss stops being finite.
    """
    settings, output = settings or TrainingSettings(), Path(output)
    check_output(output, [base.folder], needs=4 * base.parameters)
    started = time.monotonic()
    tokenizer = load_tokenizer(reader or base)
    rows = tokenize(examples, tokenizer, max_length=settings.max_length, style=style or PromptStyle())
    model = load_model(base, device=pick_device(device))
    tokens = settings.epochs * sum(len(row.ids) for row in rows)
    with (listener or Silence()).task(label, tokens, "tokens") as advance:
        curve = train(
            model,
            rows,
            loss,
            settings,
            seed=seed,
            pad_id=pad_token(tokenizer),
            state=state,
            on_progress=advance,
        )
    write_model(model, base, output, curve)
    if state is not None:
        shutil.rmtree(state, ignore_errors=True)
    return Finetuned(Checkpoint.open(output), curve, tokens, time.monotonic() - started)


def write_model(
    model: PreTrainedModel, origin: Checkpoint, output: Path, curve: Sequence[CurvePoint] = ()
) -> None:
    """Write a live model with the tokenizer and the layout of the checkpoint it came from, atomically."""
    output = output.resolve()  # "." has no name, and a link is no place to rename to
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config = GenerationConfig()  # the origin's is copied below; it may fail today's checks
    try:
        with quiet_transformers():
            model.save_pretrained(partial)
    except SafetensorError as error:  # its own kind of OSError
        raise OutputError(f"{partial} cannot be written ({error}); make room, or look at its disk") from error
    (partial / "generation_config.json").unlink(missing_ok=True)
    _match_layout(model, origin, partial)
    for path in origin.companions():
        place = partial / path.relative_to(origin.folder)
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)
    for file in partial.glob("*.safetensors"):  # safetensors lets nobody else read what it writes
        file.chmod((partial / "config.json").stat().st_mode)
    write_json(partial / CURVE, [asdict(point) for point in curve])
    partial.replace(output)


def _match_layout(model: PreTrainedModel, origin: Checkpoint, folder: Path) -> None:
    """Give a written model the tensors and names of its origin: a vector needs the same at both ends.

    Old checkpoints hold buffers that models make no use of today, and names without the model's prefix.
    """
    written = Checkpoint.open(folder)
    if all(written.find(name) for name in origin.tensors):
        return
    prefix = f"{model.base_model_prefix}."
    names = {prefix + name: name for name in origin.tensors if written.find(name) is None}
    tensors = {names.get(name, name): tensor for name, tensor in _tensors(written)}
    unused = {name: tensor for name, tensor in _tensors(origin) if written.find(name) is None}
    for file in {info.file for info in written.tensors.values()} | {folder / INDEX}:
        file.unlink(missing_ok=True)
    save_file({**unused, **tensors}, folder / SINGLE, metadata={"format": "pt"})


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a checkpoint by name."""
    for file in {info.file for info in checkpoint.tensors.values()}:
        yield from load_file(file).items()
