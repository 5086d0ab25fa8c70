"""Transforms of a recipe: each one's vector is what its formula says of the plain run's, and is recorded."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from palinode import StoredVector
from palinode.data.examples import at_most
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.errors import InputError, RecipeError
from palinode.methods.transforms import TRANSFORMS, LeastSquaresSettings
from palinode.models import load_model, load_tokenizer
from palinode.models.loading import save_tensors
from palinode.pipeline import transforming
from palinode.pipeline.inputs import open_inputs
from palinode.pipeline.run import run_key, unlearn
from palinode.pipeline.transforming import MomentFiles, Weighing, _in_half
from palinode.pipeline.workspace import Workspace
from palinode.records import read_json
from palinode.training.moments import basis_of, input_moments, projection
from palinode.weights.tensors import Files

GIVEN = {"forget": 0.5, "retain": 0.0}

CASES = {
    "projection": {"rows": 4, "energy": 0.5},
    "least_squares": {"rows": 8, "mu": 10.0, "epsilon": 0.1, "others": "filter"},
    "low_rank": {"rank": 2},
    "layer_scales": {"scales": {r"model\.layers\.0\..*": 0.5}},
}


@pytest.fixture(scope="module")
def run(recipe_of, tmp_path_factory):
    """A function that runs the tiny world with transforms, all in one workspace."""
    folder = tmp_path_factory.mktemp("transforms")

    def build(name, *transforms, **sections):
        output = {"folder": str(folder / name), "workspace": str(folder / "workspace")}
        return recipe_of(
            folder / name, transforms=list(transforms), output=output, **{"scales": GIVEN, **sections}
        )

    build.workspace = folder / "workspace"
    return build


@pytest.fixture(scope="module")
def plain(run, tiny):
    """The plain forget vector, tensor by tensor."""
    unlearn(run("plain"))
    (model,) = run.workspace.glob("finetune-forget-*/model")
    start = load_file(tiny.base.folder / "model.safetensors")
    return {name: value - start[name] for name, value in load_file(model / "model.safetensors").items()}


def transformed(run, name):
    """The vector and the record of a run with one transform."""
    done = unlearn(run(name, {"name": name, **CASES[name]}))
    (facts,) = done.record["vectors"]["transforms"]
    (folder,) = run.workspace.glob(f"transform-{name}-*/vector")
    return dense(StoredVector.open(folder)), facts, done


def moments_of(tiny, rows):
    """What the target's layers read of rows, by the name of a tensor: moment and axis."""
    tokens = tokenize(rows, load_tokenizer(tiny.target), max_length=64, style=PromptStyle())
    model = load_model(tiny.target, device=torch.device("cpu"))
    return {
        name: (group.values[keys[0]].numpy(), axis)
        for group in input_moments(model, tokens, pad_id=0)
        for name, [(keys, axis), *_] in group.places.items()
    }


def dense(vector):
    found = {}
    for name, change in vector.changes.items():
        values = np.empty(int(np.prod(change.shape)))
        with Files() as files:
            change.read(files, 0, values)
        found[name] = torch.from_numpy(values.reshape(change.shape))
    return found


def test_every_transform_has_a_case_here():
    assert set(CASES) == set(TRANSFORMS)


@pytest.mark.parametrize("name", CASES)
def test_record_names_what_was_done_and_the_model_is_made_with_it(run, plain, tiny, name):
    vector, facts, done = transformed(run, name)
    assert facts["name"] == name
    assert facts["formula"] == TRANSFORMS[name].formula
    assert 0 < facts["cosine"] <= 1 + 1e-6
    size, before = (
        sum(float(value.square().sum()) for value in own.values()) ** 0.5 for own in (vector, plain)
    )
    assert facts["norm_share"] == pytest.approx(size / before, rel=1e-4)
    assert facts["norm"] == pytest.approx(size, rel=1e-5)
    assert done.record["vectors"]["forget"]["norm"] == pytest.approx(size, rel=1e-5)
    target, made = (load_file(place / "model.safetensors") for place in (tiny.target.folder, done.output))
    for tensor, value in made.items():
        change = vector.get(tensor, torch.zeros(value.shape))
        torch.testing.assert_close(value, (target[tensor].double() - 0.5 * change).float(), rtol=0, atol=1e-6)
    assert unlearn(run(name, {"name": name, **CASES[name]})).finished_before


def test_low_rank_keeps_the_leading_singular_values(run, plain):
    vector, _, _ = transformed(run, "low_rank")
    name = "model.layers.0.mlp.down_proj.weight"
    left, values, right = np.linalg.svd(plain[name].double().numpy(), full_matrices=False)
    assert vector[name].numpy() == pytest.approx(left[:, :2] * values[:2] @ right[:2], abs=1e-5)


