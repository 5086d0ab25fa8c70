"""`palinode vector` and `palinode vector save`: what they print, and what they refuse in one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from palinode.cli.app import app
from palinode.weights.vectors import StoredVector


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def difference(tiny):
    """target − base, as torch computes it, and its norm."""
    base, target = (load_file(model.folder / "model.safetensors") for model in (tiny.base, tiny.target))
    found = {name: target[name].double() - base[name].double() for name in base}
    return found, math.sqrt(sum(float(tensor.square().sum()) for tensor in found.values()))


@pytest.fixture
def save(palinode, tiny):
    """A function that stores target − base."""

    def run(output, *words):
        return palinode(
            *("vector", "save", "--base", tiny.base.folder, "--model", tiny.target.folder),
            *("--output", output, *words),
        )

    return run


@pytest.fixture
def adapter(tiny, here):
    """A LoRA adapter for the tiny model, written by hand."""
    shape = load_file(tiny.base.folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].shape
    folder = here / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 3}))
    module = "base_model.model.model.layers.0.mlp.up_proj"
    save_file(
        {
            f"{module}.lora_A.weight": torch.ones(1, shape[1]),
            f"{module}.lora_B.weight": torch.ones(shape[0], 1),
        },
        folder / "adapter_model.safetensors",
    )
    return folder, 3 * math.sqrt(math.prod(shape))


# save


def test_save_prints_norm_size_and_error(save, difference):
    tensors, norm = difference
    said = save("out")
    size = 4e-6 * sum(tensor.numel() for tensor in tensors.values())
    assert said.code == 0
    assert said.out == (
        f"out: norm {norm:.5g}, {len(tensors)} tensors in float32, whole, {size:.4g} MB; relative error 0\n"
    )
    assert said.err.startswith("storing: ")
    assert StoredVector.open("out").norm == pytest.approx(norm, rel=1e-6)


def test_save_as_json_is_the_facts_and_nothing_else(save, difference, here):
    said = save("out", "--dtype", "bfloat16", "--json", "--quiet")
    facts = json.loads(said.out)
    tensors, norm = difference
    assert said.err == ""
    rest = sum(
        float((tensor - tensor.float().bfloat16().double()).square().sum()) for tensor in tensors.values()
    )
    weights = sum(tensor.numel() for tensor in tensors.values())
    assert facts == {
        "output": "out",
        "kind": "dense",
        "dtype": "bfloat16",
        "tensors": len(tensors),
        "weights": weights,
        "ranks": None,
        "norm": pytest.approx(norm, rel=1e-6),
        "bytes": 2 * weights,
        "relative_error": pytest.approx(math.sqrt(rest) / norm, rel=1e-4),
    }


def test_save_at_a_rank_or_an_energy(save, difference, here):
    tensors, norm = difference
    facts = json.loads(save("rank", "--rank", 2, "--json", "--quiet").out)
    assert (facts["kind"], facts["ranks"]) == ("low_rank", [2, 2])
    rest = sum(
        float(torch.linalg.svdvals(tensor)[2:].square().sum())
        for tensor in tensors.values()
        if tensor.ndim == 2
    )
    assert facts["relative_error"] == pytest.approx(math.sqrt(rest) / norm, rel=1e-3)
    assert facts["bytes"] < 4 * facts["weights"] / 3
    text = save("rank2", "--rank", 2, "--quiet").out
    assert "rank 2, " in text
    assert " MB instead of " in text
    assert f"relative error {facts['relative_error']:.3g}" in text
    facts = json.loads(save("energy", "--energy", 0.5, "--json", "--quiet").out)
    assert facts["relative_error"] <= math.sqrt(0.5)
    assert facts["ranks"][0] >= 1


def test_a_stored_vector_or_an_adapter_is_stored_anew(palinode, save, adapter, here):
    save("whole", "--quiet")
    words = ("vector", "save", "--vector", "whole", "--output", "small", "--rank", 1, "--quiet", "--json")
    assert json.loads(palinode(*words).out)["ranks"] == [1, 1]
    folder, norm = adapter
    words = ("vector", "save", "--vector", folder, "--output", "adapted", "--energy", 1, "--json", "--quiet")
    facts = json.loads(palinode(*words).out)
    assert (facts["ranks"], facts["tensors"]) == ([1, 1], 1)
    assert facts["norm"] == pytest.approx(norm)
    assert facts["relative_error"] < 1e-6


# measure


def test_models_vectors_and_adapters_are_measured_together(palinode, save, adapter, tiny, difference):
    save("stored", "--quiet")
    folder, norm = adapter
    words = (
        *("vector", "--base", tiny.base.folder, "--model", tiny.target.folder),
        *("--vector", "stored", "--vector", folder),
    )
    found = json.loads(palinode(*words, "--json").out)
    target = str(tiny.target.folder)
    assert found["all"]["norms"] == {
        target: pytest.approx(difference[1], rel=1e-5),
        "stored": pytest.approx(difference[1], rel=1e-5),
        str(folder): pytest.approx(norm, rel=1e-5),
    }
    cosines = {tuple(pair["between"]): pair["cosine"] for pair in found["all"]["cosines"]}
    change = difference[0]["model.layers.0.mlp.up_proj.weight"]
    expected = 3 * float(change.sum()) / (norm * difference[1])
    assert cosines[target, "stored"] == pytest.approx(1, abs=1e-5)
    assert cosines["stored", str(folder)] == pytest.approx(expected, abs=1e-5)
    layer = found["parts"]["layer 1"]
    assert layer["norms"][str(folder)] == 0
    assert [pair["cosine"] for pair in layer["cosines"] if str(folder) in pair["between"]] == [None, None]
    said = palinode(*words, "--layers", "--quiet")
    assert (said.code, said.err) == (0, "")
    assert "layer 1" in said.out
    assert f"{norm:.5g}" in said.out


def test_vectors_are_measured_without_any_model(palinode, save, adapter, difference):
    save("stored", "--quiet")
    found = json.loads(palinode("vector", "--vector", "stored", "--vector", adapter[0], "--json").out)
    assert found["all"]["norms"]["stored"] == pytest.approx(difference[1], rel=1e-5)
    alone = json.loads(palinode("vector", "--vector", adapter[0], "--json").out)
    assert alone["all"] == {"norms": {str(adapter[0]): pytest.approx(adapter[1])}, "cosines": []}


def test_names_in_brackets_are_printed_as_they_are(palinode, save, here):
    save("[bold]v", "--quiet")
    assert "[bold]v" in palinode("vector", "--vector", "[bold]v", "--vector", "[bold]v", "--layers").out
    assert save("[red]w", "--quiet").out.startswith("[red]w: norm")


def test_an_adapter_in_a_pickle_is_read_when_allowed(palinode, adapter):
    folder, norm = adapter
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert "or allow pickles" in palinode("vector", "--vector", folder).refusal
    found = json.loads(palinode("vector", "--vector", folder, "--allow-pickle", "--json").out)
    assert found["all"]["norms"][str(folder)] == pytest.approx(norm)


# refuse


def test_what_cannot_be_measured_is_refused_in_a_sentence(palinode, tiny, here):
    base, target = tiny.base.folder, tiny.target.folder
    nothing = "there is no vector to measure; name --base and --model, or --vector"
    assert palinode("vector").refusal == nothing
    assert palinode("vector", "--base", base).refusal == nothing
    assert "needs the point that it starts from; name --base" in palinode("vector", "--model", target).refusal
    assert "there is no folder nowhere" in palinode("vector", "--vector", "nowhere").refusal
    assert "holds neither a stored vector" in palinode("vector", "--vector", target).refusal
    assert "No such command 'sav'" in palinode("vector", "sav").refusal
    moved = palinode("vector", "--base", base, "save", "--model", target, "--output", "out").refusal
    assert moved == "options of 'save' come after that word; move them there"
    assert list(here.iterdir()) == []


def test_vectors_of_another_model_are_refused(palinode, tiny, here):
    save_file({"w": torch.ones(2)}, here / "other.safetensors")
    folder = here / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    factors = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}
    save_file(factors, folder / "adapter_model.safetensors")
    words = ("vector", "--base", tiny.base.folder, "--model", tiny.target.folder, "--vector", folder)
    assert "changes x.weight, and" in palinode(*words).refusal
    save_file({"x.lora_A.weight": torch.ones(1, 2)}, folder / "adapter_model.safetensors")
    assert "has only A of x" in palinode("vector", "--vector", folder).refusal


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dtype", "int8"], "a vector cannot be stored in 'int8'; choose one of float32, bfloat16"),
        (["--rank", "0"], "a rank of 0 leaves nothing"),
        (["--energy", "2"], "an energy of 2.0 is no share"),
        (["--energy", "nan"], "an energy of nan is no share"),
        (["--rank", "1", "--energy", "0.5"], "a rank and an energy were given"),
        (["--vector", "x"], "one vector is stored at a time"),
        (["--rank", "many"], "'--rank'"),
    ],
)
def test_settings_that_cannot_be_are_refused(save, here, words, said):
    assert said in save("out", *words, "--quiet").refusal
    assert list(here.iterdir()) == []


def test_what_cannot_be_stored_is_refused_in_a_sentence(palinode, tiny, save, here):
    base, target = tiny.base.folder, tiny.target.folder
    assert "Missing option '--output'; see palinode vector save --help" in palinode("vector", "save").refusal
    assert "one vector is stored at a time" in palinode("vector", "save", "--output", "o").refusal
    assert "name --base" in palinode("vector", "save", "--model", target, "--output", "o").refusal
    words = ("vector", "save", "--base", base, "--model", base, "--output", "o", "--quiet")
    assert "the direction is zero" in palinode(*words).refusal
    assert "lie inside one another" in save(base / "vector", "--quiet").refusal
    assert list(here.iterdir()) == []
    (here / "taken").write_text("the only copy")
    assert "exists and is not empty" in save("taken", "--quiet").refusal


# The reference


def test_the_reference_has_subcommands_as_well():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for name in ("vector", "vector save", "requests", "requests carry-out"):
        assert f"## palinode {name}\n" in page
    groups = [group.typer_instance.registered_commands for group in app.registered_groups]
    assert page.count("\n## palinode ") == len(app.registered_commands) + sum(len(one) + 1 for one in groups)
