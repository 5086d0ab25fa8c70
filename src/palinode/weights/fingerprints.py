"""Content hashes (BLAKE3) of tensors and whole models, remembered beside size and time of their files.

A tensor's digest is blake3(dtype, shape, d_1, d_2, …), where d_i is the digest of its i-th block of
HASH_BLOCK raw bytes. So a block is hashed by whoever has it in cache, in any order, and neither the
digest nor the fingerprint of a model depends on how its tensors are spread over files.

What was hashed once is kept in the user's cache folder, a small JSON file for each weight file. It counts
only while path, size, times and inode of the weight file are what they were.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import blake3

from palinode.errors import CheckpointError, told_as
from palinode.records import cache_folder, keep_whole
from palinode.weights.tensors import BLOCK, TensorInfo, by_file, map_blocks, read_header

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


class _Readable(Protocol):
    """A model or direction, as far as its files go."""

    def files(self) -> Iterable[Path]: ...


class _OnDisk(_Readable, Protocol):
    """A model folder, as far as hashing goes."""

    @property
    def folder(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    def companions(self) -> Iterable[Path]: ...


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
    checkpoint: _OnDisk,
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


def fingerprint(checkpoint: _OnDisk, digests: Mapping[str, str] | None = None) -> str:
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


def known_fingerprint(checkpoint: _OnDisk) -> str | None:
    """Return the fingerprint if every tensor's digest is remembered, without reading any; else None."""
    found: dict[str, str] = {}
    for file, infos in by_file(checkpoint.tensors.values()).items():
        found |= _recall(file, _stamp(file), infos)
    return fingerprint(checkpoint, found) if found.keys() == checkpoint.tensors.keys() else None


def companion_digests(checkpoint: _OnDisk) -> dict[str, str]:
    """Return the digests (64 hex digits) of config, tokenizer and templates, by path in the folder."""
    return {
        path.relative_to(checkpoint.folder).as_posix(): file_digest(path) for path in checkpoint.companions()
    }


def file_digest(path: Path) -> str:
    """Return the digest (64 hex digits) of a whole file; raises CheckpointError when it cannot be read."""
    total = blake3.blake3()
    with (
        told_as(CheckpointError, f"{path} cannot be read", "fetch the model again"),
        path.open("rb") as stream,
    ):
        while block := stream.read(HASH_BLOCK):
            total.update(block)
    return total.hexdigest()


def remember(checkpoint: _OnDisk, digests: Mapping[str, str]) -> None:
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


def check_files(checkpoints: Iterable[_OnDisk]) -> None:
    """Raise CheckpointError when a weight file is not what it was when its checkpoint was opened."""
    for checkpoint in checkpoints:
        for file, infos in by_file(checkpoint.tensors.values()).items():
            check_as_opened(file, infos)


def check_as_opened(file: Path, infos: Iterable[TensorInfo]) -> None:
    """Raise CheckpointError when the tensors of a safetensors file lie elsewhere than when it was opened."""
    if file.suffix != ".safetensors":
        return
    try:
        now = read_header(file)
    except CheckpointError:
        now = []
    if not set(now).issuperset(infos):
        raise CheckpointError(f"{file} is not what it was when the checkpoint was opened; open it again")


def take_stamps(terms: Iterable[_Readable]) -> Stamps:
    """Return the stamps of all files that these models and directions are read from."""
    return {file: _stamp(file) for term in terms for file in term.files()}


def check_stamps(stamps: Stamps, terms: Iterable[_Readable] = ()) -> None:
    """Raise CheckpointError when a file is no longer what it was, or is new beside the weights of `terms`.

    What was read may then be of two states.
    """
    come = take_stamps(terms).keys() - stamps.keys()
    for file, stamp in sorted({**stamps, **dict.fromkeys(come)}.items()):
        if _stamp(file) != stamp:
            raise CheckpointError(
                f"{file} changed while it was read; wait for its writer, and repeat the call"
            )


def check_same(checkpoint: _OnDisk, before: str) -> None:
    """Raise CheckpointError when a model no longer has the fingerprint that it had; nothing else counts."""
    if fingerprint(checkpoint) != before:
        raise CheckpointError(
            f"{checkpoint.folder} changed while it was in use, and what was measured may be of two models; "
            "wait for its writer, and repeat the call"
        )


@contextmanager
def unchanged(terms: Iterable[_Readable]) -> Iterator[None]:
    """Raise CheckpointError when a file of these models or directions changes before the block ends."""
    terms = list(terms)
    stamps = take_stamps(terms)
    yield
    check_stamps(stamps, terms)


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
    with told_as(CheckpointError, f"{file} cannot be read", "fetch the model again"):
        status = file.stat()
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _entry_path(file: Path) -> Path:
    """Return the place in the cache that belongs to a weight file, links followed."""
    name = blake3.blake3(os.fsencode(file.resolve())).hexdigest()[:32]
    return cache_folder("digests") / f"{name}.json"


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
        keep_whole(_entry_path(file), entry)


def _place(info: TensorInfo) -> list[Any]:
    """Return what must agree, besides the file, for a remembered digest to be this tensor's."""
    return [info.dtype, list(info.shape), info.offset]


def _is_plain(info: TensorInfo) -> bool:
    """Tell whether a tensor's bytes lie in one file as they are: then the file is all that counts."""
    return type(info) is TensorInfo
