"""Packed weights: matrices stored as whole numbers, to be multiplied by scales that lie beside them.

They cannot be added. Whatever their names, whole numbers that are no buffer are packed weights where they
are called weights or make up a notable part of the model; names only tell which format it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError
from palinode.weights.names import is_buffer
from palinode.weights.tensors import FLOAT_BYTES, TensorInfo, shown

NOTABLE = 0.01
"""Share of a model's bytes from which whole numbers cannot be a table of the model's own."""

EMBEDDING = re.compile(r"embed|(^|\.)wte\.")
CALLED_WEIGHTS = re.compile(r"(weight|weight_packed|_data|codes|_blocks|W_q)$")

ORIGINAL = "take the original model that it was made from"
DEQUANTISE = f"save it dequantised (in transformers: model.dequantize(), then save_pretrained), or {ORIGINAL}"
IN_FULL = f"load it with {{}} in transformers and save_pretrained, or {ORIGINAL}"
UNCOMPRESSED = IN_FULL.format("CompressedTensorsConfig(run_compressed=False)")

UNKNOWN = "an unknown format"

# (format, pattern of the tensors' names that give it away, the way out); the first that fits counts.
FORMATS = (
    ("bitsandbytes 4-bit", r"\.weight\.(absmax|quant_map|nested_\w+|quant_state\..+)$", DEQUANTISE),
    ("bitsandbytes int8", r"\.(SCB|weight_format)$", DEQUANTISE),
    ("AQLM", r"\.codebooks$", ORIGINAL),
    ("VPTQ", r"\.(centroids|res_centroids)(\.weight)?$", ORIGINAL),
    ("QuIP#", r"\.Qidxs(_\d+)?$", ORIGINAL),
    ("EXL2", r"\.q_weight$", ORIGINAL),
    ("EXL3", r"\.trellis$", ORIGINAL),
    ("HQQ", r"\.W_q$", DEQUANTISE),
    ("quanto", r"\._(data|scale|shift)$", ORIGINAL),
    ("torchao", r"(:|\.|_weight_)_?(qdata|tensor_impl|int_data)(\W|$)|:_data$", ORIGINAL),
    ("MXFP4", r"_blocks$", IN_FULL.format("Mxfp4Config(dequantize=True)")),
    ("compressed-tensors", r"\.weight_(packed|shape|zero_point|global_scale)$", UNCOMPRESSED),
    ("NVFP4 (ModelOpt)", r"\.weight_scale_2$", ORIGINAL),
    ("EETQ", r"\.weight_scales$", ORIGINAL),
    ("GPTQ", r"\.g_idx$", ORIGINAL),
    ("FP8", r"\.(weight_)?scale_inv$", IN_FULL.format("FineGrainedFP8Config(dequantize=True)")),
)  # fmt: skip


def refuse_packed(folder: Path, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
    """Raise CheckpointError with the format's name and the way out where a model's weights are packed."""
    method = _method(config)
    packed = _packed([*tensors.values()])
    if not packed and not method and not _is_bitsandbytes(tensors):
        return
    kind, way_out = _format(tensors, packed, method)
    numbers = sum(info.size for info in tensors.values())
    share = sum(info.size for info in packed) / numbers if numbers else 0
    found = ""
    if packed:
        largest = max(packed, key=lambda info: info.nbytes)
        found = f" ({largest.dtype} {shown(largest.name)}, …: {share:.0%} of its numbers)"
    raise CheckpointError(
        f"{folder} is quantised: its weights are packed as {kind}{found}, and only floating point can be "
        f"added; {way_out}"
    )


def _packed(infos: Sequence[TensorInfo]) -> list[TensorInfo]:
    """Return the tensors that are weights in another form than floating point."""
    whole = [
        info
        for info in infos
        if info.dtype not in (*FLOAT_BYTES, "BOOL") and not is_buffer(info.name, info.shape, is_float=False)
    ]
    matrices = [info for info in whole if len(info.shape[_leading_ones(info.shape) :]) > 1]
    called = [info for info in whole if CALLED_WEIGHTS.search(info.name)]
    total, is_model = _bytes(infos), any(EMBEDDING.search(info.name) for info in infos)
    if any(len(info.shape) > 1 for info in called) or _bytes(called) > total / 2:
        return whole
    return whole if is_model and _bytes(matrices) > NOTABLE * total else []


def _leading_ones(shape: tuple[int, ...]) -> int:
    return next((place for place, length in enumerate(shape) if length != 1), len(shape))


def _bytes(infos: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in infos)


def _is_bitsandbytes(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether bytes are packed as if they were floating point, which only their tables give away."""
    return any(name.endswith((".absmax", ".quant_map")) for name in tensors)


def _method(config: Mapping[str, Any]) -> str | None:
    """Return what the config calls the quantisation; None where it has none."""
    settings = [found for key in ("quantization_config", "compression_config") if (found := config.get(key))]
    for entry in settings:
        if isinstance(entry, dict) and isinstance(named := entry.get("quant_method"), str) and named:
            return named
    return "MLX" if config.get("quantization") else UNKNOWN if settings else None


def _format(
    tensors: Mapping[str, TensorInfo], packed: Sequence[TensorInfo], method: str | None
) -> tuple[str, str]:
    """Return the name of the format and the way out."""
    for kind, pattern, way_out in FORMATS:
        if any(re.search(pattern, name) for name in tensors):
            return kind, way_out
    words = next((info for info in packed if info.name.endswith("qweight")), None)
    if words and (scales := tensors.get(words.name.removesuffix("qweight") + "scales")):
        return ("GPTQ" if scales.shape[-1:] == words.shape[-1:] else "AWQ"), ORIGINAL
    unnamed = method in (None, UNKNOWN)
    if method == "MLX" or (unnamed and any(info.dtype == "U32" for info in packed)):
        return "MLX", f"save it with mlx_lm.convert --dequantize, or {ORIGINAL}"
    if method == "compressed-tensors":
        return method, UNCOMPRESSED
    if unnamed and any(name.endswith(".weight_scale") for name in tensors):
        return "compressed-tensors", UNCOMPRESSED
    return method or UNKNOWN, ORIGINAL
