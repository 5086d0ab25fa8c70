"""Content hashes (BLAKE3) of tensors and whole models, remembered beside size and time of their files.

A tensor's digest is blake3(dtype, shape, d_1, d_2, …), where d_i is the digest of its i-th block of
HASH_BLOCK raw bytes. So a block is hashed by whoever has it in cache, in any order, and neither the
digest nor the fingerprint of a model depends on how its tensors are spread over files.

What was hashed once is kept in the user's cache folder, a small JSON file for each weight file. It counts
only while path, size, times and inode of the weight file are what they were.

`weights.json`: what a model folder that Palinode wrote is made of, and whether it still is.

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
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import blake3

from palinode.errors import CheckpointError
from palinode.records import make_private, read_json, write_text
from palinode.version import __version__
from palinode.weights.checkpoint import (
    INDEX,
    MAX_HEADER,
    SINGLE,
    Checkpoint,
    TensorInfo,
    by_file,
    read_header,
)
from palinode.weights.direction import Term
from palinode.weights.tensors import BLOCK, map_blocks

if TYPE_CHECKING:
    from palinode.weights.direction import Term

HASH_BLOCK = BLOCK
"""Bytes of a block; part of what a digest means, so it never changes."""

SETTLED = 2_000_000_000
"""Nanoseconds: no file system's clock ticks more slowly. A file that was written later than this before it
was hashed could be written again without a new time, so that nobody could tell."""

CACHE_VERSION = 1
DIGEST = re.compile("[0-9a-f]{64}")


class Stamp(NamedTuple):
    """What tells that a file has changed; times in nanoseconds."""

    size: int
    modified: int
    changed: int
    inode: int

    def is_settled(self, now: int) -> bool:
        """Tell whether any change from `now` on would give the file another stamp."""
        return now - max(self.modified, self.changed) >= SETTLED


Stamps = Mapping[Path, Stamp]
"""What files were like when somebody began to read them."""


def block_digest(data: bytes | bytearray | memoryview) -> bytes:
    """Return the digest (32 bytes) of one block of a tensor."""
    return blake3.blake3(data).digest()


def tensor_digest(info: TensorInfo, block_digests: Sequence[bytes]) -> str:
    """Return the digest of a tensor (64 hex digits) from those of its blocks, in their order.

    Only dtype and shape of `info` count: not its name, and not where it lies.
    """
    head = f"{info.dtype}{list(info.shape)}".encode()
    return blake3.blake3(head + b"".join(block_digests)).hexdigest()


def tensor_digests(
    checkpoint: Checkpoint,
    *,
    workers: int | None = None,
    cached: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Return the digest of every tensor by name, in the checkpoint's order.

    With `cached`, files that have not changed since they were last hashed are not read. `on_progress` is
    told the bytes that are done. Raises CheckpointError when a file cannot be read, is no longer what it
    was when the checkpoint was opened, or changes meanwhile.
    """
    started, tensors = time.time_ns(), checkpoint.tensors
    places = by_file(tensors.values())
    stamps = {file: _stamp(file) for info in tensors.values() for file in info.files}
    found: dict[str, str] = {}
    for file, infos in places.items():
        check_as_opened(file, infos)
        found |= _recall(file, stamps[file], infos) if cached else {}
    if on_progress and found:
        on_progress(sum(tensors[name].nbytes for name in found))
    rest = [info for name, info in tensors.items() if name not in found]
    found |= _hash(rest, workers, on_progress)
    check_stamps({file: stamps[file] for info in rest for file in info.files})
    if cached:
        for file in by_file(rest):
            if stamps[file].is_settled(started):
                _store(file, stamps[file], places[file], found)
    return {name: found[name] for name in tensors}


def fingerprint(checkpoint: Checkpoint, digests: Mapping[str, str] | None = None) -> str:
    """Return a content hash (32 hex digits) of all tensors, the config and the tokenizer.

    It does not depend on the folder's name or on how tensors are spread over files. `digests` are those of
    the tensors, where the caller has them already. Raises CheckpointError as `tensor_digests` does.
    """
    digests = tensor_digests(checkpoint) if digests is None else digests
    total = blake3.blake3()
    for kind, members in (("tensor", digests), ("file", companion_digests(checkpoint))):
        for name, digest in sorted(members.items()):
            total.update(blake3.blake3(f"{kind} {name}".encode(errors="surrogateescape")).digest())
            total.update(bytes.fromhex(digest))
    return total.hexdigest()[:32]


