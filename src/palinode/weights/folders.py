"""Which layout a model folder has, its tensors whatever that is, and whether they are packed.

The file that leads to the weights decides. The first of these that is there is taken, as transformers does:

    model.safetensors                        all tensors in one file
    model.safetensors.index.json             … spread over files that this index names
    .metadata                                a distributed checkpoint (DCP) with *.distcp
    pytorch_model.bin                        torch.save, one file
    pytorch_model.bin.index.json             … spread over files
    one other *.bin, *.pt or *.pth           … a training checkpoint
    one *.gguf                               llama.cpp's format

Safetensors and GGUF are data. The others are pickles and have to be allowed.

Packed weights are matrices stored as whole numbers, to be multiplied by scales that lie beside
them. They cannot be added. Whatever their names, whole numbers that are no buffer are packed weights where
they are called weights, lie in a layer that has nothing but scales besides, or make up a notable part of
the model. One layer is enough. Names only tell which format it is, or give
away a format that has no others like it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from palinode.errors import CheckpointError, told_as
from palinode.records import packaged_table
from palinode.weights.fingerprints import fingerprint
from palinode.weights.foreign import Model, check_folder, inside, read_gguf
from palinode.weights.formats.pickled import METADATA, read_distributed, read_pickled, read_pickled_part
from palinode.weights.formats.pieces import all_experts, one_expert
from palinode.weights.tensors import (
    CALLED_WEIGHTS,
    FLOAT_BYTES,
    HEADS,
    TensorInfo,
    by_plain,
    is_buffer,
    is_embedding,
    is_head,
    is_wrapped,
    plain,
    read_header,
    read_index,
    read_object,
    shown,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

PICKLES = (".bin", ".pt", ".pth")
SHARD = re.compile(r"-\d+-of-\d+$")

DEEPSPEED = "it is DeepSpeed's training state, in pieces: put them together with its zero_to_fp32.py"
STATES = {
    "zero_to_fp32.py": DEEPSPEED,
    "*zero_pp_rank_*": DEEPSPEED,
    "global_step*": DEEPSPEED,
    "latest_checkpointed_iteration.txt": "it is Megatron's training state: make a model folder of it with "
    "Megatron's own converter",
}
"""What gives away that a folder holds a trainer's state and no model yet, and the way to one."""

# Pickles that a trainer leaves beside a model and that hold no weights of it.
NO_WEIGHTS = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*")

Format = Literal["safetensors", "pickle", "distributed", "gguf"]


Told = tuple[dict[str, TensorInfo], list[str]]
"""Tensors by name, and notes on how they were read."""


def is_pickle(path: Path) -> bool:
    """Tell by its name whether a file is a pickle that may hold weights."""
    return path.suffix in PICKLES and not any(fnmatch(path.name, pattern) for pattern in NO_WEIGHTS)


def find_leading(folder: Path) -> Path:
    """Return the file that leads to the weights of a folder; raises CheckpointError when there is none."""
    with told_as(CheckpointError, f"{folder} cannot be read"):
        files = sorted(path for path in folder.iterdir() if path.is_file())
    names = {path.name for path in files}
    sharded = any(path.suffix == ".distcp" for path in files)
    for name in (SINGLE, INDEX, METADATA, PICKLE, PICKLE_INDEX):
        if name in names and (sharded or name != METADATA):
            return folder / name
    state = next((way for mark, way in STATES.items() if any(folder.glob(mark))), None)
    pickles = [path for path in files if is_pickle(path)]
    found = pickles or [path for path in files if path.suffix == ".gguf"]
    if len(found) == 1 and not state:
        return found[0]
    if found and not state:
        raise CheckpointError(
            f"{folder} holds {len(found)} files that could be its weights ({shown(found[0].name)}, "
            f"{shown(found[1].name)}, …) and no index; name the one that holds the whole model"
        )
    others = [path.name for path in files if path.suffix == ".safetensors"]
    models = ("*/config.json", "snapshots/*/config.json", f"*/{METADATA}", "*/adapter_config.json")
    below = [path for pattern in models for path in sorted(folder.glob(pattern))]
    do = state or (f"did you mean {below[0].parent}?" if below else "is the download finished?")
    if others:
        do = f"{shown(others[0])} needs its index, or that name: save the model once with save_pretrained"
    raise CheckpointError(f"{folder} holds no weights ({SINGLE} or {INDEX}); {do}")


