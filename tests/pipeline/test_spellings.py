"""Whole runs on models whose files have other names than the live one, and refusals before any training."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, Qwen2MoeConfig

from palinode.errors import CheckpointError, MismatchError
from palinode.pipeline.run import dry_run, unlearn

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4}
KINDS = {
    "gpt2 with bare names": GPT2Config(n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1),
    "mixtral": MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4),
    "qwen2-moe": Qwen2MoeConfig(**SMALL, **QWEN, num_key_value_heads=1, num_experts_per_tok=2),
    "mixtral with fused experts": MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4),
}


def write_pair(tiny, place, kind):
    """Target and base of an architecture, a little apart; with the tokenizer of the tiny world."""
    config = KINDS[kind]
    config.vocab_size = tiny.base.config["vocab_size"]
    folders = []
    for seed, name in enumerate(("target", "base")):
        folder = place / name
        shutil.copytree(tiny.base.folder, folder)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * seed * torch.randn_like(parameter)
        model.save_pretrained(folder, save_original_format="fused" not in kind)
        if "bare" in kind:
            rewrite(folder, lambda t: {n.removeprefix("transformer."): v for n, v in t.items()})
        folders.append(folder)
    return folders


def rewrite(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_keeps_the_targets_own_names(tiny, recipe_of, tmp_path, kind):
    target, base = write_pair(tiny, tmp_path, kind)
    recipe = recipe_of(
        tmp_path / "out",
        models={"target": str(target), "base": str(base)},
        training={"epochs": 1},
        scales={"forget_grid": [0.5, 1.0], "retain_grid": [0.0], "probe_rows": 4},
        evaluation={"max_rows": 4},
        output={"keep_unchanged": True},
    )
    done = unlearn(recipe)
    before, after = load_file(target / "model.safetensors"), load_file(done.output / "model.safetensors")
    assert before.keys() == after.keys()
    still = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert [name for name in still if "expert" not in name and "wpe" not in name] == []
    AutoModelForCausalLM.from_pretrained(done.output)
    assert done.record["dose"]["unreached_share"] == 0


def retype(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def spoil_head(folder):
    retype(folder, lambda config: config.update(tie_word_embeddings=True))
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})


def drop_head(folder):
    retype(folder, lambda config: config.update(tie_word_embeddings=False))
    rewrite(folder, lambda t: {name: value for name, value in t.items() if name != "lm_head.weight"})


def pack(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    scale = {"model.layers.0.mlp.up_proj.SCB": torch.ones(8)}
    rewrite(folder, lambda t: t | {name: t[name].to(torch.int8)} | scale)


def spoil_value(folder):
    rewrite(folder, lambda t: t | {"model.norm.weight": t["model.norm.weight"] * float("nan")})


FAULTS = {
    "a tied head beside another embedding": (spoil_head, MismatchError, "holds two different tensors"),
    "no head in the file": (drop_head, CheckpointError, "is incomplete"),
    "packed weights": (pack, CheckpointError, "packed as bitsandbytes int8"),
}


@pytest.mark.parametrize("role", ["target", "base"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_last_step_would_refuse_is_refused_by_plan_and_doctor(
    tiny, recipe_of, tmp_path, palinode, fault, role
):
    spoil, error, words = FAULTS[fault]
    places = {"target": tiny.target.folder, "base": tiny.base.folder}
    for name, folder in places.items():
        places[name] = shutil.copytree(folder, tmp_path / name)
    if fault.startswith("a tied head"):
        retype(places["base"], lambda config: config.update(tie_word_embeddings=True))
        retype(places["target"], lambda config: config.update(tie_word_embeddings=True))
        for folder in places.values():
            rewrite(folder, lambda t: {name: v for name, v in t.items() if name != "lm_head.weight"})
    spoil(places[role])
    recipe = recipe_of(tmp_path / "out", models={name: str(place) for name, place in places.items()})
    for ask in (dry_run, unlearn):
        with pytest.raises(error, match=words):
            ask(recipe)
    options = [word for name, place in places.items() for word in (f"--{name}", place)]
    said = palinode("doctor", *options, "--forget", tiny.forget, "--retain", tiny.retain, "--json", "--quiet")
    assert said.code != 0
    assert any(words in finding["text"] for finding in json.loads(said.out)["findings"])
    assert not (tmp_path / "out.workspace").exists()


def test_values_that_are_not_finite_are_found_before_training(tiny, recipe_of, tmp_path):
    folder = shutil.copytree(tiny.target.folder, tmp_path / "target")
    spoil_value(folder)
    with pytest.raises(CheckpointError, match="NaN"):
        unlearn(recipe_of(tmp_path / "out", models={"target": str(folder)}))
    assert not (tmp_path / "out.workspace").exists()
