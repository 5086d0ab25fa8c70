"""A process of its own: it reads pickles from standard input and writes, as JSON, where their tensors lie.

A pickle is a program: it names functions and calls them. Here a name means what the tables below say, which
is a record of the call and nothing else; every other name is refused. What a pickle can still do is take
time and memory, and of both this process has little: the parent (pickled.py) goes on without it. It imports
nothing of ours, so that it starts in milliseconds.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

MEGABYTE = 1 << 20

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

PLAIN = (
    "collections.Counter", "_codecs.encode", "builtins.set", "__builtin__.set", "builtins.bytearray",
    "builtins.complex", "torch.device", "torch.serialization._get_layout",
)  # fmt: skip
"""What stands beside weights and is of no use here: only that it was called is kept."""

TORCH_METADATA = "torch.distributed.checkpoint.metadata"
METADATA = (
    *(f"{TORCH_METADATA}.{name}" for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local")
      for name in ("PosixPath", "WindowsPath", "PurePosixPath")),
    "builtins.getattr", "builtins.set",
)  # fmt: skip
"""Of what the metadata of a distributed checkpoint consist; some versions write an enum with getattr."""


WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Under which of these a training checkpoint keeps its weights beside the state of its optimiser."""

MAX_PIECES = 10_000
"""A tensor in more pieces than this comes from no training run that we know of."""


class RefusedError(Exception):
    """What is wrong with a file, as a sentence about it; `about` takes the place of its braces."""

    def __init__(self, sentence: str, about: str = "") -> None:
        super().__init__(sentence)
        self.answer = {"error": sentence, "about": about}


def unreadable(why: str) -> RefusedError:
    """Return the error for a pickle that cannot be read."""
    return RefusedError("cannot be read: {}; save a plain state dict again, best as safetensors", why)


class Inert:
    """A call that was not made: what was called, with what, and the state that it was given."""

    kind = ""

    def __new__(cls, *args: Any) -> Inert:
        """Keep the arguments."""
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state

    args: tuple[Any, ...]
    state: Any


class Fixed:
    """What no state can be given."""

    def __setstate__(self, state: Any) -> None:
        """Refuse it."""
        raise unreadable("it changes a tensor after it was made")


class Dtype(Fixed):
    """A dtype: a safetensors code, or PyTorch's name for one that has none."""

    def __init__(self, code: str) -> None:
        self.code = code


class Storage(Fixed):
    """A run of bytes that tensors are views of."""

    def __init__(self, number: int, dtype: Dtype, count: int) -> None:
        self.number, self.dtype, self.count = number, dtype, count


class View(Fixed):
    """A tensor: its storage and dtype, and its first element, shape and strides as they stand there."""

    def __init__(self, storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any) -> None:
        if not isinstance(storage, Storage) or not isinstance(dtype, Dtype):
            raise unreadable("a tensor is conjugated, negated or has no storage")
        self.storage, self.dtype = storage, dtype
        self.offset, self.shape, self.strides = offset, shape, strides


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """Stand for torch._utils._rebuild_tensor_v2, whose last argument may say that numbers are negated."""
    if len(rest) > 2 and rest[2]:
        raise unreadable("a tensor is conjugated, negated or has no storage")
    return View(storage, getattr(storage, "dtype", None), offset, shape, strides)


def _typed_view(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *rest: Any
) -> View:
    """Stand for torch._utils._rebuild_tensor_v3, where the dtype is apart from the storage."""
    if any(rest):
        raise unreadable("a tensor is conjugated, negated or has no storage")
    return View(storage, dtype, offset, shape, strides)


def _from_type(function: Callable[..., Any], kind: Any, args: Any, _state: Any) -> Any:
    """Stand for torch._tensor._rebuild_from_type_v2: a tensor to which attributes were given."""
    if kind not in (TENSOR, PARAMETER):
        raise unreadable("a tensor is of a class that is no plain tensor")
    return function(*args)


def _record(name: str) -> type[Inert]:
    return type("Inert", (Inert,), {"kind": name.rpartition(".")[2]})


TENSOR, PARAMETER = _record("Tensor"), _record("Parameter")

WEIGHTS: dict[str, Any] = {
    **{name: _record(name) for name in PLAIN},
    "collections.OrderedDict": OrderedDict,
    "torch.Size": lambda lengths=(): tuple(lengths),
    "torch.Tensor": TENSOR,
    "torch.nn.parameter.Parameter": PARAMETER,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _typed_view,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}
TABLES: dict[str, dict[str, Any]] = {
    "weights": WEIGHTS,
    "metadata": {name: _record(name) for name in METADATA}
    | {name: WEIGHTS[name] for name in ("collections.OrderedDict", "torch.Size")},
}


