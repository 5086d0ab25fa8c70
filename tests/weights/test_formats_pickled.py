"""Weights in files of torch.save: found in place, equal to what torch reads, and never run."""

import collections
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from argparse import Namespace

import pytest
import torch
from on_disk import assert_holds, raw, read, tiny_llama, write_config

from palinode.errors import CheckpointError
from palinode.weights import Checkpoint, TensorInfo


def with_attribute():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.note = 1
    return weight


def all_kinds() -> dict[str, torch.Tensor]:
    """One tensor for each way in which torch.save describes one."""
    torch.manual_seed(0)
    shared = torch.randn(6, 4)
    return {
        "whole": shared,
        "turned": shared.t(),
        "rows": shared[2:5],
        "columns": shared[:, 1:3],
        "steps": torch.randn(9, 9)[1::2, ::3],
        "cube": torch.randn(5, 6, 7).permute(2, 0, 1)[1:4, :, 2:5],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "attribute": with_attribute(),
        "scalar": torch.tensor(2.5),
        "one": torch.randn(1, 1)[:, 0],
        "empty": torch.zeros(0, 3),
        "double": torch.randn(3, dtype=torch.float64),
        "half": torch.randn(3).half(),
        "brain": torch.randn(4, 2).bfloat16(),
        "long": torch.arange(5),
        "int": torch.arange(5, dtype=torch.int32),
        "short": torch.arange(5, dtype=torch.int16),
        "char": torch.arange(5, dtype=torch.int8),
        "byte": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "unsigned": torch.tensor([1, 2], dtype=torch.uint16),
        "wide": torch.tensor([1, 2], dtype=torch.uint64),
        "ünï\ncode '\"/..": torch.ones(1),
        "": torch.ones(1),
    }


@pytest.fixture
def folder(tmp_path):
    return write_config(tmp_path / "model")


def put(folder, content, name="pytorch_model.bin", **options):
    torch.save(content, folder / name, **options)
    return folder


def refusal(location, *, allow_pickle=True) -> str:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(location, allow_pickle=allow_pickle)
    message = str(error.value)
    assert "\n" not in message
    assert message[-1] not in ".!"
    return message


# What can be read


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("step", [3, 8, 1 << 16])
def test_every_kind_of_tensor_reads_as_torch_reads_it(folder, zipped, step):
    state = all_kinds()
    if not zipped:  # torch writes these two, and cannot read them
        del state["unsigned"], state["wide"]
    put(folder, state, _use_new_zipfile_serialization=zipped)
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert checkpoint.format == "pickle"
    assert_holds(checkpoint, torch.load(folder / "pytorch_model.bin", weights_only=True), step)
    assert type(checkpoint.tensors["whole"]) is TensorInfo
    assert checkpoint.tensors["whole"].offset > 0


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(folder, protocol):
    state = all_kinds()
    put(folder, state, pickle_protocol=protocol)
    assert_holds(Checkpoint.open(folder, allow_pickle=True), state)


