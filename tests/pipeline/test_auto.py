"""The search for the scales on the tiny world: it forgets, keeps, says what it did, goes on when killed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from palinode.data.examples import read_examples
from palinode.data.tokenize import TokenRow
from palinode.errors import DataError
from palinode.models import load_model
from palinode.pipeline import search
from palinode.pipeline.costs import describe, distinct_inputs
from palinode.pipeline.goal import TOLERANCE
from palinode.pipeline.inputs import open_inputs
from palinode.pipeline.run import dry_run, unlearn
from palinode.pipeline.search import belongs_to, layer_groups, range_around
from palinode.training.moments import input_moments

AUTO = {"choose": "auto", "trials": 4}


@pytest.fixture(scope="module")
def searched(recipe_of, tiny, tmp_path_factory):
    """A whole run with searched scales; read it only."""
    folder = tmp_path_factory.mktemp("auto")
    return unlearn(recipe_of(folder / "out", scales=AUTO, data={"holdout": str(tiny.holdout)}))


def workspace_of(done):
    """The searched run's workspace, where another run finds the vectors made."""
    return done.output.with_name("out.workspace")


def probabilities(record, data_set):
    return {name: sets[data_set]["answer_probability"]["value"] for name, sets in record["scores"].items()}


def test_search_forgets_towards_the_yardstick_and_keeps_the_floor(searched):
    forget, retain = (probabilities(searched.record, name) for name in ("forget", "retain"))
    scales = searched.record["scales"]
    wanted = scales["yardstick"]["answer_probability"]["value"]
    assert abs(forget["unlearned"] - wanted) < 0.3 * abs(forget["target"] - wanted)
    (chosen,) = [point for point in scales["points"] if point["chosen"]]
    assert chosen["allowed"]
    assert retain["unlearned"] > 0.8 * retain["target"]


def test_record_says_how_the_scales_came_about(searched):
    scales = searched.record["scales"]
    assert scales["chosen_by"] == "auto"
    assert "the least sum of the distance to the yardstick" in scales["rule"]
    assert scales["yardstick"]["source"] == "holdout"
    assert scales["yardstick"]["unseen_rows"] == 60  # twice the probe rows, of the 450 there are
    chosen = {"forget": scales["forget"], "retain": scales["retain"]}
    assert sum(point["chosen"] for point in scales["points"]) == 1
    assert scales["front"]
    assert chosen not in [
        {"forget": step["forget"], "retain": step["retain"]} for step in scales["sensitivity"]
    ]
    assert scales["sensitivity"]
    assert "never saw the forget set would give it an answer probability of" in (
        (searched.output / "report.md").read_text()
    )


def test_report_holds_the_forgetting_against_the_estimate(searched):
    estimate = searched.record["scales"]["yardstick"]["answer_probability"]["value"]
    assert (
        f"the estimate of a model that never saw it: {estimate:.3f}"
        in (searched.output / "report.md").read_text()
    )
    assert ">estimated yardstick</text>" in (searched.output / "report.html").read_text(encoding="utf-8")


def test_chosen_point_is_the_best_of_those_measured_in_full(searched):
    scales = searched.record["scales"]
    whole = [point for point in scales["points"] if "neutral_probability" in point and point["rows"] == 30]
    allowed = [point for point in whole if point["allowed"]]
    (chosen,) = [point for point in scales["points"] if point["chosen"]]
    least = min(point["objective"] for point in allowed)
    alike = [point for point in allowed if point["objective"] <= least + TOLERANCE]
    near = [point for point in alike if point["distance"] <= scales["yardstick"]["tolerance"]] or alike
    assert chosen in near
    assert chosen["retain_probability"] == max(point["retain_probability"] for point in near)


def test_front_goes_from_near_to_cheap(searched):
    front = searched.record["scales"]["front"]
    distances = [point["distance"] for point in front]
    kept = [point["retain_probability"] for point in front]
    assert distances == sorted(distances)
    assert kept == sorted(kept)


def test_killed_search_goes_on_to_the_same_point(searched, recipe_of, tiny, tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path / "out", scales=AUTO, data={"holdout": str(tiny.holdout)})
    asked = []
    real = search.Trials.tried

    def counted(search, alpha, beta, *, whole=True):
        asked.append((search.filtered and search.filtered.label, alpha, beta))
        if len(asked) == 8:
            raise KeyboardInterrupt
        return real(search, alpha, beta, whole=whole)

    monkeypatch.setattr(search.Trials, "tried", counted)
    with pytest.raises(KeyboardInterrupt):
        unlearn(recipe)
    (kept,) = (tmp_path / "out.workspace").glob("scales-*/probes.json")
    before = json.loads(kept.read_text())
    assert len([name for name in before if "," in name]) == len(set(asked[:7]))
    again = unlearn(recipe)
    assert again.record["scales"] == searched.record["scales"]
    after = json.loads(kept.read_text())
    assert all(after[name].items() >= found.items() for name, found in before.items())


