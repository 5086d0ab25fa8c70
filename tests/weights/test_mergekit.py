"""The recipe for mergekit says what the sum says; and mergekit itself, run on it, finds the same weights."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from palinode.errors import InputError, MismatchError
from palinode.weights import Checkpoint, TensorInfo, WeightedSum
from palinode.weights.checkpoint import StoredDirection, mergekit_recipe

ROOT = Path(__file__).resolve().parents[2]


def place(folder, dtypes=("BF16",), file="model.safetensors"):
    """A checkpoint that need not exist, with one tensor of each dtype."""
    folder = Path(folder)
    names = {f"weight_{place}": code for place, code in enumerate(dtypes)}
    tensors = {name: TensorInfo(name, code, (2,), folder / file, 0, 4) for name, code in names.items()}
    return Checkpoint(folder, tensors, {})


TARGET, BASE, FORGET, RETAIN = (place(f"/models/{name}") for name in ("target", "base", "theta_1", "theta_2"))


def recipe_of(point, **options):
    return yaml.safe_load(mergekit_recipe(point, **options))


def weights_of(recipe):
    """The weight of each model beside the base."""
    return {entry["model"]: entry["parameters"]["weight"] for entry in recipe["models"]}


def path_of(model):
    """What mergekit takes for the place of a model, however it is written."""
    return model["model"]["path"] if isinstance(model, dict) else model


# What the recipe says


def test_recipe_holds_the_paper_formula():
    point = TARGET - 1.5 * (FORGET - BASE) + 0.25 * (RETAIN - BASE)
    assert recipe_of(point) == {
        "merge_method": "task_arithmetic",
        "base_model": "/models/target",
        "models": [
            {"model": "/models/theta_1", "parameters": {"weight": -1.5}},
            {"model": "/models/base", "parameters": {"weight": 1.25}},
            {"model": "/models/theta_2", "parameters": {"weight": 0.25}},
        ],
        "parameters": {"normalize": False, "lambda": 1.0},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def test_vectors_that_start_from_the_target_leave_it_out_of_the_list():
    recipe = recipe_of(TARGET - 2.0 * (FORGET - TARGET))
    assert (recipe["base_model"], weights_of(recipe)) == ("/models/target", {"/models/theta_1": -2.0})


def test_target_that_cancels_is_still_what_the_others_are_compared_with():
    recipe = recipe_of(TARGET - 1.0 * (TARGET - BASE))
    assert (recipe["base_model"], weights_of(recipe)) == ("/models/target", {"/models/base": 1.0})


def test_sum_without_any_change_names_the_target_alone():
    recipe = recipe_of(TARGET - 0.0 * (FORGET - BASE))
    assert (recipe["base_model"], recipe["models"]) == ("/models/target", [{"model": "/models/target"}])


@pytest.mark.parametrize("value", [1e-05, -1e-300, 1e16, 1e22, 123456789.0, 1 / 3, -0.1, 5e-324])
def test_weights_are_numbers_to_a_yaml_reader(value):
    assert weights_of(recipe_of(WeightedSum(TARGET, {TARGET: 1 - value, FORGET: value}))) == {
        "/models/theta_1": value
    }


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_weight_comes_back_bit_for_bit(value):
    (weight,) = weights_of(recipe_of(WeightedSum(TARGET, {FORGET: value}))).values()
    assert type(weight) is float
    assert weight.hex() == value.hex()


@given(st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1))
def test_every_folder_name_comes_back_as_it_is(name):
    folder = Path("/models") / name / "m"
    recipe = recipe_of(place(folder) - 1.0 * (FORGET - BASE))
    assert path_of(recipe["base_model"]) == str(folder)


@pytest.mark.parametrize("name", ["a+b", "a@b", "a+b+c@d"])
def test_marks_that_mergekit_would_read_are_put_in_a_mapping(name):
    recipe = recipe_of(place(f"/models/{name}") - 1.0 * (FORGET - BASE))
    assert recipe["base_model"] == {"model": {"path": f"/models/{name}"}}


def test_model_of_the_hub_is_named_as_the_hub_does():
    found = place("/cache/hub/models--allenai--OLMo-2-0425-1B/snapshots/a1b2c3")
    assert recipe_of(TARGET - 1.0 * (found - BASE))["models"][0]["model"] == "allenai/OLMo-2-0425-1B@a1b2c3"


def test_recipe_says_what_it_is_and_how_to_run_it():
    comment = [
        line for line in mergekit_recipe(TARGET - 1.0 * (FORGET - BASE)).splitlines() if line[0] == "#"
    ]
    text = " ".join(line.removeprefix("#").strip() for line in comment)
    assert "mergekit-yaml THIS_FILE OUTPUT_FOLDER" in text
    assert "compare with what Palinode writes with --rounding nearest. " in text


# Dtypes


def test_dtype_is_that_of_the_output_and_is_named_in_the_comparison():
    text = mergekit_recipe(TARGET - 1.0 * (FORGET - BASE), dtype="float16")
    assert yaml.safe_load(text)["out_dtype"] == "float16"
    assert "--rounding nearest --dtype float16. " in text


@pytest.mark.parametrize(
    ("dtypes", "written"),
    [
        (["F32"], "float32"),
        (["BF16", "F16"], "float32"),
        (["BF16", "F32"], "float32"),
        (["F32", "F64"], "float64"),
    ],
)
def test_target_of_several_dtypes_is_written_in_one_that_holds_them_all(dtypes, written):
    target, forget, base = (place(f"/models/{name}", [*dtypes, "I64"]) for name in "abc")
    text = mergekit_recipe(target - 1.0 * (forget - base))
    assert yaml.safe_load(text)["out_dtype"] == written
    assert (f"--dtype {written}" in text) == (len(dtypes) > 1)


def test_sum_is_in_float64_where_a_term_is():
    recipe = recipe_of(TARGET - 1.0 * (place("/models/double", ["F64"]) - BASE))
    assert (recipe["dtype"], recipe["out_dtype"]) == ("float64", "bfloat16")
    assert recipe_of(TARGET - 1.0 * (FORGET - BASE), dtype="float64")["dtype"] == "float64"


# What cannot be said


def test_term_that_is_no_model_is_refused():
    adapter = StoredDirection(Path("/models/adapter"), {})
    with pytest.raises(InputError, match=r"/models/adapter is a direction of its own \(a LoRA adapter"):
        mergekit_recipe(TARGET - 1.0 * adapter)


def test_format_that_mergekit_does_not_read_is_refused():
    sharded = place("/models/dcp", file="__0_0.distcp")
    with pytest.raises(InputError, match=r"keeps its weights in __0_0\.distcp"):
        mergekit_recipe(TARGET - 1.0 * (sharded - BASE))


def test_models_that_do_not_fit_together_are_refused():
    with pytest.raises(MismatchError, match="weight_1 is missing in /models/theta_1"):
        mergekit_recipe(place("/models/target", ["F32", "F32"]) - 1.0 * (FORGET - BASE))


def test_unknown_dtype_is_refused():
    with pytest.raises(InputError, match="there is no dtype 'int8'"):
        mergekit_recipe(TARGET - 1.0 * (FORGET - BASE), dtype="int8")


# mergekit itself


@pytest.fixture(scope="session")
def mergekit():
    """A function that runs mergekit-yaml on a recipe, from the environment that the benchmark uses."""
    spec = importlib.util.spec_from_file_location("mergekit_env", ROOT / "benchmarks" / "mergekit_env.py")
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    program = tools.make_environment() / "mergekit-yaml"

    def run(recipe, output):
        command = [program, recipe, output, "--no-copy-tokenizer"]
        done = subprocess.run(command, env=tools.offline(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return run


def four_llamas(folder, dtype, *, tied):
    """Four neighbouring states of one tiny Llama, two in folders whose names hold marks to mergekit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model, found = LlamaForCausalLM(config).to(dtype), []
    for name in ("target", "base", "theta+1", "theta@2"):
        model.save_pretrained(folder / name)
        found.append(Checkpoint.open(folder / name))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 2e-3)
    return found


