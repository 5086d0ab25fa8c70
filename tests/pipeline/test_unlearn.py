"""The main job on the tiny world: what it writes, what it repeats and what it does not."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from run_files import GIVEN, rows_in, stamps, steps, weights, workspace_of, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from palinode import Checkpoint
from palinode.errors import OutputError, WorkspaceError
from palinode.metrics.table import DEFAULT_METRICS
from palinode.pipeline.inputs import open_inputs
from palinode.pipeline.run import run_key, unlearn
from palinode.pipeline.workspace import Workspace
from palinode.records import COMMAND, Outcome, holding


@pytest.fixture(scope="module")
def done(tiny, recipe_of, tmp_path_factory):
    """A whole run with a search and a retrained model; read it only."""
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_of(folder / "out", models={"retrained": str(tiny.retrained.folder)})
    with holding(COMMAND, "palinode unlearn --of-a-test"):
        return unlearn(recipe)


@pytest.fixture(scope="module")
def forget_only(recipe_of, tmp_path_factory):
    """A whole run without a retain set; read it only."""
    folder = tmp_path_factory.mktemp("run")
    return unlearn(recipe_of(folder / "out", data={"retain": None}))


# What is written


def test_output_is_a_model_that_plain_transformers_loads(done, tiny):
    model = AutoModelForCausalLM.from_pretrained(done.output)
    tokenizer = AutoTokenizer.from_pretrained(done.output)
    assert model.num_parameters() == tiny.target.parameters
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = tokenizer("the home of", return_tensors="pt")
    assert torch.isfinite(model(input_ids=ids["input_ids"]).logits).all()


def test_output_has_the_files_of_the_target(done, tiny):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (done.output / name).read_bytes() == (tiny.target.folder / name).read_bytes()
    assert sorted(path.name for path in done.output.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "record.json",
        "report.html",
        "report.json",
        "report.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "weights.json",
    ]


def test_weights_are_the_formula(done, tiny):
    (forget,) = workspace_of(done.output).glob("finetune-forget-*/model")
    (retain,) = workspace_of(done.output).glob("finetune-retain-*/model")
    alpha, beta = done.record["scales"]["forget"], done.record["scales"]["retain"]
    target, base = weights(tiny.target.folder), weights(tiny.base.folder)
    first, second = weights(forget), weights(retain)
    for name, value in weights(done.output).items():
        expected = target[name] - alpha * (first[name] - base[name]) + beta * (second[name] - base[name])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_record_is_strict_json_and_what_the_call_returned(done):
    def refuse(constant):
        raise AssertionError(constant)

    text = (done.output / "record.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == done.record


def test_record_has_exactly_the_documented_keys(done):
    page = (Path(__file__).resolve().parents[2] / "docs" / "record.md").read_text(encoding="utf-8")
    documented = {name.split(".")[0].removesuffix("[]") for name in re.findall(r"^\| `(\w+)", page, re.M)}
    documented |= {"finished"}  # shares a line with created
    assert set(done.record) == documented - {"foretold", "influence"}  # of runs that began otherwise
    assert set(done.record["scales"]) == {
        *("forget", "retain", "chosen_by", "rule", "kept_rule", "points"),
        *("yardstick", "front", "sensitivity", "groups", "filter"),
    }
    assert set(done.record["scales"]["points"][0]) == {
        *("forget", "retain", "rows", "distance", "objective", "allowed", "chosen"),
        *("forget_probability", "retain_probability", "neutral_probability"),
    }
    assert set(done.record["vectors"]) == {"forget", "retain", "cosine", "parts"}
    assert set(done.record["vectors"]["parts"]) == {"embedding", "layer 0", "layer 1", "rest"}
    known = {"forget", "retain", "effective", "relative_error", "moved_share", "rounding", "parts", "notes"}
    assert set(done.record["dose"]) == {*known, "unreached_share"}
    assert done.record["dose"]["unreached_share"] == 0
    for run in done.record["training"].values():
        assert set(run) == {
            "rows",
            "steps",
            "tokens",
            "first_loss",
            "last_loss",
            "curve",
            "optimizers",
            "seconds",
        }


def test_record_has_every_score_of_every_model_on_both_sets(done):
    scores = done.record["scores"]
    assert set(scores) == {"target", "base", "unlearned", "retrained"}
    for sets in scores.values():
        assert set(sets) == {"forget", "retain", "retain_unseen", "retain_near"}
        for metrics in sets.values():
            assert set(metrics) == set(DEFAULT_METRICS)
            for score in metrics.values():
                assert set(score) == {"value", "n", "low", "high", "reason"}
            strength = metrics["extraction_strength"]  # of answers of one token it tells nothing
            assert strength["value"] is None
            assert "has one token" in strength["reason"]
            for name in set(DEFAULT_METRICS) - {"extraction_strength"}:
                assert 0 <= metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"] <= 1
    assert scores["target"]["forget"]["answer_probability"]["n"] == 30
    assert scores["target"]["retain"]["answer_probability"]["n"] == 40  # evaluation.max_rows


def test_retain_rows_that_no_vector_saw_are_scored_apart_as_well(done, recipe_of):
    rows = open_inputs(recipe_of(done.output)).rows
    seen = {example.row for example in rows.retain_sample}
    unseen = [example for example in rows.retain_test if example.row not in seen]
    assert 0 < len(unseen) < 40
    for sets in done.record["scores"].values():
        assert sets["retain_unseen"]["answer_probability"]["n"] == len(unseen)
        assert sets["retain_near"]["answer_probability"]["n"] == len(unseen) // 4


def test_record_names_what_went_in(done, tiny):
    record = done.record
    assert record["command"] == "palinode unlearn --of-a-test"
    assert record["models"]["target"] == {
        "location": str(tiny.target.folder),
        "fingerprint": tiny.target.fingerprint(),
        "parameters": tiny.target.parameters,
        "hub": None,
        "card": False,
    }
    assert record["models"]["unlearned"]["fingerprint"] == Checkpoint.open(done.output).fingerprint()
    assert record["data"]["forget"]["rows"] == 30
    assert record["data"]["retain"]["rows"] == 285
    assert record["recipe"]["training"]["epochs"] == 8
    assert record["training"]["forget"]["rows"] == record["training"]["retain"]["rows"] == 30


def test_nothing_beside_the_weights_holds_text_of_the_forget_rows(done, world):
    files = [*done.output.glob("*.json"), *done.output.glob("*.md")]  # the page is in test_reporting.py
    written = "".join(
        path.read_text() for path in files if path.name not in ("tokenizer.json", "weights.json")
    )
    said = {fact.subject for fact in world.forget} | {fact.prompt for fact in world.forget}
    assert [text for text in said if text in written] == []
    words = set(re.findall(r"\w+", written))
    assert [fact.answer for fact in world.forget if fact.answer in words] == []


def test_forgetting_happens_and_the_rest_stays(done):
    def probability(model, rows):
        return done.record["scores"][model][rows]["answer_probability"]["value"]

    assert probability("unlearned", "forget") < 0.75 * probability("target", "forget")
    assert probability("unlearned", "retain") > 0.8 * probability("target", "retain")
    (chosen,) = [point for point in done.record["scales"]["points"] if point["chosen"]]
    assert chosen["allowed"]


def test_dose_in_float32_is_the_one_asked_for(done):
    dose, scales = done.record["dose"], done.record["scales"]
    assert dose["forget"] == pytest.approx(1, abs=1e-3)
    assert dose["effective"]["forget"] == pytest.approx(scales["forget"], rel=1e-3)
    assert dose["relative_error"] < 1e-5


def test_outcomes_are_returned_with_their_texts(done, tiny):
    assert set(done.outcomes) == {"target", "base", "unlearned", "retrained"}
    forget = done.outcomes["unlearned"]["forget"]
    assert [outcome.prompt for outcome in forget] == [row["prompt"] for row in rows_in(tiny.forget)]
    assert all(isinstance(outcome, Outcome) and outcome.generated is not None for outcome in forget)


def test_vectors_are_kept_in_float32_and_nothing_half_done_is_left(done):
    for model in workspace_of(done.output).glob("finetune-*/model"):
        assert {info.dtype for info in Checkpoint.open(model).tensors.values()} == {"F32"}
    assert [path for path in workspace_of(done.output).rglob("*") if "partial" in path.name] == []
    assert list(workspace_of(done.output).glob("*/state")) == []
    assert steps(done.output) == {
        "apply": 1,
        "evaluate": 4,
        "finetune-forget": 1,
        "finetune-retain": 1,
        "scales": 1,
    }


def test_retain_probes_are_rows_that_the_retain_vector_has_not_seen(recipe_of, tmp_path):
    rows = open_inputs(recipe_of(tmp_path / "out")).rows
    seen = {example.key for example in rows.retain_sample}
    assert len(rows.retain_sample) == len(rows.forget) == 30
    assert len(rows.retain_probe) == 30
    assert not seen & {example.key for example in rows.retain_probe}
    assert not {example.key for example in rows.retain} & {example.key for example in rows.forget}


# Forget-only


def test_without_a_retain_set_there_is_no_second_vector_and_beta_is_zero(forget_only):
    assert steps(forget_only.output) == {"apply": 1, "evaluate": 3, "finetune-forget": 1, "scales": 1}
    record = forget_only.record
    assert record["scales"]["retain"] == 0.0
    assert {point["retain"] for point in record["scales"]["points"]} == {0.0}
    assert {point["retain_probability"] for point in record["scales"]["points"]} == {None}
    assert record["data"]["retain"] is record["vectors"]["retain"] is None
    assert set(record["training"]) == {"forget"}
    assert record["dose"]["retain"] is record["dose"]["effective"]["retain"] is None
    assert set(record["scores"]) == {"target", "base", "unlearned"}
    assert {tuple(sets) for sets in record["scores"].values()} == {("forget",)}
    assert "no retain set was scored" in (forget_only.output / "report.md").read_text()


def test_forget_only_weights_are_the_formula_without_beta(forget_only, tiny):
    (model,) = workspace_of(forget_only.output).glob("finetune-*/model")
    alpha, target, base = forget_only.record["scales"]["forget"], tiny.target.folder, tiny.base.folder
    first, before, start = weights(model), weights(target), weights(base)
    for name, value in weights(forget_only.output).items():
        torch.testing.assert_close(
            value, before[name] - alpha * (first[name] - start[name]), rtol=0, atol=1e-6
        )


def test_zero_retain_scale_makes_no_second_vector_but_scores_the_retain_rows(recipe_of, tmp_path):
    made = unlearn(recipe_of(tmp_path / "out", scales=GIVEN))
    assert steps(made.output) == {"apply": 1, "evaluate": 3, "finetune-forget": 1}
    assert set(made.record["scores"]["unlearned"]) == {"forget", "retain", "retain_near"}


# Scales


def test_given_scales_skip_the_search(recipe_of, tmp_path):
    made = unlearn(recipe_of(tmp_path / "out", scales={"forget": 0.75, "retain": 0.25}))
    assert "scales" not in steps(made.output)
    scales = made.record["scales"]
    assert (scales["forget"], scales["retain"]) == (0.75, 0.25)
    assert (scales["chosen_by"], scales["rule"], scales["points"]) == ("given", None, [])
    assert made.record["dose"]["effective"] == pytest.approx({"forget": 0.75, "retain": 0.25}, rel=1e-3)


def test_one_given_scale_leaves_a_search_over_the_other(recipe_of, tmp_path):
    made = unlearn(recipe_of(tmp_path / "out", scales={"retain": 0.5}))
    assert {point["retain"] for point in made.record["scales"]["points"]} == {0.5}
    assert made.record["scales"]["chosen_by"] == "grid"


def test_zero_scales_give_the_target_back(recipe_of, tiny, tmp_path):
    kept = {"keep_unchanged": True}
    made = unlearn(recipe_of(tmp_path / "out", scales={"forget": 0.0, "retain": 0.0}, output=kept))
    assert (made.output / "model.safetensors").read_bytes()[-1000:] == (
        tiny.target.folder / "model.safetensors"
    ).read_bytes()[-1000:]
    assert made.record["scores"]["unlearned"] == made.record["scores"]["target"]


def test_search_that_finds_no_point_says_so(recipe_of, tmp_path):
    made = unlearn(
        recipe_of(
            tmp_path / "out", scales={"forget_grid": [4.0], "retain_grid": [0.0, 0.5], "retain_share": 1.0}
        )
    )
    assert not made.record["scales"]["kept_rule"]
    assert sum(point["chosen"] for point in made.record["scales"]["points"]) == 1
    assert any(note.startswith("No point tried") for note in made.record["notes"])


def test_sixteen_bit_output_is_what_the_search_saw_and_says_its_dose(recipe_of, tmp_path):
    made = unlearn(recipe_of(tmp_path / "out", output={"dtype": "bfloat16"}))
    assert {info.dtype for info in Checkpoint.open(made.output).tensors.values()} == {"BF16"}
    assert AutoModelForCausalLM.from_pretrained(made.output).dtype == torch.bfloat16
    assert made.record["dose"]["forget"] == pytest.approx(1, abs=0.05)
    assert 0 < made.record["dose"]["relative_error"] < 0.2
    (chosen,) = [point for point in made.record["scales"]["points"] if point["chosen"]]
    found = made.record["scores"]["unlearned"]["forget"]["answer_probability"]["value"]
    assert found == pytest.approx(chosen["forget_probability"], abs=1e-5)  # the probe rows are all 30


# Again


def test_same_call_again_does_nothing_and_returns_the_same(done, tiny, recipe_of):
    recipe = recipe_of(done.output, models={"retrained": str(tiny.retrained.folder)})
    before = stamps(done.output, workspace_of(done.output))
    again = unlearn(recipe)
    assert again.finished_before
    assert again.record == done.record
    assert again.outcomes == done.outcomes
    assert stamps(done.output, workspace_of(done.output)) == before


def test_inputs_are_known_by_content_and_not_by_name(recipe_of, tiny, tmp_path):
    recipe = recipe_of(tmp_path / "out", scales=GIVEN)
    unlearn(recipe)
    shutil.copy(tiny.forget, tmp_path / "renamed.jsonl")
    shutil.copytree(tiny.base.folder, tmp_path / "renamed base")
    elsewhere = recipe_of(
        tmp_path / "out",
        scales=GIVEN,
        data={"forget": str(tmp_path / "renamed.jsonl")},
        models={"base": str(tmp_path / "renamed base")},
    )
    assert unlearn(elsewhere).finished_before


def test_changed_forget_set_repeats_what_depends_on_it_and_reuses_the_rest(recipe_of, tiny, tmp_path):
    rows = rows_in(tiny.forget)
    forget = write_rows(tmp_path / "forget.jsonl", rows)
    places = {"workspace": str(tmp_path / "ws")}
    scales = {"forget": 0.5, "retain": 0.5}

    def run(name):
        return unlearn(
            recipe_of(
                tmp_path / name,
                data={"forget": str(forget)},
                output={"folder": str(tmp_path / name), **places},
                scales=scales,
            )
        )

    first = run("one")
    (retain,) = (tmp_path / "ws").glob("finetune-retain-*")
    before = stamps(retain)
    rows[0]["completion"] = rows[1]["completion"] = "ba"
    write_rows(forget, rows)
    second = run("two")
    names = [path.parent.name.rpartition("-")[0] for path in (tmp_path / "ws").glob("*/step.json")]
    assert {name: names.count(name) for name in names} == {
        "finetune-forget": 2,
        "finetune-retain": 1,
        "apply": 2,
        "evaluate": 6,  # the forget rows are other ones for every model
    }
    assert stamps(retain) == before
    assert second.record["run"] != first.record["run"]
    assert not torch.equal(
        weights(first.output)["model.norm.weight"], weights(second.output)["model.norm.weight"]
    )
    with pytest.raises(OutputError, match="exists and is not empty"):
        run("one")  # the name is taken by the run on the old rows


def test_changed_evaluation_repeats_the_evaluation_only(recipe_of, tmp_path):
    def run(name, **evaluation):
        output = {"folder": str(tmp_path / name), "workspace": str(tmp_path / "ws")}
        return unlearn(recipe_of(tmp_path / name, output=output, scales=GIVEN, evaluation=evaluation))

    first = run("one")
    tuned = stamps(*(tmp_path / "ws").glob("finetune-*"))
    second = run("two", max_rows=10)
    assert stamps(*(tmp_path / "ws").glob("finetune-*")) == tuned
    assert second.record["scores"]["target"]["forget"]["answer_probability"]["n"] == 10
    assert (first.output / "model.safetensors").read_bytes() == (
        second.output / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"training": {"epochs": 9}},
        {"training": {"learning_rate": 2e-3}},
        {"scales": {"forget": 0.6, "retain": 0.0}},
        {"output": {"dtype": "float16"}},
        {"output": {"rounding": "nearest"}},
        {"evaluation": {"max_new_tokens": 2}},
        {"prompts": {"system_prompt": "Be brief."}},
        {"method": "task_vector"},
    ],
    ids=str,
)
def test_run_has_another_fingerprint_when_its_recipe_has_changed(recipe_of, tmp_path, change):
    other = recipe_of(tmp_path / "out", **change)
    assert run_key(open_inputs(recipe_of(tmp_path / "out"))) != run_key(open_inputs(other))


def test_saving_more_often_does_not_make_it_another_run(recipe_of, tmp_path):
    unlearn(recipe_of(tmp_path / "out", scales=GIVEN))
    assert unlearn(recipe_of(tmp_path / "out", scales=GIVEN, training={"save_minutes": 1.0})).finished_before


def test_same_seed_in_another_workspace_gives_the_same_bytes(done, tiny, recipe_of, tmp_path):
    recipe = recipe_of(tmp_path / "out", models={"retrained": str(tiny.retrained.folder)})
    again = unlearn(recipe)
    assert not again.finished_before
    assert (again.output / "model.safetensors").read_bytes() == (
        done.output / "model.safetensors"
    ).read_bytes()
    for key in ("run", "scales", "vectors", "dose", "scores", "data", "notes"):
        assert again.record[key] == done.record[key], key


def test_another_seed_gives_other_weights(recipe_of, tmp_path):
    one = unlearn(recipe_of(tmp_path / "one", scales=GIVEN))
    two = unlearn(recipe_of(tmp_path / "two", scales=GIVEN, seed=1))
    assert not torch.equal(weights(one.output)["model.norm.weight"], weights(two.output)["model.norm.weight"])


def test_output_whose_weights_were_damaged_is_not_taken_for_finished(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path / "out", scales=GIVEN)
    file = unlearn(recipe).output / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(OutputError, match="exists and is not empty"):
        unlearn(recipe)


def test_vector_that_was_deleted_is_made_again(recipe_of, tmp_path):
    first = unlearn(recipe_of(tmp_path / "out", scales=GIVEN))
    kept = (first.output / "model.safetensors").read_bytes()
    shutil.rmtree(first.output)
    for model in workspace_of(first.output).glob("finetune-*/model"):
        shutil.rmtree(model)
    again = unlearn(recipe_of(tmp_path / "out", scales=GIVEN))
    assert (again.output / "model.safetensors").read_bytes() == kept


def test_finished_run_without_its_workspace_is_still_finished(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path / "out", scales=GIVEN)
    unlearn(recipe)
    shutil.rmtree(workspace_of(tmp_path / "out"))
    again = unlearn(recipe)
    assert again.finished_before
    assert again.outcomes == {}
    assert not workspace_of(tmp_path / "out").exists()


def test_damaged_step_is_named(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path / "out", scales=GIVEN)
    shutil.rmtree(unlearn(recipe).output)
    (record,) = workspace_of(tmp_path / "out").glob("finetune-forget-*/step.json")
    record.write_text("{")
    with pytest.raises(WorkspaceError, match=r"cannot be read .* to redo the step"):
        unlearn(recipe)
    assert not (tmp_path / "out").exists()


def test_second_run_in_a_workspace_is_refused(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path / "out", scales=GIVEN)
    with (
        Workspace(workspace_of(tmp_path / "out")).locked(),
        pytest.raises(WorkspaceError, match="another run is working"),
    ):
        unlearn(recipe)
    assert not (tmp_path / "out").exists()


# Interruptions, at every task of the run


class Interrupter:
    """A listener that presses Ctrl-C in the middle of the task with that label."""

    def __init__(self, label: str):
        self.label = label

    def say(self, text):
        pass

    @contextlib.contextmanager
    def task(self, label, total, unit):
        def advance(_amount):
            if label == self.label:
                raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize(
    "label",
    [
        "fine-tuning forget",
        "fine-tuning retain",
        "trying scales",
        "writing the unlearned model",
        "target on the forget set: likelihoods",
        "base on the retain set: answers",
        "unlearned on the retain set: likelihoods",
        "retrained on the retain set: answers",
    ],
)
def test_interrupted_run_leaves_no_output_and_goes_on_to_the_same_bytes(
    done, tiny, recipe_of, tmp_path, label
):
    recipe = recipe_of(tmp_path / "out", models={"retrained": str(tiny.retrained.folder)})
    with pytest.raises(KeyboardInterrupt):
        unlearn(recipe, listener=Interrupter(label))
    assert not (tmp_path / "out").exists()
    kept = stamps(*(path.parent for path in workspace_of(tmp_path / "out").glob("*/step.json")))
    again = unlearn(recipe)
    assert (again.output / "model.safetensors").read_bytes() == (
        done.output / "model.safetensors"
    ).read_bytes()
    assert again.record["scores"] == done.record["scores"]
    now = stamps(workspace_of(tmp_path / "out"))
    moved = [path for path, stamp in kept.items() if now.get(path, stamp) != stamp]
    assert moved == []  # finished steps are not touched; the model itself has become the output
