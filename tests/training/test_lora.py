"""Low-rank training: what is kept is a product, the same on every run, and is all that was trained."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from palinode import Checkpoint, LoraAdapter, TrainingSettings, finetune, read_examples, save
from palinode.errors import InputError, RecipeError
from palinode.jobs import finetune_file
from palinode.methods import METHODS
from palinode.methods.method import Given
from palinode.methods.msa import PAIRED, PairedSettings

GIVEN = {
    "epochs": 2,
    "learning_rate": 1e-2,
    "batch_size": 8,
    "max_length": 64,
    "precision": "float32",
    "warmup_epochs": 0.0,
}
SETTINGS = TrainingSettings.model_validate({**GIVEN, "lora": {"rank": 3}})


def lora(**given) -> TrainingSettings:
    return TrainingSettings.model_validate({**GIVEN, "lora": {"rank": 3, **given}})


@pytest.fixture(scope="module")
def forget(tiny):
    return read_examples(tiny.forget)[:16]


@pytest.fixture(scope="module")
def done(tiny, forget, tmp_path_factory):
    """An adapter on the base's linear layers; read it only."""
    return finetune(tiny.base, forget, tmp_path_factory.mktemp("lora") / "out", SETTINGS, device="cpu")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_vector_is_twice_b_a_of_every_linear_layer_of_the_blocks(done, tiny):
    factors, base = weights(done.saved.folder), load_file(tiny.base.folder / "model.safetensors")
    made = load_file(
        save(done.point, done.saved.folder.with_name("merged")).checkpoint.folder / "model.safetensors"
    )
    modules = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    assert len(modules) == 2 * 7
    changed = {module.removeprefix("base_model.model.") + ".weight": module for module in modules}
    for name, value in base.items():
        expected = value
        if name in changed:
            a, b = (factors[f"{changed[name]}.lora_{part}.weight"].double() for part in "AB")
            assert a.shape[0] == b.shape[1] == 3
            expected = (value.double() + 2 * (b @ a)).float()
            assert not torch.equal(expected, value)
        torch.testing.assert_close(made[name], expected, rtol=0, atol=1e-7)


def test_peft_reads_the_adapter_and_its_own_merged_model_is_ours(done, tiny, tmp_path):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = AutoModelForCausalLM.from_pretrained(tiny.base.folder)
        theirs = PeftModel.from_pretrained(start, done.saved.folder).merge_and_unload().state_dict()
    save(done.point, tmp_path / "merged")
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)


def test_same_seed_gives_the_same_bytes_and_another_seed_others(done, tiny, forget, tmp_path):
    again = finetune(tiny.base, forget, tmp_path / "again", SETTINGS, device="cpu")
    other = finetune(tiny.base, forget, tmp_path / "other", SETTINGS, seed=1, device="cpu")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again.saved.folder / name).read_bytes() == (done.saved.folder / name).read_bytes()
    assert again.saved.fingerprint() == done.saved.fingerprint() != other.saved.fingerprint()
    assert done.curve[-1].loss < done.curve[0].loss


def test_adapter_names_no_place_of_this_machine(done, tiny):
    config = (done.saved.folder / "adapter_config.json").read_text()
    assert str(tiny.base.folder) not in config
    assert json.loads(config)["r"] == 3


def test_no_checkpoint_is_claimed_where_there_is_an_adapter(done):
    assert isinstance(done.saved, LoraAdapter)
    with pytest.raises(InputError, match="no whole model"):
        _ = done.checkpoint


def test_pair_is_the_exact_difference_of_two_products(tiny, forget, tmp_path):
    replay = read_examples(tiny.retain)[:8]
    exposed, control = (
        finetune(tiny.base, run.material, tmp_path / run.name, SETTINGS, device="cpu", loss=run.objective)
        for run in PAIRED.runs(PairedSettings(), Given(forget, sample=replay))
    )
    vector = exposed.point - control.point
    assert vector.terms == {exposed.saved: 1.0, control.saved: -1.0}  # the start is never read
    first, second = (weights(run.saved.folder) for run in (exposed, control))
    made = load_file(save(tiny.target - vector, tmp_path / "out").checkpoint.folder / "model.safetensors")
    target = load_file(tiny.target.folder / "model.safetensors")
    for name in first:
        if not name.endswith("lora_A.weight"):
            continue
        b, tensor = name.replace("lora_A", "lora_B"), name[len("base_model.model.") :].replace(".lora_A", "")
        change = 2 * (first[b].double() @ first[name].double() - second[b].double() @ second[name].double())
        torch.testing.assert_close(made[tensor].double(), target[tensor].double() - change, rtol=0, atol=1e-6)


