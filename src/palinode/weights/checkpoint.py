"""A checkpoint: where a model lies on disk and which tensors it holds. Weights are read lazily.

The layout of a safetensors file is 8 bytes of header length, that many bytes of JSON
`{name: {dtype, shape, data_offsets}}`, then the raw little-endian tensors. Headers are checked in full
before anything uses them, so that a half-downloaded or damaged file is named here and not later.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import blake3

from palinode.errors import CheckpointError
from palinode.weights.direction import Point

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer headers as well."""

FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
OTHER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}

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
    "preprocessor_config.json",
)

# An output head that is left out of the file shares its storage with the token embedding.
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "tok_embeddings.weight")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as it lies on disk."""

    name: str
    dtype: str
    """Code of the safetensors format: F32, BF16, F16, I64, …"""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Bytes from the start of the file."""
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether sums can be formed of it; other tensors are copied from the target."""
        return self.dtype in FLOAT_BYTES

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return FLOAT_BYTES.get(self.dtype) or OTHER_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Checkpoint(Point):
    """A model folder on disk: a point in weight space. Two openings of one folder are equal."""

    folder: Path
    tensors: Mapping[str, TensorInfo] = field(compare=False, repr=False)
    config: Mapping[str, Any] = field(compare=False, repr=False)
    tied: tuple[str, str] | None = field(init=False, compare=False, repr=False)
    """Names of (output head, token embedding) when the two share their weights, else None."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tied", _tied_pair(self.tensors, self.config))

    @classmethod
    def open(cls, location: Path | str) -> Checkpoint:
        """Open a local model folder, or a hub id with an optional `@revision`.

        Reads the headers only. Raises CheckpointError when the folder is missing, half-downloaded,
        damaged, quantised, or in a format that is not safetensors.
        """
        folder = _local_folder(location)
        config = _read_config(folder)
        return cls(folder, _read_tensors(folder), config)

    @property
    def terms(self) -> Mapping[Checkpoint, float]:
        """A checkpoint is the sum of itself alone."""
        return {self: 1.0}

    @property
    def anchor(self) -> Checkpoint:
        """The checkpoint itself."""
        return self

    def find(self, name: str) -> TensorInfo | None:
        """Return the tensor of that name; a tied head that is not in the files stands for its embedding."""
        if self.tied and name in HEADS and name not in self.tensors:
            return self.tensors[self.tied[1]]
        return self.tensors.get(name)

    def twin(self, name: str) -> TensorInfo | None:
        """Return the other copy of a tied tensor that lies in the files twice, else None."""
        if self.tied is None or name not in self.tied or not all(copy in self.tensors for copy in self.tied):
            return None
        return self.tensors[self.tied[name == self.tied[0]]]

    def is_second_copy(self, name: str) -> bool:
        """Tell whether this is a tied head that lies in the files beside its embedding."""
        return name in HEADS and self.twin(name) is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of floating-point elements on disk."""
        return sum(info.size for info in self.tensors.values() if info.is_float)

    def companions(self) -> Iterator[Path]:
        """Yield the files beside the weights that make the folder a usable model."""
        seen = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        yield from sorted(seen)

    def fingerprint(self) -> str:
        """Return a content hash (BLAKE3, hex) of all tensors, the config and the tokenizer.

        It does not depend on the folder's name or on how tensors are spread over files.
        """
        files = [*{info.file for info in self.tensors.values()}, *self.companions()]
        stamps = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files))
        return _fingerprint(self, stamps)


def require_causal_lm(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the config names a causal language model."""
    listed = checkpoint.config.get("architectures")
    names = list(map(str, listed)) if isinstance(listed, list) else []
    if names and not any("CausalLM" in name or "LMHead" in name for name in names):
        raise CheckpointError(
            f"{checkpoint.folder} is a {', '.join(names)}, not a causal language model; "
            "Palinode works on models that AutoModelForCausalLM can load"
        )


def _tied_pair(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[str, str] | None:
    embedding = next((name for name in tensors if name.endswith(EMBEDDINGS)), None)
    head = next((name for name in HEADS if name in tensors), None)
    if embedding is None or (head and not config.get("tie_word_embeddings", False)):
        return None
    return head or HEADS[0], embedding


# Finding the files


def _local_folder(location: Path | str) -> Path:
    try:
        path = Path(location).expanduser()
        if path.is_dir():
            return path.resolve()
        taken = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, an unknown ~user, no permission
        raise CheckpointError(f"{location} cannot be opened as a model folder ({error})") from None
    if taken:
        raise CheckpointError(
            f"{location} is a file; name the model folder that holds config.json and the weights"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(location)) or str(location).startswith("."):
        raise CheckpointError(f"there is no model folder {location}")
    return _download(str(location))


def _download(location: str) -> Path:
    """Fetch a hub snapshot (or find it in the local cache) and return its folder."""
    from huggingface_hub import snapshot_download

    name, _, revision = location.partition("@")
    try:
        found = snapshot_download(
            name, revision=revision or None, allow_patterns=["*.safetensors", INDEX, *COMPANIONS]
        )
    except Exception as error:  # the hub client raises many kinds; each means that we have no model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{location} is no local folder, and the model hub could not give it ({reason}); "
            "check the name, or go online, or name a folder"
        ) from error
    return Path(found).resolve()


