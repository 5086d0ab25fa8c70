"""Thousands of damaged checkpoints in every layout: each is refused in one sentence, or read to its end.

A loop that changes bytes, numbers and words of files at random, from fixed seeds: a failure names the seed
that repeats it. Never may there be another exception, a hang, or memory that grows.
"""

import copy
import io
import json
import math
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from on_disk import tiny_llama, write_config, write_dcp, write_gguf
from safetensors.torch import save

from palinode.errors import PalinodeError
from palinode.weights import Checkpoint
from palinode.weights.adapters import LoraAdapter
from palinode.weights.files import Files

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


# The layouts: each writes a small whole checkpoint, with damage where its parts are put together


def state():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 3, generator=generator)
    return {
        "model.embed_tokens.weight": shared,
        "model.norm.weight": torch.ones(3).bfloat16(),
        "turned": torch.randn(3, 5, generator=generator).t(),
        "ids": torch.arange(4),
        "lm_head.weight": shared,
    }


STATE = {name: tensor.clone().contiguous() for name, tensor in state().items()}


def safetensors_file(damage, tensors):
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    length = int.from_bytes(raw[:8], "little")
    header = damage.json(raw[8 : 8 + length], 0.7)
    return damage.maybe(struct.pack("<Q", len(header)) + header + raw[8 + length :], 0.3)


def safetensors(folder, damage):
    (folder / "model.safetensors").write_bytes(safetensors_file(damage, STATE))


def index(folder, damage):
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(STATE)}
    for file in sorted(set(files.values())):
        part = {name: STATE[name] for name, place in files.items() if place == file}
        raw = safetensors_file(damage, part) if damage.random.random() < 0.1 else save(part)
        (folder / file).write_bytes(raw)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": files}).encode()
    (folder / "model.safetensors.index.json").write_bytes(damage.json(text, 1.0))


def config(folder, damage):
    (folder / "model.safetensors").write_bytes(save(STATE))
    text = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(damage.json(text, 1.0))


