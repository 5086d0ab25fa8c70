"""Write a point as an ordinary model folder, atomically.

The output has the target's layout: same files, same tensors, same order. So every header is known
before any arithmetic, files are laid out at their final size, and slices are put in place in any order.
Everything is written into a neighbour folder that takes its final name only when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from palinode.errors import InputError, MismatchError, OutputError
from palinode.weights.arithmetic import (
    CODES,
    DTYPES,
    Dose,
    DoseMeter,
    Operands,
    Reader,
    Rounding,
    Slice,
    as_bytes,
    check_same_shape,
    map_slices,
    name_key,
    round_to,
    slices,
)
from palinode.weights.checkpoint import INDEX, SINGLE, Checkpoint, TensorInfo
from palinode.weights.direction import Direction, Point


@dataclass(frozen=True, slots=True)
class Saved:
    """A model folder that was written, and how much of the change asked for arrived in it."""

    checkpoint: Checkpoint
    dose: Dose
    rounding: Rounding


def check_output(output: Path, inputs: Sequence[Path], *, needs: int = 0) -> None:
    """Raise OutputError unless `output` is free, apart from all inputs, and has room for `needs` bytes."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists and is not empty; choose another output folder, or remove it")
    place = output.resolve()
    for path in (entry.resolve() for entry in inputs):
        if place == path or path in place.parents or place in path.parents:
            raise OutputError(
                f"the output {output} and the input {path} lie inside one another; choose another output"
            )
    home = next(parent for parent in place.parents if parent.exists())
    if not os.access(home, os.W_OK):
        raise OutputError(f"{home} cannot be written to; choose another output folder")
    free = shutil.disk_usage(home).free
    if free < needs:
        raise OutputError(
            f"{home} has {free / 1e9:.2f} GB free where {needs / 1e9:.2f} GB are needed; make room"
        )


