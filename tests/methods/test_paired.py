"""`method = "paired"` through the pipeline: its limits, its second term, what it refuses and records."""

from __future__ import annotations

import json

import pytest
import torch

from palinode import Checkpoint
from palinode.errors import MismatchError, RecipeError
from palinode.models import load_model
from palinode.pipeline.run import dry_run, unlearn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One workspace for the runs of this file, as a user who compares settings would have it."""
    return tmp_path_factory.mktemp("paired-runs")


@pytest.fixture(scope="module")
def run(recipe_of, shared):
    def build(name, method="paired", settings=None, **sections):
        sections.setdefault("scales", {"forget": 1.0})
        recipe = recipe_of(
            shared / name,
            method=method,
            method_settings=settings or {},
            **{"training": {"epochs": 2}, "output": {"workspace": str(shared / "workspace")}, **sections},
        )
        return unlearn(recipe)

    return build


def weights(folder):
    return load_model(Checkpoint.open(folder), device=CPU).state_dict()


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("start", "limit"), [("base", "msa"), ("target", "task_vector")])
def test_without_replay_it_is_msa_from_the_base_and_the_task_vector_from_the_target(start, limit, run):
    ours = run(f"no-replay-{start}", settings={"start": start, "replay_rows": 0}, data={"retain": None})
    theirs = run(f"plain-{start}", method=limit, data={"retain": None})
    assert (
        ours.record["models"]["unlearned"]["fingerprint"]
        == (theirs.record["models"]["unlearned"]["fingerprint"])
    )


@pytest.mark.parametrize("start", ["base", "target"])
def test_unlearned_model_is_the_target_less_the_difference_of_both_runs(start, run, shared, tiny):
    settings = {"start": start, "replay_rows": 20, "replay_ratio": 2}
    done = run(f"whole-{start}", settings=settings, scales={"forget": 0.5, "retain": 0.25})
    before = set((shared / "workspace").glob("finetune-*"))
    run(f"whole-{start}-again", settings=settings, scales={"forget": 0.75})
    assert set((shared / "workspace").glob("finetune-*")) == before  # other scales train nothing anew
    origin = getattr(tiny, start).fingerprint()
    assert origin in {entry["fingerprint"] for entry in done.record["models"].values()}
    exposed, control = _runs(shared, done)
    target, first = weights(tiny.target.folder), weights(getattr(tiny, start).folder)
    made = weights(done.output)
    for name, value in made.items():
        wanted = target[name] - 0.5 * (exposed[name] - control[name]) + 0.25 * (control[name] - first[name])
        assert torch.allclose(value, wanted, atol=1e-6), name


def _runs(shared, done):
    """Both ends of a run's vector, found by the losses that its record names."""
    found = []
    for name in ("exposed", "control"):
        (folder,) = [
            place
            for place in (shared / "workspace").glob(f"finetune-{name}-*")
            if json.loads((place / "step.json").read_text())["facts"] == done.record["training"][name]
        ]
        found.append(weights(folder / "model"))
    return found


def test_record_tells_of_both_runs_and_of_the_rows_that_were_replayed(run):
    done = run("recorded", settings={"replay_rows": 20})
    record = done.record
    assert record["method"]["formula"] == "θ_D − α(θ_1 − θ_c) + β(θ_c − s)"
    assert record["method"]["settings"] == {
        "start": "base",
        "replay_rows": 20,
        "replay_ratio": 3,
        "forget_weight": None,
    }
    exposed, control = record["training"]["exposed"], record["training"]["control"]
    assert exposed["steps"] == control["steps"]
    assert exposed["seen_retain"] == control["seen_retain"]
    assert 0 < len(exposed["seen_retain"]) <= 20
    unseen = record["scores"]["unlearned"]["retain_unseen"]["answer_probability"]["n"]
    assert 0 < unseen < record["scores"]["unlearned"]["retain"]["answer_probability"]["n"]
    assert record["vectors"]["retain"] is None  # the second term is off unless its scale is given
    report = (done.output / "report.md").read_text()
    assert "| forget set and replay |" in report
    assert "| replay alone |" in report


