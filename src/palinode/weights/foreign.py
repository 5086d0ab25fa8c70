"""The one door through which transformers reads a folder that somebody else made.

Code in a model folder is never run, whatever its configs ask for and whoever answers on standard input, and
nothing is fetched. Before transformers opens a folder, the files that it may read are looked at: ordinary
files of a bounded size, JSON of bounded depth, no kernels or further folders to be loaded by name. While it
builds a model, parameters are counted: a config cannot ask for more than what the files can hold.

GGUF files, as llama.cpp uses them, through transformers: dequantised to float32 and held in memory.

GGUF has its own names and its own order of some weights; transformers knows how to undo both. What it
gives is what the quantised file says, not the model that the file was made from: the notes say so.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError, broke_down, first_line, told_as, writing
from palinode.weights.tensors import MAX_JSON, Files, HeldTensor, TensorInfo, read_json, shown, whole

MAX_CONFIG = 10_000_000
"""Bytes of a config; the longest of real tokenizers, with all their added tokens, have two million."""
MAX_DEPTH = 60
"""Levels of lists and objects in a config."""
MAX_GROWTH = 4
"""How many times as many numbers as its files hold a model may have: a tied head counts twice."""
MAX_NUMBERS = 1 << 36
"""Numbers in one tensor of a model."""
MAX_COUNT = 100_000
"""Layers or labels of a model: lists of that length are made before anything is built."""

CONFIGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
"""What Python parses; the vocabularies beside them may be longer."""

READ = re.compile(r"(tokenizer|vocab|merges|chat_template)|.*\.(model|tiktoken|jinja|json)$")
"""Names of files that transformers may read whole, apart from LOGS, which are of no use to it."""
LOGS = ("trainer_state.json", "record.json", "weights.json")
WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf)$")

COUNTS = re.compile(r"(layers?|blocks|depths?|labels)$")
"""Keys of a config whose number says how many of something there are."""

NO_CODE = (
    "needs code of its own, and Palinode runs no code from a model's folder; take a model that transformers "
    "itself knows, or a newer transformers"
)


def from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """Return what `kind` (an Auto class of transformers) makes of a folder, without running its code.

    With `state_dict` among the options, nothing more is read.
    Raises CheckpointError where the folder cannot be used so, and what transformers raises.
    """
    check_folder(folder)
    _refuse_own_code(folder)
    place = None if "state_dict" in options else folder
    return _without_code(
        folder, lambda: kind.from_pretrained(place, trust_remote_code=False, local_files_only=True, **options)
    )


def from_config(kind: Any, config: Any, **options: Any) -> Any:
    """Return the untrained model that an Auto class of transformers builds for a config it has read."""
    options.setdefault("attn_implementation", "eager")  # what the config names might be fetched from the hub
    name = config.name_or_path
    if not hasattr(kind, "from_config"):  # a model's class, and no Auto class: it knows no code but its own
        return _without_code(name, lambda: kind._from_config(config, **options))
    return _without_code(name, lambda: kind.from_config(config, trust_remote_code=False, **options))


def check_folder(folder: Path) -> None:
    """Raise CheckpointError unless all that transformers may open in a folder can be opened without harm."""
    with told_as(CheckpointError, f"{folder} cannot be read"):
        for path in folder.iterdir():
            if not (READ.match(path.name) or WEIGHTS.match(path.name)) or not path.exists() or path.is_dir():
                continue  # nobody opens it; or a link that leads nowhere
            if not path.is_file():
                raise CheckpointError(f"{path} is a pipe or a device, which no model has; remove it")
            if READ.match(path.name) and path.name not in LOGS and path.stat().st_size > MAX_JSON:
                raise CheckpointError(f"{path} has more than {MAX_JSON} bytes; is it a file of the model?")
    for name in CONFIGS:
        if os.path.lexists(folder / name):
            _check_config(folder / name)


def inside(folder: Path, path: Path) -> Path:
    """Return the file to which a name in a model folder leads, links followed.

    Raises CheckpointError unless it lies in the folder itself, or among the blobs of a hub cache: what is
    copied with a model must not be some other file of this machine.
    """
    home, real = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    if real.is_relative_to(home) or (home.parent.name == "snapshots" and real.parent == blobs):
        return real
    raise CheckpointError(
        f"{path} is a link to {shown(str(real))}, outside the model's folder; put the file itself there"
    )


def copy_inside(folder: Path, path: Path, place: Path) -> None:
    """Copy a file of a model folder; raises CheckpointError as `inside` does, or when it changes."""
    real = inside(folder, path)
    with (
        told_as(CheckpointError, f"{path} cannot be copied", "look at the folder"),
        open(os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as source,  # noqa: PTH123
    ):
        status = os.fstat(source.fileno())
        same = os.path.samestat(status, inside(folder, path).stat())
        if not (same and stat.S_ISREG(status.st_mode)):
            raise OSError(0, "it changes, or is no ordinary file")
        with writing(place), place.open("wb") as target:
            shutil.copyfileobj(source, target)


def _check_config(file: Path) -> None:
    """Raise CheckpointError for a config that is endless, or has something loaded from elsewhere."""
    for key, value in walked(file, read_config(file)):
        complaint = _in_text(file, key, value) if isinstance(value, str) else _in_number(file, key, value)
        if complaint:
            raise CheckpointError(f"{file} {complaint}")


def _in_text(file: Path, key: str, text: str) -> str | None:
    """Return what is wrong with a text in a config: it has something loaded."""
    if key.endswith("_implementation") and "/" in text:
        return f"asks for the kernel {shown(text)}; Palinode fetches no code: remove it"
    if key.endswith("_file") and _is_elsewhere(file.parent, text):
        return f"names {shown(text)}, a file outside its folder; do not trust it"
    if file.name == "modules.json" and key == "type" and not text.startswith("sentence_transformers."):
        return f"names {shown(text)}, which {NO_CODE}"
    return None


def _in_number(file: Path, key: str, value: Any) -> str | None:
    """Return what is wrong with a number or truth value in a config: it would never end, or allow code."""
    if isinstance(value, float) and math.isnan(value):
        return f"says {shown(key)} = NaN; fetch the model again"
    largest = MAX_COUNT if COUNTS.search(key) else (1 << 63) - 1
    if type(value) is int and value > largest and file.name in ("config.json", "generation_config.json"):
        return f"says {shown(key)} = {shown(str(value))}, which no model has; fetch the model again"
    if value is True and key == "trust_remote_code" and "sentence" in file.name:
        return f"asks for trust_remote_code: it {NO_CODE}"
    return None


def read_config(file: Path) -> Any:
    """Return a config; raises CheckpointError when it is no JSON or too long."""
    return read_json(file, limit=MAX_CONFIG)


def walked(file: Path, content: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys and values of a config, at any depth; what a list holds is under the list's key."""
    level = [("", content)]
    for _ in range(MAX_DEPTH):
        yield from level
        level = [below for key, item in level for below in _below(key, item)]
    if level:
        raise CheckpointError(f"{file} is nested too deep to be a config; fetch the model again")


