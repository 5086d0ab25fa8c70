"""Weights in files of torch.save (.bin, .pt, .pth), found without loading them and without running them.

Such a file is a pickle that describes the tensors, and their storages as raw bytes: in a zip archive, where
each storage is an uncompressed record, or, before PyTorch 1.6, behind the pickle, one after the other. The
pickle is read in a process of its own (unpickler.py) with little time and memory, where names only leave
records; what it describes comes back as JSON. Where a storage lies follows from the archive's directory (of
which only what finds stored bytes is read), so that a tensor can be read in place like any other.

Python's zipfile takes other directories for true than torch does, and torch.load reads neither a part of a
file in place nor pickles of protocol 3 and above without running code.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError
from palinode.records import bare_environment
from palinode.weights.formats import unpickler
from palinode.weights.formats.pieces import Piece, pieced, row_major
from palinode.weights.formats.unpickler import Dtype, Inert, Storage, View
from palinode.weights.tensors import Files, TensorInfo, Window, is_shape, is_text, itemsize_of, shown, whole

START = b"PK\x03\x04"
END = struct.Struct("<4s4H2LH")
LOCATOR = struct.Struct("<4sLQL")
END_64 = struct.Struct("<4sQ2H2L4Q")
ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")

MAX_DIRECTORY = 1 << 24
"""Bytes: 16 MiB name far more records than a model has tensors."""

CIPHERED = 0x2041
"""Flags of a record that is encrypted, in one way or another, or whose directory is."""


@dataclass(frozen=True, slots=True)
class ZipRecord:
    """One file in the archive, as the directory describes it."""

    name: str
    header: int
    """Byte of its local header."""
    nbytes: int
    stored: bool
    """Whether its bytes lie in the archive as they are: neither compressed nor encrypted."""


def read_directory(window: Window) -> dict[str, ZipRecord]:
    """Return the records of a zip archive by name; raises CheckpointError when it is damaged."""
    start, size = _find_directory(window)
    if size > MAX_DIRECTORY:
        raise CheckpointError(f"{window.file} has a zip directory of {size} bytes, which no model needs")
    records: dict[str, ZipRecord] = {}
    known = set[str]()
    for record in _entries(window, window.read(start, size)):
        if record.name.lower() in known:  # torch takes a and A for one name
            raise CheckpointError(
                f"{window.file} holds the record {shown(record.name)} twice; fetch it again"
            )
        known.add(record.name.lower())
        records[record.name] = record
    return records


def data_offset(window: Window, record: ZipRecord) -> int:
    """Return the byte at which the stored bytes of a record begin.

    Raises CheckpointError when they are compressed, encrypted, or not all there.
    """
    if not record.stored:
        raise CheckpointError(
            f"{window.file} is compressed, and weights are read in place; load it and save it again with "
            "torch.save"
        )
    head = _read(window, record.header, LOCAL.size)
    signature, _, _, method, *_, name_length, extra_length = LOCAL.unpack(head)
    name = _read(window, record.header + LOCAL.size, name_length)
    start = record.header + LOCAL.size + name_length + extra_length
    sound = signature == START and not method and name == record.name.encode()
    if not sound or start + record.nbytes > window.size:
        raise _damaged(window)
    return int(start)


def read_record(window: Window, record: ZipRecord, *, limit: int) -> bytes:
    """Return the bytes of a small record; raises CheckpointError when it is larger than `limit`."""
    if record.nbytes > limit:
        raise CheckpointError(f"{window.file} has a {shown(record.name)} of {record.nbytes} bytes, too many")
    return window.read(data_offset(window, record), record.nbytes)


def _find_directory(window: Window) -> tuple[int, int]:
    """Return (start, size) of the central directory."""
    place = window.size - END.size
    signature, *_, count, size, start, comment = END.unpack(_read(window, place, END.size))
    if signature != b"PK\x05\x06" or comment:
        raise _damaged(window)
    wide = count == 0xFFFF or 0xFFFFFFFF in (size, start)
    if place >= LOCATOR.size:
        signature, _, place_64, _ = LOCATOR.unpack(_read(window, place - LOCATOR.size, LOCATOR.size))
        if signature == b"PK\x06\x07":  # which goes before the end record, even where that has room
            return _wide_directory(window, place_64, size, start)
    if wide:
        raise _damaged(window)
    return start, size


def _wide_directory(window: Window, place: int, size: int, start: int) -> tuple[int, int]:
    """Return the same of the 64-bit end record; numbers for which the other had room must be the same."""
    signature, *_, size_64, start_64 = END_64.unpack(_read(window, place, END_64.size))
    agrees = size in (0xFFFFFFFF, size_64) and start in (0xFFFFFFFF, start_64)
    if signature != b"PK\x06\x06" or not agrees:
        raise _damaged(window)
    return start_64, size_64


def _entries(window: Window, directory: bytes) -> Iterator[ZipRecord]:
    place = 0
    while place < len(directory):
        try:
            fields = ENTRY.unpack_from(directory, place)
            signature, flags, method = fields[0], fields[3], fields[4]
            packed, nbytes, name_length, extra_length, comment_length = fields[8:13]
            header = fields[16]
            place += ENTRY.size
            name = directory[place : place + name_length].decode()
            extra = directory[place + name_length : place + name_length + extra_length]
            place += name_length + extra_length + comment_length
            nbytes, packed, header = _wide(extra, [nbytes, packed, header])
        except (struct.error, ValueError):
            raise _damaged(window) from None
        if signature != b"PK\x01\x02" or place > len(directory):
            raise _damaged(window)
        yield ZipRecord(
            name, header, nbytes, stored=method == 0 and not flags & CIPHERED and packed == nbytes
        )


def _wide(extra: bytes, numbers: list[int]) -> list[int]:
    """Replace the numbers that do not fit 32 bits by those in the extra field of kind 1, in turn."""
    if 0xFFFFFFFF not in numbers:
        return numbers
    place = 0
    while place < len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        place += 4
        if kind == 1:
            found = iter(struct.unpack_from(f"<{length // 8}Q", extra, place))
            return [next(found, number) if number == 0xFFFFFFFF else number for number in numbers]
        place += length
    return numbers


def _read(window: Window, offset: int, length: int) -> bytes:
    """Read a part of the end records; that they lie outside means that the end is not there."""
    if not 0 <= offset <= window.size - length:
        raise _damaged(window)
    return window.read(offset, length)


def _damaged(window: Window) -> CheckpointError:
    return CheckpointError(
        f"{window.file} is cut off or damaged (its zip directory is broken); fetch it again"
    )


MAX_PICKLE = 1 << 24
"""Bytes: 16 MiB. The description of a model with a thousand tensors takes a hundred thousand."""

OLD_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")

SECONDS = 20
"""Time for a process that reads a pickle, and a second more for each MAX_RATE bytes."""
MAX_RATE = 1 << 19

AGAIN = "save a plain state dict again, best as safetensors"

WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Under which of these a training checkpoint keeps its weights beside the state of its optimiser."""

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""What data parallelism, torch.compile and FSDP put before the names of a model's tensors."""


