"""Packed weights are refused by name whatever their config says, and a model's own buffers never are."""

import json
from pathlib import Path

import pytest
import torch

from palinode.errors import CheckpointError
from palinode.weights import Checkpoint
from palinode.weights.folders import refuse_packed

LAYER = "model.layers.0.mlp.up_proj"
PLAIN = {
    "model.embed_tokens.weight": torch.ones(16, 8),
    "model.norm.weight": torch.ones(8),
    "lm_head.weight": torch.ones(16, 8),
}


def ints(*shape, dtype=torch.int32):
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


def u8(*shape):
    return ints(*shape, dtype=torch.uint8)


FORMATS = {
    "GPTQ": (
        {"qweight": ints(1, 8), "qzeros": ints(1, 1), "scales": torch.ones(1, 8), "g_idx": ints(8)},
        "original",
    ),
    "GPTQ without g_idx": (
        {"qweight": ints(1, 8), "qzeros": ints(1, 1), "scales": torch.ones(1, 8)},
        "original",
    ),
    "AWQ": ({"qweight": ints(8, 1), "qzeros": ints(1, 1), "scales": torch.ones(1, 8)}, "original"),
    "MLX": (
        {"weight": ints(8, 1).view(torch.uint32), "scales": torch.ones(8, 1), "biases": torch.ones(8, 1)},
        "mlx_lm.convert --dequantize",
    ),
    "bitsandbytes int8": (
        {"weight": ints(8, 8, dtype=torch.int8), "SCB": torch.ones(8), "weight_format": u8(1)},
        "dequantize",
    ),
    "bitsandbytes 4-bit": (
        {
            "weight": u8(32, 1),
            "weight.absmax": torch.ones(1),
            "weight.quant_map": torch.ones(16),
            "weight.quant_state.bitsandbytes__nf4": u8(80),
        },
        "dequantize",
    ),
    "bitsandbytes 4-bit kept as bfloat16": (
        {
            "weight": torch.ones(16, 1, dtype=torch.bfloat16),
            "weight.absmax": torch.ones(1),
            "weight.quant_map": torch.ones(16),
        },
        "dequantize",
    ),
    "compressed-tensors": (
        {"weight_packed": ints(8, 1), "weight_scale": torch.ones(8, 1), "weight_shape": ints(2)},
        "run_compressed=False",
    ),
    "compressed-tensors int8": (
        {"weight": ints(8, 8, dtype=torch.int8), "weight_scale": torch.ones(8, 1)},
        "run_compressed=False",
    ),
    "HQQ": ({"W_q": u8(4, 8), "scale": torch.ones(8, 1), "zero": torch.ones(8, 1)}, "dequantize"),
    "MXFP4": ({"gate_up_proj_blocks": u8(2, 8, 1, 4), "gate_up_proj_scales": u8(2, 8, 1)}, "Mxfp4Config"),
    "EETQ": ({"qweight": ints(8, 8, dtype=torch.int8), "weight_scales": torch.ones(8)}, "original"),
    "AQLM": ({"codes": ints(8, 1, 1, dtype=torch.int16), "codebooks": torch.ones(1, 16, 1, 8)}, "original"),
    "quanto": ({"weight._data": ints(8, 8, dtype=torch.int8), "weight._scale": torch.ones(8, 1)}, "original"),
    "torchao": ({"_weight_qdata": ints(8, 8, dtype=torch.int8), "_weight_scale": torch.ones(8)}, "original"),
    "an unknown format": ({"nobody_knows": u8(8, 8)}, "original"),
    "an unknown format under a known name": ({"weight": u8(8, 8)}, "original"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_weights_are_refused_with_name_and_way_out(models, kind):
    parts, way_out = FORMATS[kind]
    folder = models.write("packed", PLAIN | {f"{LAYER}.{name}": value for name, value in parts.items()})
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder)
    name = kind.split(" without")[0].split(" kept")[0].split(" under")[0].removesuffix(" int8")
    assert f"is quantised: its weights are packed as {name}" in str(error.value)
    assert way_out in str(error.value)


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale"])
def test_eight_bit_floats_are_refused_as_fp8(models, scale):
    parts = {f"{LAYER}.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), f"{LAYER}.{scale}": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"F8_E4M3, FP8, .*dequantize=True"):
        Checkpoint.open(models.write("packed", PLAIN | parts))


def test_four_bits_with_scales_of_eight_are_not_called_fp8(models):
    parts = {"weight_packed": u8(8, 4), "weight_scale": torch.ones(8, 1).to(torch.float8_e4m3fn)}
    written = models.write("nvfp4", PLAIN | {f"{LAYER}.{name}": value for name, value in parts.items()})
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(written)
    assert "FP8" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("quantization_config", {"quant_method": "bitnet"}, "bitnet"),
        ("quantization", {"group_size": 64, "bits": 4}, "MLX"),
        ("compression_config", {"format": "dense"}, "an unknown format"),
        ("quantization_config", {"group_size": 64, "bits": 4}, "an unknown format"),
    ],
)
def test_a_config_that_says_so_is_believed(models, key, value, name):
    with pytest.raises(
        CheckpointError, match=f"is quantised: its weights are packed as {name},.*config.json"
    ):
        Checkpoint.open(models.write("said", PLAIN, **{key: value}))


