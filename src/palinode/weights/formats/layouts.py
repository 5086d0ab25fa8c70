"""Which layout a model folder has, and its tensors whatever that is.

The file that leads to the weights decides. The first of these that is there is taken, as transformers does:

    model.safetensors                        all tensors in one file
    model.safetensors.index.json             … spread over files that this index names
    .metadata                                a distributed checkpoint (DCP) with *.distcp
    pytorch_model.bin                        torch.save, one file
    pytorch_model.bin.index.json             … spread over files
    one other *.bin, *.pt or *.pth           … a training checkpoint
    one *.gguf                               llama.cpp's format

Safetensors and GGUF are data. The others are pickles and have to be allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NoReturn

from palinode.errors import CheckpointError
from palinode.weights.foreign import read_gguf
from palinode.weights.formats.distributed import METADATA, read_distributed
from palinode.weights.formats.pickled import read_pickled, read_pickled_part
from palinode.weights.tensors import TensorInfo, read_header, read_index, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

PICKLES = (".bin", ".pt", ".pth")
SHARD = re.compile(r"-\d+-of-\d+$")

# Pickles that a trainer leaves beside a model and that hold no weights of it.
NO_WEIGHTS = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*")

Format = Literal["safetensors", "pickle", "distributed", "gguf"]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds, in whatever layout."""

    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    """Where the weights come with a config of their own, that one."""


def find_leading(folder: Path) -> Path:
    """Return the file that leads to the weights of a folder; raises CheckpointError when there is none."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror})") from None
    names = {path.name for path in files}
    sharded = any(path.suffix == ".distcp" for path in files)
    for name in (SINGLE, INDEX, METADATA, PICKLE, PICKLE_INDEX):
        if name in names and (sharded or name != METADATA):
            return folder / name
    pickles = [path for path in files if path.suffix in PICKLES and not is_no_weights(path)]
    found = pickles or [path for path in files if path.suffix == ".gguf"]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder} holds {len(found)} files that could be its weights ({shown(found[0].name)}, "
            f"{shown(found[1].name)}, …) and no index; name the one that holds the whole model"
        )
    raise CheckpointError(f"{folder} holds no weights ({SINGLE} or {INDEX}); is the download finished?")


def is_no_weights(file: Path) -> bool:
    """Tell whether this is a pickle of a trainer's own state, by its name."""
    return any(fnmatch(file.name, pattern) for pattern in NO_WEIGHTS)


def format_of(leading: Path) -> Format:
    """Return the format to which a leading file belongs, by its name."""
    if leading.name == METADATA:
        return "distributed"
    if leading.suffix == ".gguf":
        return "gguf"
    return "pickle" if leading.suffix in PICKLES or leading.name == PICKLE_INDEX else "safetensors"


def read_contents(leading: Path, *, allow_pickle: bool) -> Contents:
    """Return the tensors to which this file leads; reads headers only, except for GGUF.

    Raises CheckpointError when the format is a pickle and `allow_pickle` is not set, or when anything
    is damaged or missing.
    """
    kind = format_of(leading)
    if kind in ("pickle", "distributed") and not allow_pickle:
        _refuse_pickles(leading)
    if SHARD.search(leading.stem):
        raise CheckpointError(
            f"{leading} is one of several files of a model; name a folder that holds all of them "
            "and their index"
        )
    if kind == "gguf":
        tensors, notes, config = read_gguf(leading)
        return Contents(tensors, tuple(notes), config)
    if kind == "distributed":
        tensors, notes = read_distributed(leading)
        return Contents(tensors, tuple(notes))
    if leading.suffix == ".json":
        return _merge(leading, _read_safetensors if kind == "safetensors" else read_pickled_part)
    tensors, notes = _read_safetensors(leading) if kind == "safetensors" else read_pickled(leading)
    return Contents(tensors, tuple(notes))


def _refuse_pickles(leading: Path) -> NoReturn:
    raise CheckpointError(
        f"{leading.parent} holds its weights only as pickles ({shown(leading.name)}), a format that can "
        "carry harmful code; save the model once with save_pretrained, which writes safetensors, or let "
        "Palinode read it, restricted to plain tensors: --allow-pickle, in Python allow_pickle=True"
    )


def _read_safetensors(file: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    return {info.name: info for info in read_header(file)}, []


def _merge(index_file: Path, read: Callable[[Path], tuple[dict[str, TensorInfo], list[str]]]) -> Contents:
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
    return Contents(tensors, tuple(notes))
