"""A checkpoint: where a model lies on disk and which tensors it holds. Weights are read lazily.

formats/ knows the layouts: safetensors, torch.save, distributed checkpoints, GGUF. Whatever the layout,
a checkpoint is a folder, a config, and a TensorInfo for each tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palinode.errors import CheckpointError
from palinode.weights.direction import Point
from palinode.weights.foreign import check_folder, inside
from palinode.weights.formats.distributed import METADATA
from palinode.weights.formats.layouts import (
    INDEX,
    PICKLE_INDEX,
    PICKLES,
    SINGLE,
    Format,
    find_leading,
    format_of,
    read_contents,
)
from palinode.weights.formats.pieces import all_experts, one_expert
from palinode.weights.packed import refuse_packed
from palinode.weights.tensors import (
    FLOAT_BYTES,
    HEADS,
    MAX_HEADER,
    OTHER_BYTES,
    TensorInfo,
    by_file,
    by_plain,
    is_embedding,
    is_head,
    plain,
    read_header,
    read_json,
)

if TYPE_CHECKING:
    from palinode.weights.direction import Term

__all__ = [
    "FLOAT_BYTES",
    "INDEX",
    "MAX_HEADER",
    "OTHER_BYTES",
    "SINGLE",
    "Checkpoint",
    "TensorInfo",
    "by_file",
    "read_header",
    "require_causal_lm",
]

# What lies beside the weights and belongs to the model: config, generation config, tokenizer, chat template.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*processor_config.json",
)

# What travels with the model and has no say in what it is.
PAPERS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "*USE_POLICY*", "*TERMS_OF_USE*")

# What is fetched from the hub besides: an adapter only to say that it is one, and pickles only if they are
# allowed and there is nothing better.
ON_HUB = ("*.safetensors", INDEX, "adapter_config.json", *COMPANIONS, *PAPERS)
PICKLES_ON_HUB = ("*.bin", "*.pt", "*.pth", PICKLE_INDEX, METADATA, "*.distcp")


@dataclass(frozen=True, slots=True)
class Checkpoint(Point):
    """A model folder on disk: a point in weight space. Two openings of one folder are equal."""

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
    def open(cls, location: Path | str, *, allow_pickle: bool = False) -> Checkpoint:
        """Open a local model folder or weight file, or a hub id with an optional `@revision`.

        Reads headers only; a GGUF file is dequantised into memory. Pickles (torch.save, distributed
        checkpoints) are read only with `allow_pickle`, as plain tensors, and none of their code is run.
        Raises CheckpointError when the model is missing, half-downloaded, damaged or quantised.
        """
        path = _local_path(location, allow_pickle=allow_pickle)
        folder, named = (path, None) if path.is_dir() else (path.parent, path)
        _refuse_adapter(folder)
        check_folder(folder)
        _ = [*_beside(folder, (*COMPANIONS, *PAPERS))]  # a link that leads elsewhere is refused at once
        leading = named or find_leading(folder)
        kind = format_of(leading)
        config = {} if kind == "gguf" else _read_config(folder, optional=kind == "distributed")
        contents = read_contents(leading, allow_pickle=allow_pickle)
        config = config if contents.config is None else contents.config
        refuse_packed(path, contents.tensors, config)
        tensors = _without_shared_head(contents.tensors, config)
        return cls(folder, tensors, config, named, kind, contents.notes)

    @property
    def terms(self) -> Mapping[Term, float]:
        """A checkpoint is the sum of itself alone."""
        return {self: 1.0}

    @property
    def anchor(self) -> Checkpoint:
        """The checkpoint itself."""
        return self

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

    def fingerprint(self) -> str:
        """Return a content hash (BLAKE3, 32 hex digits) of all tensors, the config and the tokenizer.

        It does not depend on the folder's name or on how tensors are spread over files. Files that have not
        changed since they were last hashed are not read again; see `fingerprints`.
        """
        from palinode.weights.fingerprints import fingerprint

        return fingerprint(self)


def require_causal_lm(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless transformers can run the model as a causal language model."""
    if checkpoint.format in ("distributed", "gguf") or checkpoint.file is not None:
        raise CheckpointError(
            f"{checkpoint.file or checkpoint.folder} can be added, but not run or trained as it is; write it "
            "as a model folder once (in Python: palinode.save(Checkpoint.open(...), OUT)), and its tokenizer "
            "beside it"
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


def require_head(checkpoint: Checkpoint) -> None:
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


# Finding the files


def _local_path(location: Path | str, *, allow_pickle: bool) -> Path:
    """Return the model folder, or the weight file, that a name stands for; fetch it from the hub."""
    try:
        path = Path(location).expanduser()
        if path.is_dir():
            return path.resolve()
        if path.is_file() and path.suffix in (*PICKLES, ".gguf"):
            return path.parent.resolve() / path.name  # the hub's cache keeps the bytes under other names
        taken, dangling = path.exists(), path.is_symlink()
    except (OSError, RuntimeError, ValueError) as error:  # too long, an unknown ~user, no permission
        raise CheckpointError(f"{location} cannot be opened as a model folder ({error})") from None
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
        return _download(str(location), (*ON_HUB, *PICKLES_ON_HUB))
    return found


def _download(location: str, patterns: Sequence[str]) -> Path:
    """Fetch a hub snapshot (or find it in the local cache) and return its folder."""
    from huggingface_hub import snapshot_download

    name, _, revision = location.partition("@")
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=list(patterns))
    except Exception as error:  # the hub client raises many kinds; each means that we have no model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{location} is no local folder, and the model hub could not give it ({reason}); "
            "check the name, or go online, or name a folder"
        ) from error
    return Path(found).resolve()


def _beside(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        inside(folder, path)
        yield path


def _refuse_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds a LoRA adapter, not a whole model; use it as a direction (LoraAdapter.open), or "
            "merge it into its base first"
        )


def _read_config(folder: Path, *, optional: bool) -> Mapping[str, Any]:
    """Return config.json; where it is `optional` and not there, {}."""
    file = folder / "config.json"
    if not os.path.lexists(file):
        if optional:
            return {}
        raise CheckpointError(
            f"{folder} has no config.json: it is not a model folder, or its download is not finished"
        )
    config = read_json(file)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} does not hold a JSON object; fetch the model again")
    return config
