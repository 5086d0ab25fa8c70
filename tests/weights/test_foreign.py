"""A folder that somebody else made: no code of it runs, nothing is endless, nothing leads elsewhere."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import palinode
from palinode.errors import CheckpointError
from palinode.models.loading import build_empty, load_config, load_model, load_tokenizer
from palinode.weights import Checkpoint, save
from palinode.weights.foreign import check_folder, from_pretrained
from palinode.weights.store import copy_companions

CPU = torch.device("cpu")
SOURCES = sorted(Path(palinode.__file__).parent.rglob("*.py"))
LOADERS = {
    "from_pretrained",
    "from_config",
    "load_checkpoint_and_dispatch",
    "trust_remote_code",
    "unsafe_load",
}
UNSAFE = {("pickle", "load"), ("pickle", "loads"), ("torch", "load"), ("joblib", "load"), ("dill", "loads")}


def bare_calls(code: str) -> list[str]:
    """The calls in this code that let a library read a foreign folder past the door."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        if node.func.attr in LOADERS or (owner, node.func.attr) in UNSAFE:
            found.append(f"{owner}.{node.func.attr}")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_module_loads_past_the_door(source):
    if source.name != "foreign.py":
        assert bare_calls(source.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "call",
    [
        "AutoModel.from_pretrained(x)",
        "Auto[0].from_config(c)",
        "torch.load(f)",
        "pickle.loads(b)",
        "PeftModel.from_pretrained(m, x)",
    ],
)
def test_a_bare_call_is_noticed(call):
    assert bare_calls(f"def f():\n    return {call}") != []


@pytest.mark.parametrize("text", ["x", 5, [], {}, {"vocab_size": 7}])
def test_a_config_whose_text_tower_is_none_is_refused(folder, text):
    change(folder / "config.json", text_config=text)
    checkpoint = Checkpoint.open(folder)
    for load in (load_config, build_empty, lambda one: load_model(one, device=CPU)):
        with pytest.raises(CheckpointError, match="describes no model"):
            load(checkpoint)
    load_tokenizer(checkpoint)


@pytest.mark.parametrize("rows", [0, -1, "many", None])
def test_an_embedding_without_rows_is_refused(folder, rows):
    change(folder / "config.json", vocab_size=rows)
    with pytest.raises(CheckpointError, match="vocab_size"):
        load_config(Checkpoint.open(folder))


def test_what_a_config_says_never_steers_a_terminal(folder, capfd):
    change(folder / "config.json", sub_configs="\x1b]0;yours\x07")
    with pytest.raises(CheckpointError) as refused:
        load_config(Checkpoint.open(folder))
    said = capfd.readouterr()
    assert said.out + said.err == ""
    assert str(refused.value).isprintable()


# Code in the folder

