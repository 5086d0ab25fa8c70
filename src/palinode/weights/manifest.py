"""The manifest of a model that Palinode wrote, by which `palinode verify` tells whether it is as it was.

Beside the weights lies their formula with the digest of every tensor and of every file that belongs to the
model. So one pass over the folder tells whether anything has changed since it was written:

    {"format": "palinode-weights", "version": 1, "palinode": …,
     "formula": [{"model": "target", "coefficient": 1.0, "fingerprint": …}, …], "rounding": …, "seed": …,
     "tensors": {name: digest}, "companions": {path: digest}, "headers": {path: digest}, "seal": …}

Digests are 64 hex digits of BLAKE3 (`fingerprints`). A header is what a safetensors file holds before its
first tensor; the seal is the digest of all the rest of the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import blake3

from palinode.errors import CheckpointError
from palinode.records import read_json, write_text
from palinode.version import __version__
from palinode.weights.fingerprints import DIGEST, companion_digests, file_digest, tensor_digests
from palinode.weights.folders import INDEX, ModelFolder
from palinode.weights.tensors import MAX_HEADER

NAME = "weights.json"
FORMAT = "palinode-weights"
VERSION = 1
PARTS = ("tensors", "companions", "headers")
Finding = Literal["changed", "missing", "new"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `weights.json` says: digests by name or path, and what the writer told about the sum."""

    tensors: Mapping[str, str]
    companions: Mapping[str, str]
    """Config, tokenizer, templates and the index, by path in the folder."""
    headers: Mapping[str, str]
    """Of the weight files, by path in the folder."""
    content: Mapping[str, Any]
    """All the rest: version of Palinode, formula, dtype, rounding, seed, dose."""


@dataclass(frozen=True, slots=True)
class Verification:
    """How a model folder compares with its manifest; names of tensors, paths of files in the folder."""

    checked: int
    """Number of tensors that were compared."""
    nbytes: int
    """Their bytes."""
    changed: tuple[str, ...]
    """Tensors with other values, dtype or shape."""
    missing: tuple[str, ...]
    """Tensors of the manifest that are not in the folder."""
    extra: tuple[str, ...]
    """Tensors in the folder that are not in the manifest."""
    companions: Mapping[str, Finding]
    """Files of the model (config, tokenizer, index, headers of the weight files) that are not as written."""

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written."""
        return not (self.changed or self.missing or self.extra or self.companions)


def write_manifest(
    folder: Path, *, checkpoint: ModelFolder, digests: Mapping[str, str], content: Mapping[str, Any]
) -> None:
    """Write `weights.json` into a finished model folder, in one step.

    `checkpoint` is that folder, opened; `digests` has one for each of its tensors. `content` is strict JSON
    and goes in as it is, before the digests. Raises ValueError when digests are missing, or `content` holds
    a number that is not finite, or a name that the manifest uses itself.
    """
    if digests.keys() != checkpoint.tensors.keys():
        raise ValueError(f"{len(digests)} digests were given for {len(checkpoint.tensors)} tensors")
    parts = {
        "tensors": dict(digests),
        "companions": _companions(folder, checkpoint),
        "headers": {path.name: _header_digest(path) for path in _weight_files(folder)},
    }
    head = {"format": FORMAT, "version": VERSION, "palinode": __version__}
    taken = content.keys() & {*head, *parts, "seal"}
    if taken:
        raise ValueError(f"the manifest has its own {', '.join(sorted(taken))}")
    whole = json.loads(json.dumps({**head, **content, **parts}, allow_nan=False))  # as a reader will find it
    whole["seal"] = _seal(whole)
    write_text(folder / NAME, json.dumps(whole, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Return what `weights.json` says.

    Raises CheckpointError when there is none, or it is damaged, or of a version that we do not know.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}")
    try:
        found = read_json(folder / NAME)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {NAME}, so nobody can tell what changed; name a model that Palinode wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / NAME} cannot be read ({error}); write the model again") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{folder / NAME} is no manifest of Palinode; write the model again")
    if found.get("version") != VERSION:
        raise CheckpointError(
            f"{folder / NAME} has version {found.get('version')!a}, and this Palinode knows {VERSION}; "
            "use the Palinode that wrote it"
        )
    digests = [found[part].values() if isinstance(found.get(part), dict) else [None] for part in PARTS]
    sound = all(isinstance(one, str) and DIGEST.fullmatch(one) for part in digests for one in part)
    if found.pop("seal", None) != _seal(found) or not sound:
        raise CheckpointError(f"{folder / NAME} has been changed since it was written; write the model again")
    parts = {part: found.pop(part) for part in PARTS}
    return Manifest(**parts, content=found)


def check_manifest(
    folder: Path, *, workers: int | None = None, on_progress: Callable[[int], None] | None = None
) -> Verification:
    """Compare a model folder with its manifest, in one pass over all of its bytes; nothing is remembered.

    Files that are no part of the model (a report, a record) may be added freely. `on_progress` is told the
    bytes of tensors that are done. Raises CheckpointError when there is no manifest, or the folder is no
    model that can be opened (a file cut off or missing, a header or config that is broken).
    """
    manifest, checkpoint = read_manifest(folder), ModelFolder.open(folder)
    found = tensor_digests(checkpoint, workers=workers, cached=False, on_progress=on_progress)
    written = manifest.tensors
    files = [path for path in _weight_files(folder) if path.name in manifest.headers]
    return Verification(
        checked=len(found.keys() & written.keys()),
        nbytes=checkpoint.nbytes,
        changed=tuple(name for name in written if name in found and found[name] != written[name]),
        missing=tuple(name for name in written if name not in found),
        extra=tuple(name for name in found if name not in written),
        companions={
            **_compare(manifest.companions, _companions(folder, checkpoint)),
            **_compare(manifest.headers, {path.name: _header_digest(path) for path in files}),
        },
    )


def _companions(folder: Path, checkpoint: ModelFolder) -> dict[str, str]:
    """Return the digests of all files beside the weights that decide how the model is read."""
    index = {INDEX: file_digest(folder / INDEX)} if (folder / INDEX).is_file() else {}
    return {**companion_digests(checkpoint), **index}


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def _header_digest(path: Path) -> str:
    """Return the digest of what a safetensors file holds before its first tensor."""
    try:
        with path.open("rb") as stream:
            length = stream.read(8)
            header = stream.read(min(int.from_bytes(length, "little"), MAX_HEADER))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); write the model again") from None
    return blake3.blake3(length + header).hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return blake3.blake3(text.encode()).hexdigest()


def _compare(written: Mapping[str, str], found: Mapping[str, str]) -> dict[str, Finding]:
    """Return what became of the files that are not as they were written."""
    kinds: dict[str, Finding] = {name: "changed" for name in written if found.get(name) != written[name]}
    kinds |= {name: "missing" for name in written if name not in found}
    return kinds | {name: "new" for name in found if name not in written}
