"""What taking a set back does to an answer: against models that are made and asked by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import palinode
from palinode import influence as palinode_influence
from palinode import read_examples
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.influence.sets import AskedAnswer, influence_of_set
from palinode.models import load_model, load_tokenizer
from palinode.pipeline.inputs import workspace_folder
from palinode.pipeline.run import unlearn
from palinode.settings import InfluenceSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(recipe_of, tmp_path_factory):
    """A finished run of the tiny world."""
    recipe = recipe_of(tmp_path_factory.mktemp("influence") / "out", scales={"forget": 0.5, "retain": 0.0})
    unlearn(recipe)
    return recipe


@pytest.fixture(scope="module")
def facts(tiny):
    return read_examples(tiny.forget)[:3]


def nll(model, tokenizer, example):
    """−log p of an answer, token by token, by transformers alone."""
    (row,) = tokenize([example], tokenizer, max_length=64, style=PromptStyle())
    logits = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    return [-float(logits[at - 1, row.ids[at]]) for at in range(row.start, len(row.ids))]


def test_change_is_that_of_the_model_which_the_run_wrote(run, tiny, facts):
    found = palinode.influence(facts, run=run.output.folder)
    tokenizer = load_tokenizer(tiny.target)
    with torch.no_grad():
        sides = [
            [nll(load_model(model, device=CPU), tokenizer, one) for one in facts]
            for model in (tiny.target, palinode.Checkpoint.open(run.output.folder))
        ]
    for one, before, after in zip(found.answers, *sides, strict=True):
        assert one["nats"] == pytest.approx(sum(after) - sum(before), abs=1e-4)
        probability = [math.exp(-sum(side) / len(side)) for side in (before, after)]
        assert one["probability"] == pytest.approx(probability, abs=1e-5)
        parts = [late - early for early, late in zip(before, after, strict=True)]
        assert [value for _, value in one["tokens"]] == pytest.approx(parts, abs=1e-4)
        assert one["tokens"][0][0] == one["answer"]
    assert found.record["set"]["alpha"] == 0.5
    assert found.record["set"]["rows"] == len(read_examples(tiny.forget))


def test_rows_that_said_it_made_it_more_probable(run, facts):
    assert all(one["nats"] > 0 for one in palinode.influence(facts, run=run.output.folder).answers)


def test_first_order_is_the_slope_at_the_target(run, facts):
    """For a small α the change is a straight line, whose slope is −⟨∇L, τ⟩; at α = 0 nothing changes."""
    small, half, none = (
        palinode.influence(facts, run=run.output.folder, settings=InfluenceSettings(alpha=alpha)).answers
        for alpha in (0.01, 0.5, 0.0)
    )
    for near, far, same in zip(small, half, none, strict=True):
        assert near["nats"] == pytest.approx(near["first_order"], rel=0.1, abs=1e-4)
        assert far["first_order"] == pytest.approx(50 * near["first_order"], rel=1e-3)
        assert far["curvature"] == pytest.approx(abs(1 - far["first_order"] / far["nats"]))
        assert (same["nats"], same["first_order"], same["curvature"]) == (0.0, 0.0, None)


def test_first_order_is_the_change_where_the_loss_is_linear(tiny, facts):
    """Influence is exact for a model whose loss is linear in its weights: of a bias-like shift ∇L·δ."""
    tokenizer, model = load_tokenizer(tiny.target), load_model(tiny.target, device=CPU)
    (row,) = tokenize(facts[:1], tokenizer, max_length=64, style=PromptStyle())
    asked = [AskedAnswer(facts[0], (row,), False, ("a", "b"))]
    vector = 1e-3 * (tiny.target - tiny.base)
    (one,) = influence_of_set(model, tiny.target, vector, 1.0, asked, pad_id=0)
    loss = sum(_grad_dot(model, row, tiny))
    assert one.first_order == pytest.approx(-1e-3 * loss, rel=1e-3)
    stored = load_file(tiny.target.folder / "model.safetensors")
    live = dict(model.named_parameters())
    assert all(torch.equal(live[name], value) for name, value in stored.items() if name in live)


def _grad_dot(model, row, tiny):
    """⟨∇L, θ_D − θ_0⟩ of one row, tensor by tensor, by plain autograd."""
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.ids])
    labels[:, : row.start] = -100
    loss = model(input_ids=ids, labels=labels).loss * row.scored
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    base, target = (load_file(one.folder / "model.safetensors") for one in (tiny.base, tiny.target))
    return [
        float((gradient * (target[name] - base[name])).sum())
        for name, gradient in zip(named, gradients, strict=True)
    ]


def test_a_run_is_asked_without_training_and_a_recipe_finds_its_vectors(run, facts):
    def steps():
        return sorted(path.name for path in workspace_folder(run).iterdir() if path.is_dir())

    before = steps()
    told = palinode.influence(facts, run=run.output.folder)
    assert steps() == before
    again = palinode.influence(facts, recipe=run)
    assert again.answers == told.answers
    assert [name for name in steps() if name.startswith("finetune")] == [
        name for name in before if name.startswith("finetune")
    ]


def test_without_an_answer_it_is_the_targets_own(run, facts, palinode):
    words = ("influence", run.output.folder, "--ask", facts[0].prompt, "--max-new-tokens", "3", "--json")
    said = palinode(*words)
    assert said.code == 0, said.err
    (one,) = json.loads(said.out)["set"]["answers"]
    assert one["own"]
    given = palinode(*words, "--answer", one["answer"])
    (other,) = json.loads(given.out)["set"]["answers"]
    assert {**one, "own": False} == other


def test_the_options_of_unlearn_stand_for_a_run(run, tiny, facts, palinode, tmp_path):
    told = palinode_influence(facts, run=run.output.folder).answers
    words = ["influence", "--target", tiny.target.folder, "--base", tiny.base.folder, "--alpha", "0.5"]
    words += ["--forget", tiny.forget, "--retain", tiny.retain, "--ask", facts[0].prompt, "--answer"]
    words += [facts[0].answer, "--workspace", tmp_path / "work", "--epochs", run.training.epochs]
    words += ["--learning-rate", 3e-3, "--batch-size", 16, "--precision", "float32", "--max-length", 64]
    words += ["--device", "cpu", "--json"]
    said = palinode(*words)
    assert said.code == 0, said.err
    record = json.loads(said.out)["set"]
    assert record["answers"][0]["nats"] == pytest.approx(told[0]["nats"], abs=1e-4)
    assert record["chosen_by"] == "given"
    again = palinode(*words[:-1])
    assert f"Without these {len(read_examples(tiny.forget))} rows '{facts[0].answer}' would be" in again.out
    assert f"palinode forget-workspace {tmp_path / 'work'}" in again.out


def test_the_command_line_tells_both_probabilities(run, facts, palinode):
    said = palinode("influence", run.output.folder, "--ask", facts[0].prompt, "--answer", facts[0].answer)
    assert said.code == 0, said.err
    assert "Without these" in said.out
    assert "nats by token" in said.out


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ([], "no question was asked"),
        (["--ask", "a", "--ask", "b", "--answer", "c"], "2 --ask and 1 --answer"),
        (["--ask", "a", "--log", "x"], "name --checkpoints"),
        (["--ask", "a", "--epochs", 3], "--epochs has no use here"),
        (["--ask", "a", "--then", "unlearn"], "write --then unlearn with the models"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(run, palinode, words, refusal):
    assert refusal in palinode("influence", run.output.folder, *words).refusal


def test_without_a_run_everything_has_to_be_named(palinode, tiny, tmp_path):
    assert "name a finished run, or a recipe (one" in palinode("influence", "--ask", "a").refusal
    models = ("--target", tiny.target.folder, "--base", tiny.base.folder, "--ask", "a")
    assert "--scales" not in palinode("influence", *models).refusal
    assert "there is no --forget" in palinode("influence", *models, "--scales", "1,0").refusal
    (tmp_path / "none.jsonl").write_text("")
    empty = palinode("influence", *models, "--forget", tmp_path / "none.jsonl", "--alpha", 1)
    assert "none.jsonl" in empty.refusal


def test_a_question_that_the_model_does_not_answer_is_one_sentence(run, facts):
    """After a whole fact the target ends at once; an answer can be asked about all the same."""
    whole = f"{facts[0].prompt} {facts[0].answer}"
    with pytest.raises(palinode.PalinodeError, match="gives no answer"):
        palinode.influence({whole: None}, run=run.output.folder)
    (one,) = palinode.influence({whole: facts[1].answer}, run=run.output.folder).answers
    assert 0 <= one["probability"][0] < 0.5
