"""Load a checkpoint as a live model with its tokenizer. No remote code, SDPA attention.

Pickles are read as everywhere else, as plain tensors (`Checkpoint`), and the model is built from those. Of
a wrapper with towers for images or sounds (Gemma3ForConditionalGeneration) the text tower is the live model.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import blake3
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.auto_factory import _get_model_class

from palinode.data.tokenize import TokenRow, recognise
from palinode.errors import CheckpointError, DataError, InputError, first_line, told_as, writing
from palinode.records import read_bytes
from palinode.weights.checkpoint import Checkpoint
from palinode.weights.fingerprints import unchanged
from palinode.weights.folders import require_causal_lm
from palinode.weights.foreign import (
    WEIGHTS,
    bounded,
    check_folder,
    from_config,
    from_pretrained,
    quiet_transformers,
)
from palinode.weights.formats.unpickler import CODES
from palinode.weights.tensors import FLOAT_BYTES, Files, TensorInfo, read_json, read_object, shown

DTYPES = {code: getattr(torch, name) for name, code in CODES.items()}

LARGEST_PLANNED = 50_000, 1 << 41
"""Tensors and numbers of the largest model that a config alone may describe."""

TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(lm_head\.)?(.+)|(lm_head\..+)")
"""What a wrapper calls the weights of its text tower."""


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name; "auto" takes CUDA, then MPS, then the CPU.

    Raises InputError when the device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with told_as(
        InputError, f"there is no device {name!r} here", "use cpu or auto", RuntimeError, AssertionError
    ):
        device = torch.device(name)
        torch.ones(1, device=device).item()  # there, and able to compute
    return device


def free_memory(device: torch.device) -> int:
    """Return how many bytes of a GPU nothing lies in; what torch keeps for later counts."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


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
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        # sums stay float32, so that rows depend less on others
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    require_causal_lm(checkpoint)
    refused = f"{checkpoint.folder} cannot be loaded as a causal language model"
    with quiet_transformers(lambda error: f"{refused} ({_reason(error)})"), unchanged([checkpoint]):
        placed = {"quantization_config": quantization, "device_map": {"": device}} if quantization else {}
        model, info = _build(checkpoint, dtype, "sdpa", placed)
    _require_all_weights(checkpoint, info)
    model.config.return_dict = True  # whatever the folder says, we go by names
    ready: PreTrainedModel = (model if quantization else model.to(device)).eval()
    return ready


def load_classifier(
    folder: Path, *, device: torch.device
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, Sequence[str]]:
    """Return a classifier of texts from safetensors, its tokenizer, and the names of weights that it lacks.

    Raises CheckpointError where its folder cannot be used without harm, and what transformers raises.
    """
    tokenizer = from_pretrained(AutoTokenizer, folder)
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with bounded(folder / "config.json", tensors=min(5_000, nbytes), numbers=nbytes):
        options = {"use_safetensors": True, "attn_implementation": "eager", "output_loading_info": True}
        model, report = from_pretrained(AutoModelForSequenceClassification, folder, **options)
    return tokenizer, model.to(device).eval(), sorted(report["missing_keys"])


def load_reader(
    checkpoint: Checkpoint, *, device: torch.device, precision: str = "auto", written: str | None = None
) -> PreTrainedModel:
    """Return a checkpoint as a model that is only read.

    "auto" is float32, and on a GPU the checkpoint's own dtype, or that in which its sums are `written`. In
    float32 a GPU may multiply with TF32.
    """
    dtype = _reading_dtype(checkpoint, device, precision, written)
    model = load_model(checkpoint, device=device, dtype=dtype)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return model


def _reading_dtype(
    checkpoint: Checkpoint, device: torch.device, precision: str, written: str | None
) -> torch.dtype:
    if precision != "auto":
        found: torch.dtype = getattr(torch, precision)
        return found
    if device.type != "cuda":
        return torch.float32
    largest = max(checkpoint.tensors.values(), key=lambda info: info.size)
    own = getattr(torch, written) if written else DTYPES[largest.dtype]
    usable = own == torch.float16 or (own == torch.bfloat16 and torch.cuda.is_bf16_supported())
    return own if usable else torch.float32


def _build(
    checkpoint: Checkpoint, dtype: torch.dtype, attention: str, placed: Mapping[str, Any] | None = None
) -> Any:
    """Return (model, loading info), with SDPA attention where the architecture has it."""
    kind, options = _loader(checkpoint)
    options |= {"dtype": dtype, "attn_implementation": attention, "output_loading_info": True}
    try:
        with no_larger_than(checkpoint):
            return from_pretrained(kind, checkpoint.folder, **options, **(placed or {}))
    except ValueError as error:
        if attention == "eager" or "scaled_dot_product_attention" not in str(error):
            raise
        return _build(checkpoint, dtype, "eager", placed)


