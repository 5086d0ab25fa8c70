"""Weights in files of torch.save (.bin, .pt, .pth), found without loading them and without running them.

Such a file is a pickle that describes the tensors, and their storages as raw bytes: in a zip archive, where
each storage is an uncompressed record, or, before PyTorch 1.6, behind the pickle, one after the other. The
pickle is read by our own machine (formats/unpickler.py), which knows the names below and no others; where
a storage lies follows from the archive, so that a tensor can be read in place like any other.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError
from palinode.weights.files import Files
from palinode.weights.formats.pieces import Piece, pieced, row_major
from palinode.weights.formats.unpickler import Inert, Known, flat, inert, unpickle
from palinode.weights.formats.windows import Window, whole
from palinode.weights.formats.zips import START, Record, data_offset, read_directory, read_record
from palinode.weights.tensors import TensorInfo, is_shape, is_text, itemsize_of, shown

MAX_PICKLE = 1 << 24
"""Bytes: 16 MiB. The description of a model with a thousand tensors takes a hundred thousand."""

OLD_MAGIC = 0x1950A86A20F9469CFC6C

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""PyTorch's names of dtypes, and those of the safetensors format."""

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip

WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Under which of these a training checkpoint keeps its weights beside the state of its optimiser."""

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""What data parallelism, torch.compile and FSDP put before the names of a model's tensors."""


@dataclass(frozen=True, slots=True)
class Dtype:
    """The dtype of a tensor or storage: a safetensors code, or PyTorch's name for one that has none."""

    code: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes that tensors are views of: its key in the file, its dtype and number of elements."""

    key: str
    dtype: Dtype
    count: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a pickle describes it; offset and strides count elements. Not yet checked."""

    storage: Storage
    dtype: Dtype
    offset: Any
    shape: Any
    strides: Any


@dataclass(frozen=True, slots=True)
class Saved:
    """What torch.save wrote: the object, and where a storage lies, as (byte in the file, bytes)."""

    content: Any
    locate: Callable[[Storage], tuple[int, int]]


