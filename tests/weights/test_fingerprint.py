"""A fingerprint follows the content of a model, not its name or its files."""

import dataclasses
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from palinode.errors import CheckpointError
from palinode.records import cache_folder
from palinode.weights import Checkpoint, fingerprints
from palinode.weights.fingerprints import fingerprint as fingerprint_of
from palinode.weights.fingerprints import remember, tensor_digests
from palinode.weights.tensors import Files


@pytest.fixture
def model(models):
    """A small model folder with a tokenizer."""
    tensors = {f"model.layers.{i}.w": models.noise(i, 5, 4) for i in range(5)}
    return with_tokenizer(models.write("model", {**tensors, "empty": torch.empty(0, 3)}))


def with_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text("{}")
    return folder


def fingerprint(folder):
    return Checkpoint.open(folder).fingerprint()


def test_fingerprint_is_32_hex_digits_and_repeats(model):
    assert fingerprint(model) == fingerprint(model)
    assert len(fingerprint(model)) == 32
    assert set(fingerprint(model)) <= set("0123456789abcdef")


def test_fingerprint_does_not_depend_on_the_folders_name(model):
    assert fingerprint(shutil.copytree(model, model.with_name("another name"))) == fingerprint(model)


@pytest.mark.parametrize("shards", [2, 4])
def test_fingerprint_does_not_depend_on_sharding(models, model, shards):
    sharded = with_tokenizer(models.write("sharded", models.read(model), shards=shards))
    assert len(list(sharded.glob("*.safetensors"))) == shards
    assert fingerprint(sharded) == fingerprint(model)


def test_fingerprint_does_not_depend_on_files_that_are_no_part_of_the_model(model):
    before = fingerprint(model)
    for name in ("README.md", "training.json", "optimizer.pt"):
        (model / name).write_text("x")
    assert fingerprint(model) == before


def changed(model, number):
    return shutil.copytree(model, model.with_name(f"changed {number}"))


def test_fingerprint_changes_with_any_flipped_bit_of_the_weights(model):
    seen = {fingerprint(model)}
    size = (model / "model.safetensors").stat().st_size
    for number, place in enumerate((size - 1, size - 40, size - 200)):
        copy = changed(model, number)
        content = bytearray((copy / "model.safetensors").read_bytes())
        content[place] ^= 1 << (number + 2)
        (copy / "model.safetensors").write_bytes(content)
        seen.add(fingerprint(copy))
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_fingerprint_changes_with_config_and_tokenizer(model, name):
    copy = changed(model, 0)
    (copy / name).write_text((copy / name).read_text().replace("{", "{ ", 1))
    assert fingerprint(copy) != fingerprint(model)


def test_fingerprint_changes_with_a_new_companion(model):
    copy = changed(model, 0)
    (copy / "chat_template.jinja").write_text("{{ x }}")
    assert fingerprint(copy) != fingerprint(model)


def test_fingerprint_changes_with_names_shapes_and_dtypes(models):
    row = torch.arange(6, dtype=torch.int32)
    variants = [
        {"w": row},
        {"v": row},
        {"w": row.view(2, 3)},
        {"w": row.view(3, 2)},
        {"w": row.view(torch.float32)},
        {"w": row[:3], "w2": row[3:]},
        {"w": row, "empty": torch.empty(0)},
    ]
    assert len({fingerprint(models.write(f"m{i}", variant)) for i, variant in enumerate(variants)}) == 7


def test_fingerprint_tells_swapped_tensors_apart(models):
    a, b = torch.ones(3), torch.zeros(3)
    assert fingerprint(models.write("1", {"a": a, "b": b})) != fingerprint(
        models.write("2", {"a": b, "b": a})
    )


def test_a_file_changed_in_place_gives_another_fingerprint(model):
    before = fingerprint(model)
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))  # whatever the clock's ticks
    assert fingerprint(model) != before


def test_fingerprint_of_a_model_without_parameters(models):
    assert len(fingerprint(models.write("none", {}))) == 32


# Digests of tensors