class Reader(pickle.Unpickler):
    """The unpickler of the standard library, for which names mean what a table says."""

    def __init__(self, raw: bytes, table: str) -> None:
        self.raw, self.table = io.BytesIO(raw), table
        self.storages: dict[str, Storage] = {}
        super().__init__(self.raw)

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for."""
        full = f"{module}.{name}"
        if full in TABLES[self.table]:
            return TABLES[self.table][full]
        if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
            return Dtype(STORAGES.get(name, name))
        number = name in CODES or name.startswith(("float", "complex", "q", "uint", "int", "bits"))
        if module == "torch" and name.isidentifier() and (number or self.table == "metadata"):
            return Dtype(CODES.get(name, name))
        raise unreadable(f"it names {full[:300]}, which is no part of plain {self.table}")

    def persistent_load(self, reference: Any) -> Storage:
        """Return the storage of ("storage", dtype, key, device, elements[, no view])."""
        kind, dtype, key, _, count, *views = reference
        sound = kind in ("storage", b"storage") and isinstance(dtype, Dtype) and type(key) is str
        sound = sound and type(count) is int and 0 <= count < 1 << 63 and self.table == "weights"
        if not sound or any(view is not None for view in views):
            raise unreadable("it refers to something that is no storage of a tensor")
        return self.storages.setdefault(key, Storage(len(self.storages), dtype, count))


# What is told of what was read. Dictionaries are asked through `dict`, as a pickle may give an OrderedDict
# attributes that hide its methods.


def numbers(item: Any) -> list[int] | None:
    """Return a tuple of whole numbers, such as a shape, as a list; None for anything else."""
    sound = type(item) is tuple and len(item) <= 32
    return [*item] if sound and all(type(n) is int and 0 <= n < 1 << 63 for n in item) else None


def view_list(view: View) -> list[Any]:
    """Return a tensor's storage, dtype, first element, shape and strides; None for what is malformed."""
    place = [numbers((view.offset,)), numbers(view.shape), numbers(view.strides)]
    return [view.storage.number, view.dtype.code, *place]


def weights(content: Any) -> dict[str, Any]:
    """Tell of a model's tensors: those of the outermost dictionary, or of one under a key in WRAPPERS.

    `left` has the wrappers that were opened, each with the keys that lay beside it.
    """
    here, left = content, []
    for _ in WRAPPERS:
        inner = [key for key in WRAPPERS if isinstance(here, dict) and isinstance(dict.get(here, key), dict)]
        wrapper = next((key for key in inner if has_tensors(here[key])), None)
        if wrapper is None:
            break
        left.append([wrapper, [text_of(key) for key in here if key != wrapper]])
        here = here[wrapper]
    if not isinstance(here, dict):
        raise RefusedError("holds no state dict (names and tensors) but something else")
    views = {name: value for name, value in dict.items(here) if isinstance(value, View)}
    for name, value in dict.items(here):
        nested = name not in views and has_tensors(value)
        if nested or (name in views and not is_text(name)):
            odd = text_of(name) if nested else "names that are no text"
            raise RefusedError("is no plain state dict: it has {} beside or above the tensors", odd)
    if here and not views:
        raise RefusedError("holds no tensors; is it a file of weights?")
    return {"tensors": {name: view_list(view) for name, view in views.items()}, "left": left}


def text_of(key: Any) -> str:
    """Return a dictionary's key for a message: what is no text or number is not shown."""
    return str(key) if isinstance(key, str | int) else "what has no name"


def is_text(name: Any) -> bool:
    """Tell whether a name can be written as UTF-8: half a surrogate pair cannot."""
    return isinstance(name, str) and name.encode(errors="ignore").decode() == name


def has_tensors(content: Any) -> bool:
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
            waiting += dict.values(item)
        elif isinstance(item, Inert):
            waiting += [item.args, item.state]
        elif isinstance(item, list | tuple | set):
            waiting += item
    return False


def metadata(content: Any) -> dict[str, Any]:
    """Tell of the tensors that a distributed checkpoint's metadata describes, and where their chunks lie."""
    if not isinstance(content, Inert) or content.kind != "Metadata" or not isinstance(content.state, dict):
        raise RefusedError("is no metadata of a distributed checkpoint")
    tensors, paths, places = (
        dict.get(content.state, key) for key in ("state_dict_metadata", "planner_data", "storage_data")
    )
    if not isinstance(tensors, dict):
        raise RefusedError("names no tensors; save the checkpoint again")
    paths = paths if isinstance(paths, dict) else {}
    return {
        "tensors": [
            described_tensor(name, about.state, dict.get(paths, name, (name,)))
            for name, about in dict.items(tensors)
            if isinstance(about, Inert) and about.kind == "TensorStorageMetadata"
        ],
        "places": [chunk_place(*pair) for pair in dict.items(places)] if isinstance(places, dict) else [],
    }


