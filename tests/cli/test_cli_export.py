"""`palinode export`: the recipe it prints or writes, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import save_file

from palinode.weights import Checkpoint
from palinode.weights.checkpoint import mergekit_recipe


@pytest.fixture
def words(tiny):
    """Words that export the tiny world's formula; its retrained model stands for θ_1, its target for θ_2."""
    return [
        "export",
        *("--target", tiny.target.folder),
        *("--base", tiny.base.folder),
        *("--forget-model", tiny.retrained.folder),
        *("--retain-model", tiny.target.folder),
    ]


def test_recipe_goes_to_standard_output_and_holds_the_scales(palinode, words, tiny):
    said = palinode(*words, "--scales", "1.5,0.25")
    assert (said.code, said.err) == (0, "")
    recipe = yaml.safe_load(said.out)
    assert recipe["base_model"] == str(tiny.target.folder)
    # (1 + β) θ_D − α θ_1 + (α − β) θ_0: what θ_D weighs follows from the others
    assert [(entry["model"], entry["parameters"]["weight"]) for entry in recipe["models"]] == [
        (str(tiny.retrained.folder), -1.5),
        (str(tiny.base.folder), 1.25),
    ]


def test_recipe_is_that_of_the_formula(palinode, words, tiny):
    point = tiny.target - 1.0 * (tiny.retrained - tiny.base)
    assert palinode(*words).out == mergekit_recipe(point)
    assert palinode(*words, "--dtype", "float16").out == mergekit_recipe(point, dtype="float16")


def test_output_is_a_file_with_the_same_text_and_nothing_is_printed(palinode, words, tmp_path):
    said = palinode(*words, "--output", tmp_path / "recipe.yaml")
    assert (said.code, said.out, said.err) == (0, "", "")
    assert (tmp_path / "recipe.yaml").read_text() == palinode(*words).out


def test_without_a_retain_scale_the_retain_model_is_never_opened(palinode, words):
    assert palinode(*words[:-1], "no-such-folder").code == 0


def test_recipe_is_plain_letters_whatever_the_folders_are_called(palinode, words, tiny, tmp_path):
    shutil.copytree(tiny.target.folder, tmp_path / "θ_D “é”")
    said = palinode(*words, "--target", tmp_path / "θ_D “é”")
    assert said.out.isascii()
    assert yaml.safe_load(said.out)["base_model"] == str(tmp_path / "θ_D “é”")


# What it refuses


def test_file_that_exists_is_left_alone(palinode, words, tmp_path):
    (tmp_path / "recipe.yaml").write_text("mine")
    assert "recipe.yaml exists" in palinode(*words, "--output", tmp_path / "recipe.yaml").refusal
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_place_that_cannot_be_written_is_refused(palinode, words, tmp_path):
    said = palinode(*words, "--output", tmp_path / "none" / "recipe.yaml").refusal
    assert "or its folder does not; name another file" in said


def test_negative_scale_is_refused(palinode, words):
    assert "must not be negative" in palinode(*words, "--scales", -1).refusal


def test_retain_scale_needs_a_retain_model(palinode, words):
    assert "needs a retain model; name it" in palinode(*words[:-2], "--scales", "1,0.5").refusal


def test_missing_model_is_refused(palinode, words):
    assert palinode(*words, "--base", "no-such-folder").refusal == "there is no model folder no-such-folder"


def test_vector_of_its_own_is_refused(palinode, words, tmp_path):
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    part = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{part}.lora_A.weight": torch.ones(2, 32), f"{part}.lora_B.weight": torch.ones(32, 2)}
    save_file(pair, tmp_path / "adapter" / "adapter_model.safetensors")
    sentence = palinode(*words, "--forget-model", tmp_path / "adapter").refusal
    assert "adapter is a direction of its own (a LoRA adapter or a stored vector)" in sentence


def test_models_that_do_not_fit_together_are_refused(palinode, words, tiny, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny.base.folder, other)
    config = (other / "config.json").read_text()
    assert Checkpoint.open(other).config["num_attention_heads"] != 1
    (other / "config.json").write_text(config.replace('"num_attention_heads": 4', '"num_attention_heads": 1'))
    assert "are not states of one model" in palinode(*words, "--base", other).refusal
