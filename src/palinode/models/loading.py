"""Load a checkpoint as a live model with its tokenizer. No remote code, no pickles, SDPA attention."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from palinode.errors import CheckpointError, InputError
from palinode.weights.checkpoint import Checkpoint, require_causal_lm


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name; "auto" takes CUDA, then MPS, then the CPU.

    Raises InputError when the device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"there is no device {name!r} here ({str(error).splitlines()[0]}); use cpu or auto"
        ) from None
    return device


def load_model(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return the checkpoint as a causal language model in evaluation mode.

    Raises CheckpointError when it is no causal language model or transformers cannot build it.
    """
    require_causal_lm(checkpoint)
    with quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=dtype,
                attn_implementation="sdpa",
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{checkpoint.folder} cannot be loaded as a causal language model "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
    model, info = loaded
    _require_all_weights(checkpoint, info)
    ready: PreTrainedModel = model.to(device).eval()
    return ready


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
    return tokenizer


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to fill batches with. Any will do: attention masks come from lengths."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def _require_all_weights(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    """Refuse a model part of whose weights were made up: transformers would only warn."""
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} weights that its config asks for "
            f"(first: {missing[0]}); are config.json and the weights of the same model?"
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
