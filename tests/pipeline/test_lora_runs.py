"""The main job with low-rank vectors: search, record, what is kept, and `apply` on the same adapters."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from palinode.pipeline.run import dry_run, unlearn

LORA = {"training": {"lora": {"rank": 4}, "learning_rate": 1e-2}}


def test_search_and_result_are_those_of_the_adapters_products(recipe_of, tiny, palinode, tmp_path):
    full, low = (recipe_of(tmp_path / "out", **sections) for sections in ({}, LORA))
    assert dry_run(low).disk < dry_run(full).disk
    done = unlearn(low)
    assert done.record["scales"]["chosen_by"] != "given"
    assert done.record["recipe"]["training"]["lora"]["rank"] == 4
    workspace = tmp_path / "out.workspace"
    (forget,) = workspace.glob("finetune-forget-*/adapter")
    (retain,) = workspace.glob("finetune-retain-*/adapter")
    assert not list(workspace.glob("finetune-*/model"))
    scales = done.record["scales"]
    said = palinode(
        "apply", "--target", tiny.target.folder, "--forget-model", forget, "--retain-model", retain,
        "--scales", f"{scales['forget']},{scales['retain']}",
        "--output", tmp_path / "again",
    )  # fmt: skip
    assert said.code == 0, said.err
    ours, theirs = (load_file(place / "model.safetensors") for place in (done.output, tmp_path / "again"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert unlearn(low).finished_before


def test_method_that_trains_the_target_saves_target_and_product_in_one(recipe_of, tiny, tmp_path):
    done = unlearn(recipe_of(tmp_path / "out", method="npo", **LORA))
    (adapter,) = (tmp_path / "out.workspace").glob("finetune-npo-*/adapter")
    factors = load_file(adapter / "adapter_model.safetensors")
    target, made = (load_file(place / "model.safetensors") for place in (tiny.target.folder, done.output))
    moved = [name for name, value in made.items() if not torch.equal(value, target[name])]
    assert len(moved) == len(factors) // 2
    name = "model.layers.1.mlp.up_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = target[f"{name}.weight"] + 2 * (b @ a)
    torch.testing.assert_close(made[f"{name}.weight"], expected, rtol=0, atol=1e-6)
