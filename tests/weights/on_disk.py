"""Checkpoints in the layouts that people have, written by torch, gguf and transformers themselves."""

import io
import itertools
import json
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from palinode.weights import Checkpoint
from palinode.weights.tensors import Files

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}


def write_config(folder: Path, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in row-major order."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def read(info, step: int = 1 << 16) -> bytes:
    """The bytes of a tensor as the engine reads them, `step` at a time."""
    out = memoryview(bytearray(info.nbytes))
    with Files() as files:
        for start in range(0, info.nbytes, step):
            info.read(files, start, out[start : start + step])
    return bytes(out)


def assert_holds(checkpoint: Checkpoint, state: dict[str, torch.Tensor], step: int = 1 << 16) -> None:
    """The checkpoint has these tensors and no others, with every bit of them."""
    assert checkpoint.tensors.keys() == state.keys()
    for name, tensor in state.items():
        info = checkpoint.tensors[name]
        assert info.name == name
        assert info.shape == tuple(tensor.shape)
        assert info.nbytes == tensor.numel() * tensor.element_size()
        assert read(info, step) == raw(tensor), name


def boxes(shape, grid):
    """The chunks (offsets, sizes) when dimension d is cut at the places grid[d]."""
    cuts = [[0, *grid.get(axis, ()), length] for axis, length in enumerate(shape)]
    for place in itertools.product(*(range(len(cut) - 1) for cut in cuts)):
        low = [cut[i] for cut, i in zip(cuts, place, strict=True)]
        high = [cut[i + 1] for cut, i in zip(cuts, place, strict=True)]
        yield torch.Size(low), torch.Size(b - a for a, b in zip(low, high, strict=True))


def write_dcp(folder: Path, state, grids=None, *, ranks=2, planner_data=None) -> Metadata:
    """A folder as several ranks would leave it: chunks dealt out to files, and torch's own metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [io.BytesIO() for _ in range(ranks)]
    described, places = {}, {}
    hands = itertools.cycle(range(ranks))
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            described[name] = BytesStorageMetadata()
            continue
        chunks = list(boxes(tensor.shape, (grids or {}).get(name, {})))
        properties = TensorProperties(dtype=tensor.dtype)
        listed = [ChunkStorageMetadata(*chunk) for chunk in chunks]
        described[name] = TensorStorageMetadata(properties, tensor.size(), listed)
        for number, (offsets, sizes) in enumerate(chunks):
            part = tensor.detach()
            for axis in range(part.dim()):
                part = part.narrow(axis, offsets[axis], sizes[axis])
            rank = next(hands)
            start = files[rank].tell()
            torch.save(part.contiguous(), files[rank])
            info = _StorageInfo(f"__{rank}_0.distcp", start, files[rank].tell() - start)
            places[MetadataIndex(name, offsets, number)] = info
    for rank, file in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    metadata = Metadata(described, planner_data=planner_data, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return metadata


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """What llama.cpp calls a weight of LlamaForCausalLM."""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, *module, _ = name.split(".")
    return f"blk.{layer}.{GGUF_NAMES['.'.join(module)]}.weight"


def interleaved(weight, heads: int):
    """Rows of a query or key projection in the order of llama.cpp, which turns neighbours, not halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model, kind: str | None = None) -> None:
    """A Llama model as a GGUF file; matrices are quantised where `kind` names a type."""
    import gguf
    import numpy as np

    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            query = name.endswith("q_proj.weight")
            values = interleaved(values, config.num_attention_heads if query else config.num_key_value_heads)
        values = np.ascontiguousarray(values)
        if kind is not None and values.ndim == 2:
            code = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, code), raw_dtype=code)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_llama(**options):
    """A Llama of two layers and some ten thousand weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options}))