def test_one_given_scale_is_left_as_it_is(searched, recipe_of, tmp_path):
    output = {"folder": str(tmp_path / "out"), "workspace": str(workspace_of(searched))}
    scales = unlearn(recipe_of(tmp_path, scales={**AUTO, "retain": 0.125}, output=output)).record["scales"]
    assert {point["retain"] for point in scales["points"]} == {0.125}
    assert scales["yardstick"]["source"] == "base"
    assert scales["yardstick"]["unseen_rows"] == 0


def test_forget_only_search_has_no_second_side(recipe_of, tmp_path):
    made = unlearn(recipe_of(tmp_path / "out", scales=AUTO, data={"retain": None}))
    scales = made.record["scales"]
    assert {point["retain_probability"] for point in scales["points"]} == {None}
    (nearest,) = scales["front"]
    assert nearest["chosen"]


def test_search_goes_beyond_a_grid_that_forgets_too_little_until_it_is_past(searched, recipe_of, tmp_path):
    output = {"folder": str(tmp_path / "out"), "workspace": str(workspace_of(searched))}
    short = {**AUTO, "forget_grid": [0.1, 0.2], "retain_grid": [0.0]}
    scales = unlearn(recipe_of(tmp_path, scales=short, output=output)).record["scales"]
    assert [point["forget"] for point in scales["points"][:4]] == [0.1, 0.2, 0.3, 0.4]
    assert scales["forget"] > 0.2
    assert scales["kept_rule"]


@pytest.mark.parametrize(
    ("own", "most"),
    [
        ({"forget_grid": [0.2]}, 0.2),
        ({"forget_grid": [2.0, 2.5], "retain_share": 0.01}, 3.0),
        ({"forget_grid": [0.1, 0.2], "retain_grid": [0.0], "retain_share": 1.0}, 0.3),
    ],
    ids=["a single scale", "a grid that is past", "a floor that is missed"],
)
def test_search_stays_within_the_grid_and_the_closer_look(searched, recipe_of, tmp_path, own, most):
    output = {"folder": str(tmp_path / "out"), "workspace": str(workspace_of(searched))}
    made = unlearn(recipe_of(tmp_path, scales={**AUTO, **own}, output=output, filter="none"))
    assert max(point["forget"] for point in made.record["scales"]["points"]) <= most


def test_search_that_reaches_neither_side_warns(searched, recipe_of, tmp_path):
    output = {"folder": str(tmp_path / "out"), "workspace": str(workspace_of(searched))}
    scales = {**AUTO, "forget_grid": [4.0, 5.0], "retain_grid": [0.0], "retain_share": 1.0}
    made = unlearn(recipe_of(tmp_path, scales={**scales, "trials": 2}, output=output))
    assert not made.record["scales"]["kept_rule"]
    assert any(note.startswith("No point tried") for note in made.record["notes"])


def test_plan_says_what_the_search_does(recipe_of, tmp_path):
    lines = describe(dry_run(recipe_of(tmp_path / "out", scales=AUTO, filter="none")))
    assert any("search scales: 6 pairs at a glance, about 8 in full, in memory" in line for line in lines)
    filtered = describe(dry_run(recipe_of(tmp_path / "out", scales=AUTO)))
    assert any("measure what the layers read" in line for line in filtered)
    assert any("filter the vector, 5 times at most" in line for line in filtered)
    assert not any("retain sample" in line for line in filtered)  # no second vector is trained


# An α for each group of layers


def test_groups_are_runs_of_layers_and_hold_every_part_once(tiny):
    assert layer_groups(tiny.target, 2) == [["embedding", "layer 0"], ["layer 1", "rest"]]
    assert layer_groups(tiny.target, 1) == [["embedding", "layer 0", "layer 1", "rest"]]
    assert layer_groups(tiny.target, 4) == layer_groups(tiny.target, 2)  # it has two layers
    assert belongs_to(["layer 1"])("model.layers.1.mlp.up_proj.weight")
    assert not belongs_to(["layer 1"])("model.layers.11.mlp.up_proj.weight")