CODE = """
import os, pathlib
pathlib.Path(os.environ["MARKER"]).write_text("ran")
from transformers import LlamaConfig as EvilConfig, LlamaForCausalLM as EvilModel
from transformers import PreTrainedTokenizerFast as EvilTokenizer
"""


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny base in which every file of code would leave a mark."""
    copy = Path(shutil.copytree(tiny.base.folder, tmp_path / "model"))
    (copy / "custom_generate").mkdir()
    for name in ("evil.py", "setup.py", "conftest.py", "sitecustomize.py", "custom_generate/generate.py"):
        (copy / name).write_text(CODE)
    return copy


def change(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoTokenizer": [None, "evil.EvilTokenizer"],
}


def unknown_model(folder):
    change(folder / "config.json", model_type="evil", auto_map=AUTO_MAP)


def known_model(folder):
    change(folder / "config.json", auto_map=AUTO_MAP, custom_pipelines={"text": {"impl": "evil.P"}})
    change(folder / "generation_config.json", custom_generate="evil", trust_remote_code=True)


def own_tokenizer(folder):
    change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=AUTO_MAP)


def own_tokenizer_in_the_old_way(folder):
    change(folder / "tokenizer_config.json", tokenizer_class=None, auto_map=["evil.EvilTokenizer", None])


def said_by_command(tmp_path, *words) -> str:
    """What a command says, at whose standard input somebody agrees to everything; no mark may be left."""
    marker = tmp_path / "marker"
    run = subprocess.run(
        [sys.executable, "-m", "palinode", *map(str, words)],
        input="y\n" * 1000,
        env={**os.environ, "MARKER": str(marker)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert not marker.exists()
    said = " ".join((run.stdout + run.stderr).split())
    assert "trust_remote_code" not in said
    assert "[y/N]" not in said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("verb", ["doctor", "evaluate", "apply"])
def test_code_of_a_model_folder_never_runs(folder, tiny, tmp_path, verb):
    unknown_model(folder)
    words = {
        "doctor": ["--target", folder, "--base", tiny.base.folder, "--forget", tiny.forget],
        "evaluate": [folder, "--data", tiny.forget],
        "apply": ["--target", folder, "--base", tiny.base.folder, "--forget", folder, "--output", "out"],
    }[verb]
    said = said_by_command(tmp_path, verb, *words)
    if verb != "apply":  # which needs no model that runs
        assert "model_type = evil" in said
        assert "runs no code" in said


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (unknown_model, "model_type = evil"),
        (known_model, None),
        (own_tokenizer, "tokenizer_class = EvilTokenizer"),
        (own_tokenizer_in_the_old_way, "tokenizer_class"),
    ],
)
def test_whoever_agrees_is_not_asked(folder, tmp_path, spoil, said, monkeypatch, capfd):
    spoil(folder)
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    checkpoint = Checkpoint.open(folder)
    for load in (load_config, load_tokenizer, build_empty, lambda one: load_model(one, device=CPU)):
        wanted = pytest.raises(CheckpointError, match=f"{said}.* runs no code") if said else nullcontext()
        with wanted:
            load(checkpoint)
    assert not (tmp_path / "marker").exists()
    assert sys.stdin.read() == "y\n" * 100
    assert capfd.readouterr().out == ""


def test_a_config_that_is_known_and_a_model_that_is_not(folder, tmp_path, monkeypatch):
    change(folder / "config.json", model_type="vit", architectures=["EvilForCausalLM"], auto_map=AUTO_MAP)
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    checkpoint = Checkpoint.open(folder)
    for load in (build_empty, lambda one: load_model(one, device=CPU)):
        with pytest.raises(CheckpointError, match="runs no code from a model's folder"):
            load(checkpoint)
    assert not (tmp_path / "marker").exists()
    assert sys.stdin.read() == "y\n" * 100


def test_doctor_ends_on_a_model_of_two_thousand_million_layers(folder, tiny, tmp_path):
    change(folder / "config.json", num_hidden_layers=2**31)
    words = ["--target", folder, "--base", tiny.base.folder, "--forget", tiny.forget]
    assert "num_hidden_layers = 2147483648, which no model has" in said_by_command(tmp_path, "doctor", *words)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("config.json", {"_attn_implementation": "stranger/kernel"}, "kernel"),
        ("config.json", {"text_config": {"attn_implementation": "stranger/kernel@main:f"}}, "kernel"),
        ("config.json", {"experts_implementation": {"": "stranger/kernel"}}, "kernel"),
        ("config.json", {"num_hidden_layers": 2**31}, "num_hidden_layers"),
        ("config.json", {"n_layer": 10**9}, "n_layer"),
        ("config.json", {"encoder": {"depths": [2, 2**40]}}, "depths"),
        ("config.json", {"num_labels": 10**10}, "num_labels"),
        ("config.json", {"rope_theta": 10**30}, "rope_theta"),
        ("config.json", {"x": float("nan")}, "NaN"),
        ("generation_config.json", {"max_new_tokens": 10**400}, "max_new_tokens"),
        ("tokenizer_config.json", {"vocab_file": "../model/../outside"}, "outside its folder"),
        ("modules.json", {"0": {"type": "sentence_transformers_evil.Model"}}, "runs no code"),
        ("sentence_bert_config.json", {"model_args": {"trust_remote_code": True}}, "runs no code"),
    ],
)
def test_a_config_that_fetches_or_never_ends_is_refused(folder, file, changes, said):
    (folder.parent / "outside").write_text("secret")
    change(folder / file, **changes)
    with pytest.raises(CheckpointError, match=said):
        check_folder(folder)
    with pytest.raises(CheckpointError, match=said):
        from_pretrained(AutoTokenizer, folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 90_000},
        {"vocab_size": 2**50},
        {"hidden_size": 2**30, "head_dim": 2**30},
        {"intermediate_size": 2**45},
        {"model_type": "mixtral", "num_local_experts": 10**8},
        {"model_type": "gpt2", "max_position_embeddings": 10**7},
        {"model_type": "gpt_neo", "max_position_embeddings": 10**9, "num_layers": 2},
        {"num_key_value_heads": 2**40, "num_attention_heads": 2**40},
        {"layer_types": ["full_attention"] * 50_000, "num_hidden_layers": 50_000},
    ],
)
def test_a_config_cannot_describe_more_than_the_weights_hold(folder, changes):
    change(folder / "config.json", **changes)
    with pytest.raises(Exception, match=r"^(?!.*memory)"):
        build_empty(Checkpoint.open(folder))
    with pytest.raises(CheckpointError):
        load_model(Checkpoint.open(folder), device=CPU)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "chat_template.jinja", "x.bin"])
def test_a_pipe_in_the_folder_is_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for read in (Checkpoint.open, check_folder):
        with pytest.raises(CheckpointError, match="is a pipe or a device"):
            read(folder)


def test_a_device_in_the_folder_is_not_read(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("depth", [100, 100_000])
def test_a_config_nested_deep_is_refused(folder, depth):
    (folder / "generation_config.json").write_text('{"x":' + "[" * depth + "]" * depth + "}")
    with pytest.raises(CheckpointError, match=r"nested too deep|recursion"):
        Checkpoint.open(folder)


def test_a_long_config_is_refused_unread(folder):
    (folder / "tokenizer_config.json").write_text('{"x":[' + "[]," * 4_000_000 + "[]]}")
    with pytest.raises(CheckpointError, match="would be many"):
        Checkpoint.open(folder)


def test_a_model_that_transformers_knows_needs_none_of_its_code(folder):
    known_model(folder)
    checkpoint = Checkpoint.open(folder)
    assert load_config(checkpoint).model_type == "llama"
    assert load_tokenizer(checkpoint).is_fast
    assert from_pretrained(AutoConfig, folder).model_type == "llama"


def test_an_adapter_is_not_followed_to_its_base(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "stranger/model"}))
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        from_pretrained(AutoConfig, folder)


# Links

SECRET = "root:x:0:0"


@pytest.fixture
def outside(tmp_path):
    """A file and a folder that belong to no model."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text(SECRET)
    return tmp_path / "etc"


