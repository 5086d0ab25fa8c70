"""Load a checkpoint as a live model with its tokenizer. No remote code, no pickles, SDPA attention."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import blake3
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from palinode.data.tokenize import TokenRow
from palinode.errors import CheckpointError, DataError, InputError
from palinode.weights.checkpoint import Checkpoint, require_causal_lm


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name; "auto" takes CUDA, then MPS, then the CPU.

    Raises InputError when the device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # there, and able to compute
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"there is no device {name!r} here ({str(error).splitlines()[0]}); use cpu or auto"
        ) from None
    return device


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    quantization: Any = None,
) -> PreTrainedModel:
    """Return the checkpoint as a causal language model in evaluation mode.

    `quantization` is a quantisation config of transformers, for a model that is only read. Raises
    CheckpointError when it is no causal language model or transformers cannot build it.
    """
    require_causal_lm(checkpoint)
    with quiet_transformers():
        try:
            placed = {"quantization_config": quantization, "device_map": {"": device}} if quantization else {}
            model, info = _build(checkpoint, dtype, "sdpa", placed)
        except Exception as error:  # transformers raises many kinds here; each means that there is no model
            raise CheckpointError(
                f"{checkpoint.folder} cannot be loaded as a causal language model ({_reason(error)})"
            ) from error
    _require_all_weights(checkpoint, info)
    ready: PreTrainedModel = (model if quantization else model.to(device)).eval()
    return ready


def _build(
    checkpoint: Checkpoint, dtype: torch.dtype, attention: str, placed: Mapping[str, Any] | None = None
) -> Any:
    """Return (model, loading info), with SDPA attention where the architecture has it."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
            **(placed or {}),
        )
    except ValueError as error:
        if attention == "eager" or "scaled_dot_product_attention" not in str(error):
            raise
        return _build(checkpoint, dtype, "eager", placed)


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Return the checkpoint's config as transformers reads it; raises CheckpointError when it cannot."""
    try:
        with quiet_transformers():
            config: PreTrainedConfig = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} describes no model that can be built ({_reason(error)})"
        ) from error
    return config


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Return the checkpoint's tokenizer; raises CheckpointError when the folder has none."""
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                checkpoint.folder, local_files_only=True
            )
    except Exception as error:  # transformers raises many kinds here; each means that there is no tokenizer
        raise CheckpointError(
            f"{checkpoint.folder} has no tokenizer that can be loaded ({type(error).__name__}); "
            "copy the tokenizer files of the model it came from into the folder"
        ) from error
    with contextlib.suppress(CheckpointError):  # it says so where the model is needed
        _ROWS[tokenizer] = int(load_config(checkpoint).get_text_config().vocab_size)
    return tokenizer


_ROWS: WeakKeyDictionary[PreTrainedTokenizerBase, int] = WeakKeyDictionary()
"""How many rows the embedding has beside which a tokenizer was found."""


def tokenizer_fingerprint(checkpoint: Checkpoint) -> str:
    """Return a content hash of the tokenizer and chat template that lie in a checkpoint's folder."""
    total = blake3.blake3()
    for path in checkpoint.companions():
        if path.name not in ("config.json", "generation_config.json"):
            total.update(f"{path.relative_to(checkpoint.folder)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:32]


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to fill batches with, inside the model's embedding.

    Any will do: attention masks come from lengths.
    """
    rows = _ROWS.get(tokenizer, sys.maxsize)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and token < rows:
            return token
    return 0


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model can take at a time; None where its config sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_positions(
    config: PreTrainedConfig, rows: Sequence[TokenRow], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise DataError when a row has more tokens than the model can take, or one that it does not know.

    `tokenizer` serves to name that token.
    """
    limit, longest = position_limit(config), max((len(row.ids) for row in rows), default=0)
    if limit is not None and longest > limit:
        raise DataError(
            f"a row has {longest} tokens and the model takes at most {limit}; "
            f"set max_length to {limit} or less"
        )
    check_known(config, max((max(row.ids) for row in rows), default=0), tokenizer)


def check_known(
    config: PreTrainedConfig, largest: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise DataError when the model's embedding has no row for the largest id of some tokens."""
    known = int(config.get_text_config().vocab_size)
    if largest >= known:
        name = f"the token {tokenizer.convert_ids_to_tokens(largest)!r} with the id" if tokenizer else "token"
        raise DataError(
            f"the rows hold {name} {largest}, and the model's embedding has {known} rows; "
            "put the model's own tokenizer into its folder, or enlarge its embedding"
        )


def _reason(error: Exception) -> str:
    """Return why transformers could not build a model, in one line."""
    text = str(error).strip()
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than its config asks for"
    return text.splitlines()[0] if text else type(error).__name__


def _require_all_weights(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    """Refuse a model part of whose weights were made up or left out: transformers would only warn."""
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} weights that its config asks for "
            f"(first: {missing[0]}); are config.json and the weights of the same model?"
        )
    unused = sorted(name for name in info.get("unexpected_keys", ()) if name.endswith(".weight"))
    if unused:  # old checkpoints hold buffers that nobody misses; those are no weights
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(unused)} weights that its config makes no use of "
            f"(first: {unused[0]}); are config.json and the weights of the same model?"
        )


class quiet_transformers:  # noqa: N801 - reads as a statement
    """Keep transformers' own progress bars and notes off the terminal while it loads or saves."""

    def __enter__(self) -> None:
        self.level = transformers.logging.get_verbosity()
        self.bars = transformers.logging.is_progress_bar_enabled()
        transformers.logging.set_verbosity(logging.ERROR)
        transformers.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers.logging.set_verbosity(self.level)
        if self.bars:
            transformers.logging.enable_progress_bar()
