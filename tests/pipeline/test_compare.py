"""A comparison: equal points, budgets and rows; one rule; resumed; ranked with noise in mind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from comparing import Heard, tiny_comparison
from palinode.compare.comparing import (
    check_comparison,
    compare,
    divide_comparison,
    open_ground,
    plan_comparison,
)
from palinode.compare.comparison_recipe import (
    Contestant,
    Demo,
    SearchBudget,
    Split,
    build_comparison,
    divide_rows,
    load_comparison,
    rows_for,
    world_folder,
)
from palinode.compare.contest import Ground, draw_points, epochs_for, part_of, recipe_of, steps_an_epoch
from palinode.compare.measuring import Values, make_gauge, rank, values_of
from palinode.data.examples import Example, Message
from palinode.errors import DataError, OutputError, RecipeError
from palinode.pipeline.goal import TOLERANCE, Behaviour
from palinode.pipeline.inputs import open_inputs
from palinode.pipeline.search import Probes
from palinode.pipeline.workspace import Workspace
from palinode.progress import NullListener
from palinode.weights import Checkpoint

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MSA = {"name": "MSA", "method": "msa", "search": {"scales.forget": [1.0, 0.5], "scales.retain": [0.5, 0.0]}}
GRAD_DIFF = {"name": "GradDiff", "method": "grad_diff", "search": {"training.learning_rate": [1e-3, 3e-4]}}


@pytest.fixture(scope="module")
def content(tiny, tmp_path_factory):
    """A comparison of two methods on the tiny world as plain values; copy before changing."""
    content = tiny_comparison(
        tiny,
        tmp_path_factory.mktemp("compare") / "out",
        tries=2,
        budget={"steps": 8},
        split={"probe_rows": 40},
        measure={"rank_by": "exact_match"},
        contestants=[MSA, GRAD_DIFF],
    )
    content["data"]["holdout"] = str(tiny.base.folder.parent / "holdout.jsonl")
    return content


@pytest.fixture(scope="module")
def compared(content):
    """The comparison, interrupted when the second contestant begins to train, then done."""
    recipe = build_comparison(content)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, listener=Heard(stop_at="fine-tuning grad_diff"))
    partial = json.loads((Path(content["output"]["folder"]) / "table.json").read_text())
    heard = Heard()
    return recipe, partial, compare(recipe, listener=heard), heard


# The recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("budgets.steps=3", "did you mean 'budget'"),
        ("split.retain_trane=0.5", "did you mean 'split.retain_train'"),
        ("trainings.epochs=3", "did you mean 'training"),
        ("method='npo'", "method belongs to a contestant"),
        ("scales.forget=1.0", "scales belongs to a contestant"),
        ("budget.seconds=3.0", "one of the two"),
        ("seeds=[1,1]", "different numbers"),
        ("split.retain_train=0.9", "leave no retain rows"),
        ("measure.rank_by='rogue'", "no metric 'rogue'"),
        ("benchmark={name='own', data='.'}", "no benchmark 'own' here"),
        ("world='demo'", "leave [data] out"),
        ("tries=5", "MSA has 4 points to search and tries is 5"),
        ("budget.steps=3", "less than one epoch of MSA, which takes 4 for 2 models"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_sentence(content, change, message):
    with pytest.raises(RecipeError) as refused:
        plan_comparison(build_comparison(content, [change]))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("contestant", "message"),
    [
        ({"name": "x", "method": "mda"}, "no method 'mda'"),
        ({"name": "x", "method": "whp_logits"}, "no method 'whp_logits'"),
        ({"name": "x", "method": "npo", "set": {"training.epochs": 3}}, "epochs is the same for all"),
        ({"name": "x", "method": "npo", "set": {"scales.forget": 1.0}}, "adds no vectors"),
        (
            {
                "name": "x",
                "method": "npo",
                "set": {"training.batch_size": 1},
                "search": {"training.batch_size": [2]},
            },
            "both fixed and searched",
        ),
        ({"name": "x", "method": "npo", "search": {"method_settings.bata": [1.0]}}, "no setting 'bata'"),
        ({"name": "x", "method": "npo", "serach": {}}, "did you mean 'contestants.0.search'"),
        ({**MSA}, "two contestants are called 'MSA'"),
    ],
)  # fmt: skip
def test_contestants_that_cannot_be_are_refused(content, contestant, message):
    changed = {**content, "tries": 1, "contestants": [contestant, MSA]}
    with pytest.raises(RecipeError) as refused:
        plan_comparison(build_comparison(changed))
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["compare_demo.toml", "compare_tofu.toml"])
def test_recipes_in_the_repository_are_fair_and_name_the_methods_of_the_issue(name):
    recipe = load_comparison(RECIPES / name)
    comparison = recipe.comparison
    methods = {"msa", "paired", "task_vector", "grad_diff", "npo", "simnpo", "rmu", "rewind"}
    assert {contestant.method for contestant in comparison.contestants} == methods
    for contestant in comparison.contestants:
        assert len(draw_points(contestant, comparison.tries, seed=comparison.seed)) == comparison.tries


def test_each_method_of_the_same_checkpoint_recipe_has_the_same_points_from_target_and_base():
    recipe = load_comparison(RECIPES / "compare_same_checkpoint.toml")
    points = check_comparison(recipe)
    assert {len(drawn) for drawn in points.values()} == {6}
    named = {contestant.name: contestant for contestant in recipe.comparison.contestants}
    for name in ("NPO", "GradDiff", "SimNPO"):
        both = points[name], points[f"{name} from the base"]
        tried = [[point.settings for point in drawn] for drawn in both]
        assert tried[0] == tried[1]
        assert named[f"{name} from the base"].set["method_settings.start"] == "base"


def test_model_trained_at_the_base_is_probed_as_it_is_saved(content, tiny, tmp_path):
    """The sum in memory, target + change, and the model on disk say the same of the probe rows."""
    contestant = {"name": "NPO", "method": "npo", "set": {"method_settings.start": "base"}}
    changed = {
        **content,
        "tries": 1,
        "contestants": [contestant],
        "output": {"folder": str(tmp_path / "out")},
    }
    recipe = build_comparison(changed)
    table = compare(recipe).table
    (point,) = table["contestants"][0]["points"]
    (made,) = recipe.workspace.glob("apply-*/model")
    ground = open_ground(recipe, Workspace(recipe.workspace), NullListener())
    points = check_comparison(recipe)["NPO"]
    inputs = part_of(ground, recipe.comparison.contestants[0], points, 0).inputs
    found = Probes(inputs, tiny.target, tmp_path / "probes.json").of_point("made", Checkpoint.open(made))
    asked = Behaviour.of(found).probabilities
    assert point["forget_probability"] == pytest.approx(asked["forget"], abs=1e-6)
    assert point["retain_probability"] == pytest.approx(asked["retain"], abs=1e-6)
    assert asked["forget"] != pytest.approx(table["models"]["target"]["probes"]["forget"], abs=1e-3)


def test_demo_recipe_is_planned_before_its_world_is_there():
    planned = plan_comparison(load_comparison(RECIPES / "compare_demo.toml"))
    assert planned["rows"] == {"forget": 150, "forget_test": 75, "retain_train": 885, "retain_test": 443}
    assert {entry["steps"] for entry in planned["contestants"]} == {100}


@pytest.mark.parametrize("path", sorted((RECIPES / "axes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_of_the_axes_can_be_compared_in_one_workspace(path):
    recipe = load_comparison(path)
    assert {entry["points"] for entry in plan_comparison(recipe)["contestants"]} == {4}
    assert str(recipe.workspace) == "palinode-axes.workspace"


def test_worlds_of_equal_histories_have_one_folder(tmp_path):
    usual = world_folder(Demo(), tmp_path, seed=0)
    assert world_folder(Demo(base="during", exposures=1, between_epochs=0), tmp_path, seed=0) == usual
    others = [Demo(exposures=2), Demo(between_epochs=5), Demo(later_epochs=30)]
    assert len({usual, *(world_folder(one, tmp_path, seed=0) for one in others)}) == 4
    assert usual.name == "world-76c5ffcadfc4"  # as it was before there were more keys


# Points and budgets


def test_first_point_has_the_first_values_and_the_others_are_drawn_alike_every_time():
    search = {"method_settings.beta": [0.1, 0.2, 0.3], "training.learning_rate": [1e-5, 1e-4]}
    npo = Contestant(name="NPO", method="npo", search=search)
    points = draw_points(npo, 4, seed=0)
    assert points[0].settings == {"method_settings.beta": 0.1, "training.learning_rate": 1e-5}
    assert points == draw_points(npo, 4, seed=0)
    assert len({point.training for point in points}) == 4
    drawn = {tuple(tuple(point.settings.values()) for point in draw_points(npo, 4, seed=s)) for s in range(5)}
    assert len(drawn) > 1


def test_points_that_differ_in_scales_share_their_training():
    points = draw_points(Contestant.model_validate(MSA), 4, seed=0)
    assert [point.scales for point in points] == [(1.0, 0.5), (1.0, 0.0), (0.5, 0.5), (0.5, 0.0)]
    assert len({point.training for point in points}) == 1


def test_two_models_of_one_method_share_the_steps(content):
    # 30 forget rows in batches of 16 are 2 steps an epoch.
    points = draw_points(Contestant.model_validate(MSA), 1, seed=0)
    recipe = recipe_of(build_comparison(content).content, points[0], {}, epochs=1, seed=0)
    shares = divide_rows(examples(30), examples(100), Split(), most=400, seed=0)
    each = steps_an_epoch(recipe, rows_for(recipe, shares))
    assert each == [2, 2]
    assert epochs_for(SearchBudget(steps=20), each, "MSA") == 5
    assert epochs_for(SearchBudget(steps=20, share="each"), each, "MSA") == 10
    alone = Contestant(name="MSA", method="msa", set={"scales.retain": 0.0})
    recipe = recipe_of(
        build_comparison(content).content, draw_points(alone, 1, seed=0)[0], {}, epochs=1, seed=0
    )
    assert epochs_for(SearchBudget(steps=21), steps_an_epoch(recipe, rows_for(recipe, shares)), "MSA") == 10


# Rows


def examples(count: int) -> list[Example]:
    return [Example(row, "made", "question", (Message("user", f"q{row}"),), "a") for row in range(count)]


def test_rows_are_divided_without_overlap():
    shares = divide_rows(examples(40), examples(100), Split(), most=400, seed=0)
    names = ("forget", "forget_probe", "forget_test", "retain", "retain_probe", "retain_test")
    rows = {name: {one.row for one in getattr(shares, name)} for name in names}
    assert rows["forget_probe"] | rows["forget_test"] == rows["forget"] == set(range(40))
    assert not rows["forget_probe"] & rows["forget_test"]
    parts = [rows[name] for name in ("retain", "retain_probe", "retain_test")]
    assert [len(part) for part in parts] == [50, 25, 25]
    assert set.union(*parts) == set(range(100))


def test_too_few_rows_to_divide_are_refused():
    with pytest.raises(DataError, match="no retain rows to choose on"):
        divide_rows(examples(4), examples(2), Split(), most=10, seed=0)


# Ranking


def constant(forget: list[float], retain: list[float]) -> Values:
    return Values(np.array([forget]), np.array([retain]))


def test_gap_counts_forgetting_too_much_as_forgetting_too_little():
    ideal = constant([0.2] * 8, [0.9] * 8)
    models = {
        "under": constant([0.3] * 8, [0.9] * 8),
        "over": constant([0.1] * 8, [1.0] * 8),  # more than the ideal keeps is no fault
        "costly": constant([0.2] * 8, [0.6] * 8),
    }
    found = {entry["name"]: entry for entry in rank(models, ideal)}
    assert found["under"]["gap"] == pytest.approx(0.1)
    assert found["over"]["gap"] == pytest.approx(0.1)
    assert found["costly"]["gap"] == pytest.approx(0.3)
    assert [entry["name"] for entry in rank(models, ideal)][-1] == "costly"
    assert found["costly"]["within_noise_of"] == []
    assert found["costly"]["differences"]["under"] == pytest.approx({"value": 0.2, "low": 0.2, "high": 0.2})


def test_differences_of_many_rows_alike_are_no_noise_and_those_of_few_are():
    random = np.random.default_rng(0)
    ideal = Values(np.zeros((1, 200)), np.ones((1, 200)))
    shared = random.random((1, 200)) * 0.5
    models = {
        "a": Values(shared, np.ones((1, 200))),
        "b": Values(shared + 0.05, np.ones((1, 200))),  # always worse by the same: pairing sees it
        "c": Values(random.permuted(shared, axis=1) + 0.001, np.ones((1, 200))),
    }
    found = {entry["name"]: entry for entry in rank(models, ideal)}
    assert found["a"]["within_noise_of"] == ["c"]
    assert found["b"]["place"] == 3


def test_spread_over_seeds_is_noise():
    rows = np.ones((1, 50))
    ideal = Values(np.zeros((1, 50)), rows)
    steady = Values(np.array([[0.20] * 50, [0.20] * 50]), np.ones((2, 50)))
    shaky = Values(np.array([[0.00] * 50, [0.44] * 50]), np.ones((2, 50)))
    assert rank({"steady": steady, "shaky": shaky}, ideal)[0]["within_noise_of"] == ["shaky"]


def test_rows_without_a_value_count_nowhere():
    found = values_of([{"forget": [1.0, None], "retain": [0.5]}])
    assert rank({"m": found}, constant([0.0, 0.0], [0.5]))[0]["gap"] == pytest.approx(1.0)
    assert values_of([{"forget": [None], "retain": [0.5]}]) is None


# The whole


def test_interrupted_comparison_had_written_what_it_had(compared):
    _, partial, done, heard = compared
    assert not partial["complete"]
    assert done.table["complete"]
    assert partial["contestants"] == done.table["contestants"][:1]
    assert "fine-tuning forget" not in heard.labels  # MSA was through, and is not trained again
    assert sum("fine-tuning grad_diff" in label for label in heard.labels) == 2


def test_the_same_command_again_trains_and_asks_nothing(compared):
    recipe, _, done, _ = compared
    heard = Heard()
    again = compare(recipe, listener=heard)
    assert not [label for label in heard.labels if "fine-tuning" in label or "likelihoods" in label]
    unstable = {"created", "finished"}
    assert {k: v for k, v in again.table.items() if k not in unstable} == {
        k: v for k, v in done.table.items() if k not in unstable
    }


def test_chosen_points_are_those_of_the_rule(compared):
    table = compared[2].table
    target = table["models"]["target"]["probes"]
    for entry in table["contestants"]:
        points = entry["points"]
        assert len(points) == 2
        allowed = [
            point
            for point in points
            if all(point[f"{name}_probability"] >= 0.9 * target[name] for name in target if name != "forget")
        ]
        (chosen,) = [point for point in points if point["chosen"]]
        assert entry["chosen"]["kept_rule"] == bool(allowed)
        for point in points:
            lost = max(0.0, target["retain"] - point["retain_probability"])
            assert point["objective"] == pytest.approx(point["distance"] + lost)
        if allowed:
            assert chosen in allowed
            assert chosen["objective"] <= min(point["objective"] for point in allowed) + TOLERANCE


def test_every_contestant_spends_the_same_steps_and_says_what_it_cost(compared):
    table = compared[2].table
    assert {entry["cost"]["steps"] for entry in table["contestants"]} == {8}
    for entry in table["contestants"]:
        assert entry["cost"]["tokens"] > 0
        assert entry["cost"]["seconds"] > 0
        peak = entry["cost"]["peak_bytes"]
        assert peak is None or 50e6 < peak < 50e9


def test_scores_are_there_for_every_model_or_say_why_not(compared):
    table = compared[2].table
    summaries = [entry["summary"]["rows"] for entry in (*table["models"].values(), *table["contestants"])]
    assert len(summaries) == 5
    for rows in summaries:
        for name in ("exact_match", "answer_probability"):
            assert rows["forget"][name]["n"] == rows["retain"][name]["n"] - 25 == 15
        assert rows["forget"]["extraction_strength"]["value"] is None  # the world's answers have one token
        assert "the answer has one token" in rows["forget"]["extraction_strength"]["reason"]
        assert rows["forget"]["auc_loss"]["value"] is not None
        assert rows["forget"]["judge_forget_accuracy"]["value"] is not None
        assert "paraphrased" in rows["forget"]["forget_quality"]["reason"] or rows is summaries[2]
    assert "retrained model itself" in summaries[2]["forget"]["forget_quality"]["reason"]
    target, retrained = (table["models"][name]["summary"]["rows"] for name in ("target", "retrained"))
    assert target["forget"]["exact_match"]["value"] > retrained["forget"]["exact_match"]["value"]
    assert target["forget"]["auc_loss"]["value"] > retrained["forget"]["auc_loss"]["value"]


def test_models_that_lost_are_removed_and_chosen_ones_kept(compared):
    recipe = compared[0]
    left = list(recipe.workspace.glob("finetune-*/model"))
    assert left == []
    assert len(list(recipe.workspace.glob("apply-*/model/config.json"))) == 2


def test_pairs_that_differ_in_transforms_only_are_trained_once(content, tmp_path):
    own = {"method_settings.replay_ratio": 1}
    rivals = [
        {"name": "plain", "method": "paired", "set": own, "search": {"scales.forget": [1.0]}},
        {"name": "projected", "method": "paired", "search": {"scales.forget": [2.0]}},
    ]
    rivals[1]["set"] = {**own, "transforms": [{"name": "projection"}]}
    changed = {**content, "tries": 1, "contestants": rivals, "output": {"folder": str(tmp_path / "out")}}
    heard = Heard()
    compare(build_comparison(changed | {"keep_models": False}), listener=heard)
    assert sorted(heard.trainings()) == ["fine-tuning control", "fine-tuning exposed"]


def test_report_ranks_in_words_and_holds_no_row(compared, content):
    folder = Path(content["output"]["folder"])
    report, table = (folder / "report.md").read_text(), (folder / "table.json").read_text()
    assert "Nearest to the ideal is " in report
    assert "| MSA |" in report
    answer = json.loads(Path(content["data"]["forget"]).read_text().splitlines()[0])["prompt"]
    assert answer not in report + table
    assert (folder / "tradeoff.svg").read_text().count('class="mark"') == 2 * (2 + 3) + 2  # and the key


def test_rows_that_preparation_left_out_are_the_holdout_rows(content):
    import copy

    prepared = copy.deepcopy(content) | {"prepare": {"retain_rows": 60}}
    prepared["models"] = {"base": content["models"]["base"]}
    del prepared["data"]["holdout"]
    recipe = build_comparison(prepared)
    inputs = open_inputs(recipe.shared)
    shares = divide_comparison(recipe, inputs.rows.forget, inputs.rows.retain)
    ground = Ground(recipe, inputs, shares, Workspace(recipe.workspace), Heard())
    asked = make_gauge(recipe, shares, ground.left_over).exams[0]
    unseen = {question.example.key for question in asked.sets["holdout"].questions}
    assert len(unseen) == 40  # evaluation.max_rows
    assert not unseen & {example.key for example in [*inputs.rows.forget, *inputs.rows.retain]}
    assert "holdout" not in asked.missing
    assert "holdout" in make_gauge(recipe, shares).exams[0].missing


def test_folder_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match=r"holds mine\.txt"):
        plan_comparison(build_comparison(content, [f'output.folder="{tmp_path}"']))


def test_budget_of_seconds_is_counted_in_the_time_of_one_epoch(content, tmp_path):
    changed = {**content, "tries": 1, "contestants": [GRAD_DIFF], "budget": {"seconds": 1e-6}}
    recipe = build_comparison(changed, [f'output.folder="{tmp_path / "out"}"'])
    with pytest.raises(RecipeError, match=r"1e-06 seconds is less than one epoch of GradDiff, which took \d"):
        compare(recipe)


def test_cli_shows_a_plan_and_refuses_in_one_sentence(palinode, content, tmp_path):
    said = palinode("compare", RECIPES / "compare_demo.toml", "--dry-run", "--output", tmp_path / "out")
    assert said.code == 0
    assert "MSA with retain vector (msa): 6 points in" in said.out
    assert "no recipe" in palinode("compare", tmp_path / "none.toml").refusal