def known_fingerprint(checkpoint: Checkpoint) -> str | None:
    """Return the fingerprint if every tensor's digest is remembered, without reading any; else None."""
    found: dict[str, str] = {}
    for file, infos in by_file(checkpoint.tensors.values()).items():
        found |= _recall(file, _stamp(file), infos)
    return fingerprint(checkpoint, found) if found.keys() == checkpoint.tensors.keys() else None


def companion_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the digests (64 hex digits) of config, tokenizer and templates, by path in the folder."""
    return {
        path.relative_to(checkpoint.folder).as_posix(): file_digest(path) for path in checkpoint.companions()
    }


def file_digest(path: Path) -> str:
    """Return the digest (64 hex digits) of a whole file; raises CheckpointError when it cannot be read."""
    total = blake3.blake3()
    try:
        with path.open("rb") as stream:
            while block := stream.read(HASH_BLOCK):
                total.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); fetch the model again") from None
    return total.hexdigest()


def remember(checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
    """Put digests of files that the caller has just written into the cache, so that nobody reads them again.

    The time of so young a file is set back by SETTLED: whatever is written into it from now on shows.
    Where the cache or the file cannot be written to, nothing is remembered.
    """
    for file, infos in by_file(checkpoint.tensors.values()).items():
        with suppress(OSError, CheckpointError):
            status = file.stat()
            if not _stamp(file).is_settled(time.time_ns()):
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns - SETTLED))
            _store(file, _stamp(file), infos, digests)


def cache_folder() -> Path:
    """Return the folder of remembered digests: in $PALINODE_CACHE, or in the user's cache folder.

    Raises RuntimeError when there is no home folder.
    """
    if chosen := os.environ.get("PALINODE_CACHE"):
        return Path(chosen).expanduser() / "digests"
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "palinode" / "digests"


def check_files(checkpoints: Iterable[Checkpoint]) -> None:
    """Raise CheckpointError when a weight file is not what it was when its checkpoint was opened."""
    for checkpoint in checkpoints:
        for file, infos in by_file(checkpoint.tensors.values()).items():
            check_as_opened(file, infos)


def check_as_opened(file: Path, infos: Iterable[TensorInfo]) -> None:
    """Raise CheckpointError when the tensors of a safetensors file lie elsewhere than when it was opened."""
    if file.suffix != Path(SINGLE).suffix:
        return
    try:
        now = read_header(file)
    except CheckpointError:
        now = []
    if not set(now).issuperset(infos):
        raise CheckpointError(f"{file} is not what it was when the checkpoint was opened; open it again")


def take_stamps(terms: Iterable[Term]) -> Stamps:
    """Return the stamps of all files that these models and directions are read from."""
    return {file: _stamp(file) for term in terms for file in _files_of(term)}


def check_stamps(stamps: Stamps, terms: Iterable[Term] = ()) -> None:
    """Raise CheckpointError when a file is no longer what it was, or is new beside the weights of `terms`.

    What was read may then be of two states.
    """
    come = take_stamps(terms).keys() - stamps.keys()
    for file, stamp in sorted({**stamps, **dict.fromkeys(come)}.items()):
        if _stamp(file) != stamp:
            raise CheckpointError(
                f"{file} changed while it was read; wait for its writer, and repeat the call"
            )


def check_same(checkpoint: Checkpoint, before: str) -> None:
    """Raise CheckpointError when a model no longer has the fingerprint that it had; nothing else counts."""
    if checkpoint.fingerprint() != before:
        raise CheckpointError(
            f"{checkpoint.folder} changed while it was in use, and what was measured may be of two models; "
            "wait for its writer, and repeat the call"
        )


@contextmanager
def unchanged(terms: Iterable[Term]) -> Iterator[None]:
    """Raise CheckpointError when a file of these models or directions changes before the block ends."""
    terms = list(terms)
    stamps = take_stamps(terms)
    yield
    check_stamps(stamps, terms)


def _files_of(term: Term) -> Iterator[Path]:
    if isinstance(term, Checkpoint):
        infos = list(term.tensors.values())
        yield from term.companions()
    else:
        infos = [info for change in term.changes.values() for info in change.infos]
    for info in infos:
        yield from info.files


# Hashing


def _hash(
    infos: Sequence[TensorInfo], workers: int | None, on_progress: Callable[[int], None] | None
) -> dict[str, str]:
    blocks: dict[str, list[bytes]] = {info.name: [] for info in infos}
    digests = map_blocks(
        infos, lambda _info, block: block_digest(block), workers=workers, on_progress=on_progress
    )
    for info, digest in digests:
        blocks[info.name].append(digest)
    return {info.name: tensor_digest(info, blocks[info.name]) for info in infos}


# Remembering


def _stamp(file: Path) -> Stamp:
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); fetch the model again") from None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _entry_path(file: Path) -> Path:
    """Return the place in the cache that belongs to a weight file, links followed."""
    name = blake3.blake3(os.fsencode(file.resolve())).hexdigest()[:32]
    return cache_folder() / f"{name}.json"


def remembered(files: Iterable[Path]) -> list[Path]:
    """Return the cache entries there are about these weight files."""
    with suppress(RuntimeError):  # no home folder, no cache
        return [entry for entry in map(_entry_path, files) if entry.exists()]
    return []


def _recall(file: Path, stamp: Stamp, infos: Iterable[TensorInfo]) -> dict[str, str]:
    """Return the remembered digests of these tensors; none where anything is not as it should be."""
    try:
        entry = json.loads(_entry_path(file).read_bytes())
        if entry["version"] != CACHE_VERSION or entry["stamp"] != list(stamp):
            return {}
        kept: Mapping[str, Any] = entry["tensors"]
        there = [info for info in infos if _is_plain(info) and kept[info.name][1:] == _place(info)]
        return {info.name: kept[info.name][0] for info in there if DIGEST.fullmatch(kept[info.name][0])}
    except (OSError, RuntimeError, ValueError, TypeError, LookupError):
        return {}


def _store(file: Path, stamp: Stamp, infos: Iterable[TensorInfo], digests: Mapping[str, str]) -> None:
    """Write what is known of a file, in one step; the cache is a help, so that no failure counts."""
    tensors = {info.name: [digests[info.name], *_place(info)] for info in infos if _is_plain(info)}
    entry = {"version": CACHE_VERSION, "file": str(file), "stamp": stamp, "tensors": tensors}
    with suppress(OSError, RuntimeError):
        place = _entry_path(file)
        make_private(place.parent)
        handle, partial = tempfile.mkstemp(dir=place.parent, suffix=".partial")
        try:
            os.close(handle)
            Path(partial).write_text(json.dumps(entry), encoding="utf-8")
            Path(partial).replace(place)
        except OSError:
            Path(partial).unlink(missing_ok=True)


def _place(info: TensorInfo) -> list[Any]:
    """Return what must agree, besides the file, for a remembered digest to be this tensor's."""
    return [info.dtype, list(info.shape), info.offset]


