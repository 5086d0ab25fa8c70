"""One tensor under several names: what wrappers, trainers and versions of one library add to it.

`plain` takes off the model's own prefix (GPT-2 with and without `transformer.`) and what wrappers leave in a
name (`module.`, `_orig_mod.`), and gives the output head and the experts of a mixture one spelling each. Two
tensors of one file never count as one: a plain name that two of them share stands for neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "head.weight", "output_projection.weight")
"""Names of output heads. A tied head that is not in the files shares its storage with the token embedding."""

EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "embed_in",
    "tok_embeddings",
    "word_embeddings",
    "word_embedding",
    "embeddings",
)

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What data parallelism, torch.compile, FSDP and checkpointing put into names, anywhere."""

STEMS = {"base_model", "model", "transformer", "gpt_neox", "backbone", "language_model", "text_model",
    "rwkv", "bert", "roberta", "biogpt", "cpmant", "gpt_neox_japanese"}  # fmt: skip
"""What stands before the name that a tensor has in the bare model."""

MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

# What a model computes for itself, and old checkpoints hold all the same.
BUFFER = re.compile(
    r"(^|\.)(original_inv_freq|inv_freq|(cos|sin)_cached|masked_bias|num_batches_tracked|(.+_)?mask|tril|triu|(.+_)?ids)$"
)

CALLED_WEIGHTS = re.compile(r"(weight|weight_packed|_data|codes|_blocks|W_q)$")


@lru_cache(maxsize=1 << 16)
def plain(name: str) -> str:
    """Return the one spelling of a tensor's name.

    >>> plain("module.transformer.h.0._orig_mod.ln_1.weight"), plain("embed_out.weight")
    ('h.0.ln_1.weight', 'lm_head.weight')
    >>> plain("model.layers.0.block_sparse_moe.experts.1.w2.weight")
    'layers.0.mlp.experts.1.down_proj.weight'
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 2 and parts[0] in STEMS:
        del parts[0]
    if len(parts) == 2 and f"{parts[0]}.weight" in HEADS:
        parts[0] = "lm_head"
    if "block_sparse_moe" in parts:
        parts[parts.index("block_sparse_moe")] = "mlp"
    if len(parts) > 3 and parts[-4] == "experts":
        parts[-2] = MIXTRAL.get(parts[-2], parts[-2])
    return ".".join(parts)


def by_plain(names: Iterable[str]) -> dict[str, str]:
    """Return each name by its plain one, without those that several names have."""
    found: dict[str, str] = {}
    shared = set()
    for name in names:
        if found.setdefault(plain(name), name) != name:
            shared.add(plain(name))
    return {key: name for key, name in found.items() if key not in shared}


def is_head(name: str) -> bool:
    """Tell whether this is an output head's weight, under any spelling."""
    return plain(name) == HEADS[0]


def is_embedding(name: str) -> bool:
    """Tell whether this is a token embedding, under any spelling."""
    *_, module, kind = ("", *plain(name).split("."))
    return kind == "weight" and module in EMBEDDINGS


def is_buffer(name: str, shape: tuple[int, ...], *, is_float: bool) -> bool:
    """Tell whether a model computes this tensor for itself: rotary frequencies, masks, positions.

    A causal mask is [n, n], mostly with ones before it, and is called `bias` in GPT-2 and its kin.
    """
    square = len(shape) > 2 and shape[-1] == shape[-2] and set(shape[:-2]) == {1}
    if is_float:
        return bool(BUFFER.search(name)) or (square and name.endswith(".bias"))
    mask = len(shape) > 1 and name.endswith("bias")
    return bool(BUFFER.search(name)) or mask or (square and not CALLED_WEIGHTS.search(name))
