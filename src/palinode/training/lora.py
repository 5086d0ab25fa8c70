"""Low-rank fine-tuning: θ = θ_s + s·B·A beside every linear layer of the blocks, the start θ_s frozen.

A is random with the seed and B zero, so training begins at the start itself, and two runs of one seed
begin with the same A. What is kept is the adapter, in peft's own format: gradients, optimiser state and
file are those of A and B alone. Read back it is the direction s·B·A, exactly (weights/adapters.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from palinode.errors import CheckpointError, InputError, RecipeError
from palinode.models.loading import load_model, save_tensors
from palinode.models.reading import linear_layers
from palinode.records import write_json
from palinode.settings import LoraSettings
from palinode.training.objectives import CURVE, CurvePoint
from palinode.weights.adapters import CONFIG, WEIGHTS
from palinode.weights.atomic import claimed, publish
from palinode.weights.checkpoint import Checkpoint

PREFIX = "base_model.model."
"""What peft puts before the names of the model's own modules."""


def load_frozen(base: Checkpoint, settings: LoraSettings, *, device: torch.device) -> PreTrainedModel:
    """Return the live start, held as `settings.base` says; raises InputError where the machine cannot."""
    if settings.base == "4bit":
        return load_model(base, device=device, quantization=_four_bit(device))
    dtype = torch.bfloat16 if settings.base == "bfloat16" else torch.float32
    return load_model(base, device=device, dtype=dtype)


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
    chosen = {
        name: module
        for name, module in found
        if ends is None or any(f".{name}".endswith(f".{end}") for end in ends)
    }
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
    try:
        import peft
    except ImportError:
        raise InputError(
            "low-rank training needs peft, which is not installed; pip install 'palinode[lora]', or leave "
            "out --lora"
        ) from None
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
