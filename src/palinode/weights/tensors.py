"""Tensors in files: their names, where their bytes lie, and how these are read, from several threads at once.

`plain` takes off a name what wrappers, trainers and versions of one library add (`transformer.`, `module.`,
`_orig_mod.`), and gives the output head and the experts of a mixture one spelling each. A plain name that two
tensors of one file share stands for neither.

A safetensors file is 8 bytes of header length, that many bytes of JSON, `{name: {dtype, shape,
data_offsets}}`, then the raw little-endian tensors. The JSON is checked in full before anything uses it, so
that a half-downloaded or damaged file is named here and not later. Small files are read whole, up to a limit.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from threading import Event, Lock, local
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from palinode.errors import CheckpointError, told_as
from palinode.records import read_bytes, unique_keys

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "head.weight", "output_projection.weight")
"""Names of output heads. A tied head that is not in the files shares its storage with the token embedding."""

EMBEDDINGS = (
    "embed_tokens", "wte", "embed_in", "tok_embeddings", "word_embeddings", "word_embedding", "embeddings",
)  # fmt: skip

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What data parallelism, torch.compile, FSDP and checkpointing put into names, anywhere."""

STEMS = {"base_model", "model", "transformer", "gpt_neox", "backbone", "language_model", "text_model",
    "rwkv", "bert", "roberta", "biogpt", "cpmant", "gpt_neox_japanese"}  # fmt: skip
"""What stands before the name that a tensor has in the bare model."""

MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

# What a model computes for itself, and old checkpoints hold all the same.
BUFFER = re.compile(
    r"(^|\.)(original_inv_freq|inv_freq|(cos|sin)_cached|masked_bias|num_batches_tracked|(.+_)?mask|tril|triu|(.+_)?ids)$"
)

CALLED_WEIGHTS = re.compile(r"(weight|weight_packed|_data|codes|_blocks|W_q)$")


@lru_cache(maxsize=1 << 16)
def plain(name: str) -> str:
    """Return the one spelling of a tensor's name.

    >>> plain("module.transformer.h.0._orig_mod.ln_1.weight"), plain("embed_out.weight")
    ('h.0.ln_1.weight', 'lm_head.weight')
    >>> plain("model.layers.0.block_sparse_moe.experts.1.w2.weight")
    'layers.0.mlp.experts.1.down_proj.weight'
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 2 and parts[0] in STEMS:
        del parts[0]
    if len(parts) == 2 and f"{parts[0]}.weight" in HEADS:
        parts[0] = "lm_head"
    if "block_sparse_moe" in parts:
        parts[parts.index("block_sparse_moe")] = "mlp"
    if len(parts) > 3 and parts[-4] == "experts":
        parts[-2] = MIXTRAL.get(parts[-2], parts[-2])
    return ".".join(parts)


def by_plain(names: Iterable[str]) -> dict[str, str]:
    """Return each name by its plain one, without those that several names have."""
    found: dict[str, str] = {}
    shared = set()
    for name in names:
        if found.setdefault(plain(name), name) != name:
            shared.add(plain(name))
    return {key: name for key, name in found.items() if key not in shared}


def is_wrapped(name: str) -> bool:
    """Tell whether a wrapper has left something in a name, which transformers does not take for the same."""
    return name.startswith("base_model.model.") or not WRAPPERS.isdisjoint(name.split("."))


def is_head(name: str) -> bool:
    """Tell whether this is an output head's weight, under any spelling."""
    return plain(name) == HEADS[0]


def is_embedding(name: str) -> bool:
    """Tell whether this is a token embedding, under any spelling."""
    *_, module, kind = ("", *plain(name).split("."))
    return kind == "weight" and module in EMBEDDINGS


def is_buffer(name: str, shape: tuple[int, ...], *, is_float: bool) -> bool:
    """Tell whether a model computes this tensor for itself: rotary frequencies, masks, positions.

    A causal mask is [n, n], mostly with ones before it, and is called `bias` in GPT-2 and its kin.
    """
    square = len(shape) > 2 and shape[-1] == shape[-2] and set(shape[:-2]) == {1}
    if is_float:
        return bool(BUFFER.search(name)) or (square and name.endswith(".bias"))
    mask = len(shape) > 1 and name.endswith("bias")
    return bool(BUFFER.search(name)) or mask or (square and not CALLED_WEIGHTS.search(name))