@pytest.mark.parametrize("shards", ["10MB", "20KB"])
def test_a_saved_model_single_and_sharded(folder, shards):
    model = tiny_llama()
    state, size, part, parts = model.state_dict(), 0, {}, []
    limit = 20_000 if shards == "20KB" else 10_000_000
    for name, tensor in state.items():
        if size + tensor.nbytes > limit:
            parts, part, size = [*parts, part], {}, 0
        part[name], size = tensor, size + tensor.nbytes
    parts = [*parts, part]
    files = [f"pytorch_model-{i:05}-of-{len(parts):05}.bin" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = ["pytorch_model.bin"]
    else:
        index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    for file, part in zip(files, parts, strict=True):
        put(folder, part, file)
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert (len(parts) > 1) == (shards == "20KB")
    assert_holds(checkpoint, state)
    assert checkpoint.notes == ()


def test_the_file_is_not_loaded(folder):
    put(folder, {"w": torch.zeros(4000, 1000)})
    tracemalloc.start()
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert checkpoint.nbytes == 16_000_000
    assert peak < 1_000_000


def test_opening_a_pickle_needs_no_torch(folder):
    put(folder, all_kinds())
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from palinode.weights.formats.pickled import read_pickled\n"
        "before = 'torch' in sys.modules\n"
        f"read_pickled(Path({str(folder / 'pytorch_model.bin')!r}))\n"
        "print(before or 'torch' not in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"


@pytest.mark.parametrize("says_tied", [True, False])
def test_a_head_that_is_its_embedding_is_one_tensor_if_the_config_says_so(tmp_path, says_tied):
    folder = write_config(tmp_path / "tied", tie_word_embeddings=says_tied)
    shared = torch.randn(4, 2)
    put(folder, {"model.embed_tokens.weight": shared, "lm_head.weight": shared})
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert ("lm_head.weight" in checkpoint.tensors) == (not says_tied)
    head = checkpoint.find("lm_head.weight")
    assert read(head) == raw(shared)
    assert checkpoint.tied == (("lm_head.weight", "model.embed_tokens.weight") if says_tied else None)


def test_two_copies_of_a_tied_tensor_stay_two(tmp_path):
    folder = write_config(tmp_path / "tied", tie_word_embeddings=True)
    put(folder, {"model.embed_tokens.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2, 2)})
    assert len(Checkpoint.open(folder, allow_pickle=True).tensors) == 2


OPTIMISER = {
    "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}},
    "param_groups": [{"lr": 0.1}],
}


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "module"])
def test_a_training_checkpoint_gives_its_model(folder, wrapper):
    state = {"a.weight": torch.randn(2), "b.weight": torch.randn(3)}
    content = {wrapper: state, "optimizer": OPTIMISER, "epoch": 3, "best_loss": torch.tensor(1.0)}
    put(folder, content, "step-100.pt")
    put(folder, OPTIMISER, "optimizer.pt")
    (folder / "training_args.bin").write_bytes(b"no weights")
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert_holds(checkpoint, state)
    assert checkpoint.notes == (
        f"step-100.pt: took the weights under {wrapper!r} and left out optimizer, epoch, best_loss",
    )


def test_wrappers_inside_wrappers_and_values_beside_weights(folder):
    state = collections.OrderedDict(a=torch.randn(2), version=3, extra={"scale": 1.5}, nothing=None)
    state._metadata = {"": {"version": 1}}
    put(folder, {"state_dict": {"model": state}}, "last.pth")
    assert_holds(Checkpoint.open(folder, allow_pickle=True), {"a": state["a"]})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_prefix_that_all_names_have_is_left_out(folder, prefix):
    state = {"a.weight": torch.randn(2), "module.weight": torch.randn(1)}
    put(folder, {f"{prefix}{name}": tensor for name, tensor in state.items()})
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert_holds(checkpoint, state)
    assert "left out" in checkpoint.notes[0]


def test_a_prefix_that_one_name_lacks_stays(folder):
    state = {"module.a": torch.randn(2), "b": torch.randn(1)}
    assert_holds(Checkpoint.open(put(folder, state), allow_pickle=True), state)


def test_one_named_file_is_a_checkpoint_of_its_own(folder):
    first = put(folder, {"w": torch.ones(1)}, "a.pt") / "a.pt"
    second = put(folder, {"w": torch.zeros(1)}, "b.pt") / "b.pt"
    opened = [Checkpoint.open(path, allow_pickle=True) for path in (first, second)]
    assert opened[0] != opened[1]
    assert opened[0] == Checkpoint.open(first, allow_pickle=True)
    for checkpoint, value in zip(opened, (1.0, 0.0), strict=True):
        assert checkpoint.folder == folder
        assert_holds(checkpoint, {"w": torch.full((1,), value)})
    assert "holds 2 files that could be its weights (a.pt, b.pt, …)" in refusal(folder)


def test_a_named_file_may_be_a_link_as_in_the_cache_of_the_hub(folder, tmp_path):
    put(folder, {"w": torch.ones(1)})
    (folder / "pytorch_model.bin").rename(tmp_path / "0123abcd")
    (folder / "pytorch_model.bin").symlink_to(tmp_path / "0123abcd")
    checkpoint = Checkpoint.open(folder / "pytorch_model.bin", allow_pickle=True)
    assert (checkpoint.folder, checkpoint.format) == (folder, "pickle")


def test_no_tensors_at_all(folder):
    assert Checkpoint.open(put(folder, {}), allow_pickle=True).parameters == 0


def test_safetensors_go_first(models):
    folder = models.write("both", {"w": torch.ones(1)})
    put(folder, {"other": torch.ones(1)})
    for allow_pickle in (True, False):
        checkpoint = Checkpoint.open(folder, allow_pickle=allow_pickle)
        assert (checkpoint.format, *checkpoint.tensors) == ("safetensors", "w")


# What is refused


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth"])
def test_pickles_must_be_allowed(folder, name):
    put(folder, {"w": torch.ones(1)}, name)
    for location in (folder, folder / name):
        message = refusal(location, allow_pickle=False)
        assert "only as pickles" in message
        assert "--allow-pickle" in message
        assert "allow_pickle=True" in message
        assert "safetensors" in message


class Bomb:
    """Would write a file if it were run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(folder, tmp_path, zipped):
    put(folder, {"w": torch.ones(1), "x": Bomb(tmp_path / "ran")}, _use_new_zipfile_serialization=zipped)
    assert "names posix.mkdir" in refusal(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"w": torch.ones(1), "args": Namespace(lr=1)}, "names argparse.Namespace"),
        (torch.nn.Linear(2, 2), "names torch.nn.modules.linear.Linear"),
        ([torch.ones(1)], "no state dict"),
        (torch.ones(1), "no state dict"),
        (3, "no state dict"),
        ({"a": 1}, "holds no tensors"),
        ({"w": torch.ones(1), "inner": {"v": torch.ones(1)}}, "no plain state dict: it has inner"),
        ({"layers": [torch.ones(1)]}, "no plain state dict: it has layers"),
        ({0: torch.ones(1)}, "names that are no text"),
        ({"w": torch.ones(1, dtype=torch.complex64)}, "w is stored as ComplexFloatStorage"),
        ({"w": torch.ones(1).to(torch.float8_e4m3fn)}, "w is stored as float8_e4m3fn"),
        ({"w": torch.ones(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"w": torch.empty(2, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        ({"w": torch.ones(1).expand(5)}, "share their place; make it contiguous()"),
        ({"w": torch.ones(6).as_strided((3, 4), (1, 1))}, "share their place"),
        ({"w": torch._neg_view(torch.ones(2))}, "negated"),
    ],
)
def test_what_is_no_plain_state_dict(folder, content, said):
    assert said in refusal(put(folder, content))


def test_truncated_at_many_lengths(folder):
    for zipped in (True, False):
        put(folder, {"w": torch.randn(64), "v": torch.randn(8)}, _use_new_zipfile_serialization=zipped)
        whole = (folder / "pytorch_model.bin").read_bytes()
        for length in [*range(0, len(whole), 7), len(whole) - 1]:
            (folder / "pytorch_model.bin").write_bytes(whole[:length])
            refusal(folder)


def rezip(folder, change, method=zipfile.ZIP_STORED):
    """Write the archive again with other records."""
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in change(records).items():
            archive.writestr(name, content)
    return folder


def top(records, name):
    return f"{next(iter(records)).split('/')[0]}/{name}"


def test_an_archive_that_another_program_has_written_again(folder):
    state = all_kinds()
    assert_holds(
        Checkpoint.open(rezip(put(folder, state), lambda records: records), allow_pickle=True), state
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda old: {**old, top(old, "byteorder"): b"big"}, "is big-endian"),
        (lambda old: {**old, top(old, "constants.pkl"): b""}, "TorchScript"),
        (
            lambda old: {name: part for name, part in old.items() if "data.pkl" not in name},
            "lacks its record",
        ),
        (lambda old: {name: part for name, part in old.items() if "data/0" not in name}, "lacks its record"),
        (
            lambda old: {**old, top(old, "data/0"): b"short"},
            "holds 5 bytes of the storage 0 where its 64 elements need 256",
        ),
        (lambda old: {**old, top(old, "data/0"): bytes(260)}, "holds 260 bytes of the storage 0"),
        (lambda old: {}, "lacks its record"),
    ],
)
def test_archives_that_are_not_whole(folder, change, said):
    put(folder, {"w": torch.randn(64)})
    if not change({"a/b": b""}):
        (folder / "pytorch_model.bin").write_bytes(b"PK\x05\x06" + bytes(18))
        assert "no file that torch.save wrote" in refusal(folder) or "cannot be read" in refusal(folder)
    else:
        assert said in refusal(rezip(folder, change))


def test_a_compressed_archive(folder):
    put(folder, {"w": torch.zeros(640)})
    assert "is compressed" in refusal(rezip(folder, lambda records: records, zipfile.ZIP_DEFLATED))


def test_a_record_that_stands_twice(folder):
    put(folder, {"w": torch.randn(4)})
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(folder / "pytorch_model.bin", "a") as archive,
    ):
        archive.writestr(archive.namelist()[0], b"another")
    assert "twice" in refusal(folder)


def test_records_that_differ_in_case_alone_are_one_name_for_torch(folder):
    put(folder, {"w": torch.ones(3)})
    rezip(folder, lambda records: {**records, **{name.upper(): b"x" for name in [*records][:1]}})
    assert "twice" in refusal(folder)


def directory_of(raw: bytes) -> tuple[int, int]:
    """Start and bytes of a zip's directory."""
    size, start = struct.unpack_from("<2L", raw, len(raw) - 10)
    return start, size


def test_two_directories_that_disagree_are_refused(folder):
    """Of an archive with two directories, torch and zipfile would not read the same one."""
    put(folder, {"w": torch.ones(3)})
    raw = (folder / "pytorch_model.bin").read_bytes()
    start, size = directory_of(raw)
    other = raw[start : start + size].replace(b"data/0", b"data/1")
    count = struct.unpack_from("<H", raw, len(raw) - 12)[0]
    for second in (start, start + size):
        wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, second)
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + 2 * size, 1)
        end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, size, start, 0)
        written = raw[: start + size] + other + wide + locator + end
        (folder / "pytorch_model.bin").write_bytes(written)
        assert "zip directory is broken" in refusal(folder)


