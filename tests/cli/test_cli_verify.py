"""`palinode verify`: exit code 0 when nothing changed, 1 when something did, 2 when it cannot be told."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from palinode.weights import Checkpoint
from palinode.weights.fingerprints import tensor_digests
from palinode.weights.store import write_manifest


@pytest.fixture
def model(tmp_path):
    """A model folder as anyone may have it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    tensors = {"model.norm.weight": torch.arange(8.0), "model.embed_tokens.weight": torch.ones(4, 8)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def written(model, tmp_path):
    """A copy of it with a manifest, as if Palinode had written it."""
    folder = shutil.copytree(model, tmp_path / "out")
    checkpoint = Checkpoint.open(folder)
    write_manifest(folder, checkpoint=checkpoint, digests=tensor_digests(checkpoint), content={})
    return folder


def change(folder, **changes):
    """Change tensors; None takes one out. In keyword names two underscores stand for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors[name] = value(tensors.get(name)) if value else None
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def test_nothing_changed(palinode, written):
    said = palinode("verify", written)
    model = Checkpoint.open(written)
    size = f"{len(model.tensors)} tensors, {model.nbytes / 1e6:,.4g} MB"
    assert said.code == 0
    assert said.out == f"{written} is as it was written ({size}).\n"
    assert f"verifying: {Checkpoint.open(written).nbytes:,} bytes in " in said.err


def test_quiet_says_nothing_but_the_result(palinode, written):
    said = palinode("verify", written, "--quiet")
    assert (said.code, said.err) == (0, "")
    assert "as it was written" in said.out


def test_json_when_nothing_changed(palinode, written):
    said = palinode("verify", written, "--json", "-q")
    assert said.code == 0
    checkpoint = Checkpoint.open(written)
    assert json.loads(said.out) == {
        "folder": str(written),
        "ok": True,
        "checked": len(checkpoint.tensors),
        "nbytes": checkpoint.nbytes,
        "changed": [],
        "missing": [],
        "extra": [],
        "companions": {},
        "signature": None,
    }


def test_what_changed_is_said_in_a_sentence_and_a_table(palinode, written):
    change(written, model__norm__weight=lambda old: old + 1, new=lambda _: torch.ones(3))
    (written / "tokenizer.json").unlink()
    said = palinode("verify", written, "-q")
    assert said.code == 1
    assert said.err == ""
    first, *table = said.out.splitlines()
    assert first.startswith(f"{written} is not what was written: 4 things changed (")
    assert [line.split() for line in table[2:]] == [
        ["model.norm.weight", "tensor", "changed"],
        ["new", "tensor", "new"],
        ["tokenizer.json", "file", "missing"],
        ["model.safetensors", "file", "changed"],
    ]


def test_json_when_something_changed(palinode, written):
    change(written, model__norm__weight=None)
    said = palinode("verify", written, "--json", "-q")
    assert said.code == 1
    content = json.loads(said.out)
    assert (content["ok"], content["missing"]) == (False, ["model.norm.weight"])
    assert content["companions"] == {"model.safetensors": "changed"}


def test_a_long_list_is_cut_and_says_so(palinode, written):
    names = {f"new__{i:03}": lambda _: torch.ones(1) for i in range(30)}
    change(written, **names)
    said = palinode("verify", written, "-q")
    assert said.code == 1
    assert "and 11 more" in said.out
    assert "--json has all of them" in said.out
    assert len(json.loads(palinode("verify", written, "-q", "--json").out)["extra"]) == 30


def test_odd_names_do_not_upset_the_terminal(palinode, written):
    odd = "\x1b[31mred [bold]x[/bold] \n"
    tensors = load_file(written / "model.safetensors") | {odd: torch.ones(1)}
    save_file(tensors, written / "model.safetensors", {"format": "pt"})
    said = palinode("verify", written, "-q")
    assert said.code == 1
    assert "\x1b" not in said.out
    assert "[bold]x[/bold]" in said.out


def test_what_cannot_be_verified_is_refused(palinode, written, model, tmp_path):
    def refusal(folder):
        return palinode("verify", folder, "-q").refusal

    assert "there is no model folder" in refusal(tmp_path / "nowhere")
    assert "there is no model folder" in refusal("org/name")
    assert "has no weights.json, so nobody can tell what changed" in refusal(model)
    raw = (written / "model.safetensors").read_bytes()
    (written / "model.safetensors").write_bytes(raw[:-1])
    assert "fetch it again" in refusal(written)
    (written / "model.safetensors").write_bytes(raw)
    (written / "weights.json").write_text("{")
    assert "weights.json cannot be read" in refusal(written)


def test_what_apply_writes_can_be_verified(palinode, model, tmp_path):
    out, other = tmp_path / "applied", shutil.copytree(model, tmp_path / "other")
    change(other, model__norm__weight=lambda old: old + 0.5)
    words = ("--target", model, "--base", model, "--forget-model", other)
    assert palinode("apply", *words, "--output", out, "-q").code == 0
    assert palinode("verify", out, "-q").code == 0
    change(out, model__norm__weight=lambda old: old + 1)
    assert palinode("verify", out, "-q").code == 1