LONGEST_READ = 1 << 24
"""Bytes that are read at a time where they are copied."""


class Files(AbstractContextManager["Files"]):
    """Weight files that are open for reading: each is opened at its first use, and closed with this."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self._lock = Lock()

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def size(self, file: Path) -> int:
        """Return how many bytes a file has now."""
        return os.fstat(self.handle(file)).st_size

    def read(self, file: Path, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a file from `offset` on.

        Raises CheckpointError when the file cannot be read, or ends too early.
        """
        handle, done = self.handle(file), 0
        while done < len(out):
            try:
                count = _read(handle, out[done:], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{file} cannot be read at byte {offset + done} ({error.strerror}); fetch the model again"
                ) from None
            if count <= 0:
                raise CheckpointError(
                    f"{file} ended at byte {offset + done}; it was cut off while being read"
                )
            done += count

    def handle(self, file: Path) -> int:
        """Return the open file's number; it stays open as long as this does."""
        if (known := self._handles.get(file)) is not None:
            return known
        with self._lock:
            if file not in self._handles:
                with told_as(CheckpointError, f"{file} cannot be read", "fetch the model again"):
                    self._handles[file] = os.open(file, os.O_RDONLY)
            return self._handles[file]


def _read(handle: int, out: memoryview, offset: int) -> int:
    """Read into `out` and return how many bytes came; some systems (older macOS) read only into new bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, [out], offset)
    found = os.pread(handle, min(len(out), LONGEST_READ), offset)
    out[: len(found)] = found
    return len(found)


FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
OTHER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}

MAX_DIMENSIONS = 32
"""A shape with more dimensions is no shape of a weight; numpy knows no more either."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor whose bytes lie in one file, in row-major order without gaps."""

    name: str
    dtype: str
    """Code of the safetensors format: F32, BF16, F16, I64, …"""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Bytes from the start of the file."""
    nbytes: int

    def read(self, files: Files, start: int, out: memoryview) -> None:
        """Fill `out` with the tensor's raw little-endian bytes from byte `start` on (row-major order).

        Raises CheckpointError when the file cannot be read any more, or ends too early.
        """
        files.read(self.file, self.offset + start, out)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold a part of the tensor."""
        return (self.file,)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether sums can be formed of it; integers and a model's own buffers are copied from the target."""
        return self.dtype in FLOAT_BYTES and not is_buffer(self.name, self.shape, is_float=True)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return FLOAT_BYTES.get(self.dtype) or OTHER_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class HeldTensor(TensorInfo):
    """A tensor that had to be decoded and is held in memory; `file` is where it came from."""

    data: npt.NDArray[np.uint8] = field(repr=False, compare=False)
    """All of its raw bytes, row-major."""

    def read(self, files: Files, start: int, out: memoryview) -> None:  # noqa: ARG002 - it needs no file
        """Fill `out` with the tensor's raw bytes from byte `start` on."""
        out[:] = self.data[start : start + len(out)].data


def itemsize_of(file: Path, name: str, dtype: str) -> int:
    """Return the bytes of one element; raises CheckpointError for a dtype that we do not know."""
    itemsize = FLOAT_BYTES.get(dtype) or OTHER_BYTES.get(dtype)
    if itemsize is None:
        eight = dtype.lower().startswith(("f8", "float8")) and not name.endswith("scale")  # NVFP4's are
        kind = "FP8, a packed type" if eight else "a packed or quantised type"
        way_out = "load it with dequantize=True in transformers and save_pretrained, or " if eight else ""
        raise CheckpointError(
            f"{file}: {shown(name)} is stored as {shown(dtype)}, {kind}; weights can be added only in "
            f"float64, float32, float16 or bfloat16: {way_out}use the model it was made from"
        )
    return itemsize


def is_shape(shape: Sequence[Any]) -> bool:
    """Tell whether these are the lengths of a tensor's dimensions: few, whole and not negative."""
    return len(shape) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 1 << 63 for n in shape)


def is_text(name: str) -> bool:
    """Tell whether a name can be written as UTF-8: half a surrogate pair cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: str) -> str:
    """Return a name from a file as a message can show it: on one line, and not endless."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= 200 else f"{text[:200]}…"


