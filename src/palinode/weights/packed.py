"""Packed weights: matrices stored as whole numbers, to be multiplied by scales that lie beside them.

They cannot be added. Whatever their names, whole numbers that are no buffer are packed weights where
they are called weights, lie in a layer that has nothing but scales besides, or make up a notable part of
the model. One layer is enough. Names only tell which format it is, or give
away a format that has no others like it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError
from palinode.weights.tensors import CALLED_WEIGHTS, FLOAT_BYTES, TensorInfo, is_buffer, shown

NOTABLE = 0.01
"""Share of a model's bytes from which whole numbers cannot be a table of the model's own."""

EMBEDDING = re.compile(r"embed|(^|\.)wte\.")
INDICES = ("I64", "U64")
"""What torch counts and points with; nobody packs weights in so wide a type under a name of its own."""

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
        if info.dtype not in FLOAT_BYTES and not is_buffer(info.name, info.shape, is_float=False)
    ]
    called = [info for info in whole if CALLED_WEIGHTS.search(info.name)]
    total, is_model = _bytes(infos), any(EMBEDDING.search(info.name) for info in infos)
    if any(len(info.shape) > 1 for info in called) or _bytes(called) > total / 2:
        return whole
    if any(map(_scales_beside(infos), whole)) or (whole and _known(info.name for info in infos)):
        return whole
    tables = [info for info in whole if _is_matrix(info) and info.dtype not in (*INDICES, "BOOL")]
    return whole if is_model and _bytes(tables) > NOTABLE * total else []


def _scales_beside(infos: Sequence[TensorInfo]) -> Callable[[TensorInfo], bool]:
    """Return what tells whether whole numbers are all that a layer has, but for fewer floating-point ones."""
    layers: dict[str, list[TensorInfo]] = {}
    for info in infos:
        layers.setdefault(_layer(info.name), []).append(info)
    outer = {_layer(name) for name in layers}

    def tells(info: TensorInfo) -> bool:
        layer = _layer(info.name)
        scales = [one.size for one in layers[layer] if one.is_float]
        shaped = _is_matrix(info) or info.dtype not in INDICES
        return shaped and layer not in outer and 0 < max(scales, default=0) < info.size

    return tells


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape[_leading_ones(info.shape) :]) > 1


def _leading_ones(shape: tuple[int, ...]) -> int:
    return next((place for place, length in enumerate(shape) if length != 1), len(shape))


def _bytes(infos: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in infos)


def _is_bitsandbytes(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether bytes are packed as if they were floating point, which only their tables give away."""
    return any(name.endswith((".absmax", ".quant_map")) for name in tensors)


def _method(config: Mapping[str, Any]) -> str | None:
    """Return what the config calls the quantisation; None where it has none."""
    inner = config.get("text_config")
    places = (config, inner if isinstance(inner, dict) else {})
    keys = ("quantization_config", "compression_config")
    settings = [found for place in places for key in keys if (found := place.get(key))]
    for entry in settings:
        if isinstance(entry, dict) and isinstance(named := entry.get("quant_method"), str) and named:
            return named
    return "MLX" if any(place.get("quantization") for place in places) else UNKNOWN if settings else None


def _known(names: Iterable[str]) -> tuple[str, str] | None:
    """Return name and way out of the format that tensors of these names are of."""
    names = list(names)
    fits = (one for one in FORMATS if any(re.search(one[1], name) for name in names))
    return next(((kind, way_out) for kind, _, way_out in fits), None)


def _format(
    tensors: Mapping[str, TensorInfo], packed: Sequence[TensorInfo], method: str | None
) -> tuple[str, str]:
    """Return the name of the format and the way out."""
    if found := _known(tensors):
        return found
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