@dataclass(frozen=True, slots=True)
class Pickled:
    """What one or several pickles held: the objects, the byte after the last, and all storages by key."""

    parts: list[Any]
    end: int
    storages: Mapping[str, Storage]


@dataclass(frozen=True, slots=True)
class TorchFile:
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
        (saved,) = read_saved([window])
        views, notes = _state_dict(file, saved.content)
        return {name: place_view(window, saved, name, view) for name, view in views.items()}, notes


def read_saved(windows: Sequence[Window]) -> list[TorchFile]:
    """Read what torch.save wrote into files or parts of them; raises CheckpointError where one is damaged."""
    for window in windows:
        if window.size < 8:
            raise CheckpointError(f"{window.file} is cut off ({window.size} bytes); fetch it again")
    if len(windows) == 1 and windows[0].read(0, 4) != START:
        return [_read_old(windows[0])]
    archives = [_Archive(window) for window in windows]
    held = unpickle([(archive.window.file, archive.pickle()) for archive in archives])
    return [TorchFile(one.parts[0], archive.locate) for one, archive in zip(held, archives, strict=True)]


def place_view(window: Window, saved: TorchFile, name: str, view: View) -> TensorInfo:
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


def without_prefix(file: Path, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return names without a prefix of PREFIXES that all of them have, and notes that say so."""
    kept, notes = [*names], []
    for prefix in PREFIXES:
        if kept and all(name.startswith(prefix) for name in kept):
            notes.append(f"{file.name}: left out {prefix!r}, with which every name began")
            kept = [name.removeprefix(prefix) for name in kept]
    return kept, notes


# The two kinds of file


class _Archive:
    """A zip archive: data.pkl beside one record for each storage, all below one folder."""

    def __init__(self, window: Window) -> None:
        self.window, self.records = window, read_directory(window)
        self.top = next(iter(self.records), "").split("/")[0]

    def record(self, name: str) -> ZipRecord:
        """Return a record; raises CheckpointError when it is not there."""
        found = self.records.get(f"{self.top}/{name}")
        if found is None:
            raise CheckpointError(
                f"{self.window.file} lacks its record {shown(name)}: torch.save did not write it"
            )
        return found

    def pickle(self) -> bytes:
        """Return the pickle; raises CheckpointError where the archive holds something else than weights."""
        if f"{self.top}/constants.pkl" in self.records:
            raise CheckpointError(
                f"{self.window.file} is a TorchScript program; only weights (a state dict) can be used"
            )
        if f"{self.top}/byteorder" in self.records:
            order = read_record(self.window, self.record("byteorder"), limit=16)
            if order != b"little":
                raise CheckpointError(
                    f"{self.window.file} is big-endian; save it again on an ordinary machine"
                )
        return read_record(self.window, self.record("data.pkl"), limit=MAX_PICKLE)

    def locate(self, storage: Storage) -> tuple[int, int]:
        """Return where the bytes of a storage lie, which are as many as its elements need."""
        own = self.record(f"data/{storage.key}")
        needed = storage.count * itemsize_of(self.window.file, f"storage {storage.key}", storage.dtype.code)
        if own.nbytes != needed:
            raise CheckpointError(
                f"{self.window.file} holds {own.nbytes} bytes of the storage {shown(storage.key)} where its "
                f"{storage.count} elements need {needed}; fetch it again"
            )
        return data_offset(self.window, own), own.nbytes


def _read_old(window: Window) -> TorchFile:
    """Read five pickles (magic, version, system, content, keys), then each storage behind its length."""
    raw = window.read(0, min(window.size, MAX_PICKLE))
    if raw[257:262] == b"ustar":
        raise CheckpointError(
            f"{window.file} is a tar archive, as torch wrote before 2018; load it with torch once and save "
            "it again"
        )
    if OLD_MAGIC not in raw[:32]:
        raise CheckpointError(f"{window.file} is no file that torch.save wrote; is it whole?")
    (held,) = unpickle([(window.file, raw)], count=5)
    _, _, system, content, keys = held.parts
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{window.file} is big-endian; save it again on an ordinary machine")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{window.file} does not name its storages; fetch it again")
    places = _old_storages(window, held, keys)

    def locate(storage: Storage) -> tuple[int, int]:
        if storage.key not in places:
            raise CheckpointError(f"{window.file} lacks the storage {shown(storage.key)}; fetch it again")
        return places[storage.key]

    return TorchFile(content, locate)


def _old_storages(window: Window, held: Pickled, keys: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return where each storage lies, behind the pickles, and its bytes."""
    place, places = held.end, dict[str, tuple[int, int]]()
    for key in keys:
        count = int.from_bytes(window.read(place, 8), "little")
        own = held.storages.get(key)
        if own is None or count != own.count or key in places:
            raise CheckpointError(
                f"{window.file} holds a storage {shown(key)} that no tensor has; fetch it again"
            )
        places[key] = place + 8, count * itemsize_of(window.file, f"storage {key}", own.dtype.code)
        place += 8 + places[key][1]
    if place > window.size:
        raise CheckpointError(f"{window.file} has {window.size} bytes where it needs {place}; fetch it again")
    return places


# The process that reads pickles


def unpickle(
    pickles: Sequence[tuple[Path, bytes]], *, table: str = "weights", count: int = 1
) -> list[Pickled]:
    """Return what pickles of these files hold, read in a process of its own; none of their code is run.

    Each holds `count` pickles, one behind the other. Raises CheckpointError when one is damaged, names what
    the `table` has not, or asks for more time and memory than a description of weights needs.
    """
    total = sum(len(raw) for _, raw in pickles)
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as answer:
        for _, raw in pickles:
            asked.write(len(raw).to_bytes(8, "little") + raw)
        asked.seek(0)
        command = [sys.executable, "-I", "-S", unpickler.__file__, table, str(count)]
        with suppress(subprocess.SubprocessError):
            subprocess.run(
                command,
                env=bare_environment(),
                stdin=asked,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS + total // MAX_RATE,
                check=True,
            )
            answer.seek(0)
            return [_made(file, one) for (file, _), one in zip(pickles, json.load(answer), strict=True)]
    raise CheckpointError(
        f"{pickles[0][0]} cannot be read: its pickle takes more time or memory than weights need; {AGAIN}"
    )


def _made(file: Path, found: Mapping[str, Any]) -> Pickled:
    """Return what a pickle holds, made of its description."""
    if "error" in found:
        raise CheckpointError(f"{file} cannot be read: {shown(found['error'])}; {AGAIN}")
    made = [_shell(node) for node in found["nodes"]]

    def value(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        ((kind, content),) = part.items()
        if kind == "at":
            return made[content]
        makers: Mapping[str, Callable[[Any], Any]] = {"tuple": tuple, "dtype": Dtype, "other": _inert}
        return makers[kind](content)

    for node, shell in zip(found["nodes"], made, strict=True):
        if isinstance(shell, dict):
            shell.update((value(key), value(part)) for key, part in node["dict"])
        elif isinstance(shell, list):
            shell += map(value, node["list"])
        elif isinstance(shell, Inert):
            shell.args, shell.state = value(node["args"]), value(node["state"])
    storages = {key: Storage(key, Dtype(code), count) for key, (code, count) in found["storages"].items()}
    return Pickled([value(part) for part in found["parts"]], found["end"], storages)


def _shell(node: Mapping[str, Any]) -> Any:
    """Return a container before it is filled; a tensor has no parts that are containers."""
    if "view" in node:
        key, code, count, own, *place = node["view"]
        flat = [
            tuple(part["tuple"]) if isinstance(part, dict) and "tuple" in part else part for part in place
        ]
        return View(Storage(key, Dtype(code), count), Dtype(own), *flat)
    return {} if "dict" in node else [] if "list" in node else _inert(node["record"])


def _inert(kind: str) -> Inert:
    found = Inert()
    found.kind = kind
    return found


# Which of it are the weights


def _state_dict(file: Path, content: Any) -> tuple[dict[str, View], list[str]]:
    """Return the model's tensors: those of the outermost dictionary, or of one under a key in WRAPPERS."""
    notes, here = [], content
    for _ in range(len(WRAPPERS)):
        wrapper = _wrapper(here)
        if wrapper is None:
            break
        others = [_said(key) for key in here if key != wrapper]
        if others:
            left = ", ".join(others[:5])
            notes.append(f"{file.name}: took the weights under {wrapper!r} and left out {left}")
        here = here[wrapper]
    if not isinstance(here, dict):
        raise CheckpointError(f"{file} holds no state dict (names and tensors) but something else")
    views = {name: value for name, value in here.items() if isinstance(value, View)}
    nested = [name for name, value in here.items() if not isinstance(value, View) and _has_tensors(value)]
    if nested or not all(isinstance(name, str) and is_text(name) for name in views):
        odd = _said(nested[0]) if nested else "names that are no text"
        raise CheckpointError(f"{file} is no plain state dict: it has {odd} beside or above the tensors")
    if here and not views:
        raise CheckpointError(f"{file} holds no tensors; is it a file of weights?")
    return views, notes


def _said(key: Any) -> str:
    """Return a key of a dictionary for a message: what is no text or number is not shown."""
    return shown(str(key)) if isinstance(key, str | int) else "what has no name"


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
