"""GGUF files, as llama.cpp uses them, through transformers: dequantised to float32 and held in memory.

GGUF has its own names and its own order of some weights; transformers knows how to undo both. What it
gives is what the quantised file says, not the model that the file was made from: the notes say so.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError
from palinode.weights.foreign import bounded, from_config, from_pretrained
from palinode.weights.formats.safetensors import whole
from palinode.weights.tensors import Files, HeldTensor, TensorInfo, shown

NOT_THE_MODELS = ("_name_or_path", "quantization_config")

Model = tuple[dict[str, TensorInfo], list[str], Mapping[str, Any]]


def read_gguf(file: Path) -> Model:
    """Return the tensors (float32, in memory) of a GGUF file, notes, and its config.

    Raises CheckpointError when the packages that read it are missing, or they cannot read it.
    """
    if find_spec("gguf") is None or find_spec("transformers") is None:
        raise CheckpointError(f"{file} can be read only with the gguf package; pip install gguf")
    with Files() as files:
        window = whole(files, file)
        sound = window.size >= 24 and window.read(0, 4) == b"GGUF"
    if not sound:
        raise CheckpointError(f"{file} is cut off or no GGUF file; fetch it again")
    try:
        kinds, stored = _survey(file)
        with _quiet():
            tensors, config = _load(file, kinds.total(), stored)
    except CheckpointError:
        raise
    except Exception as error:  # both libraries raise many kinds here; each means that there is no model
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file} cannot be read as a GGUF model ({shown(reason)})") from error
    gigabytes = sum(info.nbytes for info in tensors.values()) / 1e9
    return tensors, [_note(file, kinds, gigabytes)], config


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the notes and the bar that transformers draws off the terminal."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(level)


def _note(file: Path, kinds: Mapping[str, int], gigabytes: float) -> str:
    """Say what was done to the weights."""
    packed = [kind for kind in kinds if kind not in ("F64", "F32", "F16", "BF16")]
    made = f"dequantised from {', '.join(packed)} to float32" if packed else "read as float32"
    lossy = "; they are what the quantised file says, not the weights it was made from" if packed else ""
    return f"{file.name}: its weights were {made} and are held in memory ({gigabytes:.2f} GB){lossy}"


def _survey(file: Path) -> tuple[Counter[str], int]:
    """Return how many tensors of each type there are, and the number of their elements."""
    import gguf

    reader = gguf.GGUFReader(file)
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    return kinds, sum(int(tensor.n_elements) for tensor in reader.tensors)


def _load(file: Path, count: int, stored: int) -> tuple[dict[str, TensorInfo], Mapping[str, Any]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = from_pretrained(AutoConfig, file.parent, gguf_file=file.name)
    if not 0 <= config.get_text_config().num_hidden_layers <= count:
        raise CheckpointError(f"{file} describes more layers than it has tensors; fetch it again")
    with bounded(file, tensors=count, numbers=stored):
        with torch.device("meta"):
            from_config(AutoModelForCausalLM, config)
        loaded: Any = from_pretrained(
            AutoModelForCausalLM,
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            output_loading_info=True,
        )
    model, found = loaded
    if found["missing_keys"]:
        raise CheckpointError(
            f"{file} lacks {len(found['missing_keys'])} weights of its model "
            f"(first: {min(found['missing_keys'])}); fetch it again"
        )
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if config.tie_word_embeddings else set()
    tensors = {
        name: _held(file, name, tensor) for name, tensor in model.state_dict().items() if name not in tied
    }
    return tensors, _config(model)


def _config(model: Any) -> Mapping[str, Any]:
    """Return the config of the dequantised model, as plain JSON and without a trace of where it came from."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in NOT_THE_MODELS}
    return {**json.loads(json.dumps(config, default=str)), "architectures": [type(model).__name__]}


def _held(file: Path, name: str, tensor: Any) -> TensorInfo:
    data = memoryview(tensor.detach().float().contiguous().numpy().reshape(-1).view("u1"))
    return HeldTensor(name, "F32", tuple(tensor.shape), file, 0, len(data), data)
