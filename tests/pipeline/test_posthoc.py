"""What training changed, or an unlearned model of any tool, is a vector that can be filtered."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from comparing import tiny_comparison
from palinode import Checkpoint, filter_change
from palinode.compare.comparing import compare
from palinode.compare.comparison_recipe import build_comparison
from palinode.data.examples import read_examples
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.errors import RecipeError
from palinode.models import load_model, load_tokenizer
from palinode.pipeline.chatting import open_chat
from palinode.pipeline.inputs import open_inputs
from palinode.pipeline.run import unlearn
from palinode.records import read_json
from palinode.training.moments import basis_of, projection

FILTER = {"name": "least_squares", "mu": 10.0, "epsilon": 0.1, "arrival": False}
SEARCHED = {"choose": "auto", "trials": 3, "forget_grid": [0.5, 1.0, 2.0], "probe_rows": 20}
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def run(recipe_of, tmp_path_factory):
    """A function that makes a recipe of GradDiff for the tiny world, without a base, in one workspace."""
    folder = tmp_path_factory.mktemp("posthoc")

    def build(name, *transforms, **sections):
        output = {"folder": str(folder / name), "workspace": str(folder / "workspace")}
        training = {"epochs": 3, "learning_rate": 1e-3}
        own = {"method": "grad_diff", "training": training, "models": {"base": None}, "scales": SEARCHED}
        own["scales"] = own["scales"] if transforms else {}
        return recipe_of(folder / name, transforms=list(transforms), output=output, **{**own, **sections})

    return build


@pytest.fixture(scope="module")
def plain(run):
    """The run of GradDiff as it is: its output is somebody's unlearned model."""
    return unlearn(run("plain"))


@pytest.fixture(scope="module")
def filtered(run, plain):
    """The same with its change filtered, α searched."""
    return unlearn(run("filtered", FILTER))


def tensors(folder):
    return {name: value.double().numpy() for name, value in load_file(folder / "model.safetensors").items()}


def inputs_of(folder, examples):
    """The moments of a layer's inputs over all tokens of the rows, by a hook."""
    checkpoint, found = Checkpoint.open(folder), []
    model, tokenizer = load_model(checkpoint, device=torch.device("cpu")), load_tokenizer(checkpoint)
    layer = model.get_submodule(LAYER)
    layer.register_forward_pre_hook(lambda _, given: found.append(given[0][0].double()))
    for row in tokenize(examples, tokenizer, max_length=64, style=PromptStyle()):
        with torch.no_grad():
            model(torch.tensor([row.ids]))
    rows = torch.cat(found).numpy()
    return rows.T @ rows / len(rows)


def probability(record, model, data_set):
    return record["scores"][model][data_set]["answer_probability"]["value"]


# What training changed


def test_filtered_model_is_the_target_less_the_filtered_change(run, plain, filtered, tiny):
    """In a layer: θ_D − α·τF(I − UUᵀ)/c, τ = θ_D − θ_trained, F of moments that are measured here."""
    record, rows = filtered.record, open_inputs(run("look", FILTER)).rows
    before, after, trained = (tensors(one) for one in (tiny.target.folder, filtered.output, plain.output))
    ours, theirs = (inputs_of(tiny.target.folder, found) for found in (rows.forget, rows.spared))
    added = 0.1 * np.trace(ours) / len(ours) * np.eye(len(ours))
    factor = (
        (ours + added)
        @ np.linalg.inv(ours + added + 10.0 * theirs)
        @ projection(basis_of(theirs, energy=0.9))
    )
    name, alpha = f"{LAYER}.weight", record["scales"]["forget"]
    share = record["vectors"]["transforms"][0]["survives"]
    wanted = before[name] - alpha / share * (before[name] - trained[name]) @ factor
    np.testing.assert_allclose(after[name], wanted, atol=2e-5)
    assert record["scales"]["retain"] == 0
    assert record["scales"]["points"]


def test_it_keeps_more_and_forgets_as_much_as_before(plain, filtered):
    before, after = plain.record, filtered.record
    assert probability(after, "unlearned", "retain") > probability(before, "unlearned", "retain")
    gap = probability(after, "unlearned", "forget") - probability(before, "unlearned", "forget")
    assert abs(gap) < 0.1


