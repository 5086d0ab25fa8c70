"""Write a point as an ordinary model folder, atomically.

The output has the target's layout: same files, same tensors, same order. So every header is known
before any arithmetic, files are laid out at their final size, and slices are put in place in any order.
Everything is written into a neighbour folder that takes its final name only when it is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from palinode.errors import AlgebraError, InputError, OutputError
from palinode.weights.arithmetic import (
    CODES,
    DTYPES,
    Dose,
    DoseMeter,
    Operands,
    Reader,
    Rounding,
    Slice,
    all_finite,
    as_bytes,
    check_rounding,
    check_same_shape,
    map_slices,
    name_key,
    round_to,
    slices,
)
from palinode.weights.checkpoint import INDEX, SINGLE, Checkpoint, TensorInfo, by_file
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
    if not home.is_dir() or not os.access(home, os.W_OK):
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
    if not isinstance(point, Point):
        raise AlgebraError("a direction is not a model; save a point, as in target - alpha * forget_vector")
    check_rounding(rounding)
    anchor, along = point.anchor, along or {}
    used = [anchor, *point.terms, *(term for direction in along.values() for term in direction.terms)]
    used = list(dict.fromkeys(used))
    check_same_shape(used[1:], anchor)
    files = _layout(anchor, code_of(dtype))
    output, inputs = output.expanduser().resolve(), [checkpoint.folder for checkpoint in used]
    check_output(output, inputs)
    with _claimed(output) as partial:
        check_output(output, inputs, needs=sum(file.size for file in files))
        dose = _fill(
            point, used, files, partial, rounding=rounding, seed=seed, along=along, on_progress=on_progress
        )
        _write_index(files, partial)
        _copy_companions(anchor, partial, dtype)
        _check_written(partial, anchor)
        _publish(partial, output)
    return Saved(Checkpoint.open(output), dose, rounding)


@contextmanager
def _claimed(output: Path) -> Iterator[Path]:
    """Make an empty neighbour folder that is ours alone; it goes away again when there is an error.

    What a killed run has left there is thrown away. The lock goes with the process, however that ends.
    """
    partial = output.with_name(f".{output.name}.partial")
    with ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, handle)
            _lock(handle)
            if not os.path.samestat(os.fstat(handle), partial.stat()):
                raise BlockingIOError  # the other run has just finished
            for entry in partial.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        except BlockingIOError:
            raise OutputError(f"another run is writing {output}; wait for it, or name another") from None
        except OSError as error:
            raise OutputError(f"{partial} cannot be made ({error.strerror}); name another output") from None
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _lock(handle: int) -> None:
    """Lock an open file or folder, or raise BlockingIOError."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems have no locks
        pass


# Laying the files out


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file to be written: its header, and where each tensor goes."""

    name: str
    header: bytes
    tensors: Mapping[str, TensorInfo]
    size: int


def code_of(dtype: str | None) -> str | None:
    """Return the safetensors code of a dtype name; raises InputError when weights cannot have it."""
    if dtype is not None and dtype not in CODES:
        raise InputError(f"there is no dtype {dtype!r} for weights; choose one of {', '.join(CODES)}")
    return CODES[dtype] if dtype else None


def _layout(anchor: Checkpoint, code: str | None) -> list[OutputFile]:
    """Plan the output files after the anchor's own, with floating-point tensors in `code`."""
    files = by_file(anchor.tensors.values())
    if len(files) < 2:
        return [_plan_file(SINGLE, [*anchor.tensors.values()], code)]
    return [_plan_file(path.name, infos, code) for path, infos in files.items()]


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
    used: Sequence[Checkpoint],
    files: Sequence[OutputFile],
    folder: Path,
    *,
    rounding: Rounding,
    seed: int,
    along: Mapping[str, Direction],
    on_progress: Callable[[int], None] | None,
) -> Dose:
    """Write headers, then every slice of every tensor in its place; return the dose that arrived."""
    anchor, meter = point.anchor, DoseMeter(along)
    placed = {name: info for file in files for name, info in file.tensors.items()}

    def work(part: Slice) -> DoseMeter:
        place, own = placed[part.info.name], DoseMeter(along)
        operands = Operands(reader, part, point.terms, place.dtype)
        exact, stored = round_slice(point, operands, part, place.dtype, rounding=rounding, seed=seed)
        _write(handles[place.file], as_bytes(stored), place.offset + part.start * place.itemsize)
        if not anchor.is_second_copy(part.info.name):
            own.add(operands, operands[anchor], exact, stored)
        return own

    with ExitStack() as stack:
        handles = {Path(file.name): _create(folder / file.name, file, stack) for file in files}
        reader = stack.enter_context(Reader())
        reader.open(used)
        _copy_other_tensors(reader, anchor, placed, handles)
        map_slices(list(slices(anchor)), work, collect=meter.merge, on_progress=on_progress)
    return meter.result()


def round_slice(
    point: Point, operands: Operands, part: Slice, code: str, *, rounding: Rounding, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a slice of a point before and after rounding.

    This is the one place where a written and a live model agree on their values. Raises InputError
    when one of them is too large for its dtype.
    """
    name, exact = part.info.name, operands.point(point)
    key = name_key(seed, name)
    stored = round_to(exact, DTYPES[code], stochastic=rounding != "nearest", key=key, start=part.start)
    if not all_finite(stored):
        kind = next(kind for kind, known in CODES.items() if known == code)
        raise InputError(
            f"the sum has values in {name} that {kind} cannot hold; use smaller scales or a wider dtype"
        )
    return exact, stored


def _create(path: Path, file: OutputFile, stack: ExitStack) -> int:
    """Create a file at its final size with its header in place, and return its handle; `stack` closes it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        stack.callback(os.close, handle)
        os.posix_fallocate(handle, 0, file.size)
        _write(handle, memoryview(file.header), 0)
    except OSError as error:
        raise OutputError(
            f"{path} could not be laid out at {file.size / 1e9:.2f} GB ({error.strerror})"
        ) from error
    return handle


def _write(handle: int, view: memoryview, offset: int) -> None:
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
            _write(handles[place.file], memoryview(reader.read_bytes(info, 0, info.nbytes)), place.offset)


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
    for path in [*partial.rglob("*"), partial]:  # all of it is on disk before the name is
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    try:
        partial.replace(output)
    except OSError as error:
        raise OutputError(
            f"{output} was taken while it was written ({error.strerror}); repeat the call"
        ) from None