def build_empty(checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the model that a checkpoint's config describes, without its numbers."""
    config = load_config(checkpoint)
    text = text_config(config)
    known = type(text) in AutoModelForCausalLM._model_mapping
    kind = (None if known else _class_of(text, config)) or AutoModelForCausalLM
    with torch.device("meta"), quiet_transformers(), no_larger_than(checkpoint):
        model: PreTrainedModel = from_config(kind, text)
    return model


def outline(location: Path | str) -> Checkpoint:
    """Return a model without opening its weights, which may not be there: a config.json says their shapes.

    It serves for plans alone. Raises CheckpointError where neither weights nor a config can be read.
    """
    place = Path(location).expanduser()
    folder = place.parent if place.name == "config.json" else place
    if not (folder / "config.json").is_file() or any(map(WEIGHTS.fullmatch, map(str, folder.iterdir()))):
        return Checkpoint.open(location)
    check_folder(folder)
    empty = Checkpoint(folder.resolve(), {}, read_object(folder / "config.json"))
    config = text_config(load_config(empty))
    limit = bounded(folder / "config.json", tensors=LARGEST_PLANNED[0], numbers=LARGEST_PLANNED[1])
    with torch.device("meta"), quiet_transformers(), limit:
        model: PreTrainedModel = from_config(_class_of(config, config) or AutoModelForCausalLM, config)
    code = "F32" if config.dtype == torch.float32 else "BF16"
    infos = {
        name: TensorInfo(name, code, tuple(value.shape), folder, 0, FLOAT_BYTES[code] * value.numel())
        for name, value in model.named_parameters()
    }
    return Checkpoint(empty.folder, infos, empty.config)


def no_larger_than(checkpoint: Checkpoint) -> AbstractContextManager[None]:
    """Refuse to build a model that outgrows the weights of a checkpoint."""
    sizes = [info.size for info in checkpoint.tensors.values()]
    return bounded(checkpoint.folder / "config.json", tensors=len(sizes), numbers=sum(sizes))


def _loader(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
    """Return the class that loads a checkpoint, and what it is given where it cannot read the files."""
    if checkpoint.format == "safetensors" and "text_config" not in checkpoint.config:
        return AutoModelForCausalLM, {"use_safetensors": True}
    config = load_config(checkpoint)
    text = text_config(config)
    with Files() as files:
        state = {
            name if text is config else _in_text_tower(name): as_torch(info, files)
            for name, info in checkpoint.tensors.items()
            if text is config or _in_text_tower(name)
        }
    kind, own = _class_of(text, config), _class_of(config, config)
    if text is not config and own.config_class is type(config):  # else transformers, too, asks the tower's
        text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    return kind, {"config": text, "state_dict": state}


def _class_of(config: PreTrainedConfig, wrapper: PreTrainedConfig) -> Any:
    """Return the class of causal language model that AutoModelForCausalLM has for a config, None without.

    For some wrappers it names the class of their text tower.
    """
    known = AutoModelForCausalLM._model_mapping
    if type(config) in known:
        return _get_model_class(config, known)
    own = _get_model_class(wrapper, known) if type(wrapper) in known else None
    return own if own is not None and own.config_class is type(config) else None


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of a wrapper's text tower; of any other model its own."""
    text = getattr(config, "text_config", None)
    return text if isinstance(text, PreTrainedConfig) else config


def _in_text_tower(name: str) -> str:
    """Return what the text tower alone calls a weight of a wrapper; "" where it is none of its own."""
    found = TEXT.fullmatch(name)
    if found is None:
        return ""
    return found[3] or (f"{found[1]}{found[2]}" if found[1] else f"model.{found[2]}")


def stored_names(live: Iterable[str], model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Return, by the names `live` of a model's weights, those that they have in the checkpoint's files.

    The text tower of a wrapper, and models whose files leave out the prefix, have other names in memory. A
    weight that has no counterpart of its own is left out.
    """
    live = set(live)
    names = {name: own for name in live if (own := checkpoint.spelled(name))}
    for stored in checkpoint.tensors:
        if (name := f"{model.base_model_prefix}.{stored}") in live:
            names.setdefault(name, stored)
    return names


def as_torch(info: TensorInfo, files: Files) -> torch.Tensor:
    """Return a whole tensor of a checkpoint, read into memory."""
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    info.read(files, 0, raw.numpy().data)
    return raw.view(DTYPES[info.dtype]).reshape(info.shape)


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write tensors as a safetensors file; raises OutputError when there is no room."""
    with writing(file, SafetensorError):
        save_file(tensors, file, metadata={"format": "pt"})


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Return the checkpoint's config as transformers reads it.

    Raises CheckpointError when it cannot, or when AutoModelForCausalLM knows nothing of such a wrapper.
    """
    refused = f"{checkpoint.folder / 'config.json'} describes no model that can be built"
    with quiet_transformers(lambda error: f"{refused} ({_reason(error)})"):
        config: PreTrainedConfig = from_pretrained(AutoConfig, checkpoint.folder)
        rows = config.get_text_config().vocab_size
        if type(rows) is not int or rows < 1:
            raise ValueError(f"its vocab_size is {shown(str(rows))}")
    text = text_config(config)
    built_here = text is not config or checkpoint.format != "safetensors"
    if built_here and not (_class_of(config, config) and _class_of(text, config)):
        raise CheckpointError(
            f"{checkpoint.folder} is a {config.model_type}, not a causal language model; "
            "Palinode works on models that AutoModelForCausalLM can load"
        )
    return config


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Return the checkpoint's tokenizer; raises CheckpointError when the folder has none."""
    refused = f"{checkpoint.folder} has no tokenizer that can be loaded"
    advice = "copy the tokenizer files of the model it came from into the folder"
    with quiet_transformers(lambda error: f"{refused} ({type(error).__name__}); {advice}"):
        tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, checkpoint.folder)
        tokenizer("a")  # what its config says wrongly may show only when it reads
        if len(tokenizer) <= len(tokenizer.added_tokens_decoder) + 1:  # without its files it gets no more
            raise ValueError("it has no vocabulary")
    beside = checkpoint.folder / "chat_template.json"
    if not tokenizer.chat_template and beside.is_file():  # tokenizers know nothing of a processor's
        found = read_json(beside)
        if not isinstance(found, dict) or not isinstance(found.get("chat_template"), str):
            raise CheckpointError(
                f"{beside} holds no text under 'chat_template'; put the model's own there, or remove it"
            )
        tokenizer.chat_template = found["chat_template"]
    recognise(tokenizer, tokenizer_fingerprint(checkpoint))
    with contextlib.suppress(CheckpointError):  # it says so where the model is needed
        _ROWS[tokenizer] = load_config(checkpoint).get_text_config().vocab_size
    return tokenizer


_ROWS: WeakKeyDictionary[PreTrainedTokenizerBase, int] = WeakKeyDictionary()
"""How many rows the embedding has beside which a tokenizer was found."""


def find_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """Return the checkpoint's tokenizer; None where its folder has nothing but config and weights."""
    names = {path.name for path in checkpoint.companions()}
    return load_tokenizer(checkpoint) if names - {"config.json", "generation_config.json"} else None


def tokenizer_fingerprint(checkpoint: Checkpoint) -> str:
    """Return a content hash of the tokenizer and chat template that lie in a checkpoint's folder."""
    total = blake3.blake3()
    for path in checkpoint.companions():
        if path.name not in ("config.json", "generation_config.json"):
            total.update(f"{path.relative_to(checkpoint.folder)}\0".encode() + read_bytes(path))
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
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config asks for"
    return shown(first_line(error))


def _counts(info: TensorInfo | None) -> bool:
    """Tell whether a tensor is a weight, and not zeros alone."""
    if info is None or not info.is_float:
        return False
    content = bytearray(info.nbytes)
    with Files() as files:
        info.read(files, 0, memoryview(content))
    return any(content)


def _require_all_weights(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    """Refuse a model part of whose weights were made up or left out: transformers would only warn."""
    # old checkpoints hold buffers that nobody misses, and converters write biases of zeros
    unused = sorted(
        name
        for name in info.get("unexpected_keys", ())
        if name.endswith(".weight") or (name.endswith(".bias") and _counts(checkpoint.tensors.get(name)))
    )
    missing = sorted(info.get("missing_keys", ()))
    for names, has, told in ((missing, "lacks", "asks for"), (unused, "holds", "makes no use of")):
        if names:
            raise CheckpointError(
                f"{checkpoint.folder} {has} {len(names)} weights that its config {told} (first: {names[0]}); "
                "are config.json and the weights of the same model?"
            )