@pytest.mark.parametrize(
    "name", ["tokenizer_x", "vocab.txt", "chat_template.jinja", "a.model", "config.json", "merges.txt"]
)
def test_a_companion_that_is_a_link_to_elsewhere_is_refused_at_once(folder, outside, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside / "passwd")
    with pytest.raises(CheckpointError, match=r"is a link to .*, outside the model's folder|cannot be read"):
        Checkpoint.open(folder)


def test_a_linked_folder_of_templates_is_refused(folder, outside):
    (folder / "additional_chat_templates").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        Checkpoint.open(folder)


def test_a_link_put_there_after_opening_is_not_copied(folder, outside, tmp_path):
    checkpoint = Checkpoint.open(folder)
    (folder / "tokenizer_x").symlink_to(outside / "passwd")
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        copy_companions(checkpoint, tmp_path, None)
    assert SECRET not in "".join(path.read_text() for path in tmp_path.glob("tokenizer*"))
    with pytest.raises(CheckpointError):
        save(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_inside_the_folder_and_into_the_cache_of_the_hub_are_followed(folder, tmp_path):
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    for number, path in enumerate(sorted(path for path in snapshot.iterdir() if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    (snapshot / "tokenizer_two.json").symlink_to("tokenizer.json")
    save(Checkpoint.open(snapshot), tmp_path / "out")
    copied = (tmp_path / "out" / "tokenizer_two.json").read_bytes()
    assert copied == (folder / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    listed = json.loads((tmp_path / "out" / "weights.json").read_text())["companions"]
    assert {"config.json", "tokenizer.json", "tokenizer_two.json"} <= set(listed)


def test_blobs_that_are_a_link_themselves_are_no_cache(folder, outside, tmp_path):
    snapshot = tmp_path / "a" / "snapshots" / "0123"
    shutil.copytree(folder, snapshot)
    (tmp_path / "a" / "blobs").symlink_to(outside)
    (snapshot / "tokenizer_x").symlink_to("../../blobs/passwd")
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        Checkpoint.open(snapshot)


def test_weights_may_lie_on_another_disk(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    assert len(Checkpoint.open(folder).tensors) > 0


def test_a_pipe_that_nobody_opens_is_no_fault(folder):
    os.mkfifo(folder / "agent.sock")
    (folder / "tokenizer_lost.json").symlink_to("nowhere")
    assert len(Checkpoint.open(folder).tensors) > 0