@pytest.mark.parametrize("place", [6, 8, 10, 20, 38, 40])
def test_a_record_whose_own_header_says_otherwise_is_refused(folder, place):
    """At 8 is its method, from 30 on its name; flags, time, packed size and version say nothing new."""
    put(folder, {"w": torch.ones(3)})
    file = folder / "pytorch_model.bin"
    raw = bytearray(file.read_bytes())
    name = raw.find(b"pytorch_model/data/0")
    raw[name - 30 + place] ^= 1
    file.write_bytes(bytes(raw))
    if place in (8, 38, 40):
        assert "broken" in refusal(folder)
    else:
        assert [*Checkpoint.open(folder, allow_pickle=True).tensors] == ["w"]


@pytest.mark.parametrize("flag", [0x1, 0x40, 0x2000])
def test_an_encrypted_record_is_refused(folder, flag):
    put(folder, {"w": torch.ones(3)})
    file = folder / "pytorch_model.bin"
    raw = bytearray(file.read_bytes())
    entry = raw.rfind(b"pytorch_model/data/0") - 46
    struct.pack_into("<H", raw, entry + 8, flag)
    file.write_bytes(bytes(raw))
    assert "compressed" in refusal(folder)


def test_an_archive_beyond_four_gigabytes(folder):
    """The 64-bit fields of a zip, in a sparse file with a hole before the second storage."""
    put(folder, {"w": torch.arange(4.0), "v": torch.arange(3.0)})
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        records = {info.filename: archive.read(info) for info in infos}
    hole = 5 << 30
    with path.open("wb") as stream:
        directory = b""
        for name, content in records.items():
            if name.endswith("data/1"):
                stream.seek(hole)
            start = stream.tell()
            stream.write(
                struct.pack(
                    "<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, len(content), len(content), len(name), 0
                )
            )
            stream.write(name.encode() + content)
            wide = start >= 1 << 32
            extra = struct.pack("<2HQ", 1, 8, start) if wide else b""
            directory += struct.pack(
                "<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, 0, len(content), len(content), len(name),
                len(extra), 0, 0, 0, 0, 0xFFFFFFFF if wide else start,
            )  # fmt: skip
            directory += name.encode() + extra
        place = stream.tell()
        stream.write(directory)
        end = stream.tell()
        count = len(records)
        stream.write(
            struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), place)
        )
        stream.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        stream.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), 0xFFFFFFFF, 0))
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert_holds(checkpoint, {"w": torch.arange(4.0), "v": torch.arange(3.0)})
    assert checkpoint.tensors["v"].offset > hole
    assert {name: raw(tensor) for name, tensor in torch.load(path, mmap=True).items()}  # torch agrees


