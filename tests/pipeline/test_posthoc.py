"""What training changed, or an unlearned model of any tool, is a vector that can be filtered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from palinode import StoredVector
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.errors import RecipeError
from palinode.models import load_model, load_tokenizer
from palinode.pipeline.chatting import open_chat
from palinode.pipeline.inputs import open_inputs
from palinode.pipeline.recipe import build_recipe
from palinode.pipeline.run import unlearn
from palinode.weights.tensors import Files

FILTER = {"name": "least_squares", "mu": 10.0, "epsilon": 0.1, "arrival": False}
SEARCHED = {"choose": "auto", "trials": 3, "forget_grid": [0.5, 1.0, 2.0], "probe_rows": 20}


@pytest.fixture(scope="module")
def run(recipe_of, tmp_path_factory):
    """A function that runs GradDiff in the tiny world, without a base, all in one workspace."""
    folder = tmp_path_factory.mktemp("posthoc")

    def build(name, *transforms, scales=None, **sections):
        output = {"folder": str(folder / name), "workspace": str(folder / "workspace")}
        training = {"epochs": 3, "learning_rate": 1e-3}
        given = {"method": "grad_diff", "transforms": list(transforms), "models": {"base": None}}
        own = {"scales": scales or {"probe_rows": 20}, "training": training, "output": output}
        return recipe_of(folder / name, **given, **own, **sections)

    build.workspace = folder / "workspace"
    return build


@pytest.fixture(scope="module")
def plain(run):
    """The model as GradDiff leaves it."""
    return unlearn(run("plain"))


@pytest.fixture(scope="module")
def filtered(run, plain):
    """The same with its change filtered, α searched without a base."""
    return unlearn(run("filtered", FILTER, scales=SEARCHED))


def tensors(folder):
    return load_file(folder / "model.safetensors")


def inputs_of(folder, examples, name, max_length=64):
    """The moments of a layer's inputs over all tokens, by a hook."""
    from palinode import Checkpoint

    checkpoint = Checkpoint.open(folder)
    model, tokenizer, found = load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint), []
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, given: found.append(given[0][0].double()))
    for row in tokenize(examples, tokenizer, max_length=max_length, style=PromptStyle()):
        with torch.no_grad():
            model(torch.tensor([row.ids]))
    rows = torch.cat(found).numpy()
    return rows.T @ rows / len(rows)


def test_filtered_model_is_the_target_less_the_filtered_change(run, plain, filtered, tiny):
    """Of a layer: θ_D − α·c⁻¹·τF, τ = θ_D − θ_trained, F of moments that a hook here has measured."""
    record, rows = filtered.record, open_inputs(run("look", FILTER)).rows
    before, after = tensors(tiny.target.folder), tensors(filtered.output)
    trained = tensors(plain.output)
    name, alpha = "model.layers.0.mlp.up_proj", record["scales"]["forget"]
    ours, theirs = (inputs_of(tiny.target.folder, found, name) for found in (rows.forget_train, rows.spared))
    added = 0.1 * np.trace(ours) / len(ours) * np.eye(len(ours))
    factor = (ours + added) @ np.linalg.inv(ours + added + 10.0 * theirs)
    change = (before[f"{name}.weight"] - trained[f"{name}.weight"]).double().numpy() @ factor
    share = record["vectors"]["transforms"][0]["survives"]
    wanted = before[f"{name}.weight"].double().numpy() - alpha / share * change
    np.testing.assert_allclose(after[f"{name}.weight"].numpy(), wanted, atol=2e-5)
    assert record["scales"]["retain"] == 0
    assert alpha > 0