def format_of(leading: Path) -> Format:
    """Return the format to which a leading file belongs, by its name."""
    if leading.name == METADATA:
        return "distributed"
    if leading.suffix == ".gguf":
        return "gguf"
    return "pickle" if leading.suffix in PICKLES or leading.name == PICKLE_INDEX else "safetensors"


def read_contents(leading: Path, *, allow_pickle: bool) -> Model:
    """Return the tensors to which this file leads, notes, and the config that comes with them, if one does.

    Reads headers only, except for GGUF.

    Raises CheckpointError when the format is a pickle and `allow_pickle` is not set, or when anything
    is damaged or missing.
    """
    kind = format_of(leading)
    if kind in ("pickle", "distributed") and not allow_pickle:
        raise CheckpointError(
            f"{leading.parent} holds its weights only as pickles ({shown(leading.name)}), a format that can "
            "carry harmful code; save the model once with save_pretrained, which writes safetensors, or let "
            "Palinode read it, restricted to plain tensors: --allow-pickle, in Python allow_pickle=True"
        )
    if SHARD.search(leading.stem):
        raise CheckpointError(
            f"{leading} is one of several files of a model; name a folder that holds all of them "
            "and their index"
        )
    if kind == "gguf":
        return read_gguf(leading)
    if kind == "distributed":
        return *read_distributed(leading), None
    if leading.suffix == ".json":
        return *_merge(leading, _read_safetensors if kind == "safetensors" else read_pickled_part), None
    return *(_read_safetensors(leading) if kind == "safetensors" else read_pickled(leading)), None


def _read_safetensors(file: Path) -> Told:
    return {info.name: info for info in read_header(file)}, []


def _merge(index_file: Path, read: Callable[[Path], Told]) -> Told:
    """Return the tensors of all files that an index names, each from the one file that holds it."""
    index = read_index(index_file)
    tensors: dict[str, TensorInfo] = {}
    notes: list[str] = []
    for file in sorted({index_file.parent / name for name in index.values()}):
        found, more = read(file)
        notes += more
        for name, info in found.items():
            if name in tensors:
                raise CheckpointError(
                    f"{index_file.parent} holds {shown(name)} twice, in {tensors[name].file.name} and "
                    f"{file.name}; remove the file that does not belong to the model"
                )
            tensors[name] = info
    lost = [name for name in index if name not in tensors]
    if lost:
        raise CheckpointError(
            f"{index_file} names {len(lost)} tensors that no file holds (first: {shown(lost[0])}); fetch the "
            "model again"
        )
    return tensors, notes


NOTABLE = 0.01
"""Share of a model's bytes from which whole numbers cannot be a table of the model's own."""

EMBEDDING = re.compile(r"embed|(^|\.)wte\.")
INDICES = ("I64", "U64")
"""What torch counts and points with; nobody packs weights in so wide a type under a name of its own."""

UNKNOWN = "an unknown format"
FORMATS: Mapping[str, Mapping[str, str]] = packaged_table("weights/packed.toml")
"""By name: the pattern of the tensors' names that give it away; the first that fits counts."""