def _read_config(folder: Path) -> Mapping[str, Any]:
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds a LoRA adapter, not a whole model; merge it into its base first"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no config.json: it is not a model folder, or its download is not finished"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} cannot be read ({error}); fetch the model again"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} does not hold a JSON object; fetch the model again")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{folder} is quantised; weights can be added only in floating point: "
            "use the model it was made from"
        )
    return config


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Return all tensors of the model by name, each from the one file that holds it."""
    single = (folder / SINGLE).is_file()  # where both are there, transformers takes it before an index too
    index = {} if single else _read_index(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in [folder / SINGLE] if single else _indexed_files(folder, index):
        for info in read_header(file):
            if info.name in tensors:
                raise CheckpointError(
                    f"{folder} holds {info.name} twice, in {tensors[info.name].file.name} and {file.name}; "
                    "remove the file that does not belong to the model"
                )
            tensors[info.name] = info
    lost = [name for name in index if name not in tensors]
    if lost:
        raise CheckpointError(
            f"{folder / INDEX} names {len(lost)} tensors that no file holds (first: {lost[0]}); fetch the "
            "model again"
        )
    return tensors


def _read_index(folder: Path) -> Mapping[str, Any]:
    """Return which tensor lies in which file, as the index says."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(index, dict) or not index:
            raise ValueError("its weight_map is empty or no object")
    except FileNotFoundError:
        _complain_of_no_weights(folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / INDEX} cannot be read ({error!r}); fetch the model again") from None
    return index


def _complain_of_no_weights(folder: Path) -> NoReturn:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(
            f"{folder} holds its weights only as pickles (.bin, .pt); save the model once with "
            "save_pretrained, which writes safetensors"
        )
    raise CheckpointError(f"{folder} holds no weights ({SINGLE} or {INDEX}); is the download finished?")


def _indexed_files(folder: Path, index: Mapping[str, Any]) -> list[Path]:
    """Return the files that the index names, all of them present."""
    names = list(dict.fromkeys(map(str, index.values())))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(
            f"{folder / INDEX} names {outside[0]!r}, a file outside its folder; do not trust it"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files (first: {missing[0]}); "
            "finish the download"
        )
    return [folder / name for name in sorted(names)]


def by_file(infos: Iterable[TensorInfo]) -> dict[Path, list[TensorInfo]]:
    """Return tensors grouped by the file they lie in, in their order."""
    grouped: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        grouped.setdefault(info.file, []).append(info)
    return grouped


def check_unchanged(file: Path, infos: Iterable[TensorInfo], *, size: int) -> None:
    """Raise CheckpointError when a file no longer has the size it had when its header was read."""
    end = max(info.offset + info.nbytes for info in infos)
    if size != end:
        raise CheckpointError(
            f"{file} has {size} bytes, and had {end} when the checkpoint was opened; open it again"
        )


# Reading a safetensors header


def read_header(file: Path) -> list[TensorInfo]:
    """Return the tensors of one safetensors file in the order of their bytes.

    Raises CheckpointError when the header is absurd, a tensor's bytes do not fit its shape, tensors
    overlap, or the file is longer or shorter than its header says.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            raw = stream.read(length) if length <= min(size - 8, MAX_HEADER) else None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); fetch the model again") from None
    if raw is None:
        raise CheckpointError(
            f"{file} is cut off or no safetensors file ({size} bytes, header of {length}); fetch it again"
        )
    infos = sorted(_parse_header(file, raw, 8 + length), key=lambda info: (info.offset, info.nbytes))
    end = 8 + length
    for info in infos:
        if info.offset != end:
            raise CheckpointError(f"{file}: the bytes of {info.name} overlap another tensor or leave a gap")
        end += info.nbytes
    if end != size:
        raise CheckpointError(f"{file} has {size} bytes where its header needs {end}; fetch it again")
    return infos


def _parse_header(file: Path, raw: bytes, data_start: int) -> Iterator[TensorInfo]:
    try:
        entries = json.loads(raw.decode(), object_pairs_hook=_object)
    except KeyError as error:
        raise CheckpointError(f"{file} names {error} twice in its header; fetch it again") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} has a header that is not JSON; fetch it again") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file} has a header that is not a JSON object; fetch it again")
    for name, entry in entries.items():
        if name != "__metadata__":
            yield _tensor_info(file, name, entry, data_start)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raises KeyError when it names a key twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise KeyError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return entries


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        name.encode()  # half a surrogate pair is JSON, but no text
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: the header entry of {name!a} is malformed; fetch it again")
    itemsize = FLOAT_BYTES.get(dtype) or OTHER_BYTES.get(dtype)
    if itemsize is None:
        raise CheckpointError(
            f"{file}: {name} is stored as {dtype}, a packed or quantised type; weights can be added only in "
            "float64, float32, float16 or bfloat16: use the model it was made from"
        )
    if math.prod(shape) * itemsize != stop - start:
        raise CheckpointError(f"{file}: {name} has {stop - start} bytes where its shape needs another number")
    return TensorInfo(name, dtype, shape, file, data_start + start, stop - start)


# Fingerprints


@lru_cache(maxsize=64)
def _fingerprint(checkpoint: Checkpoint, _stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash a checkpoint; the stamps (path, size, mtime) only serve to notice that files have changed."""
    total = blake3.blake3()
    for name, digest in sorted(_tensor_digests(checkpoint.tensors.values())):
        total.update(f"{name}\0".encode() + digest)
    for path in checkpoint.companions():
        total.update(
            f"{path.relative_to(checkpoint.folder)}\0".encode() + blake3.blake3(path.read_bytes()).digest()
        )
    return total.hexdigest()[:32]


def _tensor_digests(infos: Iterable[TensorInfo]) -> Iterator[tuple[str, bytes]]:
    for file, members in by_file(infos).items():
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            check_unchanged(file, members, size=mapped.size())
            for info in members:
                hasher = blake3.blake3(
                    f"{info.dtype}{list(info.shape)}".encode(), max_threads=blake3.blake3.AUTO
                )
                with memoryview(mapped) as view, view[info.offset : info.offset + info.nbytes] as part:
                    hasher.update(part)
                yield info.name, hasher.digest()