def test_a_web_page_instead_of_weights(folder):
    (folder / "pytorch_model.bin").write_text("<!DOCTYPE html><html>404</html>")
    refusal(folder)


def test_an_old_file_of_a_big_endian_machine(folder):
    put(folder, {"w": torch.ones(1)}, _use_new_zipfile_serialization=False)
    path = folder / "pytorch_model.bin"
    content = path.read_bytes()
    place = content.index(b"little_endian") + len(b"little_endian")
    flag = content.index(b"\x88", place)
    path.write_bytes(content[:flag] + b"\x89" + content[flag + 1 :])
    assert "big-endian" in refusal(folder)


def test_one_shard_is_not_a_model(folder):
    put(folder, {"w": torch.ones(1)}, "pytorch_model-00001-of-00002.bin")
    assert "one of several files" in refusal(folder)
    assert "one of several files" in refusal(folder / "pytorch_model-00001-of-00002.bin")


def test_an_index_of_pickles_is_checked_like_any_other(folder):
    put(folder, {"w": torch.ones(1)}, "a.bin")
    index = folder / "pytorch_model.bin.index.json"
    for weight_map, said in [
        ({"w": "a.bin", "v": "b.bin"}, "lacks 1 of 2 weight files (first: b.bin)"),
        ({"w": "../a.bin"}, "outside its folder"),
        ({"w": "a.bin", "v": "a.bin"}, "names 1 tensors that no file holds (first: v)"),
        ({}, "cannot be read"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert said in refusal(folder)
    put(folder, {"w": torch.ones(1)}, "b.bin")
    index.write_text(json.dumps({"weight_map": {"w": "a.bin", "v": "b.bin"}}))
    assert "holds w twice, in a.bin and b.bin" in refusal(folder)
    index.write_text('{"weight_map": {"w": "a.bin", "w": "b.bin"}}')
    assert "names 'w' twice" in refusal(folder)


def test_links_in_a_circle(tmp_path, folder):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert "leads nowhere, or in a circle" in refusal(tmp_path / "circle")
    (folder / "pytorch_model.bin").symlink_to(folder / "pytorch_model.bin")
    assert "holds no weights" in refusal(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")
    put(folder, {"w": torch.ones(1)}, "x.pt")
    assert "cannot be read" in refusal(folder)


def test_a_pipe_does_not_make_us_wait(folder):
    os.mkfifo(folder / "pytorch_model.bin")
    assert "is a pipe or a device" in refusal(folder)
    (folder / "pytorch_model.bin").unlink()
    put(folder, {"w": torch.ones(1)}, "x.pt")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "is a pipe or a device" in refusal(folder)


# The process that reads pickles


def with_pickle(folder, content):
    """Put another pickle in the place of an archive's own."""
    put(folder, {"w": torch.ones(2)})
    return rezip(folder, lambda old: {**old, top(old, "data.pkl"): content})


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 255, 65536, -(2**31), 2**70, -(2**70), "text", "ü" * 300, "", (), [], {}, (1,),
        (1, 2), (1, 2, 3), (1, 2, 3, 4), [1, [2, []]], {"a": {"b": 1}, (1, "x"): 2}, ["same"] * 3,
        "\ud800", {"": None, 3: [True]},
    ],
)  # fmt: skip
def test_plain_values_of_every_protocol_are_read_to_their_end(folder, protocol, value):
    content = pickle.dumps({"beside": value}, protocol)
    assert "holds no tensors" in refusal(with_pickle(folder, content + b"rest"))
    if protocol > 1:
        put(folder, {"w": torch.ones(1), "beside": value}, pickle_protocol=protocol)
        assert_holds(Checkpoint.open(folder, allow_pickle=True), {"w": torch.ones(1)})


def test_keys_that_are_left_out_are_named(folder):
    keys = ["text", "ü" * 300, "a\nb", 2**70, True, (1, 2)]
    put(folder, {"model": {"w": torch.ones(1)}} | dict.fromkeys(keys))
    (note,) = Checkpoint.open(folder, allow_pickle=True).notes
    assert note.endswith(f"left out text, {'ü' * 200}…, 'a\\nb', {2**70}, True")


def unread(folder, content) -> str:
    """What is said of a pickle that cannot be read, and that it is said soon."""
    with_pickle(folder, content)
    started = time.monotonic()
    said = refusal(folder)
    assert time.monotonic() - started < 60
    assert len(said.replace(str(folder), "")) < 500
    return said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # text of 2**63 bytes
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytearray
        b"X\xff\xff\xff\xffabc.",
        b"\x8b\xff\xff\xff\x7f.",
        b"0.",
        b"1.",
        b"(.",
        b"t.",
        b"\x85.",
        b"N\x87.",
        b"]a.",
        b"}(Nu.",
        b"h\x00.",
        b"q\x00.",
        b"NR.",
        b"NNR.",
        b"N)\x81.",
        b"NN\x93.",
        b"cos\nsystem\n.",
        b"cos\nsystem",
        b"c\xff\n\xff\n.",
        b"(ios\nsystem\n.",
        b"Pabc\n.",
        b"NQ.",
        b"\x82\x01.",
        b"\xff",
        b"}(]Nu.",  # a list as a key
        b"\x8c\x11collections.abc.x\x8c\x01y\x93.",
        b"ctorch\nload\n.",
        b"cbuiltins\ngetattr\n.",
        b"cnumpy\ndtype\n.",
        b"ccollections\nOrderedDict.__init__.__globals__\n.",
        b"ctorch\nSize\n(tR\x94\x8c\x01a\x93.",
        b"ctorch\nTensor\n)R}\x8c\x04argsNsb}\x8c\x05shapeN\x86b.",
    ],
)
def test_broken_or_hostile_pickles(folder, content):
    assert "cannot be read" in unread(folder, content) or content.startswith(b"ctorch\nTensor")