def refuse_packed(folder: Path, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
    """Raise CheckpointError with the format's name and the way out where a model's weights are packed."""
    method = _method(config)
    packed = _packed([*tensors.values()])
    # bytes packed as if they were floating point are given away by their tables alone (bitsandbytes)
    if not packed and not method and not any(name.endswith((".absmax", ".quant_map")) for name in tensors):
        return
    kind = _format(tensors, packed, method)
    instead = FORMATS.get(kind, {}).get("instead")
    numbers = sum(info.size for info in tensors.values())
    share = sum(info.size for info in packed) / numbers if numbers else 0
    found, plainly = "", ""
    if not packed and not _known(tensors):
        plainly = ", or, where it was dequantised already, take what says otherwise out of its config.json"
    if packed:
        largest = max(packed, key=lambda info: info.nbytes)
        found = f" ({largest.dtype} {shown(largest.name)}, …: {share:.0%} of its numbers)"
    raise CheckpointError(
        f"{folder} is quantised: its weights are packed as {kind}{found}, and only floating point can be "
        f"added; {f'{instead}, or ' if instead else ''}take the original model that it was made from{plainly}"
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
    longer = (place for place, length in enumerate(info.shape) if length != 1)
    return len(info.shape) - next(longer, len(info.shape)) > 1


def _bytes(infos: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in infos)


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


def _known(names: Iterable[str]) -> str | None:
    """Return the format that tensors of these names are of."""
    names, patterns = list(names), {kind: one["names"] for kind, one in FORMATS.items() if "names" in one}
    fits = (kind for kind, own in patterns.items() if any(re.search(own, name) for name in names))
    return next(fits, None)


def _format(tensors: Mapping[str, TensorInfo], packed: Sequence[TensorInfo], method: str | None) -> str:
    """Return the name of the format."""
    if found := _known(tensors):
        return found
    words = next((info for info in packed if info.name.endswith("qweight")), None)
    if words and (scales := tensors.get(words.name.removesuffix("qweight") + "scales")):
        return "GPTQ" if scales.shape[-1:] == words.shape[-1:] else "AWQ"
    unnamed = method in (None, UNKNOWN)
    if unnamed and any(info.dtype == "U32" for info in packed):
        return "MLX"
    if unnamed and any(name.endswith(".weight_scale") for name in tensors):
        return "compressed-tensors"
    return method or UNKNOWN


# What lies beside the weights and belongs to the model: config, generation config, tokenizer, chat template.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "*processor_config.json",
)  # fmt: skip


# What travels with the model and has no say in what it is.
PAPERS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "*USE_POLICY*", "*TERMS_OF_USE*")


