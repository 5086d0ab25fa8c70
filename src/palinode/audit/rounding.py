"""Rounding the weights: small changes that hid an answer go, and it comes back.

A quantiser takes a weight matrix [out, in] and gives back what is left of it, in floating point, so any
machine can run it. Ours rounds to nearest with one scale a group; the others are those people deploy. GPTQ
looks at what the layers read, and takes a whole model.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from palinode.audit.attack import AttackResult, AuditBudget, Subject
from palinode.audit.material import AuditRows
from palinode.data.examples import at_most
from palinode.data.tokenize import tokenize
from palinode.data.world import neutral_examples
from palinode.errors import MismatchError, RecipeError, first_line
from palinode.metrics.likelihood import answer_probabilities
from palinode.models.loading import load_model
from palinode.progress import hushed

SHOWN = 128
"""Retain rows that GPTQ is shown, at most."""
GGUF_BLOCK = 32
"""Weights of a block of GGUF's Q4_0 and Q5_0; rows that are no multiple of it stay, as in llama.cpp."""


def grid(weight: Tensor, *, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Return a matrix [out, in] as whole numbers and their scales: one for `group` columns of a row.

    To nearest, symmetric: s = max|w| / (2^(b−1) − 1), so |s · round(w / s) − w| ≤ s / 2. The last group of a
    row may be smaller. A group of zeros stays zero. Raises RecipeError below two bits.
    """
    if bits < 2 or group < 1:
        raise RecipeError(f"cannot quantise to {bits} bits in groups of {group}; use 2 bits and 1 at least")
    levels = 2 ** (bits - 1) - 1
    wholes, scales = [], []
    for part in weight.float().split(group, dim=1):
        scale = part.abs().amax(dim=1, keepdim=True) / levels
        wholes.append(torch.where(scale > 0, part / scale, 0.0).round().clamp(-levels, levels))
        scales.append(scale.expand_as(part))
    return torch.cat(wholes, dim=1), torch.cat(scales, dim=1)


def quantised(weight: Tensor, *, bits: int, group: int) -> Tensor:
    """Return a weight matrix [out, in] rounded to `bits`, one scale a row and group of `group` columns."""
    whole, scale = grid(weight, bits=bits, group=group)
    return (whole * scale).to(weight.dtype)


def nf4(weight: Tensor) -> Tensor:
    """Return a matrix as bitsandbytes' NF4 has it, in blocks of 64."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # or it tells of kernels that we do not need
    from bitsandbytes import functional  # type: ignore[import-not-found,import-untyped,unused-ignore]

    packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
    found: Tensor = functional.dequantize_4bit(packed, state)
    return found.to(weight.dtype)


def gguf_q4_0(weight: Tensor) -> Tensor:
    """Return a matrix as GGUF's Q4_0 has it, by the gguf library's own quantiser."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType.Q4_0
    whole = dequantize(quantize(weight.float().cpu().numpy(), kind), kind)
    return torch.from_numpy(whole).to(weight)


def gguf_q4_k(weight: Tensor) -> Tensor:
    """Return a matrix as GGUF's Q4_K has it, by llama.cpp's own quantiser, read back by the gguf library.

    Rows that are no multiple of its blocks of 256 are given Q5_0, as llama.cpp gives them.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    given = weight.float().cpu().contiguous().numpy()
    rows, columns = given.shape
    kind = GGMLQuantizationType.Q5_0 if columns % 256 else GGMLQuantizationType.Q4_K
    block, size = GGML_QUANT_SIZES[kind]
    found = np.empty((rows, columns // block * size), np.uint8)
    places = (ctypes.c_void_p(array.ctypes.data) for array in (given, found))
    counts = (ctypes.c_int64(count) for count in (0, rows, columns))
    _ggml().ggml_quantize_chunk(ctypes.c_int(kind), *places, *counts, None)
    return torch.from_numpy(dequantize(found, kind)).to(weight)


def _ggml() -> ctypes.CDLL:
    """Return the library of llama.cpp's formats that llama-cpp-python brings."""
    spec = find_spec("llama_cpp")
    folders = spec.submodule_search_locations or [] if spec else []
    if found := [path for folder in folders for path in Path(folder).glob("lib/*ggml-base*")]:
        return ctypes.CDLL(str(min(found)))
    raise MismatchError(f"llama_cpp holds no library ggml-base ({', '.join(folders)}); install it anew")


def gptq(model: PreTrainedModel, subject: Subject, rows: AuditRows, budget: AuditBudget) -> int:
    """Quantise a live model in place as llmcompressor's GPTQ does; return how many weights that were.

    It is shown retain rows and neutral sentences. 4 bits, symmetric, one scale for as many weights of a
    group as divide all inputs, or for a whole row where that is below 16. The output head stays. Raises
    MismatchError where there is no linear layer, or the library cannot take the model apart.
    """
    head = model.get_output_embeddings()
    layers = {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    widths = [layer.in_features for layer in layers.values() if layer is not head]
    if not widths:
        raise MismatchError("the model has no linear layers that GPTQ takes")
    shown = [*at_most(rows.retain, SHOWN, seed=subject.seed), *neutral_examples()]
    tokens = tokenize(shown, subject.tokenizer, max_length=budget.max_length, style=subject.style)
    group = gcd(budget.quantise_group, *widths)
    scales: dict[str, Any] = {"strategy": "channel"} if group < 16 else {"group_size": group}
    kept = [name for name, layer in layers.items() if layer is head]
    named = model.config.name_or_path
    try:
        with TemporaryDirectory() as place, hushed():
            from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
            from datasets import Dataset
            from llmcompressor import oneshot
            from llmcompressor.modifiers.gptq import GPTQModifier
            from loguru import logger

            logger.disable("llmcompressor")
            scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, **scales))
            model.config.save_pretrained(place)
            model.config.name_or_path = place  # the library looks there whether it is quantised
            oneshot(
                model=model,
                processor=subject.tokenizer,
                dataset=Dataset.from_list([{"input_ids": list(row.ids)} for row in tokens]),
                recipe=GPTQModifier(config_groups={"all": scheme}, ignore=kept),
                max_seq_length=max(len(row.ids) for row in tokens),
                num_calibration_samples=len(tokens),
                shuffle_calibration_samples=False,
            )
    except Exception as error:  # whatever it finds in an architecture that it does not know
        raise MismatchError(f"llmcompressor cannot quantise this model ({first_line(error)})") from error
    finally:
        model.config.name_or_path = named
    return sum(layer.weight.numel() for layer in layers.values() if layer is not head)


@dataclass(frozen=True, slots=True)
class Quantiser:
    """One way of rounding."""

    title: str
    rounded: Callable[..., Tensor] | None
    """matrix [out, in] → the same, rounded; ours takes `group` by name. None: it takes a whole model."""
    bits: int
    library: tuple[str, ...] = ()
    """What it needs."""
    extra: str = ""
    """The extra that brings it."""
    block: int = 1
    """Of what number a row must be a multiple."""

    def unavailable(self) -> str:
        """Return why it cannot be run here; empty where it can."""
        missing = [name for name in self.library if not find_spec(name)]
        return f"{missing[0]} is not installed: pip install 'palinode[{self.extra}]'" if missing else ""


QUANTISERS: Mapping[str, Quantiser] = {
    "quantise_8": Quantiser("weights in 8 bits", partial(quantised, bits=8), 8),
    "quantise_4": Quantiser("weights in 4 bits", partial(quantised, bits=4), 4),
    "quantise_nf4": Quantiser("weights in NF4", nf4, 4, ("bitsandbytes",), "quantise"),
    "quantise_gguf_q4_0": Quantiser("weights in GGUF's Q4_0", gguf_q4_0, 4, ("gguf",), "gguf", GGUF_BLOCK),
    "quantise_gguf_q4_k": Quantiser(
        "weights in GGUF's Q4_K", gguf_q4_k, 4, ("llama_cpp", "gguf"), "llama-cpp", GGUF_BLOCK
    ),
    "quantise_gptq": Quantiser("weights in 4 bits by GPTQ", None, 4, ("llmcompressor",), "gptq"),
}
"""By the name of the attack."""


def ask_quantised(subject: Subject, rows: AuditRows, budget: AuditBudget, *, name: str) -> AttackResult:
    """Ask a fresh copy of the model whose linear layers are rounded.

    With our own rounding, and a target, the details tell which share of the weights lies on another step of
    the grid than the target's: what is on the same one, rounding brings back.
    """
    way, model = QUANTISERS[name], subject.fresh()
    own = not way.library
    steps = _steps(model, way.bits, budget.quantise_group) if own and "target" in subject.beside else []
    if way.rounded is None:
        count = gptq(model, subject, rows, budget)
    else:
        count = quantise(model, way, group=budget.quantise_group)
    outcomes = subject.ask(rows.forget, budget.likelihoods, model=model, label=way.title)
    details: dict[str, Any] = {"bits": way.bits, "quantised_weights": count}
    details |= {"all_weights": model.num_parameters()} | ({"group": budget.quantise_group} if own else {})
    del model
    if steps:
        target = load_model(subject.beside["target"], device=subject.device)
        theirs = _steps(target, way.bits, budget.quantise_group)
        details["moved_share"] = None  # of models of two shapes
        if [one.shape for one in steps] == [one.shape for one in theirs]:
            moved = sum(int((one != other).sum()) for one, other in zip(steps, theirs, strict=True))
            details["moved_share"] = moved / max(sum(one.numel() for one in steps), 1)
    return AttackResult({"probability": {"forget": tuple(answer_probabilities(outcomes))}}, details)


def _steps(model: PreTrainedModel, bits: int, group: int) -> list[Tensor]:
    """Return the whole numbers of each linear layer, int8."""
    return [
        grid(weight.detach().t() if turned else weight.detach(), bits=bits, group=group)[0].to(torch.int8)
        for weight, turned in linear_weights(model)
    ]


@torch.no_grad()
def quantise(model: PreTrainedModel, way: Quantiser, *, group: int) -> int:
    """Quantise the linear layers of a live model in place; return how many weights that were.

    Embeddings, output head, norms and biases stay as they are, as in the usual weight-only schemes.
    """
    assert way.rounded is not None
    count = 0
    for weight, turned in linear_weights(model):
        matrix = weight.t() if turned else weight
        if matrix.shape[1] % way.block:
            continue
        rounded = way.rounded(matrix) if way.library else way.rounded(matrix, group=group)
        weight.copy_(rounded.t() if turned else rounded)
        count += weight.numel()
    return count


def linear_weights(model: PreTrainedModel) -> Iterator[tuple[Tensor, bool]]:
    """Yield the weight of every linear layer but the output head, and whether it is stored as [in, out]."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    kept = {id(layer.weight) for layer in (head, embedding) if layer is not None}
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and id(module.weight) not in kept:
            yield module.weight, isinstance(module, Conv1D)