def by_hand(code, tensor):
    """The digest as the module's docstring defines it, from torch's own bytes."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    blocks = [raw[start : start + 524288] for start in range(0, len(raw), 524288)]
    head = f"{code}{list(tensor.shape)}".encode()
    return blake3(head + b"".join(blake3(block).digest() for block in blocks)).hexdigest()


ODD_NAMES = ["", " ", "a\0b", "名前", 'say "hi"', "../up", "__proto__", "x" * 300]


def test_digests_are_what_the_definition_says(models):
    tensors = {
        "one block": ("F32", models.noise(1, 5, 4)),
        "three blocks": ("BF16", models.noise(2, 600, 1000, dtype=torch.bfloat16)),
        "exactly two": ("F64", models.noise(3, 131072, dtype=torch.float64)),
        "scalar": ("F16", torch.tensor(1.5).half()),
        "empty": ("F32", torch.empty(0, 3)),
        "count": ("I64", torch.arange(7)),
        "mask": ("BOOL", torch.tensor([True, False])),
        **{name: ("F32", torch.full((2,), float(place))) for place, name in enumerate(ODD_NAMES)},
    }
    model = models.make("model", {name: tensor for name, (_, tensor) in tensors.items()})
    expected = {name: by_hand(code, tensor) for name, (code, tensor) in tensors.items()}
    for workers in (1, 3, None):
        assert tensor_digests(model, workers=workers, cached=False) == expected


def test_digests_tell_minus_zero_and_nan_payloads_apart(models):
    bits = torch.tensor([0, -0x80000000, 0x7FC00000, 0x7FC00001], dtype=torch.int32)
    model = models.make("m", {str(i): bits[i : i + 1].view(torch.float32) for i in range(4)})
    assert len(set(tensor_digests(model).values())) == 4


def test_digests_do_not_depend_on_name_and_place(models):
    tensor = models.noise(1, 700, 300)
    first = models.make("first", {"a": tensor})
    second = models.make("second", {"pad": torch.ones(3, dtype=torch.uint8), "b": tensor}, shards=2)
    assert tensor_digests(first)["a"] == tensor_digests(second)["b"]


def test_digests_do_not_depend_on_the_format(models):
    tensors = {"a": models.noise(1, 700, 300), "b": models.noise(2, 9).half(), "t": models.noise(3, 6, 8).T}
    plain = models.make("plain", {name: tensor.contiguous() for name, tensor in tensors.items()})
    pickled = models.place / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((plain.folder / "config.json").read_bytes())
    torch.save(tensors, pickled / "pytorch_model.bin")
    other = Checkpoint.open(pickled, allow_pickle=True)
    assert tensor_digests(other) == tensor_digests(plain)
    assert other.fingerprint() == plain.fingerprint()


def test_fingerprint_from_known_digests_reads_no_weights(model, reads):
    checkpoint = Checkpoint.open(model)
    digests = tensor_digests(checkpoint)
    whole = checkpoint.fingerprint()
    reads.clear()
    assert fingerprint_of(checkpoint, digests) == whole
    assert reads == []


def test_fingerprint_of_a_companion_whose_name_is_no_text(model):
    copy = changed(model, 0)
    (copy / os.fsdecode(b"tokenizer\xff")).write_text("x")
    assert fingerprint(copy) != fingerprint(model)


# Files that change


@pytest.mark.parametrize("change", [-600, -1, +8])
def test_a_file_of_another_size_than_when_it_was_opened_says_so(models, change):
    checkpoint = models.make("model", {"w": models.noise(1, 400)})
    file = checkpoint.folder / "model.safetensors"
    os.truncate(file, file.stat().st_size + change)
    with pytest.raises(CheckpointError, match="was when the checkpoint was opened; open it again"):
        checkpoint.fingerprint()


def test_a_file_of_the_same_size_and_another_order_says_so(models):
    first, second = models.noise(1, 4), models.noise(2, 4)
    checkpoint = models.make("model", {"a": first, "b": second})
    save_file({"b": first, "a": second}, checkpoint.folder / "model.safetensors", {"format": "pt"})
    rewritten = Checkpoint.open(checkpoint.folder)
    if rewritten.tensors == checkpoint.tensors:  # safetensors sorts by name; move one by hand
        raw = (checkpoint.folder / "model.safetensors").read_bytes()
        raw = raw.replace(b'"a"', b'"_"').replace(b'"b"', b'"a"').replace(b'"_"', b'"b"')
        (checkpoint.folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="is not what it was when the checkpoint was opened"):
        checkpoint.fingerprint()
    assert len(Checkpoint.open(checkpoint.folder).fingerprint()) == 32


def test_a_file_that_is_gone_says_so(models):
    checkpoint = models.make("model", {"w": models.noise(1, 4)})
    (checkpoint.folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read \(No such file"):
        checkpoint.fingerprint()


def test_a_file_that_changes_while_it_is_hashed_says_so(models):
    checkpoint = models.make("model", {"w": models.noise(1, 400)})
    with pytest.raises(CheckpointError, match="changed while it was read"):
        tensor_digests(checkpoint, on_progress=lambda _: os.utime(checkpoint.folder / "model.safetensors"))


# The cache


@pytest.fixture
def reads(monkeypatch):
    """The weight files that were read, one entry a read."""
    seen, read = [], Files.read

    def counted(self, file, offset, out):
        seen.append(file.name)
        read(self, file, offset, out)

    monkeypatch.setattr(Files, "read", counted)
    return seen


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, which takes the files that the test has just written for old ones."""
    monkeypatch.setenv("PALINODE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "SETTLED", 0)
    return tmp_path / "cache/digests"


def test_what_was_hashed_once_is_not_read_again(models, model, cache, reads):
    before = tensor_digests(Checkpoint.open(model))
    assert reads
    reads.clear()
    told = []
    checkpoint = Checkpoint.open(model)
    assert tensor_digests(checkpoint, on_progress=told.append) == before
    assert sum(told) == checkpoint.nbytes
    assert reads == []
    assert tensor_digests(checkpoint, cached=False) == before
    assert reads


def test_only_the_shard_that_changed_is_read_again(models, cache, reads):
    folder = models.write("model", {str(i): models.noise(i, 50) for i in range(6)}, shards=3)
    before = tensor_digests(Checkpoint.open(folder))
    file = sorted(folder.glob("*.safetensors"))[1]
    flip(file)
    reads.clear()
    after = tensor_digests(Checkpoint.open(folder))
    assert set(reads) == {file.name}
    assert sum(before[name] != after[name] for name in before) == 1


def flip(file, place=-1):
    """Change one byte of a file and nothing else of it."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    with file.open("r+b") as stream:
        stream.write(content)


def test_a_change_with_the_old_time_put_back_is_noticed(model, cache):
    file = model / "model.safetensors"
    before, status = fingerprint(model), file.stat()
    time.sleep(0.05)  # a few ticks of the file system's clock
    flip(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    assert fingerprint(model) != before


def test_another_file_with_the_same_size_and_time_is_noticed(model, cache):
    file = model / "model.safetensors"
    before, status = fingerprint(model), file.stat()
    other = shutil.copy(file, file.with_name("other"))
    flip(other)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)
    assert fingerprint(model) != before


def test_the_same_bytes_opened_as_another_layout_are_not_confused(models, cache):
    # One file, its header rewritten in place so that names change hands; whatever the clock says.
    model = models.make("model", {"a": models.noise(1, 4), "b": models.noise(2, 4)})
    a, b = (model.tensors[name] for name in "ab")
    before = tensor_digests(model)
    file = model.folder / "model.safetensors"
    swapped = Checkpoint(
        model.folder,
        {"a": dataclasses.replace(a, offset=b.offset), "b": dataclasses.replace(b, offset=a.offset)},
        {},
    )
    raw = file.read_bytes()
    with file.open("r+b") as stream:
        stream.write(raw.replace(b'"a"', b'"_"').replace(b'"b"', b'"a"').replace(b'"_"', b'"b"'))
    entry = next(cache.iterdir())
    content = json.loads(entry.read_text())
    content["stamp"] = list(fingerprints._stamp(file))
    entry.write_text(json.dumps(content))
    assert tensor_digests(swapped) == {"a": before["b"], "b": before["a"]}


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"\xff\xfe garbage",
        lambda raw: b"[]",
        lambda raw: b"null",
        lambda raw: b"[" * 100_000,
        lambda raw: b'{"version": 1}',
        lambda raw: raw.replace(b'"tensors": {', b'"tensors": 3, "x": {'),
        lambda raw: raw.replace(b'"tensors": {', b'"tensors": [], "x": {'),
        lambda raw: re.sub(rb'"[0-9a-f]{64}"', b'"beef"', raw),
        lambda raw: re.sub(rb'"[0-9a-f]{64}"', b"7", raw),
        lambda raw: re.sub(rb'\["[0-9a-f]{64}", .*?\], \d+\]', b"[]", raw),
        lambda raw: raw.replace(b'"version": 1', b'"version": 2'),
        lambda raw: raw.replace(b'"F32"', b'"I32"'),
    ],
)
def test_garbage_in_the_cache_is_not_believed(model, cache, reads, change):
    before = fingerprint(model)
    (entry,) = cache.iterdir()
    damaged = change(entry.read_bytes())
    assert damaged != entry.read_bytes()
    entry.write_bytes(damaged)
    reads.clear()
    assert fingerprint(model) == before
    assert reads
    reads.clear()
    assert fingerprint(model) == before  # and it has been mended
    assert reads == []


def test_a_cache_that_cannot_be_written_is_done_without(model, tmp_path, monkeypatch):
    before = fingerprint(model)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(fingerprints, "SETTLED", 0)
    monkeypatch.setenv("PALINODE_CACHE", str(tmp_path / "file"))
    assert fingerprint(model) == before
    monkeypatch.setenv("PALINODE_CACHE", "~nobody-of-this-name/cache")
    assert fingerprint(model) == before
    remember(Checkpoint.open(model), tensor_digests(Checkpoint.open(model)))


def test_the_cache_lies_where_it_was_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PALINODE_CACHE", str(tmp_path))
    assert cache_folder("digests") == tmp_path / "digests"
    monkeypatch.setenv("PALINODE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("digests") == tmp_path / "xdg/palinode/digests"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("digests") == tmp_path / "home/.cache/palinode/digests"


def test_tests_leave_the_users_cache_alone():
    assert cache_folder("digests").is_relative_to(os.environ["PALINODE_CACHE"])


def test_a_file_just_written_is_not_remembered(model, tmp_path, monkeypatch, reads):
    # It could be written again within one tick of the clock, and nobody could tell.
    monkeypatch.setenv("PALINODE_CACHE", str(tmp_path / "cache"))
    first = fingerprint(model)
    flip(model / "model.safetensors")
    reads.clear()
    assert fingerprint(model) != first
    assert reads
    assert not (tmp_path / "cache").exists()


def test_several_at_once_leave_one_sound_entry(models, cache, reads):
    folder = models.write("model", {str(i): models.noise(i, 500) for i in range(40)})
    expected = tensor_digests(Checkpoint.open(folder), cached=False)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: tensor_digests(Checkpoint.open(folder)), range(40)))
    assert all(digests == expected for digests in found)
    assert len(list(cache.iterdir())) == 1
    reads.clear()
    assert tensor_digests(Checkpoint.open(folder)) == expected
    assert reads == []


def test_what_a_writer_remembers_is_not_read_again(model, tmp_path, monkeypatch, reads):
    monkeypatch.setenv("PALINODE_CACHE", str(tmp_path / "cache"))
    checkpoint = Checkpoint.open(model)
    digests = tensor_digests(checkpoint, cached=False)
    remember(checkpoint, digests)
    reads.clear()
    assert tensor_digests(Checkpoint.open(model)) == digests
    assert reads == []


def test_the_time_of_a_file_just_written_is_set_back_when_it_is_remembered(model, tmp_path, monkeypatch):
    # So that a second write within the same tick of the clock gives it another time than the one remembered.
    monkeypatch.setenv("PALINODE_CACHE", str(tmp_path / "cache"))
    file, checkpoint = model / "model.safetensors", Checkpoint.open(model)
    written = file.stat().st_mtime_ns
    remember(checkpoint, tensor_digests(checkpoint))
    assert file.stat().st_mtime_ns == written - fingerprints.SETTLED
    monkeypatch.setattr(fingerprints, "SETTLED", 0)  # now it counts as old, and keeps its time
    remember(checkpoint, tensor_digests(checkpoint))
    assert file.stat().st_mtime_ns == written - 2_000_000_000


def test_a_change_right_after_a_writer_remembered_is_noticed(model, tmp_path, monkeypatch):
    # Thirty times, so that some fall within one tick of the file system's clock.
    monkeypatch.setenv("PALINODE_CACHE", str(tmp_path / "cache"))
    for _ in range(30):
        checkpoint = Checkpoint.open(model)
        before = tensor_digests(checkpoint, cached=False)
        remember(checkpoint, before)
        flip(model / "model.safetensors")
        assert tensor_digests(checkpoint) != before


def test_tensors_put_together_from_pieces_are_never_remembered(models, cache, reads):
    folder = models.write("model", {"w": models.noise(1, 6, 8)})
    (folder / "model.safetensors").unlink()
    torch.save({"w": models.noise(1, 6, 8).T, "v": models.noise(2, 4)}, folder / "pytorch_model.bin")
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert type(checkpoint.tensors["w"]) is not type(checkpoint.tensors["v"])
    before = tensor_digests(checkpoint)
    (entry,) = cache.iterdir()
    assert json.loads(entry.read_text())["tensors"].keys() == {"v"}
    assert tensor_digests(checkpoint) == before