def test_mlx_is_named_where_its_settings_stand_twice_without_a_method(models):
    both = {key: {"group_size": 64, "bits": 4} for key in ("quantization", "quantization_config")}
    with pytest.raises(CheckpointError, match="packed as MLX"):
        Checkpoint.open(models.write("mlx", PLAIN, **both))


ONE_LAYER = {
    "Marlin": {"B": ints(4, 16), "s": torch.ones(1, 8)},
    "EXL3": {"trellis": ints(4, 4, 8, dtype=torch.int16), "suh": torch.ones(8), "svh": torch.ones(8)},
    "QuIP#": {"Qidxs": ints(8, 8, dtype=torch.int16), "SU": torch.ones(8), "SV": torch.ones(8)},
    "VPTQ": {"indices": ints(1, 8, 4, dtype=torch.int16), "centroids.weight": torch.ones(1, 16)},
    "numbers in a row": {"packed": u8(64), "scale": torch.ones(8)},
    "one bit each": {"weight": torch.ones(8, 8, dtype=torch.bool)},
    "signs and a scale": {"sign": torch.ones(8, 8, dtype=torch.bool), "alpha": torch.ones(8)},
    "square, one in front": {"weight": ints(1, 8, 8, dtype=torch.int8)},
}


@pytest.mark.parametrize("kind", ONE_LAYER)
def test_one_packed_layer_of_a_large_model_is_refused(models, kind):
    large = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(500, 100) for i in (1, 2)}
    parts = {f"{LAYER}.{name}": value for name, value in ONE_LAYER[kind].items()}
    with pytest.raises(CheckpointError, match="is quantised: its weights are packed as"):
        Checkpoint.open(models.write("packed", PLAIN | large | parts))


def test_a_config_may_say_so_of_the_text_tower():
    inner = {"text_config": {"quantization_config": {"quant_method": "gptq"}}}
    with pytest.raises(CheckpointError, match="packed as gptq"):
        refuse_packed(Path("folder"), {}, inner)


BUFFERS = {
    "mask that is a lower triangle": ("h.0.attn.tril", u8(64, 64)),
    "mask without ones before it": ("h.0.attn.bias", torch.ones(64, 64, dtype=torch.uint8).tril()),
    "mask that is not square": ("h.0.attn.bias", torch.ones(1, 1, 32, 64, dtype=torch.uint8).tril()),
    "several masks": ("h.0.attn.local_bias", torch.ones(2, 1, 64, 64, dtype=torch.uint8)),
    "table of relative positions": ("h.0.attn.relative_position_index", ints(49, 49, dtype=torch.int64)),
    "table of experts for tokens": ("h.0.gate.tid2eid", ints(500, 6, dtype=torch.int64)),
    "another vocabulary's numbers": ("d2t", ints(500, dtype=torch.int64)),
    "mask as bytes": ("h.0.attn.bias", torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()),
    "mask as truth": ("h.0.attn.bias", torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()),
    "mask of its own name": ("h.0.attn.causal_mask", torch.ones(64, 64, dtype=torch.uint8)),
    "positions": ("position_ids", torch.arange(512).view(1, 512)),
    "types": ("token_type_ids", torch.zeros(8, 512, dtype=torch.int64)),
    "count": ("steps", torch.tensor(3)),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_of_whole_numbers_are_no_packed_weights(models, kind):
    name, value = BUFFERS[kind]
    tensors = {"wte.weight": torch.ones(8, 8), "h.0.attn.c_attn.weight": torch.ones(8, 24), name: value}
    target, base = (
        models.make(place, {**tensors, "ln_f.weight": torch.full((8,), shift)})
        for place, shift in (("target", 1.0), ("base", 0.5))
    )
    saved = (target - 1.0 * (base - target)).save(models.place / "out")
    assert torch.equal(models.read(saved.checkpoint.folder)[name], value)
    assert models.read(saved.checkpoint.folder)["ln_f.weight"].tolist() == [1.5] * 8
    numbers = 64 + 192 + 8
    assert saved.dose.unreached_share == value.numel() / (numbers + value.numel())
    written = json.loads((saved.checkpoint.folder / "weights.json").read_text())
    assert written["dose"]["unreached_share"] == saved.dose.unreached_share