def test_saved_model_has_each_groups_own_scale(searched, recipe_of, tiny, tmp_path):
    output = {"folder": str(tmp_path / "out"), "workspace": str(workspace_of(searched))}
    plainly = {"data": {"holdout": str(tiny.holdout)}, "filter": "none"}
    first = unlearn(
        recipe_of(
            tmp_path / "first", scales=AUTO, output={**output, "folder": str(tmp_path / "one")}, **plainly
        )
    )
    made = unlearn(recipe_of(tmp_path, scales={**AUTO, "trials": 12, "groups": 2}, output=output, **plainly))
    scales = made.record["scales"]
    (chosen,) = [point for point in scales["points"] if point["chosen"]]
    (plain,) = [point for point in first.record["scales"]["points"] if point["chosen"]]
    assert chosen["objective"] < plain["objective"]  # two factors find something that one α does not
    assert [group["factor"] for group in scales["groups"]] == chosen["groups"]
    (vector,) = workspace_of(searched).glob("finetune-forget-*/model/model.safetensors")
    base, target, theta_1 = (
        load_file(path)
        for path in (*(one.folder / "model.safetensors" for one in (tiny.base, tiny.target)), vector)
    )
    (second,) = workspace_of(searched).glob("finetune-retain-*/model/model.safetensors")
    theta_2, found = load_file(second), load_file(made.output / "model.safetensors")
    for name, value in found.items():
        (factor,) = [one["factor"] for one in scales["groups"] if belongs_to(one["parts"])(name)]
        wanted = target[name] - scales["forget"] * factor * (theta_1[name] - base[name])
        wanted += scales["retain"] * (theta_2[name] - base[name])
        assert torch.allclose(value, wanted, atol=1e-6), name


# Where the unseen rows come from


def unseen_of(recipe):
    rows = open_inputs(recipe).rows
    return rows.unseen_source, rows.unseen


def test_rows_that_prepare_leaves_are_unseen(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path / "out", models={"target": None}, prepare={"retain_rows": 100})
    source, unseen = unseen_of(recipe)
    seen = {example.key for example in open_inputs(recipe).rows.retain}
    assert source == "prepared"
    assert len(unseen) > 0
    assert not any(example.key in seen for example in unseen)


def test_paraphrases_serve_where_there_is_nothing_better(recipe_of, tiny, tmp_path):
    rows = [json.loads(line) for line in tiny.forget.read_text().splitlines()]
    path = tmp_path / "forget.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "paraphrased_answer": "in other words"}) + "\n" for row in rows)
    )
    source, unseen = unseen_of(recipe_of(tmp_path / "out", data={"forget": str(path)}))
    assert source == "paraphrases"
    assert {example.answer for example in unseen} == {"in other words"}


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_holdout_rows_that_were_trained_on_are_refused(recipe_of, tiny, tmp_path, name):
    with pytest.raises(DataError, match=f"rows of the holdout set also stand in the {name} set"):
        open_inputs(recipe_of(tmp_path / "out", data={"holdout": str(getattr(tiny, name))}))


def test_holdout_people_are_strangers_to_the_world(tiny, world):
    subjects = {json.loads(line)["subject"] for line in tiny.holdout.read_text().splitlines()}
    assert not subjects & {fact.subject for fact in world.forget + world.others}
    words = {word for example in read_examples(tiny.holdout) for word in example.prompt.split()}
    assert words <= set(world.vocabulary)


# Small parts


def test_first_look_asks_a_quarter_of_the_rows_evenly_spread_or_all_of_few():
    assert search._few(300) == [4 * place for place in range(75)]
    assert search._few(40) == [int(place * 2.5) for place in range(16)]
    assert search._few(20) == list(range(20))


def test_search_goes_from_the_neighbour_below_to_the_one_above():
    grid = [0.25, 0.5, 1.0, 2.0]
    assert range_around([0.5, 1.0], grid) == (0.25, 2.0)
    assert range_around([0.25], grid) == (0.0, 0.5)
    assert range_around([2.0], grid) == (1.0, 2.0)
    assert range_around([0.7], [0.7]) == (0.7, 0.7)
    assert np.isfinite(range_around([0.0], [0.0, 1.0])).all()


def test_plan_counts_each_input_of_a_block_once(tiny):
    """As many as moments are measured, of the same widths."""
    live = load_model(tiny.target, device=torch.device("cpu"))
    row = TokenRow((1, 2, 3), 1, 0)
    moments = [own for group in input_moments(live, [row], pad_id=0) for own in group.values.items()]
    measured = [len(value) for key, value in moments if value.dim() == 2 and ".layers." in key]
    matrices = [info for info in tiny.target.tensors.values() if len(info.shape) == 2]
    assert sorted(distinct_inputs(matrices)) == sorted(measured)
