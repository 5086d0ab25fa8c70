"""Recipes are strict: what is not known is refused, and the nearest known thing is named."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from palinode.data.tokenize import PromptStyle
from palinode.errors import RecipeError
from palinode.jobs import finetune_file
from palinode.pipeline.recipe import build_recipe, checked_settings, known_keys, load_recipe
from palinode.settings import EvaluationSettings

MINIMAL = """
[models]
target = "models/target"
base = "models/base"

[data]
forget = "forget.jsonl"
retain = "retain.jsonl"

[output]
folder = "out"
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def with_(*changes: str, text: str = MINIMAL):
    """The minimal recipe with `key=value` changes, as --set makes them."""
    path = Path("recipe.toml")
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, changes)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(*changes: str, text: str = MINIMAL) -> str:
    with pytest.raises(RecipeError) as caught:
        with_(*changes, text=text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_left_out_has_the_papers_values():
    recipe = with_()
    assert (recipe.method, recipe.seed, recipe.device) == ("msa", 0, "auto")
    assert recipe.training.epochs == 10
    assert (recipe.scales.forget, recipe.scales.retain) == (None, None)
    assert recipe.prompts.style() == PromptStyle("You are a helpful assistant.", "10 Apr 2025", None)


def test_every_section_can_be_set_and_is_kept(write):
    text = MINIMAL.replace("[models]", 'method = "task_vector"\nseed = 7\n[models]') + "\n".join(
        [
            "[training]",
            "learning_rate = 2e-5",
            "[scales]",
            "forget = 0.75",
            "retain = 0",
            "[evaluation]",
            "max_rows = 12",
            "[prompts]",
            'system_prompt = ""',
        ]
    )
    recipe = load_recipe(write(text))
    assert (recipe.method, recipe.seed) == ("task_vector", 7)
    assert recipe.training.learning_rate == 2e-5
    assert (recipe.scales.forget, recipe.scales.retain) == (0.75, 0.0)
    assert recipe.evaluation.max_rows == 12
    assert recipe.prompts.system_prompt == ""


def test_recipes_in_the_repository_are_recipes():
    recipes = Path(__file__).resolve().parents[2] / "recipes"
    runs = [path for path in recipes.glob("*.toml") if "[[contestants]]" not in path.read_text()]
    assert len(runs) >= 3  # comparisons are in test_compare.py
    for path in runs:
        load_recipe(path)


# Unknown keys


@pytest.mark.parametrize(
    ("change", "unknown", "nearest"),
    [
        ("training.learning_rat=1", "training.learning_rat", "training.learning_rate"),
        ("training.lerning_rate=1", "training.lerning_rate", "training.learning_rate"),
        ("trainning.epochs=1", "trainning", "training"),
        ("scales.forget_scale=1", "scales.forget_scale", "scales.forget"),
        ("evaluation.max_new_token=1", "evaluation.max_new_token", "evaluation.max_new_tokens"),
        ("sead=1", "sead", "seed"),
        ("output.foldr=1", "output.foldr", "output.folder"),
        ("prompts.system=1", "prompts.system", "prompts.system_prompt"),
    ],
)
def test_unknown_key_is_refused_and_the_nearest_named(change, unknown, nearest):
    assert refusal(change) == f"the recipe has an unknown key {unknown!r}; did you mean {nearest!r}?"


def test_typing_error_in_a_needed_key_is_named_before_the_key_that_is_missing():
    message = refusal(text=MINIMAL.replace("base =", "bas ="))
    assert message == "the recipe has an unknown key 'models.bas'; did you mean 'models.base'?"


def test_known_keys_are_all_there():
    keys = known_keys()
    assert {"seed", "models.base", "data.columns", "training.epochs", "prepare.retain_rows"} <= set(keys)
    assert len(keys) == len(set(keys))


# Values


@pytest.mark.parametrize("key", ["data.forget", "output.folder"])
def test_needed_key_that_is_missing_is_named(key):
    section, name = key.split(".")
    content = tomllib.loads(MINIMAL)
    del content[section][name]
    with pytest.raises(RecipeError, match=f"^the recipe lacks {key}$"):
        build_recipe(content)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("seed=-1", "seed cannot be used: .* greater than or equal to 0"),
        ("seed=4294967296", "seed cannot be used: .* less than or equal to 4294967295"),
        ("seed=1.5", "seed cannot be used: .* valid integer"),
        ("seed=one", r"seed cannot be used: .* \('one' was given\)"),
        ("seed=true", "seed cannot be used"),
        ("scales.forget=-0.5", "scales.forget cannot be used: .* greater than or equal to 0"),
        ("scales.retain=-1", "scales.retain cannot be used: .* greater than or equal to 0"),
        ("scales.forget=nan", "scales.forget cannot be used: .* finite"),
        ("scales.forget=inf", "scales.forget cannot be used: .* finite"),
        ("scales.forget_grid=[]", "scales.forget_grid cannot be used: .* at least 1 item"),
        ("scales.retain_grid=[0.0, -1.0]", r"scales.retain_grid.1 cannot be used"),
        ("scales.retain_share=1.1", "scales.retain_share cannot be used"),
        ("scales.probe_rows=0", "scales.probe_rows cannot be used"),
        ("training.epochs=0", "training.epochs cannot be used"),
        ("training.learning_rate=fast", r"training.learning_rate cannot be used: .* \('fast' was given\)"),
        ("output.dtype=int8", "output.dtype cannot be used: .*'float32', 'bfloat16' or 'float16'"),
        ("output.rounding=up", "output.rounding cannot be used: .*'auto', 'nearest' or 'stochastic'"),
        ("models=3", "models cannot be used"),
    ],
)
def test_impossible_value_is_refused_with_its_key(change, reason):
    assert re.search(reason, refusal(change))