def by_file(infos: Iterable[TensorInfo]) -> dict[Path, list[TensorInfo]]:
    """Return tensors grouped by the (first) file they lie in, in their order."""
    grouped: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        grouped.setdefault(info.file, []).append(info)
    return grouped


Part = TypeVar("Part")
Result = TypeVar("Result")

BLOCK = 1 << 19
"""Bytes of a block: 512 KiB, so that a thread still has it in its cache when it works on it."""

RUN = 16
"""Parts that a thread is given at a time, as handing over has its price too."""

AHEAD = 3
"""Runs handed to each thread ahead of the one whose results are taken."""


def cores() -> int:
    """Return the number of processor cores that this process may use; on macOS all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_parts(
    parts: Iterable[Part], start: Callable[[], Callable[[Part], Result]], *, workers: int | None = None
) -> Generator[tuple[Part, Result], None, None]:
    """Yield each part with what is made of it in one of a few threads, in the order of the parts.

    Each thread has the worker that `start` makes for it. By default there is a thread for each core, up to
    16. The first error stops the rest and is raised; what is under way is waited for, also when the caller
    takes no more.
    """
    count = workers or min(16, cores())
    rest, stopped, own = iter(parts), Event(), local()
    waiting: deque[Future[list[tuple[Part, Result]]]] = deque()

    def walk(run: Sequence[Part]) -> list[tuple[Part, Result]]:
        if not hasattr(own, "work"):
            own.work = start()
        return [(part, own.work(part)) for part in run if not stopped.is_set()]

    pool = ThreadPoolExecutor(count)
    try:
        while True:
            while len(waiting) <= AHEAD * count and (run := [*islice(rest, RUN)]):
                waiting.append(pool.submit(walk, run))
            if not waiting:
                return
            yield from waiting.popleft().result()
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


def map_blocks(
    infos: Iterable[TensorInfo],
    work: Callable[[TensorInfo, memoryview], Result],
    *,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[TensorInfo, Result]]:
    """Yield what `work` makes of each block of each tensor, in the order of tensors and blocks.

    A block is BLOCK raw little-endian bytes, the last one of a tensor what is left over; a tensor of size
    zero has none. `work` runs in several threads and must not keep the block, which is overwritten.
    `on_progress` is told, in the caller's thread, the bytes that were done. Raises CheckpointError when a
    file cannot be read or is cut off.
    """

    def start() -> Callable[[tuple[TensorInfo, int]], Result]:
        buffer = memoryview(bytearray(BLOCK))

        def read(part: tuple[TensorInfo, int]) -> Result:
            info, first = part
            block = buffer[: min(BLOCK, info.nbytes - first)]
            info.read(files, first, block)
            return work(info, block)

        return read

    parts = ((info, start) for info in infos for start in range(0, info.nbytes, BLOCK))
    with Files() as files, closing(map_parts(parts, start, workers=workers)) as results:
        for (info, first), result in results:
            if on_progress:
                on_progress(min(BLOCK, info.nbytes - first))
            yield info, result


@dataclass(frozen=True, slots=True)
class Window:
    """`size` bytes of an open file from byte `start` on; all offsets below count from there."""

    files: Files
    file: Path
    start: int
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on; raises CheckpointError when they lie outside."""
        if not 0 <= offset <= offset + length <= self.size:
            raise CheckpointError(
                f"{self.file} is damaged: it points to {length} bytes at {offset} of {self.size}; fetch "
                "it again"
            )
        raw = bytearray(length)
        self.files.read(self.file, self.start + offset, memoryview(raw))
        return bytes(raw)


def whole(files: Files, file: Path) -> Window:
    """Return all of a file."""
    return Window(files, file, 0, files.size(file))


MAX_JSON = 100_000_000
"""Bytes, also of a header: the safetensors library refuses longer ones as well."""
MAX_PARTS = 2_000_000
"""Lists and objects in a JSON file: those of six hundred thousand tensors."""


def read_small(file: Path, *, limit: int) -> bytes:
    """Return all bytes of a file.

    Raises CheckpointError when there is none, when it is a folder, a pipe or the like, or has more than
    `limit` bytes.
    """
    with told_as(CheckpointError, f"{file} cannot be read", "fetch the model again"):
        return read_bytes(file, limit=limit)


