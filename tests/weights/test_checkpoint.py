"""Opening a model folder: what is read, and what is said of folders that cannot be used."""

import json
import shutil
import struct
import tempfile
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from palinode.errors import CheckpointError, PalinodeError
from palinode.weights import Checkpoint
from palinode.weights.folders import require_causal_lm

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def header_of(entries) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(shape=(2,), start=0, stop=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.fixture
def folder(tmp_path):
    """A model folder as it should be: one tensor of two float32 numbers in one file."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(CONFIG))
    put(place, {"w": entry()}, 8)
    return place


def put(folder, entries, data=8, name="model.safetensors"):
    (folder / name).write_bytes(header_of(entries) + bytes(data))


def refusal(folder) -> str:
    """The message with which a folder is refused: one sentence that names it."""
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    assert message[-1] not in ".!", "the command line adds nothing, so neither do we"
    return message


def test_a_whole_folder_opens(folder):
    checkpoint = Checkpoint.open(folder)
    info = checkpoint.tensors["w"]
    assert (info.dtype, info.shape, info.nbytes, info.size) == ("F32", (2,), 8, 2)
    assert checkpoint.config == CONFIG
    assert (checkpoint.parameters, checkpoint.nbytes) == (2, 8)


def test_a_folder_can_be_named_in_several_ways(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder.parent / "link").symlink_to(folder)
    named = [
        Checkpoint.open(place) for place in (folder, str(folder), "model", "./model/", "~/model", "link")
    ]
    assert set(named) == {named[0]}


def test_offsets_and_sizes_agree_with_the_safetensors_library(models):
    tensors = {f"w{i}": models.noise(i, i, 3) for i in range(5)} | {
        "n": torch.arange(3),
        "s": torch.tensor(2.0),
    }
    checkpoint = models.make("several", tensors, shards=2)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, info in checkpoint.tensors.items():
        raw = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
        assert raw == tensors[name].numpy().tobytes()
        assert info.shape == tuple(tensors[name].shape)


# Places


def test_no_such_folder(tmp_path):
    assert "there is no model folder" in refusal(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(folder):
    assert "name the model folder" in refusal(folder / "config.json")


@pytest.mark.parametrize("name", ["~no-such-user-here/model", "x" * 300, "a\0b", "bad name", "../nowhere"])
def test_names_that_cannot_be_opened(name):
    with pytest.raises(CheckpointError):
        Checkpoint.open(name)


def test_a_hub_name_without_network_says_what_to_do():
    with pytest.raises(
        CheckpointError, match="no local folder, and the model hub could not give it"
    ) as error:
        Checkpoint.open("nobody-at-all/no-model@main")
    assert "\n" not in str(error.value)


@pytest.fixture
def hub(monkeypatch, folder):
    """A hub on which this folder is a model; keeps what was asked for."""
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("allow_pickle", [True, False])
def test_no_pickles_are_fetched_from_the_hub_where_there_are_safetensors(hub, folder, allow_pickle):
    assert Checkpoint.open("some/model@v2", allow_pickle=allow_pickle).folder == folder
    [(name, revision, patterns)] = hub
    assert (name, revision) == ("some/model", "v2")
    assert "*.safetensors" in patterns
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in patterns)


def test_pickles_are_fetched_from_the_hub_where_they_are_allowed_and_all_there_is(hub, folder):
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only as pickles"):
        Checkpoint.open("some/model")
    assert len(hub) == 1
    assert Checkpoint.open("some/model", allow_pickle=True).format == "pickle"
    wanted = ["pytorch_model.bin", "pytorch_model.bin.index.json", "x.pt", ".metadata", "__0_0.distcp"]
    for name in [*wanted, "config.json", "tokenizer.json"]:
        assert any(fnmatch(name, pattern) for pattern in hub[-1][2])


# Config


def test_config_missing(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', b"\xff\xfe\x00", "[" * 100_000, "{" + '"a":' * 3 + "}"]
)
def test_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "config.json" in refusal(folder)


def test_number_without_end_is_refused_in_our_words(folder):
    (folder / "config.json").write_text('{"hidden_size": ' + "9" * 5_000 + "}")
    said = refusal(folder)
    assert "it has a number of thousands of digits" in said
    assert "sys." not in said


def test_config_that_is_a_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "cannot be read" in refusal(folder)


def test_quantised_model(folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"bits": 4}}))
    assert "is quantised" in refusal(folder)


def test_lora_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")
    message = refusal(folder)
    assert "give it as a direction (in Python LoraAdapter.open)" in message
    assert "merge it into its base first" in message


@pytest.mark.parametrize("architectures", [["BertForMaskedLM"], ["LlamaModel", "T5EncoderModel"]])
def test_a_model_that_is_no_causal_language_model(folder, architectures):
    (folder / "config.json").write_text(json.dumps({"architectures": architectures}))
    with pytest.raises(CheckpointError, match=f"is a {', '.join(architectures)}, not a causal"):
        require_causal_lm(Checkpoint.open(folder))


@pytest.mark.parametrize(
    "architectures", [["LlamaForCausalLM"], ["GPT2LMHeadModel"], [], None, "LlamaForCausalLM", 3]
)
def test_a_model_that_may_be_a_causal_language_model(folder, architectures):
    (folder / "config.json").write_text(json.dumps({"architectures": architectures}))
    require_causal_lm(Checkpoint.open(folder))


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.module.", "base_model.model."])
def test_names_that_transformers_would_not_find_are_not_run(folder, wrapper):
    plain = load_file(folder / "model.safetensors")
    save_file({f"{wrapper}{name}": value for name, value in plain.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"under names that a wrapper left .{wrapper}"):
        require_causal_lm(Checkpoint.open(folder))


# Which files


@pytest.mark.parametrize(
    ("mark", "way"),
    [
        ("zero_to_fp32.py", "zero_to_fp32"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32"),
        ("latest_checkpointed_iteration.txt", "Megatron's own converter"),
        ("pytorch_model_fsdp_0/.metadata", "did you mean"),
        ("one/adapter_config.json", "did you mean"),
    ],
)
def test_state_of_a_trainer_is_named(folder, mark, way):
    (folder / "model.safetensors").unlink()
    (folder / mark).parent.mkdir(exist_ok=True)
    (folder / mark).touch()
    assert way in refusal(folder)
    assert "download" not in refusal(folder)


def test_no_weights(folder):
    shard = (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    needs = "needs its index, or that name: save the model once with save_pretrained"
    assert refusal(folder).endswith(f"index.json); {shard.name} {needs}")
    shard.unlink()
    assert refusal(folder).endswith("is the download finished?")
    snapshot = folder / "snapshots" / "4d7a"  # the hub cache's own folder of a model
    snapshot.mkdir(parents=True)
    (folder / "config.json").rename(snapshot / "config.json")
    assert refusal(folder).endswith(f"; did you mean {snapshot}?")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pt"])
def test_only_pickles(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    assert "only as pickles" in refusal(folder)


def test_a_dangling_link_as_a_half_finished_download_leaves_it(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blob")
    assert "holds no weights" in refusal(folder)


def sharded(folder, weight_map):
    (folder / "model.safetensors").unlink(missing_ok=True)
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_missing_shard(folder):
    put(folder, {"w": entry()}, name="a.safetensors")
    sharded(folder, {"w": "a.safetensors", "v": "b.safetensors", "u": "c.safetensors"})
    assert "lacks 2 of 3 weight files (first: b.safetensors); finish the download" in refusal(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "3", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000]
)
def test_index_that_cannot_be_read(folder, text):
    sharded(folder, text)
    assert "cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["../model/a.safetensors", "/etc/passwd", "sub/a.safetensors", "./a.safetensors", "..\\a", "a\0b", "a/"],
)
def test_index_that_names_a_file_outside_the_folder(folder, name):
    put(folder, {"w": entry()}, name="a.safetensors")
    sharded(folder, {"w": name})
    assert "a file outside its folder" in refusal(folder)


@pytest.mark.parametrize("name", ["", "..", ".", 3, None, ["a"], {"a": 1}, "\ud800", "x" * 300])
def test_index_that_names_no_file(folder, name):
    sharded(folder, {"w": name})
    refusal(folder)


def test_an_index_that_names_a_tensor_twice(folder):
    put(folder, {"w": entry()}, name="a.safetensors")
    sharded(folder, '{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}')
    assert "names 'w' twice" in refusal(folder)


def test_a_shard_that_is_a_link_to_itself(folder):
    (folder / "a.safetensors").symlink_to(folder / "a.safetensors")
    sharded(folder, {"w": "a.safetensors"})
    assert "lacks 1 of 1 weight files" in refusal(folder)


def test_a_tensor_that_lies_in_two_shards(folder):
    for name in "ab":
        put(folder, {"w": entry()}, name=f"{name}.safetensors")
    sharded(folder, {"w": "a.safetensors", "v": "b.safetensors"})
    assert "holds w twice, in a.safetensors and b.safetensors" in refusal(folder)


def test_a_tensor_that_only_the_index_has(folder):
    put(folder, {"w": entry()}, name="a.safetensors")
    sharded(folder, {"w": "a.safetensors", "gone": "a.safetensors"})
    assert "names 1 tensors that no file holds (first: gone)" in refusal(folder)


def test_one_whole_file_goes_before_an_index_as_in_transformers(models):
    sharded = models.write("old shards", {"w": torch.zeros(3), "v": torch.zeros(1)}, shards=2)
    shutil.copy(models.write("new", {"w": torch.ones(3)}) / "model.safetensors", sharded)
    assert Checkpoint.open(sharded).tensors.keys() == {"w"}


# Damaged files


def test_truncated_at_every_length(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (folder / "model.safetensors").write_bytes(whole[:length])
        assert "fetch it again" in refusal(folder)


def test_longer_than_its_header_says(folder):
    put(folder, {"w": entry()}, 9)
    assert "bytes where its header needs" in refusal(folder)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10_000, 0])
def test_header_of_absurd_length(folder, length):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + raw[8:])
    refusal(folder)


def test_a_web_page_instead_of_weights(folder):
    (folder / "model.safetensors").write_text("<!DOCTYPE html><html>404</html>")
    assert "no safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"[1]",
        b'[["w", 1]]',
        b"3",
        b"null",
        b'"text"',
        b"{",
        b"\xff\xfe",
        b'{"w": 1e999}',
        b"[" * 50_000,
        '{"w": {}}'.encode("utf-16"),
    ],
)
def test_header_that_is_no_json_object(folder, header):
    put(folder, header)
    refusal(folder)


@pytest.mark.parametrize(
    "bad",
    [
        1,
        None,
        [],
        "text",
        {},
        [["dtype", "F32"], ["shape", [2]], ["data_offsets", [0, 8]]],
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "data_offsets": [0, 8]},
        entry(dtype=["F32"]),
        entry(dtype={}),
        entry(dtype=None),
        entry() | {"shape": 2},
        entry() | {"shape": "2"},
        entry() | {"shape": [2.0]},
        entry() | {"shape": [-2]},
        entry() | {"shape": [True, 2]},
        entry() | {"shape": [[2]]},
        entry() | {"data_offsets": [0]},
        entry() | {"data_offsets": [0, 8, 8]},
        entry() | {"data_offsets": [-8, 0]},
        entry() | {"data_offsets": "08"},
        entry() | {"data_offsets": None},
        entry([1] * 40 + [2]),
        entry([2**63]),
        entry([9] * 100_000),
    ],
)
def test_malformed_entry(folder, bad):
    put(folder, {"w": bad})
    assert "the header entry of 'w' is malformed" in refusal(folder)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "C64", "f32", ""])
def test_dtype_that_cannot_be_added(folder, dtype):
    put(folder, {"w": entry(dtype=dtype)})
    assert f"w is stored as {dtype}" in refusal(folder)


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ({"w": entry(), "v": entry(start=4, stop=12)}, 12),  # overlap
        ({"w": entry(), "v": entry()}, 8),  # two tensors on the same bytes
        ({"w": entry(), "v": entry(start=12, stop=20)}, 20),  # a gap
        ({"w": entry(start=8, stop=16)}, 16),  # a gap at the front
        ({"w": entry(start=0, stop=8), "v": entry(start=8, stop=16)}, 8),  # beyond the end
        ({"w": entry(shape=[3])}, 8),
        ({"w": entry(shape=[2**62, 4])}, 8),
        ({"w": entry(start=8, stop=0)}, 8),
        ({"w": entry(shape=[0], start=4, stop=4), "v": entry()}, 8),  # empty, inside another
    ],
)
def test_offsets_that_cannot_be(folder, entries, size):
    put(folder, entries, size)
    refusal(folder)


def test_a_name_that_stands_twice_in_a_header(folder):
    one = json.dumps(entry())
    put(folder, f'{{"w": {one}, "w": {one}}}'.encode())
    assert "names 'w' twice" in refusal(folder)


def test_half_a_surrogate_pair_is_no_name(folder):
    put(folder, b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}")
    assert "malformed" in refusal(folder)


def test_a_folder_in_place_of_the_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refusal(folder)
    put(folder, {"w": entry()}, name="a.safetensors")
    shutil.rmtree(folder / "model.safetensors")
    sharded(folder, {"w": "a.safetensors", "v": "b.safetensors"})
    (folder / "b.safetensors").mkdir()
    refusal(folder)


def test_a_name_with_odd_characters_is_a_name(folder):
    names = ["", " ", "a\nb", "\0", "/etc/passwd", "ü'\"\\", "__metadata", "x" * 1000]
    put(folder, {name: entry([2], 8 * i, 8 * i + 8) for i, name in enumerate(names)}, 8 * len(names))
    assert [*Checkpoint.open(folder).tensors] == names


def test_a_name_with_odd_characters_is_shown_on_one_line(folder):
    for bad in (entry(dtype="F4"), entry([3]), entry(start=4, stop=12)):
        put(folder, {"a\nb" * 500: bad}, 12)
        assert len(refusal(folder)) < 1000


def test_a_model_without_parameters(folder):
    put(folder, {}, 0)
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.parameters, checkpoint.nbytes, checkpoint.tied) == (0, 0, None)


def test_a_scalar(folder):
    put(folder, {"w": entry([], 0, 4)}, 4)
    assert Checkpoint.open(folder).tensors["w"].size == 1


def test_metadata_is_no_tensor(folder):
    put(folder, {"__metadata__": {"format": "pt"}, "w": entry()})
    assert Checkpoint.open(folder).tensors.keys() == {"w"}


def test_empty_tensors_take_no_room_wherever_they_stand(folder):
    put(folder, {"a": entry([0], 0, 0), "w": entry(), "z": entry([3, 0], 8, 8), "y": entry([0], 8, 8)})
    assert Checkpoint.open(folder).tensors.keys() == {"a", "w", "z", "y"}


# Random damage: a file is either refused in one sentence or as good as another, never a traceback

WHOLE = header_of(
    {
        "__metadata__": {"format": "pt"},
        "lm_head.weight": entry([3, 2], 0, 24),
        "model.embed_tokens.weight": entry([3, 2], 24, 36, "BF16"),
        "model.mask": entry([4], 36, 40, "BOOL"),
    }
) + struct.pack("<6f", 1, -2, 0.5, 3, 4, 5) + b"\x80\x3f" * 6 + b"\1\0\1\0"  # fmt: skip
HEADER_END = len(WHOLE) - 40

damage = st.lists(
    st.tuples(
        st.one_of(st.integers(0, HEADER_END - 1), st.integers(0, len(WHOLE) - 1)),
        st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789{}[]",: \\FBU')),
    ),
    max_size=4,
)


def model_at(place: Path, name: str, weights: bytes) -> Path:
    folder = place / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@settings(max_examples=250, deadline=None)
@given(damage, st.one_of(st.just(0), st.integers(-len(WHOLE), 12)))
def test_a_damaged_file_is_refused_or_readable_and_never_a_traceback(flips, growth):
    weights = bytearray(WHOLE)
    for place, byte in flips:
        weights[place] = byte
    weights = weights[:growth] if growth < 0 else weights + bytes(growth)
    with tempfile.TemporaryDirectory() as place, suppress(PalinodeError):
        base = Checkpoint.open(model_at(Path(place), "base", WHOLE))
        folder = model_at(Path(place), "damaged", bytes(weights))
        try:
            damaged = Checkpoint.open(folder)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017 - the success of opening is no failure
            raise
        assert len(damaged.fingerprint()) == 32
        out = Path(place) / "out"
        (damaged - 0.5 * (base - damaged)).save(out)
        found = load_file(out / "model.safetensors")
        assert found.keys() == damaged.tensors.keys()
        assert all(torch.isfinite(tensor).all() for tensor in found.values())


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["config.json", "model.safetensors.index.json"]), st.binary(max_size=40))
)
def test_random_bytes_for_config_or_index_are_refused(contents):
    with tempfile.TemporaryDirectory() as place, suppress(CheckpointError):
        folder = model_at(Path(place), "model", WHOLE)
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        index = {"weight_map": {"lm_head.weight": "a.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        Checkpoint.open(folder)
