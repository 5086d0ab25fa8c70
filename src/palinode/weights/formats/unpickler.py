"""A machine for the few pickle instructions that weights need. It runs no code of the file's choosing.

A pickle is a program: it names functions and calls them. Here a name means only what the caller's table says
it means, nothing is imported, and there is no attribute access. Nor can a file cost more memory than some
dozen times its length: lengths are checked before they are believed, the memo is a dict, objects are counted,
and dictionary keys are flat (the hash of a deeply nested tuple would overflow the stack).
Protocols 2 to 5 are understood, without what only other programs write.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

BYTES_AN_OBJECT = 2
"""Pickles of weights and metadata have one object in four bytes or more; a bomb has one in every byte."""

BYTE, SHORT, WORD, LONG = (struct.Struct(layout) for layout in ("<B", "<H", "<I", "<Q"))
SIGNED, DOUBLE = struct.Struct("<i"), struct.Struct(">d")

Find = Callable[[str, str], Any]
"""From module and name to what they stand for; raises UnpicklingError for what is not allowed."""


@dataclass(frozen=True, slots=True)
class Known:
    """A function of ours that a pickle may call under the name that the table gives it."""

    function: Callable[..., Any]


@dataclass(eq=False, slots=True)
class Inert:
    """An object of a class that we know, as its bare contents: it does nothing."""

    kind: str
    args: tuple[Any, ...] = ()
    state: Any = field(default=None, repr=False)


def inert(kind: str) -> Known:
    """Return the stand-in for a class: calling it keeps its arguments, and that is all."""
    return Known(lambda *args: Inert(kind, args))


def unpickle(raw: bytes, find: Find, persistent: Callable[[Any], Any], start: int = 0) -> tuple[Any, int]:
    """Return the object that a pickle describes, and the byte after its end.

    `find` says what a name stands for and `persistent` what a persistent id does. Raises UnpicklingError,
    with the reason, for anything that is broken or not allowed.
    """
    machine = _Machine(raw, find, persistent, start)
    try:
        return machine.run(), machine.place
    except pickle.UnpicklingError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, struct.error) as error:
        raise pickle.UnpicklingError(f"the pickle is damaged, {type(error).__name__}") from None


def flat(key: Any) -> Any:
    """Return a dictionary key, if it is a plain value, an inert object, or a tuple of plain values."""
    plain = (str, int, float, bool, bytes, type(None))
    sound = type(key) in plain or isinstance(key, Inert)
    sound = sound or (type(key) is tuple and all(type(part) in plain for part in key))
    if not sound:
        raise pickle.UnpicklingError("the pickle has a dictionary with keys that are no plain values")
    return key


class _Machine:
    """The stack, the memo, and one method an instruction."""

    def __init__(self, raw: bytes, find: Find, persistent: Callable[[Any], Any], start: int) -> None:
        self.raw, self.place, self.find, self.persistent = raw, start, find, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.objects_left = 1000 + len(raw) // BYTES_AN_OBJECT

    def run(self) -> Any:
        while self.place < len(self.raw):
            code = self.raw[self.place]
            self.place += 1
            if code == pickle.STOP[0]:
                return self.stack.pop()
            step = _STEPS[code]
            if step is None:
                raise pickle.UnpicklingError(
                    f"the pickle has an instruction {code:#x} that weights do not need"
                )
            step(self)
        raise pickle.UnpicklingError("the pickle is cut off")

    # Reading the program

    def take(self, length: int) -> bytes:
        part = self.raw[self.place : self.place + length]
        if len(part) < length:
            raise pickle.UnpicklingError("the pickle is cut off")
        self.place += length
        return part

    def number(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self.raw, self.place)
        self.place += layout.size
        return value

    def line(self) -> str:
        end = self.raw.index(b"\n", self.place)
        text = self.raw[self.place : end].decode()
        self.place = end + 1
        return text

    def count_object(self) -> None:
        self.objects_left -= 1
        if self.objects_left < 0:
            raise pickle.UnpicklingError("the pickle makes more objects than its length allows for")

    # Constants

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_number(self, layout: struct.Struct) -> None:
        self.stack.append(self.number(layout))

    def push_new(self, kind: type) -> None:
        self.count_object()
        self.stack.append(kind())

    def push_long(self) -> None:  # one byte of length: no number of 2,000 bits is needed
        self.stack.append(int.from_bytes(self.take(self.number(BYTE)), "little", signed=True))

    def push_text(self, layout: struct.Struct) -> None:
        self.stack.append(self.take(self.number(layout)).decode("utf-8", "surrogatepass"))

    def push_bytes(self, layout: struct.Struct) -> None:
        self.stack.append(self.take(self.number(layout)))

    def push_old_text(self, layout: struct.Struct) -> None:  # text as Python 2 wrote it
        self.stack.append(self.take(self.number(layout)).decode("latin-1"))

    # Containers

    def mark(self) -> None:
        self.count_object()
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def tuple_of(self, count: int) -> None:
        self.count_object()
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)
        if len(items) < count:
            raise pickle.UnpicklingError("the pickle takes more from its stack than is there")

    def tuple_since_mark(self) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def append(self) -> None:
        value = self.stack.pop()
        self.target(list).append(value)

    def extend(self) -> None:
        items = self.since_mark()
        self.target(list).extend(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.target(dict)[flat(key)] = value

    def set_items(self) -> None:
        items = self.since_mark()
        target = self.target(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[flat(key)] = value

    def add_items(self) -> None:
        items = self.since_mark()
        self.target(set).update(map(flat, items))

    def target(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise pickle.UnpicklingError(f"the pickle fills something that is no {kind.__name__}")
        return self.stack[-1]

    # The memo

    def keep(self, layout: struct.Struct) -> None:
        self.count_object()
        self.memo[self.number(layout)] = self.stack[-1]

    def keep_next(self) -> None:
        self.count_object()
        self.memo[len(self.memo)] = self.stack[-1]

    def recall(self, layout: struct.Struct) -> None:
        self.stack.append(self.memo[self.number(layout)])

    # Names and calls

    def name(self) -> None:
        module = self.line()
        self.stack.append(self.find(module, self.line()))

    def name_from_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (type(name) is type(module) is str):
            raise pickle.UnpicklingError("the pickle names something with what is no text")
        self.stack.append(self.find(module, name))

    def call(self) -> None:
        self.count_object()
        args, known = self.stack.pop(), self.stack.pop()
        if not isinstance(known, Known) or type(args) is not tuple:
            raise pickle.UnpicklingError("the pickle calls something that is no function")
        self.stack.append(known.function(*args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, OrderedDict):  # whose attributes (torch's _metadata) are of no use here
            raise pickle.UnpicklingError("the pickle changes an object that is no record")

    def refer(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def skip(self, length: int) -> None:
        self.take(length)


_INSTRUCTIONS: Mapping[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: lambda machine: machine.skip(1),
    pickle.FRAME: lambda machine: machine.skip(8),
    pickle.NONE: lambda machine: machine.push(None),
    pickle.NEWTRUE: lambda machine: machine.push(True),
    pickle.NEWFALSE: lambda machine: machine.push(False),
    pickle.BININT: partial(_Machine.push_number, layout=SIGNED),
    pickle.BININT1: partial(_Machine.push_number, layout=BYTE),
    pickle.BININT2: partial(_Machine.push_number, layout=SHORT),
    pickle.BINFLOAT: partial(_Machine.push_number, layout=DOUBLE),
    pickle.LONG1: _Machine.push_long,
    pickle.BINUNICODE: partial(_Machine.push_text, layout=WORD),
    pickle.SHORT_BINUNICODE: partial(_Machine.push_text, layout=BYTE),
    pickle.BINUNICODE8: partial(_Machine.push_text, layout=LONG),
    pickle.BINSTRING: partial(_Machine.push_old_text, layout=WORD),
    pickle.SHORT_BINSTRING: partial(_Machine.push_old_text, layout=BYTE),
    pickle.BINBYTES: partial(_Machine.push_bytes, layout=WORD),
    pickle.SHORT_BINBYTES: partial(_Machine.push_bytes, layout=BYTE),
    pickle.BINBYTES8: partial(_Machine.push_bytes, layout=LONG),
    pickle.EMPTY_DICT: partial(_Machine.push_new, kind=dict),
    pickle.EMPTY_LIST: partial(_Machine.push_new, kind=list),
    pickle.EMPTY_TUPLE: partial(_Machine.push_new, kind=tuple),
    pickle.EMPTY_SET: partial(_Machine.push_new, kind=set),
    pickle.MARK: _Machine.mark,
    pickle.POP: _Machine.pop,
    pickle.POP_MARK: lambda machine: machine.since_mark().clear(),
    pickle.TUPLE: _Machine.tuple_since_mark,
    pickle.TUPLE1: partial(_Machine.tuple_of, count=1),
    pickle.TUPLE2: partial(_Machine.tuple_of, count=2),
    pickle.TUPLE3: partial(_Machine.tuple_of, count=3),
    pickle.APPEND: _Machine.append,
    pickle.APPENDS: _Machine.extend,
    pickle.SETITEM: _Machine.set_item,
    pickle.SETITEMS: _Machine.set_items,
    pickle.ADDITEMS: _Machine.add_items,
    pickle.BINPUT: partial(_Machine.keep, layout=BYTE),
    pickle.LONG_BINPUT: partial(_Machine.keep, layout=WORD),
    pickle.MEMOIZE: _Machine.keep_next,
    pickle.BINGET: partial(_Machine.recall, layout=BYTE),
    pickle.LONG_BINGET: partial(_Machine.recall, layout=WORD),
    pickle.GLOBAL: _Machine.name,
    pickle.STACK_GLOBAL: _Machine.name_from_stack,
    pickle.REDUCE: _Machine.call,
    pickle.NEWOBJ: _Machine.call,
    pickle.BUILD: _Machine.build,
    pickle.BINPERSID: _Machine.refer,
}
_STEPS = [_INSTRUCTIONS.get(bytes([code])) for code in range(256)]