def steps_apart(a, b):
    """Distance of two bfloat16 tensors in units in the last place."""
    ranks = [
        torch.where(bits < 0, -32768 - bits, bits) for bits in (t.view(torch.int16).int() for t in (a, b))
    ]
    return (ranks[0] - ranks[1]).abs()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_mergekit_agrees(mergekit, models, tmp_path, dtype, tied):
    target, base, forget, retain = four_llamas(tmp_path, dtype, tied=tied)
    point = target - 1.5 * (forget - base) + 0.7 * (retain - base)
    (tmp_path / "recipe.yaml").write_text(mergekit_recipe(point), encoding="utf-8")
    mergekit(tmp_path / "recipe.yaml", tmp_path / "theirs")
    point.save(tmp_path / "ours", rounding="nearest")

    ours, theirs = models.read(tmp_path / "ours"), models.read(tmp_path / "theirs")
    before = models.read(target.folder)
    assert ours.keys() == theirs.keys()
    assert all(one.dtype == theirs[name].dtype == dtype for name, one in ours.items())
    assert any(not torch.equal(one, before[name]) for name, one in ours.items())
    pairs = [(one.flatten(), theirs[name].flatten()) for name, one in ours.items()]
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    gap = (a.double() - b.double()).abs()
    print(f"{int((a != b).sum())} of {len(a)} weights differ, by at most {gap.max():.1e}")
    if dtype == torch.float32:
        assert gap.max() <= 1e-6
        return
    # Where the terms cancel to nothing, what float32 leaves of them has no last place to speak of.
    assert ((steps_apart(a, b) <= 1) | (gap < 1e-8)).all()
    assert (a != b).float().mean() < 0.002  # sums that float32 puts on two sides of a tie