def test_without_a_base_the_yardstick_is_the_model_before_its_change_was_filtered(plain, filtered):
    """And nothing claims to know how a model that never saw the forget set would behave."""
    yardstick = filtered.record["scales"]["yardstick"]
    assert yardstick["source"] == "unfiltered"
    assert "as much as it should before its change was filtered" in yardstick["assumes"]
    report = (filtered.output / "report.md").read_text()
    assert "Before its change was filtered, the model gave the forget set an answer probability" in report
    assert "estimated yardstick" not in report
    assert any("what training by grad_diff changed" in note for note in filtered.record["notes"])


def test_with_a_base_the_yardstick_is_the_usual_estimate(run, plain, tiny):
    models = {"base": str(tiny.base.folder)}
    done = unlearn(run("with base", FILTER, models=models, scales={**SEARCHED, "choose": "grid"}))
    assert done.record["scales"]["yardstick"]["source"] == "base"
    assert done.record["scales"]["chosen_by"] == "grid"


def test_chat_turns_alpha_of_the_filtered_change(filtered):
    chat = open_chat(filtered.output, alone=True)
    assert chat.fixed is None
    chat.set_scales(0.0, 0.0)
    chat.set_scales(filtered.record["scales"]["forget"], 0.0)
    live, saved = chat.speakers[0].model.state_dict(), load_file(filtered.output / "model.safetensors")
    assert torch.equal(live[f"{LAYER}.weight"], saved[f"{LAYER}.weight"])


def test_a_comparison_filters_what_a_contestant_trained(tiny, tmp_path):
    filtered = {"transforms": [FILTER], "scales.forget": 1.5}
    contestants = [
        {"name": "plain", "method": "grad_diff"},
        {"name": "filtered", "method": "grad_diff", "set": filtered},
    ]
    content = tiny_comparison(
        tiny, tmp_path / "out", tries=1, seeds=[0], budget={"steps": 3}, contestants=contestants
    )
    plain, ours = compare(build_comparison(content)).table["contestants"]
    assert plain["chosen"]["scales"] is None
    assert ours["chosen"]["scales"] == [1.5, 0.0]
    with pytest.raises(RecipeError, match="no method 'given' to compare"):
        build_comparison({**content, "contestants": [{"name": "x", "method": "given"}]})


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"epochs": 2, "learning_rate": 1e-3, "lora": {"rank": 2}}},
        {"method": "npo", "method_settings": {"start": "base"}, "models": {}},
        {"method": "ties"},
    ],
    ids=["low-rank", "from the base", "formula"],
)
def test_every_kind_of_training_has_a_change(run, sections):
    """α = 1 and nothing filtered would be the trained model; half of it lies halfway."""
    half = {"name": "layer_scales", "scales": {".*": 0.5}}
    name = "-".join(map(str, sections.values()))[:40]
    trained = unlearn(run(f"{name} plain", scales={}, **sections))
    halved = unlearn(run(f"{name} half", half, **{"scales": {"forget": 2.0}, **sections}))
    ours, theirs = tensors(halved.output), tensors(trained.output)
    assert all(np.allclose(ours[one], theirs[one], atol=1e-5) for one in ours)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"scales": {"retain": 1.0}}, "there is no retain vector here, so scales.retain has to be 0"),
        ({"models": {"base": None, "given": "x"}}, "the method grad_diff makes the unlearned model itself"),
        ({"method": "given"}, r"needs an unlearned model; name models.given \(palinode filter --unlearned\)"),
        ({"method": "given", "models": {"base": None, "given": "x"}, "scales": {"retain": 1.0}}, "no retain"),
    ],
)
def test_what_cannot_be_is_refused_with_the_recipe(run, sections, said):
    with pytest.raises(RecipeError, match=said):
        run("refused", FILTER, **sections)


def test_a_transform_at_the_base_needs_one(run):
    with pytest.raises(RecipeError, match=r"needs that model; name models.base \(--base\)"):
        run("refused", {"name": "projection", "at": "base"})


# Somebody else's unlearned model


@pytest.fixture(scope="module")
def words(plain, tiny, tmp_path_factory):
    """A function that spells `palinode filter` for that model."""
    folder = tmp_path_factory.mktemp("filter")

    def spell(name, **changes):
        given = {
            "target": tiny.target.folder,
            "unlearned": plain.output,
            "retain": tiny.retain,
            "output": folder / name,
            "max_length": 64,
            "device": "cpu",
            **changes,
        }
        options = [(f"--{key.replace('_', '-')}", value) for key, value in given.items()]
        return ["filter", *(word for pair in options if pair[1] is not None for word in pair)]

    return spell