def test_nothing_is_changed_after_it_was_made(folder):
    """A tensor's shape, a storage's length and a dtype's code stay what their calls said; torch refuses."""
    state = b"}(" + word("place") + b"N" + word("count") + b"K\x02" + word("code") + b"X\x03\0\0\0I32ub"
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00)))N" + b"tR"
    for made in (view, STORAGE, b"ctorch\nFloatStorage\n"):
        assert "after it was made" in unread(folder, made + state + b".")


def test_attributes_of_a_dictionary_hide_none_of_its_entries(folder):
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x02\x85K\x01\x85\x89NtR"
    hidden = b"".join(word(name) + b"ctorch\nSize\ns" for name in ("items", "values", "get", "keys"))
    inner = b"ccollections\nOrderedDict\n)R" + word("w") + view + b"s}" + hidden + b"b"
    for content in (inner, b"ccollections\nOrderedDict\n)R" + word("model") + inner + b"s}" + hidden + b"b"):
        with_pickle(folder, b"\x80\x02" + content + b".")
        assert_holds(Checkpoint.open(folder, allow_pickle=True), {"w": torch.ones(2)})


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


TWICE = b"N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # a tuple of 2**60 parts, in 300 bytes
NUMBERS = b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(25_000))

STORAGE = b"(" + word("storage") + b"ctorch\nFloatStorage\n" + word("0") + word("cpu") + b"K\x02tQ"
ONCE_MORE = b"h\x01h\x00\x85R"  # calls what lies at place 1 with what lies at place 0