def test_whole_numbers_are_taken_where_fractions_are_meant():
    recipe = with_("training.learning_rate=1", "scales.forget=2", "scales.forget_grid=[1, 2]")
    assert recipe == with_("training.learning_rate=1.0", "scales.forget=2.0", "scales.forget_grid=[1.0, 2.0]")
    assert isinstance(recipe.training.learning_rate, float)
    assert isinstance(recipe.scales.forget_grid[0], float)


def test_retain_scale_without_retain_rows_is_refused_and_zero_is_not():
    alone = MINIMAL.replace('retain = "retain.jsonl"\n', "")
    assert "a retain scale of 0.5 needs retain rows; name data.retain" in refusal(
        "scales.retain=0.5", text=alone
    )
    assert with_("scales.retain=0", text=alone).scales.retain == 0.0


def test_tilde_is_the_users_home(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    recipe = with_("output.folder=~/out", "output.workspace=~/ws")
    assert (recipe.output.folder, recipe.output.workspace) == ("/somebody/out", "/somebody/ws")


# [prepare]


PREPARED = MINIMAL.replace('target = "models/target"\n', "") + "[prepare]\nretain_rows = 20\n"


def test_target_is_given_or_prepared():
    assert with_(text=PREPARED).prepare.retain_rows == 20
    assert with_().prepare is None
    both = MINIMAL + "[prepare]\nretain_rows = 20\n"
    assert "name models.target, or have it made by [prepare]: one of the two, not both" in refusal(text=both)
    neither = MINIMAL.replace('target = "models/target"\n', "")
    assert "name models.target, or have it made by [prepare]" in refusal(text=neither)


def test_prepare_needs_retain_rows_and_makes_the_retrained_model_itself():
    assert "[prepare] needs data.retain" in refusal(text=PREPARED.replace('retain = "retain.jsonl"\n', ""))
    given = PREPARED.replace("[models]", '[models]\nretrained = "models/retrained"')
    assert "[prepare] makes the retrained model; leave models.retrained out" in refusal(text=given)
    assert "prepare.retain_rows" in refusal("prepare.retain_rows=0", text=PREPARED)


# --set


@pytest.mark.parametrize(
    ("change", "section", "name", "value"),
    [
        ("training.learning_rate=2e-5", "training", "learning_rate", 2e-5),
        ("training.epochs=3", "training", "epochs", 3),
        ("data.allow_overlap=true", "data", "allow_overlap", True),
        ("models.base=other/model@main", "models", "base", "other/model@main"),
        ('models.base="quoted = text"', "models", "base", "quoted = text"),
        ("data.forget=with = sign.jsonl", "data", "forget", "with = sign.jsonl"),
        ("scales.forget_grid=[0.1, 0.2]", "scales", "forget_grid", [0.1, 0.2]),
        ('data.columns={question = "q"}', "data", "columns", {"question": "q"}),
        ("data.columns.question=q", "data", "columns", {"question": "q"}),
        (" output.folder =elsewhere", "output", "folder", "elsewhere"),
        ("models.base=größe/é", "models", "base", "größe/é"),
    ],
)
def test_set_changes_one_key(change, section, name, value):
    assert getattr(getattr(with_(change), section), name) == value


def test_last_of_two_changes_holds():
    assert with_("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("change", ["", "seed", "=3", " = 3", "training.learning_rate"])
def test_set_without_key_and_value_is_refused(change):
    assert f"--set needs key=value, as in training.learning_rate=2e-5, and got {change!r}" in refusal(change)


def test_set_inside_a_value_is_refused():
    assert refusal("models.base.name=x") == "--set models.base.name: base is a value, not a section"


def test_set_adds_no_second_key_by_a_line_break():
    assert with_("seed=1\nmethod='task_vector'").method == "msa"


# Files


def test_missing_recipe_is_one_sentence():
    with pytest.raises(RecipeError, match=r"^there is no recipe nowhere\.toml$"):
        load_recipe(Path("nowhere.toml"))


@pytest.mark.parametrize("content", [b"models = [", b"\xff\xfe", b"seed = 1\nseed = 2\n", b"{}"])
def test_file_that_is_no_toml_is_one_sentence(content):
    Path("recipe.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.toml is not a TOML recipe \(.*\)$"):
        load_recipe(Path("recipe.toml"))


def test_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="is not a TOML recipe"):
        load_recipe(tmp_path)


# The single steps say it in the same words


def test_steps_refuse_unknown_settings_too(tiny, tmp_path):
    with pytest.raises(RecipeError, match=r"unknown key 'epoch'; did you mean"):
        finetune_file(str(tiny.base.folder), str(tiny.forget), tmp_path / "out", {"epoch": 3})
    with pytest.raises(RecipeError, match=r"max_rows cannot be used: .* \(0 was given\)"):
        checked_settings(EvaluationSettings, {"max_rows": 0})
