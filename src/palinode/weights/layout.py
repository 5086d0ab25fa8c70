"""The files of an output folder, planned before any arithmetic: headers, sizes, the place of every tensor.

The output is safetensors whatever the target is stored as, in the target's own files and order where
these are safetensors already.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from palinode.errors import OutputError, unwritable
from palinode.weights.blocks import BLOCK
from palinode.weights.checkpoint import INDEX, SINGLE, Checkpoint
from palinode.weights.foreign import copy_inside
from palinode.weights.tensors import FLOAT_BYTES, Files, TensorInfo, by_file

SHARD = 5_000_000_000
"""Bytes of a file, where the target's own files cannot be taken over."""


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file to be written: its header, and where each tensor goes."""

    name: str
    header: bytes
    tensors: Mapping[str, TensorInfo]
    size: int


def plan_files(anchor: Checkpoint, code: str | None, *, kept: Collection[str] = ()) -> list[OutputFile]:
    """Plan the output files after the anchor's own; floating-point tensors but those `kept` are in `code`."""
    files = by_file(anchor.tensors.values())
    if len(files) > 1 and all(path.suffix == ".safetensors" for path in files):
        return [_plan(path.name, infos, code, kept) for path, infos in files.items()]
    shards = list(_shards([info for infos in files.values() for info in infos]))
    if len(files) < 2 and all(path.suffix == ".safetensors" for path in files):
        shards = [[info for infos in files.values() for info in infos]]
    if len(shards) < 2:
        return [_plan(SINGLE, shards[0] if shards else [], code, kept)]
    stem, suffix = Path(SINGLE).stem, Path(SINGLE).suffix
    names = [f"{stem}-{place + 1:05d}-of-{len(shards):05d}{suffix}" for place in range(len(shards))]
    return [_plan(name, shard, code, kept) for name, shard in zip(names, shards, strict=True)]


def _shards(infos: Sequence[TensorInfo]) -> Iterator[list[TensorInfo]]:
    shard: list[TensorInfo] = []
    for info in infos:
        if shard and sum(member.nbytes for member in shard) + info.nbytes > SHARD:
            yield shard
            shard = []
        shard.append(info)
    if shard:
        yield shard


def _plan(name: str, infos: Sequence[TensorInfo], code: str | None, kept: Collection[str]) -> OutputFile:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    sizes, end = {}, 0
    for info in infos:
        kind = code if code and info.is_float and info.name not in kept else info.dtype
        nbytes = info.size * (FLOAT_BYTES[kind] if info.is_float else info.itemsize)
        entries[info.name] = {"dtype": kind, "shape": list(info.shape), "data_offsets": [end, end + nbytes]}
        sizes[info.name] = (kind, end, nbytes)
        end += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8 bytes
    start = 8 + len(text)
    placed = {
        info.name: TensorInfo(info.name, kind, info.shape, Path(name), start + offset, nbytes)
        for info in infos
        for kind, offset, nbytes in [sizes[info.name]]
    }
    return OutputFile(name, len(text).to_bytes(8, "little") + text, placed, start + end)


class OutputFiles:
    """The planned files, open for writing; closed by `stack`."""

    def __init__(
        self, files: Sequence[OutputFile], folder: Path, stack: ExitStack, *, create: bool = True
    ) -> None:
        """Lay the files out at their final size with their headers; `create` false opens those of another."""
        self._folder = folder
        self._places = {name: info for file in files for name, info in file.tensors.items()}
        opener = _create if create else _open
        self._handles = {Path(file.name): opener(folder / file.name, file, stack) for file in files}

    def write(self, name: str, start: int, values: memoryview) -> None:
        """Put raw bytes into a tensor's place, from its byte `start` on."""
        info, done = self._places[name], 0
        while done < len(values):
            try:
                done += os.pwrite(self._handles[info.file], values[done:], info.offset + start + done)
            except OSError as error:
                raise unwritable(self._folder / info.file, error) from error

    def copy(self, infos: Iterable[TensorInfo]) -> None:
        """Copy tensors as they are, a block at a time."""
        with Files() as files:
            for info in infos:
                for start in range(0, info.nbytes, BLOCK):
                    raw = memoryview(bytearray(min(BLOCK, info.nbytes - start)))
                    info.read(files, start, raw)
                    self.write(info.name, start, raw)

    def sync(self) -> None:
        """Wait until everything written is on disk."""
        for handle in self._handles.values():
            os.fsync(handle)


def _create(path: Path, file: OutputFile, stack: ExitStack) -> int:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        stack.callback(os.close, handle)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, file.size)
        else:  # macOS
            os.ftruncate(handle, file.size)
        os.pwrite(handle, file.header, 0)
    except OSError as error:
        raise unwritable(path, error) from error
    return handle


def _open(path: Path, file: OutputFile, stack: ExitStack) -> int:
    handle = os.open(path, os.O_RDWR)
    stack.callback(os.close, handle)
    if os.fstat(handle).st_size != file.size or os.pread(handle, len(file.header), 0) != file.header:
        raise OutputError(f"{path} is laid out for another sum; give every process the same command")
    return handle


def write_index(files: Sequence[OutputFile], folder: Path) -> None:
    """Write which tensor lies in which file, where there are several."""
    if len(files) == 1:
        return
    total = sum(info.nbytes for file in files for info in file.tensors.values())
    names = {name: file.name for file in files for name in file.tensors}
    text = json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}, indent=2
    )
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def copy_companions(anchor: Checkpoint, folder: Path, dtype: str | None) -> None:
    """Copy config, tokenizer, processor and licence of the target; note a changed dtype in the config.

    A config that came out of the weight file itself (GGUF) is written down.
    """
    for path in (*anchor.companions(), *anchor.papers()):
        place = folder / path.relative_to(anchor.folder)
        place.parent.mkdir(exist_ok=True)
        copy_inside(anchor.folder, path, place)
    place = folder / "config.json"
    if anchor.config and (dtype or not place.exists()):
        config = {key: value for key, value in anchor.config.items() if key != "torch_dtype" or not dtype}
        text = json.dumps(config | ({"dtype": dtype} if dtype else {}), indent=2)
        place.write_text(text + "\n", encoding="utf-8")