def described_tensor(name: Any, about: Any, path: Any) -> list[Any]:
    """Return a tensor's name, path in what was saved, dtype and shape, and each chunk's corner and shape."""
    try:
        shape, dtype = numbers(about["size"]), about["properties"].state[0].code
        chunks = [[numbers(chunk.state[key]) for key in ("offsets", "sizes")] for chunk in about["chunks"]]
        sound = is_text(name) and isinstance(dtype, str) and len(chunks) <= MAX_PIECES
        sound = sound and type(path) is tuple and all(type(part) in (str, int) for part in path)
        sound = sound and len(path) > 0 and None not in [shape, *(side for box in chunks for side in box)]
    except (AttributeError, LookupError, TypeError, ValueError):
        sound = False
    if not sound:
        said = str(name) if isinstance(name, str | int) else "a tensor"
        raise RefusedError("describes {} in a way that we do not know; save it again", said)
    return [name, [str(part) for part in path], dtype, shape, chunks]


def chunk_place(index: Any, about: Any) -> list[Any]:
    """Return a chunk's tensor and corner, and its file, first byte and length there."""
    try:
        name, corner = index.state["fqn"], dict.get(index.state, "offset")
        file, start, length = (about.state[key] for key in ("relative_path", "offset", "length"))
        sound = isinstance(name, str) and isinstance(file, str) and numbers((start, length)) is not None
        sound = sound and (corner is None or numbers(corner) is not None)
        transformed = dict.get(about.state, "transform_descriptors")
    except (AttributeError, LookupError, TypeError):
        sound = False
    if not sound:
        raise RefusedError("does not say where its chunks lie; save the checkpoint again")
    if transformed:
        raise RefusedError("says that {} is compressed; save it uncompressed", name)
    return [name, corner, file, start, length]


def old_storages(parts: list[Any], storages: dict[str, Storage]) -> list[int]:
    """Return the storages that follow the five pickles of a file from before PyTorch 1.6, in their order."""
    _, _, system, _, keys = parts
    if not isinstance(system, dict) or dict.get(system, "little_endian") is not True:
        raise RefusedError("is big-endian; save it again on an ordinary machine")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise RefusedError("does not name its storages; fetch it again")
    seen = set[str]()
    for key in keys:
        if key not in storages or key in seen:
            raise RefusedError("holds a storage {} that no tensor has; fetch it again", key)
        seen.add(key)
    return [storages[key].number for key in keys]


ASKED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "weights": weights,
    "tensor": lambda content: {"tensor": view_list(content) if isinstance(content, View) else None},
    "metadata": metadata,
}


def answer(raw: bytes, asked: str, *, old: bool) -> dict[str, Any]:
    """Return what is asked of a pickle, with its storages; of old files five follow one another."""
    try:
        reader = Reader(raw, "metadata" if asked == "metadata" else "weights")
        parts = [reader.load() for _ in range(5 if old else 1)]
        found = ASKED[asked](parts[3] if old else parts[0])
        found["storages"] = [[key, own.dtype.code, own.count] for key, own in reader.storages.items()]
        if old:
            found |= {"order": old_storages(parts, reader.storages), "end": reader.raw.tell()}
        return found
    except RefusedError as error:
        return error.answer
    except pickle.UnpicklingError as error:
        why = f"the pickle is damaged ({str(error)[:100]!a})"
    except MemoryError:
        why = "it asks for more memory than weights need"
    except Exception as error:  # whatever a damaged pickle makes of our records
        why = f"the pickle is damaged, {type(error).__name__}"
    return unreadable(why).answer


def limit(nbytes: int) -> None:
    """Give this process memory and time after the length of what it reads."""
    seconds = 2 + nbytes // MEGABYTE
    for kind, most in (
        (resource.RLIMIT_AS, 512 * MEGABYTE + 50 * nbytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 16 * nbytes + 16 * MEGABYTE),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS has not all of them, and the parent has a clock
            resource.setrlimit(kind, (most, most))


def main() -> None:
    """Read pickles, each behind its length in 8 bytes, and write a JSON list of answers."""
    asked, old = sys.argv[1], sys.argv[2] == "old"
    limit(os.fstat(0).st_size)
    found = []
    while length := sys.stdin.buffer.read(8):
        found.append(answer(sys.stdin.buffer.read(int.from_bytes(length, "little")), asked, old=old))
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # without taking down what may be nested very deep


if __name__ == "__main__":
    main()
