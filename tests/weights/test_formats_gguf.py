"""GGUF files: dequantised as their own package does it, and said so."""

import json
import sys

import pytest
import torch
from on_disk import assert_holds, read, tiny_llama, write_config, write_gguf

from palinode.errors import CheckpointError
from palinode.weights import Checkpoint
from palinode.weights.tensors import HeldTensor

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def refusal(location) -> str:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(location)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_an_unquantised_file_is_the_model_itself(tmp_path, model):
    write_gguf(tmp_path / "model.gguf", model)
    checkpoint = Checkpoint.open(tmp_path)
    assert_holds(checkpoint, model.state_dict())
    assert checkpoint.format == "gguf"
    assert {type(info) for info in checkpoint.tensors.values()} == {HeldTensor}
    assert "read as float32 and are held in memory" in checkpoint.notes[0]
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.config["hidden_size"] == 32
    text = json.dumps(checkpoint.config)
    assert "quantization_config" not in text
    assert str(tmp_path) not in text


def test_a_quantised_file_is_dequantised(tmp_path, model, capfd):
    write_gguf(tmp_path / "small.gguf", model, "Q8_0")
    checkpoint = Checkpoint.open(tmp_path / "small.gguf")
    assert capfd.readouterr().err == ""
    assert "dequantised from Q8_0 to float32" in checkpoint.notes[0]
    assert "not the weights it was made from" in checkpoint.notes[0]
    for name, tensor in model.state_dict().items():
        found = torch.frombuffer(bytearray(read(checkpoint.tensors[name])), dtype=torch.float32)
        if tensor.dim() == 1:
            assert torch.equal(found.view_as(tensor), tensor)
            continue
        # quantised row by row in blocks of 32; the reordering of query and key rows keeps rows whole
        code = gguf.GGMLQuantizationType.Q8_0
        expected = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), code), code)
        assert torch.equal(found.view_as(tensor), torch.from_numpy(expected)), name
        assert not torch.equal(found.view_as(tensor), tensor)


def test_a_tied_model_has_no_head_of_its_own(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    write_gguf(tmp_path / "tied.gguf", model)
    checkpoint = Checkpoint.open(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert_holds(checkpoint, state)
    assert checkpoint.tied == ("lm_head.weight", "model.embed_tokens.weight")
    assert checkpoint.find("lm_head.weight") == checkpoint.tensors["model.embed_tokens.weight"]


def test_several_files_must_be_told_apart(tmp_path, model):
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, model)
    assert "holds 2 files that could be its weights (a.gguf, b.gguf, …)" in refusal(tmp_path)
    first, second = (Checkpoint.open(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert first != second
    assert first == Checkpoint.open(tmp_path / "a.gguf")


def test_a_part_of_a_model_is_refused(tmp_path, model):
    write_gguf(tmp_path / "m-00001-of-00002.gguf", model)
    assert "one of several files" in refusal(tmp_path / "m-00001-of-00002.gguf")


def test_other_weights_go_first(tmp_path, model, models):
    folder = models.write("both", {"w": torch.ones(1)})
    write_gguf(folder / "model.gguf", model)
    assert Checkpoint.open(folder).format == "safetensors"


def test_broken_files(tmp_path, model):
    path = write_config(tmp_path / "m") / "m.gguf"
    write_gguf(path, model)
    whole = path.read_bytes()
    for length in (0, 10, 23, 24, 100, 700, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:length])
        assert str(path) in refusal(path)
    path.write_text("<!DOCTYPE html><html>404, page not found</html>")
    assert "no GGUF file" in refusal(path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.block_count", 2**31, "more layers than it has tensors"),
        ("llama.embedding_length", 2**20, "describes a far larger model"),
        ("llama.vocab_size", 2**30, "describes a far larger model"),
        ("llama.feed_forward_length", 2**30, "describes a far larger model"),
    ],
)
def test_a_config_that_asks_for_more_than_the_file_holds(tmp_path, model, key, value, said):
    path = tmp_path / "m.gguf"
    write_gguf(path, model)
    raw = path.read_bytes()
    place = raw.index(key.encode()) + len(key) + 4  # behind the type of the value
    path.write_bytes(raw[:place] + value.to_bytes(4, "little") + raw[place + 4 :])
    assert said in refusal(path)


def test_without_the_package(tmp_path, model, monkeypatch):
    write_gguf(tmp_path / "m.gguf", model)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'palinode[gguf]'" in refusal(tmp_path)