def _is_plain(info: TensorInfo) -> bool:
    """Tell whether a tensor's bytes lie in one file as they are: then the file is all that counts."""
    return type(info) is TensorInfo


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


def formula_terms(terms: Mapping[Term, float]) -> list[dict[str, Any]]:
    """Return a sum as plain values for the manifest, in the order given.

    A checkpoint, or a direction on disk, goes by the last part of its folder's path: where the models lay on
    the writer's machine is nobody's business. What was never hashed is read once more for its fingerprint.
    """
    return [
        {"model": term.folder.name, "coefficient": coefficient, "fingerprint": term.fingerprint()}
        for term, coefficient in terms.items()
    ]


def write_manifest(
    folder: Path, *, checkpoint: Checkpoint, digests: Mapping[str, str], content: Mapping[str, Any]
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
    if found.pop("seal", None) != _seal(found) or not all(_is_part(found.get(part)) for part in PARTS):
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
    manifest, checkpoint = read_manifest(folder), Checkpoint.open(folder)
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


def _companions(folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
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


def _is_part(part: Any) -> bool:
    """Tell whether this maps names to digests."""
    return isinstance(part, dict) and all(
        isinstance(digest, str) and DIGEST.fullmatch(digest) for digest in part.values()
    )


def _compare(written: Mapping[str, str], found: Mapping[str, str]) -> dict[str, Finding]:
    """Return what became of the files that are not as they were written."""
    kinds: dict[str, Finding] = {name: "changed" for name in written if found.get(name) != written[name]}
    kinds |= {name: "missing" for name in written if name not in found}
    return kinds | {name: "new" for name in found if name not in written}