def _below(key: str, item: Any) -> Iterator[tuple[str, Any]]:
    """Yield what lies one level below; a kernel for each part of a model is a kernel too."""
    if isinstance(item, dict):
        yield from ((key if key.endswith("_implementation") else name, part) for name, part in item.items())
    elif isinstance(item, list):
        yield from ((key, part) for part in item)


def _is_elsewhere(folder: Path, name: str) -> bool:
    """Tell whether a path in a config leads to something that exists outside the folder."""
    inside, place = os.path.abspath(folder), os.path.abspath(folder / name)  # noqa: PTH100 - takes out ".."
    return os.path.lexists(place) and os.path.commonpath([inside, place]) != inside


def _refuse_own_code(folder: Path) -> None:
    """Refuse a folder whose model or tokenizer only its own code knows, and one that leads elsewhere."""
    if os.path.lexists(folder / "adapter_config.json"):
        raise CheckpointError(
            f"{folder} holds a LoRA adapter, not a whole model; merge it into its base first"
        )
    if config_of(folder).get("quantization_config"):
        raise CheckpointError(f"{folder} is quantised; take the model that it was made from")
    for name, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        content = config_of(folder, name)
        if "auto_map" in content and not _is_known(key, content.get(key)):
            kind = shown(str(content.get(key)))
            raise CheckpointError(f"{folder} says {key} = {kind} (with auto_map, in {name}), which {NO_CODE}")


def config_of(folder: Path, name: str = "config.json") -> Mapping[str, Any]:
    """Return a config of a folder; an empty one where it has none, or that is no JSON object."""
    file = folder / name
    content = read_config(file) if os.path.lexists(file) else {}
    return content if isinstance(content, dict) else {}


