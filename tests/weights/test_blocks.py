"""Blocks come in order, whole and once, however many threads read them, in bounded memory."""

import json
import os
import threading
import tracemalloc

import pytest
import torch

from palinode.errors import CheckpointError
from palinode.weights import Checkpoint
from palinode.weights.tensors import BLOCK, RUN, map_blocks


@pytest.fixture
def mixed(models):
    """Tensors of no, one, several and many blocks, with every byte random."""
    sizes = {"big": RUN * BLOCK + 3 * BLOCK + 5, "none": 0, "small": 3, "two": BLOCK + 1, "one": BLOCK}
    generator = torch.Generator().manual_seed(0)
    return models.make(
        "mixed",
        {
            name: torch.randint(0, 256, (size,), generator=generator).to(torch.uint8)
            for name, size in sizes.items()
        },
    )


@pytest.mark.parametrize("workers", [1, 2, 7, None])
def test_blocks_put_together_are_the_tensor(models, mixed, workers):
    found = dict.fromkeys(mixed.tensors, b"")
    lengths = {name: [] for name in mixed.tensors}
    infos = mixed.tensors.values()
    for info, block in map_blocks(infos, lambda _, block: bytes(block), workers=workers):
        found[info.name] += block
        lengths[info.name].append(len(block))
    assert found == {name: tensor.numpy().tobytes() for name, tensor in models.read(mixed.folder).items()}
    assert lengths["two"] == [BLOCK, 1]
    assert lengths["one"] == [BLOCK]
    assert lengths["none"] == []
    assert set(lengths["big"][:-1]) == {BLOCK}


def test_progress_is_told_in_the_callers_thread_and_adds_up(mixed):
    told, threads = [], set()

    def hear(amount):
        told.append(amount)
        threads.add(threading.get_ident())

    for _ in map_blocks(mixed.tensors.values(), lambda _info, _block: None, on_progress=hear):
        pass
    assert sum(told) == mixed.nbytes
    assert threads == {threading.get_ident()}


def test_an_error_in_a_thread_reaches_the_caller(mixed):
    os.truncate(mixed.folder / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="cut off while being read"):
        list(map_blocks(mixed.tensors.values(), lambda _info, _block: None))


def test_nothing_of_nothing():
    assert list(map_blocks([], lambda _info, _block: None)) == []


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    size = 512 * BLOCK  # 256 MB, all of it a hole in the file
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    checkpoint = Checkpoint.open(tmp_path)
    tracemalloc.start()
    count = sum(1 for _ in map_blocks(checkpoint.tensors.values(), lambda _, block: block[0], workers=2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 512
    assert peak < 3 * BLOCK
