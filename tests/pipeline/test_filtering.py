"""Filters in whole runs: mu is chosen with alpha, moments are kept, the model is made with the choice."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from palinode.data.examples import at_most
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.errors import DataError
from palinode.evaluation.yardstick import estimate_yardstick
from palinode.models import load_model, load_tokenizer
from palinode.pipeline import search, transforming
from palinode.pipeline.goal import Behaviour, Goal, TriedScales
from palinode.pipeline.inputs import open_inputs
from palinode.pipeline.run import find_vectors, unlearn
from palinode.pipeline.search import towards_the_aim
from palinode.pipeline.transforming import applied
from palinode.training.moments import along, basis_of, input_moments, least_squares
from palinode.weights import Checkpoint, StoredVector
from palinode.weights.tensors import Files

AUTO = {"choose": "auto", "trials": 3, "forget_grid": [0.5, 1.0, 2.0], "retain_grid": [0.0]}
TRAINING = {"epochs": 4, "learning_rate": 3e-3, "batch_size": 16, "max_length": 64, "precision": "float32"}


def squares(**settings):
    return [{"name": "least_squares", "rows": 12, **settings}]


@pytest.fixture(scope="module")
def run(recipe_of, tiny, tmp_path_factory):
    """A function that makes recipes of the tiny world, all in one workspace."""
    folder = tmp_path_factory.mktemp("filtering")

    def build(name, transforms, **sections):
        return recipe_of(folder / name, **{
            "transforms": transforms,
            "scales": AUTO,
            "training": TRAINING,
            "output": {"folder": str(folder / name), "workspace": str(folder / "workspace")},
            **sections,
        })  # fmt: skip

    build.workspace = folder / "workspace"
    return build


@pytest.fixture(scope="module")
def searched(run):
    """A run whose mu and alpha, and whether it reads where the model arrives, were searched; read it only."""
    return unlearn(run("searched", squares()))


def dense(vector):
    found = {}
    for name, change in vector.changes.items():
        values = np.empty(int(np.prod(change.shape)))
        with Files() as files:
            change.read(files, 0, values)
        found[name] = torch.from_numpy(values.reshape(change.shape))
    return found


def check_model(done, run, tiny):
    """The model on disk is target − α · the vector that the record leads to."""
    vector = dense(find_vectors(done.record, run.workspace, tiny.target, tiny.base).forget)
    target, made = (load_file(place / "model.safetensors") for place in (tiny.target.folder, done.output))
    alpha = done.record["scales"]["forget"]
    for name, value in made.items():
        change = vector.get(name, torch.zeros(value.shape))
        torch.testing.assert_close(value, (target[name].double() - alpha * change).float(), rtol=0, atol=1e-6)
    return vector


def steps(run, name):
    return {path.parent.name: path.read_text() for path in run.workspace.glob(f"{name}-*/step.json")}


# μ, α and where the model arrives, chosen together


def test_record_says_which_filter_was_chosen_and_the_model_is_made_with_it(searched, run, tiny):
    chosen = searched.record["scales"]
    assert chosen["filter"].keys() == {"mu", "arrival", "key"}
    assert chosen["filter"]["key"] == searched.record["steps"]["transform"]
    assert chosen["filter"]["mu"] in (10.0, 100.0, 1000.0)
    (point,) = [point for point in chosen["points"] if point["chosen"]]
    assert (point["mu"], point["arrival"]) == (chosen["filter"]["mu"], chosen["filter"]["arrival"])
    (facts,) = searched.record["vectors"]["transforms"]
    assert facts["settings"]["mu"] == chosen["filter"]["mu"]
    assert 0 < facts["survives"] <= 1
    assert check_model(searched, run, tiny)


def test_smaller_and_larger_mu_are_tried_and_so_is_the_place_of_arrival(searched):
    tried = {(point["mu"], point["arrival"]) for point in searched.record["scales"]["points"]}
    mu = searched.record["scales"]["filter"]["mu"]
    at_target = {own for own, arrival in tried if not arrival}
    assert 100.0 in at_target
    assert len(at_target) >= 2
    assert {own for own, arrival in tried if arrival} == {mu}


def test_vectors_that_were_tried_and_not_chosen_are_removed(searched, run):
    kept = [path.parent.name for path in run.workspace.glob("transform-least_squares-*/vector")]
    chosen = searched.record["scales"]["filter"]["key"][:12]
    assert kept == [f"transform-least_squares-{chosen}"]


def test_vectors_that_an_interrupted_search_has_made_are_removed_by_the_one_that_goes_on(
    recipe_of, tmp_path, monkeypatch
):
    recipe = recipe_of(tmp_path / "out", scales={"choose": "auto", "trials": 2})

    def stopped(self, *point):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(transforming.OpenFilter, "tidy", lambda self, chosen: None)
        patched.setattr(transforming.OpenFilter, "arrived", stopped)
        with pytest.raises(KeyboardInterrupt):
            unlearn(recipe)
    assert len([*tmp_path.rglob("transform-least_squares-*/vector")]) == 4
    record = unlearn(recipe).record
    kept = {path.parent.name[-12:] for path in tmp_path.rglob("transform-least_squares-*/vector")}
    assert kept == {record["scales"]["filter"]["key"][:12]}
    assert not [*tmp_path.rglob(f"transform-*/{transforming.UNDECIDED}")]


@pytest.mark.parametrize("empty", [{0.0}, {100.0}, {100.0, 10.0, 0.0}, {0.0, 10.0, 100.0, 1000.0}])
def test_values_of_mu_that_leave_nothing_are_left_out(recipe_of, tmp_path, monkeypatch, empty):
    survey = transforming.Weighing._survey

    def surveyed(self):
        if self.settings.weights()[0] in empty:
            raise transforming.NothingLeftError("nothing is left")
        return survey(self)

    monkeypatch.setattr(transforming.Weighing, "_survey", surveyed)
    recipe = recipe_of(tmp_path / "out", scales={"choose": "auto", "trials": 2})
    if len(empty) == 4:
        with pytest.raises(transforming.NothingLeftError):
            unlearn(recipe)
        assert not [*tmp_path.rglob("transform-*")]
        return
    record = unlearn(recipe).record
    assert {point["mu"] for point in record["scales"]["points"]} == {0.0, 10.0, 100.0, 1000.0} - empty
    (kept,) = tmp_path.rglob("transform-*")
    assert kept.name.endswith(record["scales"]["filter"]["key"][:12])


def test_a_search_never_holds_more_than_the_best_vector_and_one_that_is_tried(
    recipe_of, tmp_path, monkeypatch
):
    held, transform = [], transforming.transform

    def counted(*given, **named):
        made = transform(*given, **named)
        vectors = [path.parent for path in tmp_path.rglob("transform-least_squares-*/vector")]
        assert all((one / transforming.UNDECIDED).exists() for one in vectors)  # whatever happens now
        held.append(len(vectors))
        return made

    monkeypatch.setattr(transforming, "transform", counted)
    unlearn(recipe_of(tmp_path / "out", scales={"choose": "auto", "trials": 2}))
    assert len(held) == 5  # four values of μ, and where the model arrives
    assert max(held) == 2


def test_the_same_run_is_found_finished(searched, run):
    assert unlearn(run("searched", squares())).finished_before


def test_killed_search_goes_on_without_asking_a_model_again(searched, run, monkeypatch):
    """All but the choice is there: it comes out the same, and neither rows nor inputs are read again, and
    no vector that lost is made again."""
    (step,) = run.workspace.glob("scales-*/step.json")
    step.unlink()
    (step.parent / "probes.json").stat()
    asked = []
    real, reads = search.score_rows, transforming.input_moments
    monkeypatch.setattr(search, "score_rows", lambda *a, **k: asked.append("rows") or real(*a, **k))
    monkeypatch.setattr(
        transforming, "input_moments", lambda *a, **k: asked.append("inputs") or reads(*a, **k)
    )
    monkeypatch.setattr(transforming, "transform", lambda *a, **k: asked.append("vector"))
    shutil.rmtree(searched.output.with_name("again"), ignore_errors=True)
    again = unlearn(run("again", squares()))
    assert asked == []
    assert again.record["scales"] == searched.record["scales"]
    assert (
        again.record["models"]["unlearned"]["fingerprint"]
        == (searched.record["models"]["unlearned"]["fingerprint"])
    )


@pytest.mark.parametrize("arrival", [True, False])
def test_arrival_can_be_asked_for_and_turned_off(run, tiny, arrival):
    done = unlearn(run(f"arrival {arrival}", squares(mu=100.0, arrival=arrival)))
    chosen = done.record["scales"]
    assert (chosen["filter"]["mu"], chosen["filter"]["arrival"]) == (100.0, arrival)
    (point,) = [point for point in chosen["points"] if point["chosen"]]
    assert point["arrival"] is arrival
    assert arrival or not any(point["arrival"] for point in chosen["points"])
    check_model(done, run, tiny)


def test_arrival_is_where_given_scales_and_those_of_a_grid_arrive(recipe_of, tmp_path, tiny):
    """β counts too; and only the vector that is used stays."""
    grid = {"choose": "grid", "forget_grid": [0.5, 0.7], "retain_grid": [0.0]}
    given = [{"forget": 0.7, "retain": 0.0}, {"forget": 0.7, "retain": 0.5}, grid]
    keys = []
    for place, scales in enumerate(given):
        settings = {"transforms": squares(arrival=True), "scales": scales}
        record = unlearn(recipe_of(tmp_path / str(place) / "out", **settings)).record
        assert record["scales"]["filter"]["arrival"] is True
        (kept,) = (tmp_path / str(place)).rglob("transform-*")
        assert kept.name.endswith(record["scales"]["filter"]["key"][:12])
        assert not (kept / transforming.UNDECIDED).exists()
        keys.append(record["scales"]["filter"]["key"])
    assert keys[0] != keys[1]


def test_a_damaged_file_of_probes_is_made_anew(run, monkeypatch):
    recipe = run("damaged probes", squares(mu=4.0, arrival=False))
    before = {*run.workspace.glob("scales-*")}
    done = unlearn(recipe)
    (step,) = {*run.workspace.glob("scales-*")} - before
    (step / "step.json").unlink()
    (step / "probes.json").write_bytes((step / "probes.json").read_bytes()[:10])
    shutil.rmtree(done.output)
    assert unlearn(recipe).record["scales"] == done.record["scales"]


def test_mu_that_is_given_is_left_as_it_is(run):
    done = unlearn(run("mu", squares(mu=3.0, arrival=False)))
    assert {point["mu"] for point in done.record["scales"]["points"]} == {3.0}


@pytest.mark.parametrize("rate", [0.5, 1.0, 6.0])
def test_alpha_that_forgets_as_the_yardstick_is_told_from_points(rate):
    """At .9 · exp(−rate · α) any point tells where .1 is; a later point at one α counts for an earlier."""
    goal = Goal(estimate_yardstick([math.log(0.1)] * 2), Behaviour([math.log(0.9)] * 2), 0.9)
    wanted = math.log(9) / rate

    def at(alpha, logprob):
        return TriedScales(alpha, 0.0, Behaviour([logprob] * 2), goal)

    def on_the_line(alpha):
        return at(alpha, math.log(0.9) - rate * alpha)

    for alpha in (0.4 * wanted, wanted, 10 * wanted):
        assert towards_the_aim([on_the_line(alpha)]) == pytest.approx(wanted, abs=0.01)
    assert towards_the_aim([on_the_line(2 * wanted), on_the_line(0.7 * wanted)]) == round(wanted, 2)
    assert towards_the_aim([at(wanted, -90.0), on_the_line(wanted)]) == round(wanted, 2)
    for forgotten in (math.log(0.9), -0.01):  # nothing, and less than nothing
        assert towards_the_aim([at(wanted, forgotten)]) == round(3 * wanted, 2)


def test_alpha_is_interpolated_where_the_probability_does_not_fall_on_a_line():
    """ln .9 − 1 at α = 1 and − 3 at α = 2: ln 9 = 2.197 is fallen at 1 + 1.197 / 2."""
    goal = Goal(estimate_yardstick([math.log(0.1)] * 2), Behaviour([math.log(0.9)] * 2), 0.9)
    points = [
        TriedScales(alpha, 0.0, Behaviour([math.log(0.9) - fallen] * 2), goal)
        for alpha, fallen in ((2.0, 3.0), (1.0, 1.0))
    ]
    assert towards_the_aim(points) == 1.6
    assert towards_the_aim(points[1:]) == 2.2
    target = replace(goal, target=Behaviour([math.log(0.1)] * 2))
    assert towards_the_aim([TriedScales(1.0, 0.0, Behaviour([-3.0] * 2), target)]) == 0.0


# What is kept


def test_another_mu_finds_the_moments_there(searched, run, tiny):
    before = steps(run, "moments")
    done = unlearn(run("another", squares(mu=7.0, epsilon=0.5), scales={"forget": 1.0, "retain": 0.0}))
    assert steps(run, "moments") == before
    assert done.record["vectors"]["transforms"][0]["settings"]["mu"] == 7.0
    assert not done.record["scales"].get("filter")  # nothing was chosen
    check_model(done, run, tiny)


def test_other_rows_and_other_positions_have_moments_of_their_own(searched, run):
    before = steps(run, "moments")
    given = {"scales": {"forget": 1.0, "retain": 0.0}}
    unlearn(run("answers", squares(mu=7.0, positions="answers"), **given))
    assert len(steps(run, "moments")) == len(before) + 2
    unlearn(run("fewer", squares(mu=7.0, rows=5), **given))
    assert len(steps(run, "moments")) == len(before) + 4


def test_given_scales_can_be_read_where_the_model_arrives(run, tiny):
    """θ_D − α · the filtered vector is where inputs are read again."""
    given = {"scales": {"forget": 1.0, "retain": 0.0}}
    there = unlearn(run("given", squares(mu=7.0, arrival=True), **given))
    assert there.record["scales"]["filter"]["arrival"]
    here = unlearn(run("here", squares(mu=7.0, arrival=False), **given))
    check_model(there, run, tiny)
    model = load_model(
        Checkpoint.open(here.output), device=torch.device("cpu")
    )  # the model at which the other one was filtered
    rows = open_inputs(run("here", squares())).rows
    found = []
    for own in (rows.forget, rows.spared):
        tokens = tokenize(
            at_most(own, 12, seed=0), load_tokenizer(tiny.target), max_length=64, style=PromptStyle()
        )
        groups = list(input_moments(model, tokens, pad_id=0))
        found.append({key: value.numpy() for group in groups for key, value in group.values.items()})
    name = "model.layers.1.mlp.down_proj"
    axes = basis_of(found[1][name], energy=0.9)
    rule = least_squares(*(moments[name] for moments in found), mu=7.0, epsilon=0.07, axes=axes)
    (path,) = run.workspace.glob("finetune-forget-*/model/model.safetensors")
    start = load_file(tiny.base.folder / "model.safetensors")[f"{name}.weight"]
    made = along((load_file(path)[f"{name}.weight"] - start).numpy(), rule, 1)
    found = check_model(there, run, tiny)[f"{name}.weight"].numpy()
    factor = there.record["vectors"]["transforms"][0]["survives"]
    assert found == pytest.approx(made / factor, rel=1e-3, abs=1e-6)


# Vectors and models of other kinds


def test_low_rank_vector_is_filtered_and_stays_of_low_rank(run, tiny):
    lora = {"lora": {"rank": 2}, "learning_rate": 1e-2}
    given = {"scales": {"forget": 0.5, "retain": 0.0}}
    done = unlearn(run("lora", squares(mu=5.0), training=lora, **given))
    vector = check_model(done, run, tiny)
    matrices = [value for value in vector.values() if value.dim() == 2 and value.any()]
    assert len(matrices) == 14
    for value in matrices:
        size = torch.linalg.svdvals(value)
        assert size[2] < 1e-5 * size[0]
        assert size[1] > 1e-5 * size[0]


@pytest.mark.parametrize("others", ["keep", "drop", "filter"])
def test_other_tensors_are_kept_taken_out_or_filtered(run, tiny, others):
    given = {"scales": {"forget": 0.5, "retain": 0.0}}
    done = unlearn(run(f"others {others}", squares(mu=7.0, others=others), **given))
    vector = check_model(done, run, tiny)
    (path,) = [
        path for path in run.workspace.glob("finetune-forget-*/model/model.safetensors") if path.exists()
    ]
    trained, start = load_file(path), load_file(tiny.base.folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        plain = trained[name] - start[name]
        if others == "drop":
            assert name not in vector or not vector[name].any()
        elif others == "keep":
            torch.testing.assert_close(vector[name].float(), plain)
        else:
            assert vector[name].any()
            assert not torch.allclose(vector[name].float(), plain)


def test_each_expert_is_filtered_by_the_tokens_it_is_sent(recipe_of, tiny, tmp_path):
    """The files hold a tensor for each expert, and the live model all of a layer in one."""
    words = tiny.base.config["vocab_size"]
    config = MixtralConfig(
        vocab_size=words, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    for seed, name in enumerate(("base", "target")):
        torch.manual_seed(seed)
        shutil.copytree(
            tiny.base.folder,
            tmp_path / name,
            ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json"),
        )
        MixtralForCausalLM(config).save_pretrained(tmp_path / name)
    recipe = recipe_of(
        tmp_path / "out",
        models={name: str(tmp_path / name) for name in ("base", "target")},
        scales={"forget": 0.5, "retain": 0.0},
        transforms=squares(mu=5.0, epsilon=0.1),
        training={**TRAINING, "epochs": 1},
    )
    done = unlearn(recipe)
    rows = open_inputs(recipe).rows
    model = load_model(Checkpoint.open(tmp_path / "target"), device=torch.device("cpu"))
    found = []
    for own in (rows.forget, rows.spared):
        tokens = tokenize(
            at_most(own, 12, seed=0), load_tokenizer(tiny.target), max_length=64, style=PromptStyle()
        )
        groups = list(input_moments(model, tokens, pad_id=0))
        found.append({key: value.numpy() for group in groups for key, value in group.values.items()})
    (trained,) = tmp_path.rglob("finetune-forget-*/model/model.safetensors")
    (folder,) = tmp_path.rglob("transform-least_squares-*/vector")
    after, before = load_file(trained), load_file(tmp_path / "base" / "model.safetensors")
    vector, factor = dense(StoredVector.open(folder)), done.record["vectors"]["transforms"][0]["survives"]
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 9
    for name in experts:
        number, part = name.split(".experts.")[1].split(".")[:2]
        key = f"model.layers.0.mlp.experts.{number}.{'out' if part == 'w2' else 'in'}"
        axes = basis_of(found[1][key], energy=0.9)
        rule = least_squares(*(moments[key] for moments in found), mu=5.0, epsilon=0.1, axes=axes)
        made = along((after[name] - before[name]).numpy(), rule, 1) / factor
        assert vector[name].numpy() == pytest.approx(made, rel=1e-3, abs=1e-6), name


def test_experts_that_lie_in_one_tensor_have_a_filter_each():
    random = np.random.default_rng(0)
    values, filters = random.normal(size=(3, 4, 5)), random.normal(size=(3, 5, 5))
    found = applied(values, (["0", "1", "2"], 2), lambda key: filters[int(key)])
    assert found == pytest.approx(np.einsum("eoi,eij->eoj", values, filters))


# What is kept is whole, or measured anew


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_moments_that_are_not_whole_any_more_are_measured_anew(run, tmp_path, damage):
    """The same vector comes of it, bit for bit."""

    def filtered(name):
        recipe = run(name, squares(mu=10.0), scales={"forget": 1.0, "retain": 0.0})
        own = {"folder": str(tmp_path / name), "workspace": str(tmp_path / "workspace")}
        done = unlearn(recipe.model_copy(update={"output": recipe.output.model_copy(update=own)}))
        return (done.output / "model.safetensors").read_bytes()

    first = filtered("first")
    for path in (tmp_path / "workspace").glob("moments-*/moments-001.safetensors"):
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1])
    for step in ("transform-*", "apply-*"):
        for folder in (tmp_path / "workspace").glob(step):
            shutil.rmtree(folder)
    assert filtered("second") == first


def test_background_that_is_the_forget_set_is_refused_at_once(run, tiny):
    data = {"retain": None, "background": str(tiny.forget)}
    with pytest.raises(DataError, match="every background row also stands in the forget set"):
        open_inputs(run("same", squares(), data=data))


def test_report_and_card_say_how_the_vector_was_filtered(searched):
    (told,) = searched.record["vectors"]["transforms"]
    card, page = ((searched.output / name).read_text(encoding="utf-8") for name in ("README.md", "report.md"))
    for text in (card, page):
        assert f"filtered by least squares first (μ = {told['settings']['mu']:g})" in text
        again = "again by what the layers read where the model arrives"
        assert (again in text) == searched.record["scales"]["filter"]["arrival"]


def test_search_leaves_the_vector_of_another_run_in_its_workspace(run, tiny):
    fixed = unlearn(run("fixed", squares(mu=10.0), scales={"forget": 1.0, "retain": 0.0}, seed=3))
    other = unlearn(run("other", squares(), seed=3))
    assert other.record["scales"]["filter"]["key"] != fixed.record["steps"]["transform"]
    check_model(fixed, run, tiny)