def test_projected_vector_does_nothing_to_the_spared_inputs(run, plain, tiny):
    vector, _, _ = transformed(run, "projection")
    moments = moments_of(tiny, at_most(open_inputs(run("plain")).rows.retain_sample, 4, seed=0))
    layers = [name for name in plain if "layers." in name and "norm" not in name]
    assert len(layers) == 14
    for name in layers:
        basis = torch.from_numpy(basis_of(moments[name][0], energy=0.5))
        assert float((vector[name] @ basis).abs().max()) < 1e-5 * float(plain[name].abs().max())
        others = plain[name].double() - plain[name].double() @ basis @ basis.T
        torch.testing.assert_close(vector[name], others, rtol=1e-4, atol=1e-6)
    for name in plain.keys() - set(layers):
        torch.testing.assert_close(vector[name].float(), plain[name])


def test_least_squares_filters_every_tensor_by_what_it_reads_and_gives_the_effect_back(run, plain, tiny):
    """Δ = τ(Σ_f + εI)(Σ_f + εI + μΣ_r)⁻¹(I − UUᵀ), worked out here, over c = tr τΣ_fΔᵀ / tr τΣ_fτᵀ.

    c is that of all matrices of the blocks together, and each other tensor's own.
    """
    vector, facts, _ = transformed(run, "least_squares")
    rows = open_inputs(run("plain")).rows
    forget, spared = (moments_of(tiny, at_most(own, 8, seed=0)) for own in (rows.forget, rows.spared))
    made, kept, before = {}, {}, {}
    for name, value in plain.items():
        (ours, axis), (theirs, _) = forget[name], spared[name]
        assert axis == (0 if ours.ndim == 1 else 1)
        wide, (own, other) = value.double().numpy(), (part.astype(float) for part in (ours, theirs))
        if own.ndim == 1:  # one weight a token, or a channel
            wide, own, other = wide.T, np.diag(own), np.diag(other)
        with_ridge = own + 0.1 * np.trace(own) / len(own) * np.eye(len(own))
        found = wide @ with_ridge @ np.linalg.inv(with_ridge + 10.0 * other)
        if ours.ndim == 2:
            found = found @ projection(basis_of(theirs, energy=0.9))
        sums = (np.trace(np.atleast_2d(wide @ own) @ np.atleast_2d(part).T) for part in (found, wide))
        kept[name], before[name] = sums
        made[name] = found.T if ours.ndim == 1 else found
    layers = [name for name in plain if forget[name][0].ndim == 2]
    assert len(layers) == 14
    share = sum(kept[name] for name in layers) / sum(before[name] for name in layers)
    assert facts["survives"] == pytest.approx(share, rel=1e-4)
    for name, value in made.items():
        own = share if name in layers else kept[name] / before[name]
        near = 2e-4 * np.abs(value / own).max()  # the moments are of float32 passes
        assert vector[name].numpy() == pytest.approx(value / own, rel=1e-3, abs=near), name


def test_projection_of_layers_that_store_their_weights_transposed(recipe_of, tiny, tmp_path):
    """GPT-2's weights are (in, out), so that τ becomes (I − U Uᵀ) τ, in square layers as in others."""
    words = tiny.base.config["vocab_size"]
    config = GPT2Config(vocab_size=words, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1,
                        eos_token_id=1, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)  # fmt: skip
    for seed, name in enumerate(("base", "target")):
        torch.manual_seed(seed)
        shutil.copytree(
            tiny.base.folder,
            tmp_path / name,
            ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json"),
        )
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    models = {name: str(tmp_path / name) for name in ("base", "target")}
    transforms = [{"name": "projection", "rows": 4, "energy": 0.5}]
    training = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 16, "max_length": 64}
    unlearn(
        recipe_of(tmp_path / "out", models=models, scales=GIVEN, transforms=transforms, training=training)
    )
    (step,) = tmp_path.rglob("moments-*/step.json")
    kept = MomentFiles(Workspace(step.parents[1]).step_of("moments", read_json(step)["key"]))
    (trained,) = tmp_path.rglob("finetune-forget-*/model/model.safetensors")
    (folder,) = tmp_path.rglob("transform-projection-*/vector")
    after, before = load_file(trained), load_file(tmp_path / "base" / "model.safetensors")
    vector = dense(StoredVector.open(folder))
    layers = [name for name in vector if ".c_" in name and name.endswith(".weight")]
    assert len(layers) == 4
    for name in layers:
        (key,), axis = kept.matrix_place(name)
        assert axis == 0
        basis = torch.from_numpy(basis_of(kept.read(key), energy=0.5)).float()
        change = after[name] - before[name]
        assert len(basis) == len(change)  # (in, out)
        torch.testing.assert_close(
            vector[name].float(), change - basis @ (basis.T @ change), rtol=1e-4, atol=1e-7
        )


def test_transforms_follow_one_another_and_make_another_run(run, plain):
    two = run("two", {"name": "low_rank", **CASES["low_rank"]}, {"name": "projection", **CASES["projection"]})
    done = unlearn(two)
    assert [facts["name"] for facts in done.record["vectors"]["transforms"]] == ["low_rank", "projection"]
    keys = {
        run_key(open_inputs(recipe))
        for recipe in (two, run("plain"), run("x", {"name": "projection", **CASES["projection"]}))
    }
    assert len(keys) == 3