def read_json(file: Path, *, unique: bool = False, limit: int = MAX_JSON) -> Any:
    """Return the content of a JSON file; with `unique`, no object may name a key twice.

    Raises CheckpointError when it cannot be read, or has more than `limit` bytes.
    """
    raw = read_small(file, limit=limit)
    with told_as(CheckpointError, f"{file} cannot be read", "fetch the model again"):
        return parse_json(raw, unique=unique)


def read_object(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is no file and it is `optional`.

    Raises CheckpointError when there is none, or it cannot be read.
    """
    if not os.path.exists(file):  # noqa: PTH110 - Path.exists raises where a folder is closed to us
        if optional:
            return {}
        raise CheckpointError(f"there is no {file}; is the download finished?")
    content = read_json(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object; fetch it again")
    return content


def parse_json(raw: bytes, *, unique: bool) -> Any:
    """Return the content of a JSON text; raises ValueError, or RecursionError where it is nested too deep."""
    if raw.count(b"[") + raw.count(b"{") > MAX_PARTS:
        raise ValueError(f"it has more than {MAX_PARTS} lists and objects")
    collects = gc.isenabled()
    gc.disable()  # which would look through all that is read so far again and again
    try:
        return json.loads(raw.decode(), object_pairs_hook=unique_keys if unique else None)
    except ValueError as error:
        if "set_int_max_str_digits" in str(error):  # Python's advice, to whoever writes programs
            raise ValueError("it has a number of thousands of digits") from None
        raise
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


def read_header(file: Path) -> list[TensorInfo]:
    """Return the tensors of one safetensors file in the order of their bytes.

    Raises CheckpointError when the header is absurd, a tensor's bytes do not fit its shape, tensors
    overlap, or the file is longer or shorter than its header says.
    """
    with (
        told_as(CheckpointError, f"{file} cannot be read", "fetch the model again"),
        file.open("rb") as stream,
    ):
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        raw = stream.read(length) if length <= min(size - 8, MAX_JSON) else None
    if raw is None:
        raise CheckpointError(
            f"{file} is cut off or no safetensors file ({size} bytes, header of {length}); fetch it again"
        )
    infos = sorted(_parse_header(file, raw, 8 + length), key=lambda info: (info.offset, info.nbytes))
    end = 8 + length
    for info in infos:
        if info.offset != end:
            raise CheckpointError(
                f"{file}: the bytes of {shown(info.name)} overlap another tensor or leave a gap"
            )
        end += info.nbytes
    if end != size:
        raise CheckpointError(f"{file} has {size} bytes where its header needs {end}; fetch it again")
    return infos


def header_of(infos: Iterable[TensorInfo], room: int = 0) -> bytes:
    """Return what a safetensors file begins with whose tensors lie so far behind it, in `room` bytes or more.

    The tensors start on a multiple of 8 bytes.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for info in infos:
        span = [info.offset, info.offset + info.nbytes]
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": span}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(max(room - 8, len(text) + -len(text) % 8))
    return len(text).to_bytes(8, "little") + text


def _parse_header(file: Path, raw: bytes, data_start: int) -> Iterator[TensorInfo]:
    with told_as(CheckpointError, f"{file} has a header that cannot be read", "fetch it again"):
        entries = parse_json(raw, unique=True)
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file} has a header that is not a JSON object; fetch it again")
    about = entries.get("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise CheckpointError(
            f"{file} has a __metadata__ that does not consist of texts, as the format asks; fetch it again"
        )
    for name, entry in entries.items():
        if name != "__metadata__":
            yield _tensor_info(file, name, entry, data_start)


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(dtype, str) and is_shape(shape) and is_shape([start, stop]) and is_text(name)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: the header entry of {name!a:.200} is malformed; fetch it again")
    itemsize = itemsize_of(file, name, dtype)
    if math.prod(shape) * itemsize != stop - start:
        raise CheckpointError(
            f"{file}: {shown(name)} has {stop - start} bytes where its shape needs another number"
        )
    return TensorInfo(name, dtype, shape, file, data_start + start, stop - start)