# What is fetched from the hub besides: an adapter only to say that it is one, and pickles only if they are
# allowed and there is nothing better.
ON_HUB = ("*.safetensors", INDEX, "adapter_config.json", *COMPANIONS, *PAPERS)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk, as it is read: its folder, config and tensors. Two openings of one are equal."""

    folder: Path
    tensors: Mapping[str, TensorInfo] = field(compare=False, repr=False)
    config: Mapping[str, Any] = field(compare=False, repr=False)
    tied: tuple[str, str] | None = field(init=False, compare=False, repr=False)
    """Names of (output head, token embedding) when the two share their weights, else None."""
    names: Mapping[str, str] = field(init=False, compare=False, repr=False)
    """The tensors' names by their plain ones; see `names`."""
    file: Path | None = None
    """The one weight file that was named, where it was not the folder."""
    format: Format = field(default="safetensors", compare=False, repr=False)
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """What the user should know of how the weights were read, in sentences."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tied", _tied_pair(self.tensors, self.config))
        object.__setattr__(self, "names", by_plain(self.tensors))

    @classmethod
    def open(cls, location: Path | str, *, allow_pickle: bool = False) -> Self:
        """Open a local model folder or weight file, or a hub id with an optional `@revision`.

        Reads headers only; a GGUF file is dequantised into memory. Pickles (torch.save, distributed
        checkpoints) are read only with `allow_pickle`, as plain tensors, and none of their code is run.
        Raises CheckpointError when the model is missing, half-downloaded, damaged or quantised.
        """
        path = _local_path(location, allow_pickle=allow_pickle)
        folder, named = (path, None) if path.is_dir() else (path.parent, path)
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{folder} holds a LoRA adapter, not a whole model; give it as a direction (in Python "
                "LoraAdapter.open), or merge it into its base first"
            )
        check_folder(folder)
        _ = [*_beside(folder, (*COMPANIONS, *PAPERS))]  # a link that leads elsewhere is refused at once
        leading = named or find_leading(folder)
        kind = format_of(leading)
        config: Mapping[str, Any] = {}
        if os.path.lexists(folder / "config.json") and kind != "gguf":
            config = read_object(folder / "config.json")
        elif kind not in ("gguf", "distributed"):
            raise CheckpointError(
                f"{folder} has no config.json: it is not a model folder, or its download is not finished"
            )
        tensors, notes, own = read_contents(leading, allow_pickle=allow_pickle)
        config = config if own is None else own
        refuse_packed(path, tensors, config)
        return cls(folder, _without_shared_head(tensors, config), config, named, kind, tuple(notes))

    def spelled(self, name: str) -> str | None:
        """Return the name by which the files hold a tensor, whatever spelling it is asked for by."""
        if name in self.tensors:
            return name
        if self.tied and is_head(name) and self.tied[0] not in self.tensors:
            return self.tied[1]
        return self.names.get(plain(name))

    def find(self, name: str) -> TensorInfo | None:
        """Return the tensor of that name, under whatever spelling the files hold it.

        A tied head that is not in the files stands for its embedding. The matrix of one expert is found in
        all experts' fused one, and the other way round.
        """
        own = self.spelled(name)
        if own is not None:
            return self.tensors[own]
        if "experts" not in name:
            return None
        by_plain_name = {key: self.tensors[own] for key, own in self.names.items()}
        return one_expert(by_plain_name, name) or all_experts(by_plain_name, name)

    def twin(self, name: str) -> TensorInfo | None:
        """Return the other copy of a tied tensor that lies in the files twice, else None."""
        if self.tied is None or name not in self.tied or not all(copy in self.tensors for copy in self.tied):
            return None
        return self.tensors[self.tied[name == self.tied[0]]]

    def is_second_copy(self, name: str) -> bool:
        """Tell whether this is a tied head that lies in the files beside its embedding."""
        return is_head(name) and self.twin(name) is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of floating-point elements on disk."""
        return sum(info.size for info in self.tensors.values() if info.is_float)

    def companions(self) -> Iterator[Path]:
        """Yield the files beside the weights that make the folder a usable model.

        Raises CheckpointError for a link that leads out of the folder, unless it is a hub cache's own.
        """
        yield from _beside(self.folder, COMPANIONS)

    def papers(self) -> Iterator[Path]:
        """Yield licence, notices and terms of use: they travel with the model, and are no part of it."""
        yield from _beside(self.folder, PAPERS)

    def files(self) -> Iterator[Path]:
        """Yield all files that the model is read from."""
        yield from self.companions()
        for info in self.tensors.values():
            yield from info.files

    def fingerprint(self) -> str:
        """Return a content hash (BLAKE3, 32 hex digits) of all tensors, the config and the tokenizer.

        It does not depend on the folder's name or on how tensors are spread over files. Files that have not
        changed since they were last hashed are not read again; see `fingerprints`.
        """
        return fingerprint(self)


def require_causal_lm(checkpoint: ModelFolder) -> None:
    """Raise CheckpointError unless transformers can run the model as a causal language model."""
    if checkpoint.format in ("distributed", "gguf") or checkpoint.file is not None:
        raise CheckpointError(
            f"{checkpoint.file or checkpoint.folder} can be added, but not run or trained as it is; write it "
            "as a model folder once (in Python: palinode.save(Checkpoint.open(...), OUT)), and its tokenizer "
            "beside it"
        )
    if wrapped := next(filter(is_wrapped, checkpoint.tensors), None):
        raise CheckpointError(
            f"{checkpoint.folder} keeps its weights under names that a wrapper left ({shown(wrapped)}); they "
            "can be added, but not run or trained so: save the model inside the wrapper with save_pretrained"
        )
    listed = checkpoint.config.get("architectures")
    names = list(map(str, listed)) if isinstance(listed, list) else []
    plain = any("CausalLM" in name or "LMHead" in name for name in names)
    if names and not plain and "text_config" not in checkpoint.config:  # a wrapper's text tower may be one
        raise CheckpointError(
            f"{checkpoint.folder} is a {', '.join(names)}, not a causal language model; "
            "Palinode works on models that AutoModelForCausalLM can load"
        )
    require_head(checkpoint)


