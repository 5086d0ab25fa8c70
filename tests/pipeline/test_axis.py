"""A comparison along an axis: every value a comparison, one workspace, one picture; the demo's histories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comparing import Heard, tiny_comparison
from palinode.compare import build_comparison, compare_along, load_comparison, plan_axis
from palinode.compare.axis import axis_recipes
from palinode.compare.comparison_recipe import Demo, world_folder
from palinode.errors import OutputError, RecipeError

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "axes").glob("*.toml"))
MSA = {"name": "MSA, one", "method": "msa", "search": {"scales.forget": [1.0, 0.5]}}
TASK = {"name": "task vector", "method": "task_vector", "search": {"scales.forget": [1.0, 0.5]}}
AXIS = {"key": "contestants.MSA, one.set.scales.retain", "values": [0.0, 0.5], "title": "β"}


@pytest.fixture(scope="module")
def content(tiny, tmp_path_factory):
    """Two methods on the tiny world, β of one of them the axis, as plain values; copy before changing."""
    return tiny_comparison(
        tiny,
        tmp_path_factory.mktemp("axis") / "out",
        tries=2,
        budget={"steps": 8},
        split={"probe_rows": 20},
        measure={"judge": "", "rank_by": "exact_match"},
        axis=AXIS,
        contestants=[MSA, TASK],
    )


@pytest.fixture(scope="module")
def walked(content):
    """The axis, interrupted when its second value begins, then done; what the first call left and said."""
    recipe = build_comparison(content)
    with pytest.raises(KeyboardInterrupt):
        compare_along(recipe, listener=Heard(stop_at="scales.retain = 0.5"))
    partial = json.loads((Path(content["output"]["folder"]) / "axis.json").read_text())
    heard = Heard()
    return partial, compare_along(recipe, listener=heard), heard


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("axis.kay='budget.steps'", "did you mean 'axis.key'"),
        ("axis.values=[1]", "axis.values cannot be used"),
        ("axis.values=[8,8]", "name each value once"),
        ("axis.values=['a/b','c']", "cannot be the name of a folder"),
        ("axis.values=[true,false]", "axis.values"),
        ("axis.key='output.folder'", "output.folder is the same for all values"),
        ("axis.key='budget.stepz'", "unknown key 'budget.stepz'; did you mean 'budget.steps'"),
        ("axis.key='budget.steps'", "axis.key budget.steps at 0.0"),
        ("axis.key='contestants.MSA.set.scales.retain'", "NAME is one of MSA, one, task vector"),
        ("axis.key='contestants.MSA, one.set.training.epochs'", "epochs is the same for all"),
    ],
)
def test_what_is_no_axis_is_refused_in_one_sentence(content, change, message):
    with pytest.raises(RecipeError) as refused:
        axis_recipes(build_comparison(content, [change]))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_recipe_without_an_axis_has_no_values(content):
    with pytest.raises(RecipeError, match=r"has no \[axis\]"):
        plan_axis(build_comparison({key: part for key, part in content.items() if key != "axis"}))


def test_folders_of_something_else_are_refused(content, tmp_path):
    changes = [f'output.folder="{tmp_path}"']
    (tmp_path / "0.5").mkdir()
    assert list(plan_axis(build_comparison(content, changes))["values"]) == ["0.0", "0.5"]
    (tmp_path / "0.5" / "theirs.txt").write_text("x")
    with pytest.raises(OutputError, match=r"holds theirs\.txt"):
        plan_axis(build_comparison(content, changes))
    (tmp_path / "0.5" / "theirs.txt").rename(tmp_path / "mine.txt")
    with pytest.raises(OutputError, match=r"holds mine\.txt"):
        plan_axis(build_comparison(content, changes))


def test_cli_shows_the_plan_of_each_value_and_refuses_in_one_sentence(palinode, tmp_path):
    recipe = next(path for path in RECIPES if path.stem == "exposure_to_final")
    words = ("compare", recipe, "--dry-run", "--output", tmp_path / "out")
    planned = json.loads(palinode(*words, "--json").out)
    assert {plan["rows"]["forget"] for plan in planned["values"].values()} == {150}
    refusal = palinode(*words, "--set", "axis.key='demo.latr_epochs'").refusal
    assert "did you mean 'demo.later_epochs'" in refusal
    assert not (tmp_path / "out").exists()


# The whole


def test_what_an_interrupted_axis_had_is_written_and_values_share_their_trainings(walked, content):
    partial, done, heard = walked
    assert not partial["complete"]
    assert done.table["complete"]
    assert partial["values"] == done.table["values"][:1]
    # β = 0 had the task vector and a forget vector of 8 steps; β = .5 has two vectors of 4, which are new.
    assert heard.trainings() == ["fine-tuning forget", "fine-tuning retain"]
    folder = Path(content["output"]["folder"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "0.0",
        "0.5",
        "axis.json",
        "axis.md",
        "axis.svg",
    ]
    assert (folder.parent / "out.workspace").is_dir()


def test_figures_are_those_of_the_tables(walked, content):
    _, done, _ = walked
    folder = Path(content["output"]["folder"])
    for entry in done.table["values"]:
        table = json.loads((folder / entry["folder"] / "table.json").read_text())
        assert entry["rows"] == {"forget": 15, "retain": 40}
        for one, whole in zip(entry["contestants"], table["contestants"], strict=True):
            recall = whole["summary"]["rows"]["forget"]["exact_match"]
            assert one["forget"] == {name: recall[name] for name in ("value", "low", "high")}
        assert set(entry["models"]) == {"target", "base", "retrained"}
    first, second = (entry["contestants"] for entry in done.table["values"])
    assert first[1] == second[1]  # the task vector has nothing to do with β
    assert [one[0]["scales"][1] for one in (first, second)] == [0.0, 0.5]


def test_the_same_command_again_trains_nothing(walked, content):
    heard = Heard()
    again = compare_along(build_comparison(content), listener=heard)
    assert heard.trainings() == []
    assert again.table["values"] == walked[1].table["values"]


def test_cli_prints_the_figures(walked, palinode, content, tmp_path):
    path = tmp_path / "axis.toml"
    sections = {key: part for key, part in content.items() if key != "contestants"}
    lines = [f"{key} = {_toml(part)}" for key, part in sections.items()]
    lines.append(f"contestants = [{', '.join(map(_toml, content['contestants']))}]")
    path.write_text("\n".join(lines))
    said = palinode("compare", path, "--quiet")
    assert said.code == 0, said.err
    assert "axis.json, axis.md, axis.svg" in said.out
    assert json.loads(palinode("compare", path, "--quiet", "--json").out)["key"] == AXIS["key"]


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(part)}" for key, part in value.items()) + " }"
    return json.dumps(value)


# The recipes of the repository


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_axes_can_be_walked_in_one_workspace(path):
    recipe = load_comparison(path)
    found = axis_recipes(recipe)
    assert len(found) == len(recipe.comparison.axis.values)
    assert {str(one.workspace) for one in found.values()} == {"palinode-axes.workspace"}


def test_worlds_of_equal_histories_have_one_folder(tmp_path):
    usual = world_folder(Demo(), tmp_path, seed=0)
    assert world_folder(Demo(base="during", exposures=1, between_epochs=0), tmp_path, seed=0) == usual
    others = [Demo(exposures=2), Demo(between_epochs=5), Demo(later_epochs=30)]
    assert len({usual, *(world_folder(one, tmp_path, seed=0) for one in others)}) == 4
    assert usual.name == "world-76c5ffcadfc4"  # as it was before there were more keys
