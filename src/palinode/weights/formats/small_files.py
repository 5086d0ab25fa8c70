"""Files that are read whole: configs and indexes. Only ordinary files, and never more than a limit."""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError
from palinode.records import read_bytes
from palinode.weights.tensors import shown

MAX_JSON = 100_000_000
"""Bytes, as for the header of a safetensors file."""
MAX_PARTS = 2_000_000
"""Lists and objects in a JSON file: those of six hundred thousand tensors."""


def read_small(file: Path, *, limit: int) -> bytes:
    """Return all bytes of a file.

    Raises CheckpointError when there is none, when it is a folder, a pipe or the like, or has more than
    `limit` bytes.
    """
    try:
        return read_bytes(file, limit=limit)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); fetch the model again") from None


def read_json(file: Path, *, unique: bool = False, limit: int = MAX_JSON) -> Any:
    """Return the content of a JSON file; with `unique`, no object may name a key twice.

    Raises CheckpointError when it cannot be read, or has more than `limit` bytes.
    """
    raw = read_small(file, limit=limit)
    try:
        return parse_json(raw, unique=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({shown(str(error))}); fetch the model again") from None


def parse_json(raw: bytes, *, unique: bool) -> Any:
    """Return the content of a JSON text; raises ValueError, or RecursionError where it is nested too deep."""
    if raw.count(b"[") + raw.count(b"{") > MAX_PARTS:
        raise ValueError(f"it has more than {MAX_PARTS} lists and objects")
    collects = gc.isenabled()
    gc.disable()  # which would look through all that is read so far again and again
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique if unique else None)
    finally:
        if collects:
            gc.enable()


def read_index(file: Path) -> Mapping[str, str]:
    """Return which tensor lies in which file, as an index of shards says, all of them in its folder.

    Raises CheckpointError when it cannot be read, or names a file outside its folder or one that is missing.
    """
    index = read_json(file, unique=True)
    index = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(index, dict) or not index:
        raise CheckpointError(
            f"{file} cannot be read (its weight_map is missing, empty or no object); fetch the model again"
        )
    names = list(dict.fromkeys(map(str, index.values())))
    outside = [name for name in names if not is_plain_name(name)]
    if outside:
        raise CheckpointError(f"{file} names {outside[0]!a}, a file outside its folder; do not trust it")
    require_files(file.parent, names)
    return {name: str(place) for name, place in index.items()}


def is_plain_name(name: str) -> bool:
    """Tell whether this names a file in a folder, and not one elsewhere."""
    return name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")


def require_files(folder: Path, names: Sequence[str]) -> None:
    """Raise CheckpointError unless all these files are in the folder."""
    # os.path.isfile, as Path.is_file raises for what the system does not take for a name
    missing = [name for name in names if not os.path.isfile(folder / name)]  # noqa: PTH113
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files (first: {shown(missing[0])}); "
            "finish the download"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raises ValueError when it names a key twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it names {twice!a:.200} twice")
    return entries