def test_verb_with_forget_rows_is_a_run(words, palinode, tiny, plain):
    asked = words("run", forget=tiny.forget, max_rows=20, max_new_tokens=3, mu=10)
    asked += ["--set", "scales.trials=3", "--set", "scales.probe_rows=20"]
    planned = palinode(*asked, "--dry-run")
    assert planned.code == 0, planned.err
    assert "search scales" in planned.out
    assert "evaluate 3 models" in planned.out
    done = palinode(*asked, "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["method"]["name"] == "given"
    assert record["training"] == {}
    assert record["models"]["given"]["location"] == str(plain.output)
    assert record["scales"]["yardstick"]["source"] == "unfiltered"
    assert record["scales"]["forget"] > 0
    assert record["vectors"]["transforms"][0]["settings"]["mu"] == 10
    assert probability(record, "unlearned", "retain") >= probability(record, "given", "retain")
    again = palinode(*asked)
    assert "already holds the result of this very run" in again.out
    output = asked[asked.index("--output") + 1]
    assert "unlearned, as given" in (output / "report.md").read_text()
    assert palinode("verify", output).code == 0
    assert open_chat(output, alone=True).fixed is None


def test_without_forget_rows_the_change_keeps_its_effect_along_itself(words, palinode, tiny, plain):
    """The soft filter (I + Σ_r/λ)⁻¹(I − UUᵀ), λ = ε/μ · tr Σ_r / D; over all layers tr τΔᵀ = tr ττᵀ."""
    asked = words("soft", mu=10, epsilon=1)
    done = palinode(*asked)
    assert done.code == 0, done.err
    output = asked[asked.index("--output") + 1]
    assert f"{output}: the filtered model, and filter.json; it moves the retain rows' outputs" in done.out
    before, after, given = (tensors(one) for one in (tiny.target.folder, output, plain.output))
    theirs, name = inputs_of(tiny.target.folder, read_examples(tiny.retain)), f"{LAYER}.weight"
    soft = np.linalg.inv(np.eye(len(theirs)) + theirs / (0.1 * np.trace(theirs) / len(theirs)))
    soft = soft @ projection(basis_of(theirs, energy=0.9))
    wanted, found = (before[name] - given[name]) @ soft, before[name] - after[name]
    factor = (wanted * found).sum() / (wanted * wanted).sum()
    np.testing.assert_allclose(found, factor * wanted, atol=2e-5)
    blocks = [one for one in before if "layers" in one and before[one].ndim == 2]
    changes = {one: (before[one] - given[one], before[one] - after[one]) for one in blocks}
    along = sum((old * new).sum() for old, new in changes.values())
    assert along == pytest.approx(sum((old * old).sum() for old, _ in changes.values()), rel=1e-3)
    record = read_json(output / "filter.json")
    assert record["alpha"] == 1
    assert record["transforms"][0]["harm"] < 1
    assert 1 / record["transforms"][0]["survives"] == pytest.approx(factor, rel=1e-3)
    assert record["dose"]["forget"] == pytest.approx(1, abs=1e-3)
    assert palinode("verify", output).code == 0
    half = filter_change(
        tiny.target.folder,
        unlearned=plain.output,
        retain=tiny.retain,
        output=output.with_name("half"),
        mu=10,
        epsilon=1,
        alpha=0.5,
        settings={"training.max_length": 64, "device": "cpu"},
    )
    np.testing.assert_allclose(before[name] - tensors(half.output)[name], found / 2, atol=1e-6)


def test_what_the_verb_cannot_take_is_one_sentence(words, palinode, tiny, tmp_path):
    other = tmp_path / "other"
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(other)
    for changes, said in (
        ({"unlearned": tiny.target.folder}, "the target and the unlearned model are the same folder"),
        ({"unlearned": other}, "are not states of one model: model_type is"),
        ({"unlearned": tmp_path / "nowhere"}, "nowhere"),
        ({"retain": tmp_path / "none.jsonl"}, "none.jsonl"),
        ({"mu": -1}, "'--mu'"),
        ({"alpha": -1}, "scales.forget"),
        ({"output": tiny.target.folder}, str(tiny.target.folder)),
    ):
        assert said in palinode(*words("refused", **changes)).refusal, changes
    assert "name --forget" in palinode(*words("refused"), "--dry-run").refusal
    assert not words("refused")[words("refused").index("--output") + 1].exists()
