"""A process of its own: it reads pickles from standard input and writes what they hold as JSON.

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
from collections.abc import Callable, Iterator
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


class RefusedError(Exception):
    """What a pickle says is not allowed; the message says why."""


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
        raise RefusedError("it changes a tensor after it was made")


class Dtype(Fixed):
    """A dtype: a safetensors code, or PyTorch's name for one that has none."""

    def __init__(self, code: str) -> None:
        self.code = code


class Storage(Fixed):
    """A run of bytes that tensors are views of."""

    def __init__(self, key: str, dtype: Dtype, count: int) -> None:
        self.key, self.dtype, self.count = key, dtype, count


class View(Fixed):
    """A tensor: its storage and dtype, and its first element, shape and strides as they stand there."""

    def __init__(self, storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any) -> None:
        if not isinstance(storage, Storage) or not isinstance(dtype, Dtype):
            raise RefusedError("a tensor is conjugated, negated or has no storage")
        self.storage, self.dtype = storage, dtype
        self.offset, self.shape, self.strides = offset, shape, strides


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """Stand for torch._utils._rebuild_tensor_v2, whose last argument may say that numbers are negated."""
    if len(rest) > 2 and rest[2]:
        raise RefusedError("a tensor is conjugated, negated or has no storage")
    return View(storage, getattr(storage, "dtype", None), offset, shape, strides)


def _typed_view(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *rest: Any
) -> View:
    """Stand for torch._utils._rebuild_tensor_v3, where the dtype is apart from the storage."""
    if any(rest):
        raise RefusedError("a tensor is conjugated, negated or has no storage")
    return View(storage, dtype, offset, shape, strides)


def _from_type(function: Callable[..., Any], kind: Any, args: Any, _state: Any) -> Any:
    """Stand for torch._tensor._rebuild_from_type_v2: a tensor to which attributes were given."""
    if kind not in (TENSOR, PARAMETER):
        raise RefusedError("a tensor is of a class that is no plain tensor")
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
        raise RefusedError(f"it names {full[:300]}, which is no part of plain {self.table}")

    def persistent_load(self, reference: Any) -> Storage:
        """Return the storage of ("storage", dtype, key, device, elements[, no view])."""
        kind, dtype, key, _, count, *views = reference
        sound = kind in ("storage", b"storage") and isinstance(dtype, Dtype) and type(key) is str
        sound = sound and type(count) is int and 0 <= count < 1 << 63 and self.table == "weights"
        if not sound or any(view is not None for view in views):
            raise RefusedError("it refers to something that is no storage of a tensor")
        return self.storages.setdefault(key, Storage(key, dtype, count))


class Graph:
    """What a pickle holds, as JSON: each container once, in a list, and others refer to its place there."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.places: dict[int, int] = {}
        self.waiting: list[Any] = []

    def value(self, item: Any) -> Any:
        """Return a plain value as it is, and anything else as an object of one entry."""
        self.room -= 8 + (len(item) if isinstance(item, str) else 0)
        if self.room < 0:
            raise RefusedError("it holds more than its length allows for")
        if _is_plain(item):
            return item
        if isinstance(item, Dtype):
            return {"dtype": item.code}
        if type(item) is tuple and len(item) <= 64 and all(map(_is_plain, item)):
            return {"tuple": [self.value(part) for part in item]}
        if isinstance(item, dict | list | tuple | set | View | Inert):
            if id(item) not in self.places:
                self.places[id(item)] = len(self.waiting)
                self.waiting.append(item)
            return {"at": self.places[id(item)]}
        return {"other": type(item).__name__}

    def nodes(self) -> Iterator[dict[str, Any]]:
        """Yield the containers; those that one refers to come later."""
        for item in self.waiting:  # which grows meanwhile
            if isinstance(item, dict):
                yield {"dict": [[self.key(key), self.value(value)] for key, value in dict.items(item)]}
            elif isinstance(item, View):
                own = item.storage
                place = [self.value(part) for part in (item.offset, item.shape, item.strides)]
                yield {"view": [own.key, own.dtype.code, own.count, item.dtype.code, *place]}
            elif isinstance(item, Inert):
                yield {"record": item.kind, "args": self.value([*item.args]), "state": self.value(item.state)}
            else:
                yield {"list": [self.value(part) for part in item]}

    def key(self, key: Any) -> Any:
        """Return a dictionary's key, if it is a plain value or a tuple of plain values, or a record."""
        found = self.value(key)
        if isinstance(found, dict) and not ("tuple" in found or "other" in found or isinstance(key, Inert)):
            raise RefusedError("the pickle has a dictionary with keys that are no plain values")
        return found


def _is_plain(item: Any) -> bool:
    return item is None or type(item) in (bool, str) or (type(item) is int and abs(item) < 1 << 80)


def described(raw: bytes, table: str, count: int) -> dict[str, Any]:
    """Return what `count` pickles, one behind the other, hold, and the byte after the last."""
    graph = Graph(8 * len(raw) + MEGABYTE)
    try:
        reader = Reader(raw, table)
        parts = [graph.value(reader.load()) for _ in range(count)]
        nodes = [*graph.nodes()]
    except RefusedError as error:
        return {"error": str(error)}
    except pickle.UnpicklingError as error:
        return {"error": f"the pickle is damaged ({str(error)[:100]!a})"}
    except MemoryError:
        return {"error": "it asks for more memory than weights need"}
    except Exception as error:  # whatever a damaged pickle makes of our records
        return {"error": f"the pickle is damaged, {type(error).__name__}"}
    storages = {key: [own.dtype.code, own.count] for key, own in reader.storages.items()}
    return {"parts": parts, "nodes": nodes, "end": reader.raw.tell(), "storages": storages}


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
    """Read pickles, each behind its length in 8 bytes, and write a JSON list of what they hold."""
    table, count = sys.argv[1], int(sys.argv[2])
    limit(os.fstat(0).st_size)
    found = []
    while length := sys.stdin.buffer.read(8):
        found.append(described(sys.stdin.buffer.read(int.from_bytes(length, "little")), table, count))
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # without taking down what may be nested very deep


if __name__ == "__main__":
    main()