def save(
    point: Point,
    output: Path,
    *,
    dtype: str | None = None,
    rounding: Rounding = "auto",
    seed: int = 0,
    along: Mapping[str, Direction] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Saved:
    """Write a weighted sum as a model folder with the layout, config and tokenizer of its anchor.

    `dtype` is "float32", "bfloat16", "float16" or "float64" (default: as in the target, per tensor).
    `along` names the directions whose effective scale the dose reports. Memory stays at a few
    slices. Raises MismatchError when the checkpoints do not fit together, OutputError when the
    output place cannot be used.
    """
    anchor, parts = point.anchor, [*point.terms]
    used = [*{*parts, *(term for direction in (along or {}).values() for term in direction.terms)}]
    check_same_shape([other for other in used if other != anchor], anchor)
    files = _layout(anchor, _code(dtype))
    check_output(output, [checkpoint.folder for checkpoint in used], needs=sum(f.size for f in files))
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dose = _fill(
            point, files, partial, rounding=rounding, seed=seed, along=along or {}, on_progress=on_progress
        )
        _write_index(files, partial)
        _copy_companions(anchor, partial, dtype)
        _check_written(partial, anchor)
        _publish(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Saved(Checkpoint.open(output), dose, rounding)


# Laying the files out


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file to be written: its header, and where each tensor goes."""

    name: str
    header: bytes
    tensors: Mapping[str, TensorInfo]
    size: int


def _code(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in CODES:
        raise InputError(f"there is no dtype {dtype!r} for weights; choose one of {', '.join(CODES)}")
    return CODES[dtype] if dtype else None


def _layout(anchor: Checkpoint, code: str | None) -> list[OutputFile]:
    """Plan the output files after the anchor's own, with floating-point tensors in `code`."""
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in anchor.tensors.values():
        by_file.setdefault(info.file, []).append(info)
    names = [path.name for path in by_file] if len(by_file) > 1 else [SINGLE]
    return [_plan_file(name, infos, code) for name, infos in zip(names, by_file.values(), strict=True)]


def _plan_file(name: str, infos: Sequence[TensorInfo], code: str | None) -> OutputFile:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    sizes, end = {}, 0
    for info in infos:
        kind = code if code and info.is_float else info.dtype
        nbytes = info.size * (DTYPES[kind].itemsize if info.is_float else info.itemsize)
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


# Filling them


def _fill(
    point: Point,
    files: Sequence[OutputFile],
    folder: Path,
    *,
    rounding: Rounding,
    seed: int,
    along: Mapping[str, Direction],
    on_progress: Callable[[int], None] | None,
) -> Dose:
    """Write headers, then every slice of every tensor in its place; return the dose that arrived."""
    anchor = point.anchor
    used = {anchor, *point.terms, *(term for direction in along.values() for term in direction.terms)}
    placed = {name: info for file in files for name, info in file.tensors.items()}
    handles = {Path(file.name): _create(folder / file.name, file) for file in files}
    meter, lock = DoseMeter(along), Lock()

    def work(part: Slice) -> None:
        place = placed[part.info.name]
        operands = Operands(reader, part)
        exact = operands.point(point)
        if not torch.isfinite(exact).all():
            raise MismatchError(
                f"{part.info.name} holds values that are not finite (NaN or infinity) in an input"
            )
        stored = round_slice(exact, place.dtype, part, anchor, rounding=rounding, seed=seed)
        _write(handles[place.file], stored, place.offset + part.start * place.itemsize)
        own = DoseMeter(along)
        own.add(operands, operands[anchor], exact, stored)
        with lock:
            meter.merge(own)

    try:
        with Reader() as reader:
            reader.open([info for checkpoint in used for info in checkpoint.tensors.values()])
            _copy_other_tensors(reader, anchor, placed, handles)
            map_slices(list(slices(anchor)), work, on_progress=on_progress)
        for handle in handles.values():
            os.fsync(handle)
    finally:
        for handle in handles.values():
            os.close(handle)
    return meter.result()


def round_slice(
    exact: torch.Tensor, code: str, part: Slice, anchor: Checkpoint, *, rounding: Rounding, seed: int
) -> torch.Tensor:
    """Round one slice as it is stored: the one place where a written and a live model agree on it."""
    tied = anchor.tied
    name = tied[1] if tied and part.info.name in tied else part.info.name  # a tied pair rounds alike
    key = name_key(seed, name)
    return round_to(exact, DTYPES[code], stochastic=rounding != "nearest", key=key, start=part.start)


def _create(path: Path, file: OutputFile) -> int:
    """Create a file at its final size with its header in place, and return its handle."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.posix_fallocate(handle, 0, file.size)
        os.pwrite(handle, file.header, 0)
    except OSError as error:
        os.close(handle)
        raise OutputError(
            f"{path} could not be laid out at {file.size / 1e9:.2f} GB ({error.strerror})"
        ) from error
    return handle


def _write(handle: int, values: torch.Tensor, offset: int) -> None:
    view = as_bytes(values.contiguous())
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)


def _copy_other_tensors(
    reader: Reader, anchor: Checkpoint, placed: Mapping[str, TensorInfo], handles: Mapping[Path, int]
) -> None:
    """Copy integer and boolean tensors (buffers) from the target as they are."""
    for info in anchor.tensors.values():
        if not info.is_float:
            place = placed[info.name]
            os.pwrite(handles[place.file], reader.read_bytes(info, 0, info.nbytes), place.offset)


# Finishing


def _write_index(files: Sequence[OutputFile], folder: Path) -> None:
    if len(files) == 1:
        return
    total = sum(info.nbytes for file in files for info in file.tensors.values())
    names = {name: file.name for file in files for name in file.tensors}
    text = json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}, indent=2
    )
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _copy_companions(anchor: Checkpoint, folder: Path, dtype: str | None) -> None:
    """Copy config, generation config and tokenizer of the target; note a changed dtype in the config."""
    for path in anchor.companions():
        place = folder / path.relative_to(anchor.folder)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    if dtype:
        config = {key: value for key, value in anchor.config.items() if key != "torch_dtype"}
        text = json.dumps({**config, "dtype": dtype}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _check_written(folder: Path, anchor: Checkpoint) -> None:
    """Read the new folder's headers back: the same tensors with the same shapes, or an error."""
    written = Checkpoint.open(folder)
    check_same_shape([written], anchor)


def _publish(partial: Path, output: Path) -> None:
    """Give the finished folder its final name in one step; an empty folder of that name gives way."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(output)