def test_paired_and_task_vectors_are_transformed_as_well(run, plain):
    for method in ("paired", "task_vector"):
        done = unlearn(run(method, {"name": "projection", **CASES["projection"]}, method=method))
        assert done.record["vectors"]["transforms"][0]["norm_share"] < 1


def test_retain_kl_holds_the_run_nearer_to_its_start(run, plain, tiny):
    held = unlearn(run("held", method_settings={"retain_kl": 100.0}))
    assert held.record["method"]["settings"] == {"retain_kl": 100.0}
    size = sum(float(value.square().sum()) for value in plain.values()) ** 0.5
    assert held.record["vectors"]["forget"]["norm"] < 0.9 * size
    assert held.record["scores"]["unlearned"].keys() >= {"forget", "retain", "retain_unseen"}


@pytest.mark.parametrize(
    ("transforms", "sections", "said"),
    [
        ([{"name": "fisher"}], {}, "there is no transform 'fisher'; choose one of projection, least_squares"),
        ([{"name": "low_rank"}], {}, "name a rank or an energy"),
        ([{"name": "projection", "gamma": 1}], {}, r"transforms\.gamma"),
        ([{"name": "layer_scales", "scales": {"(": 1.0}}], {}, "is no pattern"),
        ([{"name": "projection"}], {"data": {"retain": None}}, "needs retain rows"),
        (
            [],
            {"method_settings": {"retain_kl": 1.0}, "data": {"retain": None}},
            "retain_kl needs retain rows",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_is_refused_with_the_recipe(run, recipe_of, tmp_path, transforms, sections, said):
    with pytest.raises(RecipeError, match=said):
        recipe_of(tmp_path / "out", transforms=transforms, **sections)


def test_transform_that_leaves_nothing_is_one_sentence(run, plain):
    recipe = run("nothing", {"name": "layer_scales", "scales": {".*": 0.0}})
    with pytest.raises(InputError, match="layer_scales leaves nothing of the forget vector"):
        unlearn(recipe)


def test_mu_of_nothing_is_projection(recipe_of, tiny, tmp_path):
    """τ(I − UUᵀ), with its effect on the forget inputs given back: one factor for all blocks."""
    transforms = [{"name": "least_squares", "mu": 0.0, "energy": 0.5, "rows": 8}]
    done = unlearn(recipe_of(tmp_path / "out", transforms=transforms, scales=GIVEN))
    (facts,) = done.record["vectors"]["transforms"]
    _forget, spared = sorted(tmp_path.rglob("moments-*/step.json"), key=lambda path: path.stat().st_mtime)
    kept = MomentFiles(Workspace(spared.parents[1]).step_of("moments", read_json(spared)["key"]))
    (folder,) = tmp_path.rglob("transform-least_squares-*/vector")
    (trained,) = tmp_path.rglob("finetune-forget-*/model/model.safetensors")
    before = load_file(tiny.base.folder / "model.safetensors")
    after, vector = load_file(trained), dense(StoredVector.open(folder))
    for name, value in vector.items():
        if place := kept.matrix_place(name):
            (key,), axis = place
            rest = torch.from_numpy(projection(kept.axes(key, 0.5))).float()
            assert axis == 1
            wanted = (after[name] - before[name]) @ rest / facts["survives"]
            torch.testing.assert_close(value.float(), wanted, rtol=1e-3, atol=1e-5)
        else:
            assert not value.any()


@pytest.fixture
def moments(tmp_path):
    """A function that stores moments as a finished step does."""

    def stored(**values):
        save_tensors(dict(_in_half(values)), tmp_path / "moments-000.safetensors")
        files = {key: ("moments-000.safetensors", value.ndim) for key, value in values.items()}
        return MomentFiles(SimpleNamespace(folder=tmp_path, facts={"files": files, "places": {}}))

    return stored


def test_axes_are_kept_and_made_again_where_they_are_damaged(moments, tmp_path, monkeypatch):
    rows = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    kept = moments(one=rows.T @ rows)
    found = kept.axes("one", 0.7)
    assert np.array_equal(found, basis_of(kept.read("one"), energy=0.7).astype(np.float32))
    (path,) = tmp_path.glob("axes-*")
    path.write_bytes(path.read_bytes()[:40])
    assert np.array_equal(kept.axes("one", 0.7), found)
    path.write_bytes(b"")
    (tmp_path / f".{path.name}.partial").write_bytes(b"what a killed run has left")
    assert np.array_equal(kept.axes("one", 0.7), found)
    monkeypatch.setattr(transforming, "basis_of", None)
    assert np.array_equal(kept.axes("one", 0.7), found)
    assert not [*tmp_path.glob(".axes-*")]


def test_where_the_retain_rows_have_no_inputs_no_axis_is_left_alone(moments):
    kept = moments(expert=np.zeros((6, 6), np.float32))
    weighing = Weighing(None, kept, LeastSquaresSettings(mu=1.0, epsilon=0.1, energy=0.9))
    np.testing.assert_allclose(weighing.filter_of("expert"), np.eye(6), atol=1e-8)
