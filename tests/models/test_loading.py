"""Loading: whole models only, and one sentence where something is missing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig

from palinode import Checkpoint
from palinode.errors import CheckpointError, InputError
from palinode.models import load_model, load_tokenizer, pad_token, pick_device

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny base that may be damaged."""
    return shutil.copytree(tiny.base.folder, tmp_path / "model")


def change_config(folder, **changes):
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(Checkpoint.open(folder), device=CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_model_is_ready_for_use_in_float32(tiny):
    model = load_model(tiny.base, device=CPU)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_model_can_be_loaded_in_another_dtype(tiny):
    assert load_model(tiny.base, device=CPU, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_config_that_asks_for_flash_attention_needs_no_such_package(folder):
    change_config(folder, attn_implementation="flash_attention_2")
    assert load_model(Checkpoint.open(folder), device=CPU).config._attn_implementation == "sdpa"


def test_architecture_without_sdpa_is_loaded_with_what_it_has(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50)
    ).save_pretrained(tmp_path)
    assert load_model(Checkpoint.open(tmp_path), device=CPU).config._attn_implementation == "eager"


def test_masked_language_model_is_refused(folder):
    change_config(folder, architectures=["BertForMaskedLM"])
    assert "is a BertForMaskedLM, not a causal language model" in refusal(folder)


def test_config_without_architectures_is_given_a_try(folder):
    change_config(folder, architectures=None)
    load_model(Checkpoint.open(folder), device=CPU)


def test_unknown_architecture_is_refused(folder):
    change_config(folder, model_type="nonsense")
    assert "cannot be loaded as a causal language model" in refusal(folder)


def test_missing_weights_are_refused_and_not_made_up(folder):
    change_config(folder, num_hidden_layers=3)
    assert "lacks 9 weights that its config asks for (first: model.layers.2.input_layernorm" in refusal(
        folder
    )


def test_weights_that_the_config_leaves_out_are_refused_and_not_dropped(folder):
    change_config(folder, num_hidden_layers=1)
    assert "holds 9 weights that its config makes no use of (first: model.layers.1." in refusal(folder)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_that_the_config_leaves_out_are_refused_unless_they_are_zeros(folder, value):
    file, name = folder / "model.safetensors", "model.layers.0.self_attn.q_proj.bias"
    state = load_file(file)
    extra = {name: torch.full(state[name.replace("bias", "weight")].shape[:1], value)}
    save_file({**state, **extra}, file, metadata={"format": "pt"})
    if value:
        assert f"holds 1 weights that its config makes no use of (first: {name})" in refusal(folder)
    else:
        load_model(Checkpoint.open(folder), device=CPU)


def test_buffers_of_old_checkpoints_are_no_weights(folder):
    file = folder / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**load_file(file), **buffer}, file, metadata={"format": "pt"})
    load_model(Checkpoint.open(folder), device=CPU)


def test_weights_of_another_shape_are_refused(folder):
    change_config(folder, intermediate_size=64)
    assert "(its weights have other shapes than its config asks for)" in refusal(folder)


@pytest.mark.parametrize("value", ["wide", -3, 0, 31])
def test_config_that_makes_no_sense_is_refused_in_one_sentence(folder, value):
    change_config(folder, hidden_size=value)
    assert str(folder) in refusal(folder)


def test_folder_without_a_tokenizer_is_refused(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer that can be loaded .*; copy the tokenizer files"
    ):
        load_tokenizer(Checkpoint.open(folder))


def test_a_tokenizer_whose_settings_fail_when_it_reads_is_refused(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": "x"}))
    with pytest.raises(CheckpointError, match=r"has no tokenizer that can be loaded \(TypeError\)"):
        load_tokenizer(Checkpoint.open(folder))


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer"])
def test_a_tokenizer_whose_vocabulary_is_missing_is_refused(folder, kind):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "eos_token": "<eos>"}))
    with pytest.raises(CheckpointError, match=r"has no tokenizer that can be loaded .* copy the tokenizer"):
        load_tokenizer(Checkpoint.open(folder))


def test_a_config_that_wants_tuples_makes_no_difference(folder, tiny):
    change_config(folder, return_dict=False)
    ids = torch.tensor([[3, 4, 5]])
    logits = [load_model(one, device=CPU)(ids).logits for one in (tiny.base, Checkpoint.open(folder))]
    assert torch.equal(*logits)


def test_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="has no tokenizer that can be loaded"):
        load_tokenizer(Checkpoint.open(folder))


def test_template_of_a_processor_is_the_tokenizers_where_that_has_none(folder):
    place = folder / "chat_template.json"
    place.write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    assert load_tokenizer(Checkpoint.open(folder)).chat_template == "{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text("its own")
    assert load_tokenizer(Checkpoint.open(folder)).chat_template == "its own"
    (folder / "chat_template.jinja").unlink()
    place.write_text("[]")
    with pytest.raises(CheckpointError, match="holds no text under 'chat_template'"):
        load_tokenizer(Checkpoint.open(folder))


def test_loading_says_nothing(tiny, capfd):
    load_model(tiny.base, device=CPU)
    load_tokenizer(tiny.base)
    assert capfd.readouterr() == ("", "")


def test_padding_is_the_pad_token_else_the_end_token_else_zero(tiny):
    tokenizer = load_tokenizer(tiny.base)
    assert pad_token(tokenizer) == 0
    tokenizer.pad_token = None
    assert pad_token(tokenizer) == 1
    tokenizer.eos_token = None
    assert pad_token(tokenizer) == 0


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "meta", ""])
def test_device_that_cannot_compute_here_is_refused(name):
    with pytest.raises(InputError, match=r"there is no device .* here .*; use cpu or auto"):
        pick_device(name)


def test_device_by_name():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


def test_a_padding_token_beyond_the_embedding_is_replaced_by_one_inside(folder):
    tokenizer = load_tokenizer(Checkpoint.open(folder))
    rows, end = len(tokenizer), tokenizer.eos_token_id
    tokenizer.add_special_tokens({"pad_token": "<late>"})
    tokenizer.save_pretrained(folder)
    late = load_tokenizer(Checkpoint.open(folder))
    assert late.pad_token_id == rows
    assert pad_token(late) == end
    change_config(folder, vocab_size=end)
    assert pad_token(load_tokenizer(Checkpoint.open(folder))) == 0


def test_a_word_beyond_the_embedding_is_refused_by_name(folder, palinode, tiny, tmp_path):
    tokenizer = load_tokenizer(Checkpoint.open(folder))
    rows = len(tokenizer)
    tokenizer.add_tokens(["zyx"])
    tokenizer.save_pretrained(folder)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "who", "answer": "zyx"}\n' * 2)
    told = f"the rows hold the token 'zyx' with the id {rows}, and the model's embedding has {rows} rows"
    for words in (
        ["evaluate", folder, "--data", data],
        ["finetune", "--base", folder, "--data", data, "--output", tmp_path / "out"],
        [
            "unlearn",
            "--target",
            folder,
            "--base",
            tiny.base.folder,
            "--forget",
            data,
            "--output",
            tmp_path / "o",
        ],
        ["audit", folder, "--forget", data, "--against", tiny.base.folder, "--output", tmp_path / "a"],
    ):
        said = palinode(*words, "--device", "cpu")
        assert said.code == 2, words
        assert told in said.err or "'zyx'" in said.err, said.err
    said = palinode("doctor", "--target", folder, "--base", folder, "--forget", data)
    assert "'zyx'" in said.out + said.err