def require_head(checkpoint: ModelFolder) -> None:
    """Raise CheckpointError when a causal language model's head is not tied and lies in no file either."""
    listed = checkpoint.config.get("architectures")
    causal = any("CausalLM" in str(name) for name in listed) if isinstance(listed, list) else None
    if causal is None:
        causal = checkpoint.config.get("tie_word_embeddings") is False
    names = checkpoint.tensors
    if not causal or checkpoint.tied or not any(map(is_embedding, names)) or any(map(is_head, names)):
        return
    raise CheckpointError(
        f"{checkpoint.folder} is incomplete: its output head is not tied to the embedding (config.json, or "
        "its architecture's default), and no file holds it (lm_head.weight); fetch or save the model again, "
        "or set tie_word_embeddings to true if that is the truth"
    )


def _without_shared_head(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> Mapping[str, TensorInfo]:
    """Return the tensors without a tied head that is stored as a second name of its embedding."""
    pair = _tied_pair(tensors, config)
    if pair is None or pair[0] not in tensors:
        return tensors
    head, embedding = (tensors[name] for name in pair)
    if replace(head, name=embedding.name) != embedding:
        return tensors
    return {name: info for name, info in tensors.items() if name != head.name}


def _tied_pair(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[str, str] | None:
    embedding = next((name for name in tensors if is_embedding(name)), None)
    head = next((name for name in tensors if is_head(name)), None)
    if embedding is None or not (head is None if (ties := _ties(config)) is None else ties):
        return None
    return head or HEADS[0], embedding


def _ties(config: Mapping[str, Any]) -> bool | None:
    """Tell whether a config ties head and embedding; where it says nothing, its architecture's class does.

    None where transformers knows no such architecture.
    """
    inner = config.get("text_config")
    for settings in (config, inner if isinstance(inner, dict) else {}):
        if isinstance(said := settings.get("tie_word_embeddings"), bool):
            return said
    kind = config.get("model_type")
    return _ties_by_default(kind) if isinstance(kind, str) else None


@lru_cache
def _ties_by_default(kind: str) -> bool | None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return bool(CONFIG_MAPPING[kind]().tie_word_embeddings)
    except Exception:  # no such architecture, or a class that needs more than defaults
        return None


def _local_path(location: Path | str, *, allow_pickle: bool) -> Path:
    """Return the model folder, or the weight file, that a name stands for; fetch it from the hub."""
    # too long, an unknown ~user, no permission
    with told_as(CheckpointError, f"{location} cannot be opened as a model folder"):
        path = Path(location).expanduser()
        if path.is_dir():
            return path.resolve()
        if path.is_file() and path.suffix in (*PICKLES, ".gguf"):
            return path.parent.resolve() / path.name  # the hub's cache keeps the bytes under other names
        taken, dangling = path.exists(), path.is_symlink()
    if taken:
        raise CheckpointError(
            f"{location} is a file; name the model folder that holds config.json and the weights"
        )
    if dangling:
        raise CheckpointError(
            f"{location} is a link that leads nowhere, or in a circle; name the model folder"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(location)) or str(location).startswith("."):
        raise CheckpointError(f"there is no model folder {location}")
    found = _download(str(location), ON_HUB)
    if allow_pickle and not any(found.glob("*.safetensors")):
        pickles = ("*.bin", "*.pt", "*.pth", PICKLE_INDEX, METADATA, "*.distcp")
        return _download(str(location), (*ON_HUB, *pickles))
    return found


def _download(location: str, patterns: Sequence[str]) -> Path:
    """Fetch a hub snapshot (or find it in the local cache) and return its folder."""
    from huggingface_hub import snapshot_download

    name, _, revision = location.partition("@")
    what = f"{location} is no local folder, and the model hub could not give it"
    advice = "check the name, or go online, or name a folder"
    with told_as(CheckpointError, what, advice, Exception):  # of many kinds; each means that we have no model
        found = snapshot_download(name, revision=revision or None, allow_patterns=list(patterns))
    return Path(found).resolve()


def _beside(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        inside(folder, path)
        yield path
