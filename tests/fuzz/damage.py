"""Changes files at random, the same way for the same seed: bytes, numbers, words, and parts of values."""

import copy
import json
import math
import random
import re
from typing import Any

NUMBERS = [
    0,
    1,
    2,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
WORDS = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"-1", b"1e999", b"NaN", b"1.5", b"9" * 30,
    b"\\ud800", b"\\u0000", b"../", b"/etc/passwd", b'"w"', b"F32", b"BF16", b"I8", b"F8_E4M3", b"shape",
    b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b".", b"(", b")", b"t", b"\x85", b"\x87",
    b"R", b"b", b"Q", b"u", b"s", b"a", b"e", b"0", b"N", b"\x88", b"K\x00", b"M\xff\xff", b"\x81", b"\x94",
    b"J\xff\xff\xff\x7f", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"h\x00", b"j\xff\xff\xff\xff",
    b"r\xff\xff\xff\xff", b"cos\nsystem\n", b"ctorch\nSize\n", b"ctorch\nfloat16\n", b"\x93",
    b"ctorch\nHalfStorage\n", b"ccollections\nOrderedDict\n", b"X\xff\xff\xff\xff",
    b"\x8c\x08builtins\x8c\x04eval\x93",
]  # fmt: skip


ODD_VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 8, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, math.inf, math.nan,
    "", "w", "..", "../x", "/etc/passwd", "a.safetensors", "\0", "\ud800", "x" * 300, "F32", "BF16", "I64",
    [], {}, [0], [2, 3], [0, 2**62], [[]], {"w": 1}, [1] * 70, "LORA", "(a+)+$", ["model"],
]  # fmt: skip


class Damage:
    """Changes files at random, the same way for the same seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.count = 0

    def maybe(self, raw: bytes, chance: float = 0.5) -> bytes:
        """Return the bytes, changed in a few places or not at all."""
        if self.random.random() > chance:
            return raw
        content = bytearray(raw)
        for _ in range(self.random.choice([1, 1, 1, 2, 3, 6])):
            self.random.choice(
                [
                    self.flip,
                    self.number,
                    self.digits,
                    self.operand,
                    self.word,
                    self.cut,
                    self.repeat,
                    self.end,
                ]
            )(content)
            self.count += 1
        return bytes(content)

    def place(self, content: bytearray) -> int:
        return self.random.randrange(len(content) + 1)

    def flip(self, content: bytearray) -> None:
        if content:
            content[self.random.randrange(len(content))] = self.random.randrange(256)

    def number(self, content: bytearray) -> None:
        """Put a number that is often wrong over 1, 2, 4 or 8 bytes."""
        size, place = self.random.choice([1, 2, 4, 8]), self.place(content)
        value = (self.random.choice(NUMBERS) + self.random.choice([0, 0, 1, -1])) % (1 << 8 * size)
        content[place : place + size] = value.to_bytes(size, "little")

    def digits(self, content: bytearray) -> None:
        """Put a number that is often wrong in place of one that is written out."""
        found = list(re.finditer(rb"\d+", bytes(content)))
        if found:
            match = self.random.choice(found)
            content[match.start() : match.end()] = str(
                self.random.choice([*NUMBERS, 10**40, -1, 3, 4, 12])
            ).encode()

    def operand(self, content: bytearray) -> None:
        """Change a small number in a pickle: a length, a stride, an offset, a place in the memo."""
        found = [match.end() for match in re.finditer(rb"[KMhq\x85-\x88]", bytes(content))]
        place = self.random.choice([place for place in found if place < len(content)] or [len(content)])
        content[place : place + 1] = self.random.choice([b"\0", b"\1", b"\2", b"\3", b"\4", b"\x10", b"\xff"])

    def twist(self, value: Any) -> Any:
        """Return a value with one part of it, however deep inside, changed, left out or doubled."""
        parts = value.__dict__ if hasattr(value, "__dict__") and value.__dict__ else value
        if self.random.random() < 0.15 or not isinstance(parts, dict | list | tuple) or not parts:
            odd = self.random.choice(ODD_VALUES)
            return tuple(odd) if isinstance(value, tuple) and isinstance(odd, list) else odd
        keys = list(parts) if isinstance(parts, dict) else list(range(len(parts)))
        key, way = self.random.choice(keys), self.random.random()
        copy_ = dict(parts) if isinstance(parts, dict) else list(parts)
        if way < 0.1:
            del copy_[key]
        elif way < 0.2:
            copy_[self.random.choice(keys)] = parts[key]
        else:
            copy_[key] = self.twist(parts[key])
        if parts is value:
            return tuple(copy_) if isinstance(value, tuple) else copy_
        changed = copy.copy(value)
        changed.__dict__.clear()
        changed.__dict__.update(copy_)
        return changed

    def json(self, text: bytes, chance: float) -> bytes:
        """Return a JSON text that is damaged, or sound and says something else."""
        if self.random.random() < 0.5:
            return self.maybe(text, chance)
        return json.dumps(self.twist(json.loads(text))).encode() if self.random.random() < chance else text

    def word(self, content: bytearray) -> None:
        place, word = self.place(content), self.random.choice(WORDS)
        content[place : place + (len(word) if self.random.random() < 0.5 else 0)] = word

    def cut(self, content: bytearray) -> None:
        place = self.place(content)
        del content[place : place + self.random.choice([1, 2, 8, 50])]

    def repeat(self, content: bytearray) -> None:
        place, other = self.place(content), self.place(content)
        content[other:other] = content[place : place + self.random.choice([1, 8, 60])]

    def end(self, content: bytearray) -> None:
        if self.random.random() < 0.5:
            del content[self.place(content) :]
        else:
            content += self.random.randbytes(self.random.randrange(20))


class NoDamage(Damage):
    """Leaves everything as it is."""

    def maybe(self, raw: bytes, chance: float = 0.5) -> bytes:
        return raw

    def twist(self, value: Any) -> Any:
        return value