def torch_file(damage, content, chance=0.5):
    """A file of torch.save; half the time the damage is to the pickle inside a sound archive."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    if damage.random.random() < 0.5:
        with zipfile.ZipFile(buffer) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, record in records.items():
                archive.writestr(name, damage.maybe(record, 1.0 if name.endswith("data.pkl") else 0.05))
        return buffer.getvalue()
    return damage.maybe(buffer.getvalue(), chance)


def zipped(folder, damage):
    (folder / "pytorch_model.bin").write_bytes(torch_file(damage, state(), 1.0))


def training(folder, damage):
    if damage.random.random() < 0.2:
        content = damage.twist({"model": state(), "step": 3, "args": {"a": [1, 2]}})
        torch.save(content, folder / "last.pt")
        return
    optimiser = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    content = {"model": state(), "optimizer": optimiser, "step": 3, "args": ("a", 1.5, None, True)}
    (folder / "last.pt").write_bytes(torch_file(damage, content, 1.0))


def old(folder, damage):
    buffer = io.BytesIO()
    torch.save(state(), buffer, _use_new_zipfile_serialization=False)
    (folder / "pytorch_model.bin").write_bytes(damage.maybe(buffer.getvalue(), 1.0))


def pickle_index(folder, damage):
    files = {name: f"{number % 2}.bin" for number, name in enumerate(STATE)}
    for file in sorted(set(files.values())):
        part = {name: STATE[name] for name, place in files.items() if place == file}
        (folder / file).write_bytes(torch_file(damage, part, 0.2))
    text = json.dumps({"weight_map": files}).encode()
    (folder / "pytorch_model.bin.index.json").write_bytes(damage.json(text, 0.6))


def distributed(folder, damage):
    grids = {"model.embed_tokens.weight": {0: [1, 3]}, "turned": {1: [2]}, "ids": {0: [2]}}
    content = {f"model.{name}": tensor for name, tensor in STATE.items()}
    paths = {name: ("model", name.removeprefix("model.")) for name in content}
    content |= {"optim.step": torch.ones(1), "optim.lr": 0.1}
    planner_data = damage.random.choice([None, {**paths, "optim.step": ("optim", "step")}])
    write_dcp(
        folder, content, {f"model.{name}": grid for name, grid in grids.items()}, planner_data=planner_data
    )
    spoilt = damage.random.choice([".metadata", ".metadata", "__0_0.distcp", "__1_0.distcp"])
    if spoilt == ".metadata" and damage.random.random() < 0.6:
        content = damage.twist(pickle.loads((folder / spoilt).read_bytes()))
        with suppress(RuntimeError, AttributeError):  # some of it torch refuses to write
            (folder / spoilt).write_bytes(pickle.dumps(content, protocol=damage.random.choice([2, 4])))
        return
    (folder / spoilt).write_bytes(damage.maybe((folder / spoilt).read_bytes(), 1.0))


def adapter(folder, damage):
    (folder / "config.json").unlink()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(4, 2)}
    text = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {"v_proj": 4},
    }
    (folder / "adapter_config.json").write_bytes(damage.json(json.dumps(text).encode(), 0.8))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_file(damage, factors))


LAYOUTS = [safetensors, index, config, zipped, training, old, pickle_index, distributed, adapter]


# What may happen


def read_all(folder: Path, layout) -> int:
    """Open a checkpoint and read every tensor; return how many bytes."""
    if layout is adapter:
        changes = LoraAdapter.open(folder).changes.values()
        infos = [info for change in changes for info in change.infos]
    else:
        infos = [*Checkpoint.open(folder, allow_pickle=True).tensors.values()]
    buffer = memoryview(bytearray(1 << 12))
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    assert all(info.nbytes <= 4 * on_disk for info in infos), "a tensor is far larger than all files"
    with Files() as files:
        for info in infos:
            for start in range(0, info.nbytes, len(buffer)):
                info.read(files, start, buffer[: info.nbytes - start])
    return sum(info.nbytes for info in infos)


def outcome(folder: Path, layout, seed: int) -> str:
    """Damage a checkpoint and open it: "read" or "refused"; anything else is a failure."""
    shutil.rmtree(folder, ignore_errors=True)
    write_config(folder, tie_word_embeddings=True)
    layout(folder, Damage(seed))
    refusal = None
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        read_all(folder, layout)
    except PalinodeError as error:
        refusal = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if refusal is None:
        return "read"
    assert "\n" not in refusal
    assert len(refusal) < 3000
    return "refused"


def too_long(*_):
    raise TimeoutError("a damaged file took more than 20 seconds")


def run(folder: Path, layout, seeds) -> dict[str, int]:
    """Count outcomes; a failure says by which seed it came."""
    outcomes = {"read": 0, "refused": 0}
    before = signal.signal(signal.SIGALRM, too_long)
    try:
        outcome(folder, layout, seeds[0])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed in seeds:
            try:
                outcomes[outcome(folder, layout, seed)] += 1
            except Exception as error:
                raise AssertionError(f"{layout.__name__}, seed {seed}: {error!r}") from error
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
            assert grown < 100_000, f"{layout.__name__}, seed {seed}: {grown} kB more memory"
    finally:
        signal.signal(signal.SIGALRM, before)
    return outcomes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_checkpoints_are_read(tmp_path, layout):
    folder = write_config(tmp_path / "model", tie_word_embeddings=True)
    layout(folder, NoDamage(0))
    expected = 64 if layout is adapter else sum(tensor.nbytes for tensor in STATE.values())
    assert read_all(folder, layout) in (expected, expected - STATE["lm_head.weight"].nbytes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_hundred_damaged_files(tmp_path, layout):
    outcomes = run(tmp_path / "model", layout, range(60))
    assert outcomes["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_thousand_damaged_files_and_more(tmp_path, layout):
    outcomes = run(tmp_path / "model", layout, range(1000, 3000))
    assert sum(outcomes.values()) == 2000
    assert min(outcomes.values()) > 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_gguf_files(tmp_path):
    """Fewer: transformers builds a model of each that can be read."""
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "whole", tiny_llama(), "Q8_0")
    raw = (tmp_path / "whole").read_bytes()

    def gguf(folder, damage):
        (folder / "model.gguf").write_bytes(damage.maybe(raw[:2600], 1.0) + raw[2600:])

    outcomes = run(tmp_path / "model", gguf, range(500))
    assert min(outcomes.values()) > 20