def read_pickled(file: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the tensors of one file of torch.save by name, and notes on what was left out.

    Raises CheckpointError when it is damaged, or holds anything but weights and plain values.
    """
    infos, notes = read_pickled_part(file)
    names, more = without_prefix(file, [*infos])
    return {
        name: replace(info, name=name) for name, info in zip(names, infos.values(), strict=True)
    }, notes + more


def read_pickled_part(file: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the same of one of several files of a model, where the names are those of an index."""
    with Files() as files:
        window = whole(files, file)
        saved = read_saved(window)
        views, notes = _state_dict(file, saved.content)
        return {name: place_view(window, saved, name, view) for name, view in views.items()}, notes


def read_saved(window: Window) -> Saved:
    """Read what torch.save wrote into a file or a part of one; raises CheckpointError when it is damaged."""
    if window.size < 8:
        raise CheckpointError(f"{window.file} is cut off ({window.size} bytes); fetch it again")
    return _read_zip(window) if window.read(0, 4) == START else _read_old(window)


def place_view(window: Window, saved: Saved, name: str, view: View) -> TensorInfo:
    """Return where a tensor lies; raises CheckpointError when its elements are not all in its storage."""
    file, code = window.file, view.dtype.code
    itemsize = itemsize_of(file, name, code)
    shape, strides, first = view.shape, view.strides, view.offset
    if not (
        type(shape) is tuple
        and type(strides) is tuple
        and len(shape) == len(strides)
        and is_shape(shape)
        and is_shape(strides)
        and is_shape([first])
    ):
        raise CheckpointError(f"{file}: the description of {shown(name)} is malformed; fetch it again")
    if 0 in shape:
        return TensorInfo(name, code, shape, file, window.start, 0)
    start, nbytes = saved.locate(view.storage)
    reach = first + 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if reach * itemsize > nbytes:
        raise CheckpointError(f"{file} holds only {nbytes} bytes of {shown(name)}; fetch it again")
    if math.prod(shape) * itemsize > nbytes:
        raise CheckpointError(
            f"{file}: elements of {shown(name)} share their place; make it contiguous() and save it again"
        )
    places = tuple(
        stride * itemsize if length > 1 else own
        for length, stride, own in zip(shape, strides, row_major(shape, itemsize), strict=True)
    )
    piece = Piece((0,) * len(shape), shape, file, window.start + start + first * itemsize, places)
    return pieced(name, code, shape, itemsize, [piece])


def dtype_named(name: str) -> Dtype:
    """Return the dtype that PyTorch calls so."""
    return Dtype(CODES.get(name, name))


def without_prefix(file: Path, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return names without a prefix of PREFIXES that all of them have, and notes that say so."""
    kept, notes = [*names], []
    for prefix in PREFIXES:
        if kept and all(name.startswith(prefix) for name in kept):
            notes.append(f"{file.name}: left out {prefix!r}, with which every name began")
            kept = [name.removeprefix(prefix) for name in kept]
    return kept, notes


# The two kinds of file


def _read_zip(window: Window) -> Saved:
    """Read a zip archive: data.pkl beside one record for each storage, all below one folder."""
    records = read_directory(window)
    top = next(iter(records), "").split("/")[0]

    def record(name: str) -> Record:
        found = records.get(f"{top}/{name}")
        if found is None:
            raise CheckpointError(
                f"{window.file} lacks its record {shown(name)}: torch.save did not write it"
            )
        return found

    if f"{top}/constants.pkl" in records:
        raise CheckpointError(
            f"{window.file} is a TorchScript program; only weights (a state dict) can be used"
        )
    if f"{top}/byteorder" in records:
        order = read_record(window, record("byteorder"), limit=16)
        if order != b"little":
            raise CheckpointError(f"{window.file} is big-endian; save it again on an ordinary machine")
    content, _ = _unpickle(window, read_record(window, record("data.pkl"), limit=MAX_PICKLE), {})

    def locate(storage: Storage) -> tuple[int, int]:
        own = record(f"data/{storage.key}")
        return data_offset(window, own), own.nbytes

    return Saved(content, locate)


def _read_old(window: Window) -> Saved:
    """Read five pickles (magic, version, system, content, keys), then each storage behind its length."""
    raw = window.read(0, min(window.size, MAX_PICKLE))
    place, parts = 0, []
    storages: dict[str, Storage] = {}
    for _ in range(5):
        part, place = _unpickle(window, raw, storages, place)
        parts.append(part)
        if type(parts[0]) is not int or parts[0] != OLD_MAGIC:
            raise CheckpointError(f"{window.file} is no file that torch.save wrote; is it whole?")
    _, _, system, content, keys = parts
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{window.file} is big-endian; save it again on an ordinary machine")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{window.file} does not name its storages; fetch it again")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        count = int.from_bytes(window.read(place, 8), "little")
        itemsize = (
            itemsize_of(window.file, f"storage {key}", storages[key].dtype.code) if key in storages else 0
        )
        if key not in storages or count != storages[key].count or key in places:
            raise CheckpointError(
                f"{window.file} holds a storage {shown(key)} that no tensor has; fetch it again"
            )
        places[key] = place + 8, count * itemsize
        place += 8 + count * itemsize
    if place > window.size:
        raise CheckpointError(f"{window.file} has {window.size} bytes where it needs {place}; fetch it again")

    def locate(storage: Storage) -> tuple[int, int]:
        if storage.key not in places:
            raise CheckpointError(f"{window.file} lacks the storage {shown(storage.key)}; fetch it again")
        return places[storage.key]

    return Saved(content, locate)


def _unpickle(window: Window, raw: bytes, storages: dict[str, Storage], start: int = 0) -> tuple[Any, int]:
    """Return the object at `start` and the byte after it; the storages it refers to go into `storages`."""

    def refer(reference: Any) -> Storage:
        storage = _storage(reference)
        return storages.setdefault(storage.key, storage)

    try:
        return unpickle(raw, _find, refer, start)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{window.file} cannot be read: {error}; save a plain state dict again, best as safetensors"
        ) from None


# What names in the pickle stand for


def _view(storage: Storage, offset: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """Stand for torch._utils._rebuild_tensor_v2, whose last argument may say that numbers are negated."""
    if not isinstance(storage, Storage) or (len(rest) > 2 and rest[2]):
        raise pickle.UnpicklingError("a tensor is conjugated, negated or has no storage")
    return View(storage, storage.dtype, offset, shape, strides)


def _typed_view(
    storage: Storage, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *rest: Any
) -> View:
    """Stand for torch._utils._rebuild_tensor_v3, where the dtype is apart from the storage."""
    if not isinstance(storage, Storage) or not isinstance(dtype, Dtype) or any(rest):
        raise pickle.UnpicklingError("a tensor is conjugated, negated or has no storage")
    return View(storage, dtype, offset, shape, strides)


def _from_type(function: Known, kind: Known, args: tuple[Any, ...], _state: Any) -> Any:
    """Stand for torch._tensor._rebuild_from_type_v2: a tensor to which attributes were given."""
    if kind not in (TENSOR, PARAMETER):
        raise pickle.UnpicklingError("a tensor is of a class that is no plain tensor")
    return function.function(*args)


def _size(lengths: Any = ()) -> tuple[Any, ...]:
    return tuple(lengths)


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((flat(key), value) for key, value in pairs)


TENSOR, PARAMETER = inert("Tensor"), inert("Parameter")

NAMES: Mapping[str, Any] = {
    "collections.OrderedDict": Known(_ordered),
    "collections.Counter": inert("Counter"),
    "_codecs.encode": inert("bytes"),
    "builtins.set": inert("set"),
    "__builtin__.set": inert("set"),
    "builtins.bytearray": inert("bytearray"),
    "builtins.complex": inert("complex"),
    "torch.Size": Known(_size),
    "torch.device": inert("device"),
    "torch.Tensor": TENSOR,
    "torch.nn.parameter.Parameter": PARAMETER,
    "torch.serialization._get_layout": inert("layout"),
    "torch._utils._rebuild_tensor": Known(_view),
    "torch._utils._rebuild_tensor_v2": Known(_view),
    "torch._utils._rebuild_tensor_v3": Known(_typed_view),
    "torch._utils._rebuild_parameter": Known(lambda data, *_: data),
    "torch._utils._rebuild_parameter_with_state": Known(lambda data, *_: data),
    "torch._tensor._rebuild_from_type_v2": Known(_from_type),
}


def _find(module: str, name: str) -> Any:
    """Return what a name stands for; raises UnpicklingError for a name that weights do not need."""
    if (found := NAMES.get(f"{module}.{name}")) is not None:
        return found
    if (
        module in ("torch", "torch.cuda", "torch.storage")
        and name.endswith("Storage")
        and name.isidentifier()
    ):
        return Dtype(STORAGES.get(name, name))
    if module == "torch" and (
        name in CODES or name.startswith(("float", "complex", "q", "uint", "int", "bits"))
    ):
        return dtype_named(name)
    raise pickle.UnpicklingError(f"it names {shown(f'{module}.{name}')}, which is no part of plain weights")


def _storage(reference: Any) -> Storage:
    """Return the storage that a persistent id names: ("storage", dtype, key, device, elements[, no view])."""
    kind, dtype, key, _, count, *views = reference
    sound = kind in ("storage", b"storage") and isinstance(dtype, Dtype) and type(key) is str
    if not sound or type(count) is not int or count < 0 or any(view is not None for view in views):
        raise pickle.UnpicklingError("it refers to something that is no storage of a tensor")
    return Storage(key, dtype, count)


# Which of it are the weights


def _state_dict(file: Path, content: Any) -> tuple[dict[str, View], list[str]]:
    """Return the model's tensors: those of the outermost dictionary, or of one under a key in WRAPPERS."""
    notes, here = [], content
    for _ in range(len(WRAPPERS)):
        wrapper = _wrapper(here)
        if wrapper is None:
            break
        others = [shown(str(key)) for key in here if key != wrapper]
        if others:
            left = ", ".join(others[:5])
            notes.append(f"{file.name}: took the weights under {wrapper!r} and left out {left}")
        here = here[wrapper]
    if not isinstance(here, dict):
        raise CheckpointError(f"{file} holds no state dict (names and tensors) but something else")
    views = {name: value for name, value in here.items() if isinstance(value, View)}
    nested = [name for name, value in here.items() if not isinstance(value, View) and _has_tensors(value)]
    if nested or not all(isinstance(name, str) and is_text(name) for name in views):
        odd = shown(str(nested[0])) if nested else "names that are no text"
        raise CheckpointError(f"{file} is no plain state dict: it has {odd} beside or above the tensors")
    if here and not views:
        raise CheckpointError(f"{file} holds no tensors; is it a file of weights?")
    return views, notes


def _wrapper(here: Any) -> str | None:
    """Return the key under which the weights lie, where they are not in the dictionary itself."""
    if not isinstance(here, dict):
        return None
    inner = [name for name in WRAPPERS if isinstance(here.get(name), dict)]
    return next((name for name in inner if _has_tensors(here[name])), None)


def _has_tensors(content: Any) -> bool:
    """Tell whether there is a tensor anywhere in this, which may refer to itself."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, View):
            return True
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, Inert):
            waiting += [item.args, item.state]
        elif isinstance(item, list | tuple):
            waiting += item
    return False