class Stop:
    """A listener that presses Ctrl-C after so many steps have been counted."""

    def __init__(self, steps: int):
        self.left = steps

    def say(self, text):
        raise AssertionError(text)

    def task(self, label, total, unit):
        return self

    def __enter__(self):
        def advance(_amount):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

        return advance

    def __exit__(self, *_):
        return None


def test_interrupted_run_goes_on_from_a_state_that_holds_the_adapter_alone(tiny, tmp_path):
    given = {**GIVEN, "lora": {"rank": 3}}
    places = (str(tiny.base.folder), str(tiny.forget))
    finetune_file(*places, tmp_path / "whole", given, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        finetune_file(*places, tmp_path / "out", given, device="cpu", listener=Stop(2))
    (state,) = tmp_path.glob(".out.state-*")
    held = FileSystemReader(state).read_metadata().state_dict_metadata
    assert any(name.startswith("model.") for name in held)
    assert all("lora_" in name for name in held if name.startswith(("model.", "optimizer.state.")))
    resumed = finetune_file(*places, tmp_path / "out", given, device="cpu")
    assert len(resumed.curve) == 8
    assert resumed.saved.fingerprint() == LoraAdapter.open(tmp_path / "whole").fingerprint()


def test_targets_and_alpha_decide_what_is_changed_and_how_much(tiny, forget, tmp_path):
    made = finetune(
        tiny.base, forget, tmp_path / "out", lora(alpha=1.5, targets=["q_proj", "mlp.up_proj"]), device="cpu"
    )
    assert len(made.saved.changes) == 4
    assert {change.facts(defaultdict(str))[0] for change in made.saved.changes.values()} == {0.5}
    with pytest.raises(RecipeError, match=r"no linear layer of the blocks has such a name.*q_proj"):
        finetune(tiny.base, forget, tmp_path / "no", lora(targets=["query"]), device="cpu")


def test_frozen_start_in_sixteen_bits_is_trained_beside_in_thirty_two(tiny, forget, tmp_path):
    made = finetune(tiny.base, forget, tmp_path / "out", lora(base="bfloat16"), device="cpu")
    assert {info.dtype for change in made.saved.changes.values() for info in change.infos} == {"F32"}
    assert made.curve[-1].loss < made.curve[0].loss


def test_layers_that_store_their_weights_transposed_move_as_the_live_model_did(tiny, forget, tmp_path):
    """GPT-2's layers are (in, out): the merged model's loss is the trained one's."""
    shutil.copytree(
        tiny.base.folder,
        tmp_path / "base",
        ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json"),
    )
    torch.manual_seed(0)
    words = tiny.base.config["vocab_size"]
    config = GPT2Config(
        vocab_size=words, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    whole = {**GIVEN, "epochs": 5, "batch_size": 16}  # one batch an epoch, of all rows
    settings = TrainingSettings.model_validate({**whole, "lora": {"rank": 3}})
    made = finetune(base, forget, tmp_path / "out", settings, device="cpu")
    assert len(made.saved.changes) == 4
    merged = save(made.point, tmp_path / "merged").checkpoint
    still = TrainingSettings.model_validate({**whole, "learning_rate": 1e-30})
    after = finetune(merged, forget, tmp_path / "after", still, device="cpu").curve[0].loss
    losses = [point.loss for point in made.curve]
    assert after < losses[-1] < losses[0] - 0.05  # one more step was taken after the last loss was read
    assert after > losses[-1] - (losses[-2] - losses[-1])  # a smaller one, as the rate falls


def test_what_is_missing_is_named(tiny, forget, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"needs the package bitsandbytes and a CUDA device"):
        finetune(tiny.base, forget, tmp_path / "out", lora(base="4bit"), device="cpu")
    objective = METHODS["rmu"].objective(METHODS["rmu"].check_settings({"trainable": ".*mlp.*"}), 0)
    with pytest.raises(RecipeError, match="trains only some of the layers"):
        finetune(tiny.base, forget, tmp_path / "out", SETTINGS, device="cpu", loss=objective)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'palinode\[lora\]'"):
        finetune(tiny.base, forget, tmp_path / "out", SETTINGS, device="cpu")
    assert list(tmp_path.iterdir()) == []
