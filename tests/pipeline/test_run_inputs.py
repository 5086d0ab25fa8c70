"""What a run takes: methods, prepared models, few or shared rows, every form of rows; and its plan."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from run_files import GIVEN, rows_in, steps, weights, workspace_of, write_rows

from palinode import read_examples
from palinode.errors import DataError, MismatchError, OutputError
from palinode.methods import METHODS
from palinode.models.loading import outline
from palinode.pipeline import costs
from palinode.pipeline.costs import Corrected, Machine, Plan, PlannedStep, describe
from palinode.pipeline.inputs import open_inputs
from palinode.pipeline.run import dry_run, unlearn
from palinode.progress import NullListener, duration_text

# Methods, preparation, overlap


@pytest.mark.parametrize("name", ["msa", "task_vector"])
def test_every_method_takes_off_the_vector_from_the_checkpoint_it_starts_from(
    recipe_of, tiny, tmp_path, name
):
    method = METHODS[name]
    assert method.name == name
    assert method.summary
    start = getattr(tiny, method.settings().starts_at)
    assert start == (tiny.target if name == "task_vector" else tiny.base)
    made = unlearn(recipe_of(tmp_path / "out", method=name, scales=GIVEN))
    (model,) = workspace_of(made.output).glob("finetune-forget-*/model")
    target, before, tuned = weights(tiny.target.folder), weights(start.folder), weights(model)
    for key, value in weights(made.output).items():
        torch.testing.assert_close(value, target[key] - 0.5 * (tuned[key] - before[key]), rtol=0, atol=1e-6)
    assert made.record["recipe"]["method"] == name


def test_target_and_retrained_model_can_be_prepared(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path / "out", models={"target": None}, prepare={"retain_rows": 50}, scales=GIVEN)
    made = unlearn(recipe)
    assert steps(made.output) == {
        "apply": 1,
        "evaluate": 4,
        "finetune-forget": 1,
        "finetune-retrained": 1,
        "finetune-target": 1,
    }
    assert made.record["models"]["target"]["location"] == "made by [prepare]"
    assert made.record["data"]["retain"]["rows"] == 50
    scores = made.record["scores"]
    assert (
        scores["target"]["forget"]["answer_probability"]["value"]
        > (scores["retrained"]["forget"]["answer_probability"]["value"])
    )


def test_shared_rows_are_refused_with_their_number_and_left_out_when_told(recipe_of, tiny, tmp_path):
    shared = write_rows(tmp_path / "retain.jsonl", rows_in(tiny.retain)[:60] + rows_in(tiny.forget)[:3])
    with pytest.raises(
        DataError, match=r"3 rows of the retain set also stand in the forget set \(first: row 61"
    ):
        unlearn(recipe_of(tmp_path / "out", data={"retain": str(shared)}, scales=GIVEN))
    assert list(tmp_path.iterdir()) == [shared]
    made = unlearn(
        recipe_of(tmp_path / "out", data={"retain": str(shared), "allow_overlap": True}, scales=GIVEN)
    )
    assert made.record["data"]["retain"]["rows"] == 60
    assert "3 retain rows that also stand in the forget set were left out." in made.record["notes"]


def test_small_retain_set_is_used_whole_and_the_record_says_so(recipe_of, tiny, tmp_path):
    few = write_rows(tmp_path / "retain.jsonl", rows_in(tiny.retain)[:5])
    made = unlearn(
        recipe_of(tmp_path / "out", data={"retain": str(few)}, scales={"forget": 0.5, "retain": 0.5})
    )
    assert made.record["training"]["retain"]["rows"] == 5
    assert any("fewer than the forget set's 30" in note for note in made.record["notes"])


def test_same_folder_as_target_and_base_is_refused_but_for_the_task_vector(recipe_of, tiny, tmp_path):
    same = {"base": str(tiny.target.folder)}
    with pytest.raises(MismatchError, match="target and base are the same folder"):
        unlearn(recipe_of(tmp_path / "out", models=same, scales=GIVEN))
    unlearn(recipe_of(tmp_path / "out", models=same, scales=GIVEN, method="task_vector"))


def test_single_forget_row_is_enough(recipe_of, tiny, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", rows_in(tiny.forget)[:1])
    made = unlearn(recipe_of(tmp_path / "out", data={"forget": str(one)}, scales={"retain": 0.0}))
    score = made.record["scores"]["unlearned"]["forget"]["answer_probability"]
    assert (score["n"], score["low"], score["high"]) == (1, None, None)
    assert "one example gives no interval" in score["reason"]


# Forms of rows


def texts(tiny, count=6):
    return [f"{row['prompt']} {row['completion']}" for row in rows_in(tiny.forget)[:count]]


def write_document(tiny, folder):
    (folder / "forget.txt").write_text(". ".join(texts(tiny, 30)))  # longer than one piece of 64 tokens
    return folder / "forget.txt", {}, 1


def write_messages(tiny, folder):
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
                {"role": "user", "content": "the pet of"},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in rows_in(tiny.forget)[:4]
    ]
    return write_rows(folder / "forget.jsonl", rows), {}, 8


def write_csv(tiny, folder):
    lines = [f'"{row["prompt"]}",{row["completion"]}' for row in rows_in(tiny.forget)[:5]]
    (folder / "forget.csv").write_text("\n".join(["Frage,Antwort", *lines]))
    return folder / "forget.csv", {"question": "Frage", "answer": "Antwort"}, 5


@pytest.mark.parametrize("write", [write_document, write_messages, write_csv])
def test_every_form_of_rows_goes_all_the_way(recipe_of, tiny, tmp_path, write):
    path, columns, examples = write(tiny, tmp_path)
    made = unlearn(
        recipe_of(
            tmp_path / "out",
            data={"forget": str(path), "retain": None, "columns": columns},
            scales={"forget_grid": [0.5]},
            output={"keep_unchanged": True},
        )
    )
    assert made.record["data"]["forget"]["rows"] == examples
    scores = made.record["scores"]["unlearned"]["forget"]
    assert scores["answer_probability"]["n"] == examples
    if write is write_document:
        assert scores["rouge_l_recall"]["value"] is None
        assert "nothing was generated" in scores["rouge_l_recall"]["reason"]
        assert len(made.outcomes["target"]["forget"][0].logprobs) > 64


def test_documents_may_be_forgotten_and_questions_retained(recipe_of, tiny, tmp_path):
    path, _, _ = write_document(tiny, tmp_path)
    made = unlearn(recipe_of(tmp_path / "out", data={"forget": str(path)}, scales=GIVEN))
    assert made.record["scores"]["target"]["retain"]["rouge_l_recall"]["value"] is not None


# The plan


def test_plan_counts_tokens_and_leaves_nothing_on_disk(recipe_of, tiny, tmp_path):
    recipe = recipe_of(tmp_path / "out")
    planned = dry_run(recipe)
    assert list(tmp_path.iterdir()) == []
    by_label = {step.label: step.tokens for step in planned.steps}
    words = sum(len(f"{row.prompt} {row.answer}".split()) + 1 for row in read_examples(tiny.forget))
    assert by_label["fine-tune on the forget set"] == 8 * words
    assert planned.tokens == sum(by_label.values())
    assert planned.disk >= 2 * 4 * tiny.base.parameters + tiny.target.nbytes
    assert planned.memory > 16 * tiny.base.parameters
    assert planned.seconds > 0
    assert any("try up to 6 pairs of scales" in line for line in describe(planned))


def test_plan_of_a_forget_only_run_has_no_second_vector(recipe_of, tmp_path):
    labels = [step.label for step in dry_run(recipe_of(tmp_path / "out", data={"retain": None})).steps]
    assert labels == [
        "fine-tune on the forget set",
        "try up to 3 pairs of scales in memory",
        "write the unlearned model",
        "evaluate 3 models",
    ]


def test_plan_counts_transforms(recipe_of, tmp_path):
    transforms = [{"name": "projection"}, {"name": "low_rank", "rank": 2}]
    steps = dry_run(recipe_of(tmp_path / "out", transforms=transforms)).steps
    labels = [step.label for step in steps]
    first = labels.index("measure what the layers read")
    assert labels[first : first + 3] == [
        "measure what the layers read",
        "project the vector",
        "transform the vector",
    ]
    assert steps[first].tokens > 0
    assert all(step.seconds > 0 for step in steps[first : first + 3])


def test_plan_times_the_arithmetic_that_training_will_use(monkeypatch, recipe_of, tmp_path):
    """Where bfloat16 is slower than float32 it is not trained in, and not timed either."""
    asked = []

    def autocasts(settings, device, parameters):
        asked.append((settings.precision, device.type, parameters))
        return False

    monkeypatch.setattr(costs, "autocasts", autocasts)
    plan = dry_run(recipe_of(tmp_path / "out", training={"precision": "auto"}))
    assert {(precision, device) for precision, device, _ in asked} == {("auto", "cpu")}
    assert plan.seconds < 600


LLAMA = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128)}
"""Width, inner width, blocks and heads of Llama 3.1, from the configs that its maker published."""


def config_of(folder, size):
    wide, inner, deep, heads = LLAMA[size]
    config = {"model_type": "llama", "hidden_size": wide, "intermediate_size": inner, "vocab_size": 128256}
    config |= {"num_hidden_layers": deep, "num_attention_heads": heads, "num_key_value_heads": 8}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return str(folder)


@pytest.mark.parametrize(
    ("size", "parameters", "ways"),
    [
        ("8B", 8_030_261_248, {"1xh100": "in host memory", "1xb200": "whole", "8xh100": "in host memory"}),
        ("70B", 70_553_706_496, {"8xh100": "sharded, in host memory", "64xh100": "sharded over 64"}),
    ],
)
def test_a_config_alone_says_how_a_model_is_held_elsewhere(recipe_of, tmp_path, size, parameters, ways):
    models = {"target": config_of(tmp_path / size, size), "base": "none"}
    assert outline(models["target"]).parameters == parameters
    for on, way in ways.items():
        plan = dry_run(recipe_of(tmp_path / "out", models=models), on=on)
        assert (plan.held[0].phase, plan.held[0].way) == ("fine-tune", way)
        assert plan.held[0].fits(Machine.named(on))
        assert [note.startswith("Not built") for note in plan.notes] == [True] * (size == "70B")
        assert plan.seconds > 0


def test_a_plan_says_on_how_many_devices_a_model_would_fit(recipe_of, tmp_path):
    models = {"target": config_of(tmp_path / "405B", "405B"), "base": "none"}
    recipe = recipe_of(tmp_path / "out", models=models, training={"batch_size": 4})
    plan = dry_run(recipe, on="8xh100")
    assert not plan.held[0].fits(Machine.named("8xh100"))
    assert [re.search(r"takes (\d+) ", note)[1] for note in plan.notes[1:]] == ["32", "32"]
    wide = recipe_of(tmp_path / "out", models=models, training={"batch_size": 4096})
    assert "gradient_checkpointing" in dry_run(wide, on="8xh100").notes[-1]


def test_a_pass_that_is_made_again_takes_time(recipe_of, tmp_path):
    models, once, again = {"target": config_of(tmp_path / "8B", "8B"), "base": "none"}, {}, {}
    for checkpointing, found in ((False, once), (True, again)):
        training = {"gradient_checkpointing": checkpointing, "batch_size": 256}
        plan = dry_run(recipe_of(tmp_path / "out", models=models, training=training), on="1xh100")
        found.update({step.label: step.seconds for step in plan.steps})
    assert {label for label in once if again[label] > once[label]} == {
        one for one in once if "fine-tune" in one
    }


def test_a_model_s_plan_is_that_of_its_config(recipe_of, tiny, tmp_path):
    """But for the tokens, which are guessed from the letters where there is no tokenizer."""
    (tmp_path / "config").mkdir()
    shutil.copy(tiny.target.folder / "config.json", tmp_path / "config")
    whole, alone = (
        dry_run(recipe_of(tmp_path / "out", models={"target": place}), on="2xa100")
        for place in (str(tiny.target.folder), str(tmp_path / "config" / "config.json"))
    )
    assert [step.label for step in whole.steps] == [step.label for step in alone.steps]
    assert [one.weights for one in whole.held] == [one.weights for one in alone.held]


def test_plan_refuses_what_the_run_would_refuse(recipe_of, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    with pytest.raises(OutputError):
        dry_run(recipe_of(tmp_path / "out"))


def test_answers_that_are_cut_are_noted(tiny, recipe_of, tmp_path):
    long = tmp_path / "long.jsonl"
    words = json.loads(tiny.forget.read_text().splitlines()[0])
    rows = [{"prompt": words["prompt"], "completion": " ".join([words["completion"]] * 40)}, words]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(
        tmp_path / "out",
        data={"forget": str(long), "retain": None},
        training={"max_length": 32},
        evaluation={"max_length": 64},
    )
    assert list(open_inputs(recipe).notes) == ["Answers cut to fit max_length 32 in training: 1."]


class Heard(NullListener):
    """A listener that keeps what was said."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.mark.parametrize(("each", "said"), [(2.0, True), (1.0, False), (0.2, True)])
def test_a_plan_is_corrected_once_a_training_shows_its_pace(each, said):
    """Of 1,000 tokens 400 are from before; the plan counts on a second for each."""
    steps = PlannedStep("fine-tune on the forget set", 1000, 1000.0), PlannedStep("evaluate", 70, 2000.0)
    now, heard = [0.0], Heard()
    plan = Plan((PlannedStep("before", 5, 1e6), *steps), 0, 0, ())
    listener = Corrected(heard, plan, clock=lambda: now[0])
    with listener.task("fine-tuning forget", 1000, "tokens") as advance:
        advance(400)
        for _ in range(600):
            now[0] += each
            advance(1)
    with listener.task("likelihoods", 70, "rows") as advance:
        now[0] += 1e6
        advance(70)
    found = [duration_text(seconds) for seconds in (1000 * each, 1000, 3000 * each)]
    wanted = "At this pace, to fine-tune on the forget set takes {}, not {}; with all that follows, about {}."
    assert heard.lines == ([wanted.format(*found)] if said else [])