BOMBS = {
    "lists copied": b"](" + b"(" + b"N" * 200_000 + b"lq\x000ctorch\nSize\nq\x010" + ONCE_MORE * 60_000,
    "dicts copied": b"](](" + NUMBERS + b"eq\x000ccollections\nOrderedDict\nq\x010" + ONCE_MORE * 20_000,
    "hashed": b"}((" + b"N" * 300_000 + b"tq\x00N" + b"h\x00N" * 100_000 + b"u.",
    "doubled key": b"}" + TWICE + b"Ns.",
    "tower as a key": b"}" + b")" + b"\x85" * 300_000 + b"Ns.",
    "texts": b"](" + word("z" * 100_000) + b"q\x00" + b"h\x00" * 400_000 + b"e.",
    "views": b"](" + STORAGE + b"q\x000ctorch._utils\n_rebuild_tensor_v2\n(h\x00" + word("z" * 9) + TWICE,
    "marks": b"(" * 400_000,
    "one of a class": b"ctorch\nTensor\n)\x81]q\x00" + b"(h\x00e" * 300_000 + b"Q.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_takes_its_own_process_and_no_other(folder, bomb):
    said = unread(folder, BOMBS[bomb])
    assert ("holds no state dict" if bomb == "texts" else "cannot be read") in said


@pytest.mark.parametrize(
    "content",
    [
        b"N" + b"\x85" * 300_000 + b".",
        b"]" * 300_000 + b"a" * 299_999 + b".",
        b"}cbuiltins\ncomplex\n" + TWICE + b"\x85RNs.",
        TWICE + b".",
        b"Nr\xff\xff\xff\x01.",
    ],
)
def test_what_is_nested_deep_or_shared_is_refused_at_once(folder, content):
    with_pickle(folder, content)
    started = time.monotonic()
    refusal(folder)
    assert time.monotonic() - started < 20


def test_a_structure_that_holds_itself(folder):
    loop: dict = {"w": torch.ones(1), "self": []}
    loop["self"].append(loop)
    assert "no plain state dict" in refusal(put(folder, loop))
    loop = {"w": torch.ones(1), "self": []}
    loop["self"].append(loop["self"])
    assert_holds(Checkpoint.open(put(folder, loop), allow_pickle=True), {"w": torch.ones(1)})


def test_the_buffer_of_torch_save_itself(folder):
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(3.0)}, buffer)
    (folder / "x.bin").write_bytes(buffer.getvalue())
    assert_holds(Checkpoint.open(folder, allow_pickle=True), {"w": torch.arange(3.0)})