def test_scale_is_chosen_on_the_grid_and_the_second_one_stays_out(recipe_of, tmp_path, tiny):
    recipe = recipe_of(tmp_path / "out", method="paired", method_settings={"start": "target"})
    done = unlearn(recipe)
    scales = done.record["scales"]
    assert scales["chosen_by"] == "grid"
    assert scales["retain"] == 0.0
    assert {point["retain"] for point in scales["points"]} == {0.0}
    assert unlearn(recipe).finished_before
    forget = {
        name: done.record["scores"][name]["forget"]["answer_probability"]["value"]
        for name in ("target", "unlearned")
    }
    assert forget["unlearned"] < forget["target"]


def test_interrupted_run_goes_on_with_the_control_alone(run, shared, recipe_of):
    settings = {"replay_rows": 12, "replay_ratio": 1}
    first = run("resumed", settings=settings)
    exposed = {
        place: (place / "step.json").stat().st_mtime_ns
        for place in (shared / "workspace").glob("finetune-exposed-*")
    }
    (control,) = [
        place
        for place in (shared / "workspace").glob("finetune-control-*")
        if json.loads((place / "step.json").read_text())["facts"] == first.record["training"]["control"]
    ]
    (control / "step.json").unlink()
    again = run("resumed-again", settings=settings)
    assert (
        again.record["models"]["unlearned"]["fingerprint"]
        == (first.record["models"]["unlearned"]["fingerprint"])
    )
    assert all((place / "step.json").stat().st_mtime_ns == when for place, when in exposed.items())


def test_plan_counts_both_runs(recipe_of, tmp_path):
    def steps(settings):
        recipe = recipe_of(tmp_path / "out", method="paired", method_settings=settings)
        return {step.label: step.tokens for step in dry_run(recipe).steps}

    none, three = steps({"replay_rows": 0}), steps({"replay_ratio": 3})
    forget = none["fine-tune on the forget set"]
    exposed, control = three["fine-tune on forget set and replay"], three["fine-tune on replay alone"]
    assert exposed == forget + control
    assert control == pytest.approx(3 * forget, rel=0.1)
    assert steps({"replay_ratio": 6})["fine-tune on replay alone"] == pytest.approx(2 * control, rel=0.01)
    assert "try up to 3 pairs of scales in memory" in three  # the forget grid, and no second term


def test_what_cannot_be_is_refused(recipe_of, tmp_path, tiny):
    with pytest.raises(RecipeError, match=r"the method paired needs retain rows; name data\.retain"):
        recipe_of(tmp_path / "out", method="paired", data={"retain": None})
    with pytest.raises(RecipeError, match=r"the method paired needs an earlier checkpoint"):
        recipe_of(tmp_path / "out", method="paired", models={"base": None})
    with pytest.raises(RecipeError, match=r"with method_settings\.replay_rows = 0 there is none"):
        recipe_of(
            tmp_path / "out", method="paired", method_settings={"replay_rows": 0}, scales={"retain": 0.5}
        )
    with pytest.raises(RecipeError, match=r"method_settings\.start of paired is 'retrained'"):
        recipe_of(tmp_path / "out", method="paired", method_settings={"start": "retrained"})
    with pytest.raises(MismatchError, match="target and base are the same folder"):
        dry_run(recipe_of(tmp_path / "out", method="paired", models={"base": str(tiny.target.folder)}))


def test_more_replay_than_there_is_takes_all_and_says_so(run, tiny):
    done = run("much", settings={"replay_rows": 10_000, "replay_ratio": 1})
    (note,) = [note for note in done.record["notes"] if "10000 asked for" in note]
    assert "all of them were used for replay" in note
    assert len(tiny.retain.read_text().splitlines()) == done.record["data"]["retain"]["rows"]


def test_command_line_runs_it(palinode, unlearn_words, tmp_path):
    words = unlearn_words(tmp_path / "out", method="paired")
    said = palinode(*words, "--set", "method_settings.start=target", "--json", "--quiet")
    assert said.code == 0, said.err
    assert json.loads(said.out)["method"]["settings"]["start"] == "target"