def _is_known(key: str, name: Any) -> bool:
    """Tell whether transformers itself has this kind of model or tokenizer."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(name, str):
        return False
    return name in CONFIG_MAPPING if key == "model_type" else tokenizer_class_from_name(name) is not None


def _without_code(folder: Path | str, load: Callable[[], Any]) -> Any:
    """Return what a call of transformers returns, and say in our words that it would need foreign code."""
    try:
        return load()
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CheckpointError(f"{folder} {NO_CODE}") from None
    except BaseException as error:
        if not broke_down(error):
            raise
        raise CheckpointError(
            f"{folder} has a tokenizer that breaks down ({shown(str(error))}); fetch the model again"
        ) from None


@contextmanager
def bounded(source: Path, *, tensors: int, numbers: int) -> Iterator[None]:
    """Raise CheckpointError where a model that is built meanwhile outgrows what its files can hold.

    They hold so many `tensors` of so many `numbers` in all; `source` is what describes the model.
    """
    from torch.nn.modules import module

    left = {"weight": MAX_GROWTH * tensors + 1000, "module": 20 * MAX_GROWTH * tensors + 10_000}
    left["number"] = MAX_GROWTH * numbers + 1_000_000

    def count(kind: str, name: str, value: Any) -> None:
        size = value.numel() if hasattr(value, "numel") else 0
        left[kind] -= 1
        left["number"] -= size if kind == "weight" else 0
        if min(left.values()) < 0 or size > MAX_NUMBERS:
            raise CheckpointError(
                f"{source} describes a far larger model than the weights beside it make (at its "
                f"{shown(name)}); are they of one model? Fetch it again"
            )

    with ExitStack() as stack:
        for hook in (
            module.register_module_parameter_registration_hook(lambda _, *what: count("weight", *what)),
            module.register_module_buffer_registration_hook(lambda _, *what: count("module", *what)),
            module.register_module_module_registration_hook(lambda _, *what: count("module", *what)),
        ):
            stack.callback(hook.remove)
        yield


Model = tuple[dict[str, TensorInfo], list[str], Mapping[str, Any] | None]
"""Tensors by name, notes on how they were read, and the config that came with them, if one did."""


def read_gguf(file: Path) -> Model:
    """Return the tensors (float32, in memory) of a GGUF file, notes, and its config.

    Raises CheckpointError when the packages that read it are missing, or they cannot read it.
    """
    if find_spec("gguf") is None or find_spec("transformers") is None:
        raise CheckpointError(f"{file} can be read only with the gguf package; pip install 'palinode[gguf]'")
    with Files() as files:
        window = whole(files, file)
        sound = window.size >= 24 and window.read(0, 4) == b"GGUF"
    if not sound:
        raise CheckpointError(f"{file} is cut off or no GGUF file; fetch it again")
    import gguf

    refused = f"{file} cannot be read as a GGUF model"
    with (
        quiet_transformers(lambda error: f"{refused} ({shown(first_line(error))})"),
        redirect_stderr(io.StringIO()),  # gguf draws a bar of its own
    ):
        held = gguf.GGUFReader(file).tensors
        kinds = Counter(tensor.tensor_type.name for tensor in held)
        stored = sum(int(tensor.n_elements) for tensor in held)
        tensors, config = _load(file, kinds.total(), stored)
    gigabytes = sum(info.nbytes for info in tensors.values()) / 1e9
    packed = [kind for kind in kinds if kind not in ("F64", "F32", "F16", "BF16")]
    made = f"dequantised from {', '.join(packed)} to float32" if packed else "read as float32"
    lossy = "; they are what the quantised file says, not the weights it was made from" if packed else ""
    note = f"{file.name}: its weights were {made} and are held in memory ({gigabytes:.2f} GB){lossy}"
    return tensors, [note], config


@contextmanager
def quiet_transformers(told: Callable[[Exception], str] | None = None) -> Iterator[None]:
    """Keep transformers' own progress bars and notes off the terminal while it loads or saves.

    With `told`, whatever it raises becomes a CheckpointError that says so: it raises many kinds, and each
    means that there is nothing to be had.
    """
    from transformers import logging as notes

    level, bars = notes.get_verbosity(), notes.is_progress_bar_enabled()
    notes.set_verbosity(logging.CRITICAL)  # its errors show what the folder says as it is
    notes.disable_progress_bar()
    try:
        yield
    except Exception as error:
        if told is None or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(told(error)) from error
    finally:
        notes.set_verbosity(level)
        if bars:
            notes.enable_progress_bar()


def _load(file: Path, count: int, stored: int) -> tuple[dict[str, TensorInfo], Mapping[str, Any]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = from_pretrained(AutoConfig, file.parent, gguf_file=file.name)
    if not 0 <= config.get_text_config().num_hidden_layers <= count:
        raise CheckpointError(f"{file} describes more layers than it has tensors; fetch it again")
    with bounded(file, tensors=count, numbers=stored):
        with torch.device("meta"):
            from_config(AutoModelForCausalLM, config)
        options = {"gguf_file": file.name, "dtype": torch.float32, "output_loading_info": True}
        model, found = from_pretrained(AutoModelForCausalLM, file.parent, **options)
    if found["missing_keys"]:
        raise CheckpointError(
            f"{file} lacks {len(found['missing_keys'])} weights of its model "
            f"(first: {min(found['missing_keys'])}); fetch it again"
        )
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if config.tie_word_embeddings else set()
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            data = tensor.detach().float().contiguous().numpy().reshape(-1).view("u1")
            tensors[name] = HeldTensor(name, "F32", tuple(tensor.shape), file, 0, len(data), data)
    told = model.config.to_dict()
    told = {key: told[key] for key in told if key not in ("_name_or_path", "quantization_config")}
    return tensors, {**json.loads(json.dumps(told, default=str)), "architectures": [type(model).__name__]}
