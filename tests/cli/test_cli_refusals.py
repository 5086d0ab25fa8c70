"""Bad input gets one clear sentence and exit code 2, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import namedtuple
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from palinode.pipeline.workspace import Workspace


@pytest.fixture
def refused(palinode, unlearn_words, tmp_path, monkeypatch):
    """A function that runs `unlearn` with these changes, which must be refused and leave no file behind."""
    monkeypatch.chdir(tmp_path)

    def run(output: object = "out", **changes: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        sentence = palinode(*unlearn_words(output, **changes)).refusal
        assert sorted(tmp_path.rglob("*")) == before
        assert sentence.isprintable()
        return sentence

    return run


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny base in the current folder, to be damaged."""
    return shutil.copytree(tiny.base.folder, tmp_path / "copy")


def change_config(folder: Path, **changes) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))


def write_rows(path: str, *rows: dict) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Models


def test_missing_model(refused):
    assert refused(target="nowhere") == "there is no model folder nowhere"
    assert "there is no model folder ./also/nowhere" in refused(base="./also/nowhere")


def test_hub_id_without_a_network(refused):
    sentence = refused(target="someone/something@main")
    assert "someone/something@main is no local folder, and the model hub could not give it" in sentence
    assert "check the name, or go online, or name a folder" in sentence


def test_file_in_place_of_a_model(refused, tiny):
    assert "is a file; name the model folder" in refused(target=tiny.forget)


def test_truncated_weights(refused, copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "bytes where its header needs" in refused(base=copy)
    file.write_bytes(file.read_bytes()[:20])
    assert "fetch it again" in refused(base=copy)


def test_missing_shard(refused, copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = {name: f"model-{1 + place % 2:05}-of-00002.safetensors" for place, name in enumerate(tensors)}
    save_file(
        {name: value for name, value in tensors.items() if "00001-of" in names[name]},
        copy / "model-00001-of-00002.safetensors",
    )
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    sentence = refused(base=copy)
    assert (
        "lacks 1 of 2 weight files (first: model-00002-of-00002.safetensors); finish the download" in sentence
    )


def test_missing_config(refused, copy):
    (copy / "config.json").unlink()
    assert "has no config.json: it is not a model folder, or its download is not finished" in refused(
        base=copy
    )


def test_tokenizer_that_breaks_down_on_a_text(palinode, copy, tmp_path, monkeypatch):
    """`(a|aa)+$` takes the regular expressions of tokenizers beyond their limit, and they panic."""
    monkeypatch.chdir(tmp_path)
    file = copy / "tokenizer.json"
    replace = {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": "x"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": replace}))
    rows = write_rows("rows.jsonl", {"prompt": "a" * 40 + "!", "completion": "b"})
    assert "breaks down on these texts" in palinode("evaluate", copy, "--data", rows).refusal


def test_missing_tokenizer(refused, copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer that can be loaded" in refused(base=copy)
    assert "has no tokenizer that can be loaded" in refused(target=copy)


def test_masked_language_model(refused, copy):
    change_config(copy, architectures=["BertForMaskedLM"])
    for place in ("target", "base", "retrained"):
        assert "is a BertForMaskedLM, not a causal language model" in refused(**{place: copy})


def test_other_architecture(refused, copy):
    change_config(copy, model_type="mistral", architectures=["MistralForCausalLM"])
    assert "the target is a llama model and the base a mistral model" in refused(base=copy)


def test_other_vocabulary_size(refused, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-3].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    change_config(copy, vocab_size=len(tensors["model.embed_tokens.weight"]))
    assert "disagree on 1 of 20 tensors (model.embed_tokens.weight: " in refused(base=copy)


def test_vocabulary_of_the_same_size_with_other_words(refused, copy):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = [word for word in words if words[word] in (10, 11)]
    words[first], words[second] = words[second], words[first]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert Tokenizer.from_file(str(copy / "tokenizer.json")).get_vocab_size() == len(words)
    sentence = refused(base=copy)
    assert (
        f"the tokenizers of target and base disagree on 2 tokens (number 10 is {first!r} in the one"
        in sentence
    )


def test_other_tying(refused, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    change_config(copy, tie_word_embeddings=False)
    assert "the output head is tied to the embedding in" in refused(base=copy)


def test_weights_that_are_not_the_configs(refused, copy):
    change_config(copy, intermediate_size=64)
    assert "its weights have other shapes than its config asks for" in refused(base=copy, quiet=True)


def test_same_model_twice(refused, tiny):
    assert "target and base are the same folder" in refused(target=tiny.base.folder)
    said = refused(retrained=tiny.target.folder)
    assert "target and retrained model are the same folder" in said


def test_weights_that_are_not_numbers(palinode, unlearn_words, copy, tmp_path, monkeypatch):
    """Found when the base is first asked, so a workspace without finished steps is all that could remain."""
    monkeypatch.chdir(tmp_path)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    sentence = palinode(*unlearn_words("out", base=copy), "--quiet").refusal
    assert sentence.startswith(f"base {copy}: the model's likelihoods are not finite numbers")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


# Rows


def test_missing_forget_set(refused):
    assert refused(forget="nowhere.jsonl").startswith("no such file: nowhere.jsonl; give a JSON")


def test_hub_data_set_without_a_network(refused):
    assert "some/data is neither a local file nor a hub data set we could load" in refused(forget="some/data")


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_empty_forget_set(refused, content):
    Path("forget.jsonl").write_text(content)
    assert refused(forget="forget.jsonl") == "forget.jsonl holds no rows"


def test_row_with_a_missing_column_is_named(refused):
    good = {"question": "a", "answer": "b"}
    path = write_rows("forget.jsonl", good, good, {"question": "a"})
    assert refused(forget=path) == "row 3 of forget.jsonl has no 'answer' (it has: question)"
    path = write_rows("forget.jsonl", good, {"question": "a", "answer": None})
    assert refused(forget=path) == "row 2 of forget.jsonl: 'answer' is null; fill it in or leave the row out"


def test_columns_of_another_name_are_named(refused):
    path = write_rows("forget.jsonl", {"asked": "a", "told": "b c"})
    assert refused(forget=path).endswith("probably --columns question=asked,answer=told")
    assert "forget.jsonl has no column 'x' and no 'a' (it has: asked, told)" in refused(
        forget=path, columns="question=x,answer=a"
    )
    assert "columns has 'who=x'; write ROLE=NAME pairs" in refused(forget=path, columns="who=x")


def test_forget_rows_that_are_also_retain_rows(refused, tiny):
    rows = [json.loads(line) for line in tiny.forget.read_text().splitlines()]
    spaced = {**rows[4], "prompt": rows[4]["prompt"].replace(" ", "  ")}
    path = write_rows("retain.jsonl", {"prompt": "the", "completion": "river"}, rows[0], spaced)
    assert refused(retain=path) == (
        "2 rows of the retain set also stand in the forget set (first: row 2 of retain.jsonl); remove them, "
        "or say --allow-overlap to have them left out"
    )
    assert "every row of the retain set also stands in the forget set" in refused(
        retain=tiny.forget, allow_overlap=True
    )


def test_prompt_that_leaves_no_room_for_an_answer(refused):
    path = write_rows("forget.jsonl", {"prompt": "the " * 70, "completion": "river"})
    assert "row 1 of forget.jsonl: its prompt is 70 tokens, which leaves no room" in refused(forget=path)


def test_rows_longer_than_the_model_can_take(refused):
    path = write_rows("forget.jsonl", {"prompt": "the", "completion": "river " * 200})
    sentence = refused(forget=path, max_length=512)
    assert sentence == "a row has 202 tokens and the model takes at most 128; set max_length to 128 or less"


def test_binary_file_in_place_of_rows(refused, tiny):
    assert "is not" in refused(forget=tiny.base.folder / "model.safetensors")


# Places


def test_output_that_is_taken(refused):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("the only copy")
    assert refused() == "out exists and is not empty; choose another output folder, or remove it"
    assert refused("out/thesis.txt") == (
        "out/thesis.txt exists and is not empty; choose another output folder, or remove it"
    )


def test_output_inside_an_input(refused, copy):
    assert "the output copy/out and the input" in refused("copy/out", base=copy)
    assert "exists and is not empty" in refused("copy", base=copy)


def test_input_inside_the_output(refused, tiny):
    shutil.copytree(tiny.base.folder, "out/models/base")
    assert "exists and is not empty" in refused("out", base="out/models/base")


def test_output_that_is_the_current_folder(refused, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert refused(".") == "the output . is the current folder; name one that does not exist yet"


def test_current_folder_that_is_gone(refused, tmp_path, monkeypatch):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert refused().startswith("the current folder was removed or replaced; ")


def test_output_that_is_the_root(refused, palinode, tiny):
    assert refused(output="/").startswith("nothing can be written as /; ")
    words = ["--base", tiny.base.folder, "--data", tiny.forget, "--device", "cpu"]
    assert palinode("finetune", *words, "--output", "/").refusal.startswith("nothing can be written as /; ")
    assert not Path("/.workspace").exists()


def test_output_that_goes_up_out_of_a_folder_that_is_not_there(palinode, tiny, tmp_path):
    words = ["finetune", "--base", tiny.base.folder, "--data", tiny.forget, "--device", "cpu", "--output"]
    lost = tmp_path / "lost"
    assert f"goes up out of {lost}, which does not exist" in palinode(*words, lost / ".." / "out").refusal
    assert not (tmp_path / "out").exists()


def test_folder_that_is_gone_when_the_scores_are_written(palinode, tiny, tmp_path, monkeypatch):
    module = import_module("palinode.evaluation.evaluate")
    (place := tmp_path / "there").mkdir()
    write = module.write_outcomes
    monkeypatch.setattr(module, "write_outcomes", lambda *given: (place.rmdir(), write(*given)))
    words = ["--data", tiny.forget, "--max-rows", 1, "--max-new-tokens", 1, "--device", "cpu"]
    said = palinode("evaluate", tiny.base.folder, *words, "--output", place / "scores.jsonl", "-q").refusal
    assert said.startswith(f"{place}/scores.jsonl cannot be written: {place} is not there, ")


def test_empty_words_are_no_folder_and_no_option_left_out(refused, palinode, tiny, tmp_path):
    for option in ("target", "base", "retain", "holdout", "retrained", "workspace", "checkpoints"):
        assert refused(**{option: ""}).startswith(f"--{option} is empty ")
    assert palinode("vector", "--base=", "--model", tiny.base.folder).refusal.startswith("--base is empty ")
    assert palinode("audit", "", "--against", tiny.base.folder).refusal.startswith("an argument is empty ")
    (recipe := tmp_path / "recipe.toml").write_text(
        f'[models]\ntarget = ""\nbase = "{tiny.base.folder}"\n'
        f'[data]\nforget = "{tiny.forget}"\n[output]\nfolder = "out"\n'
    )
    assert palinode("run", recipe).refusal == (
        "the recipe cannot be used: models.target is empty; give it a value, or leave it out"
    )


def test_output_that_is_a_link_in_a_circle(refused, palinode, tiny, tmp_path):
    (tmp_path / "round").symlink_to("round")
    assert "circle" in refused("round")
    for verb, *words in (
        ("finetune", "--base", tiny.base.folder, "--data", tiny.forget),
        ("doctor", "--target", tiny.target.folder, "--base", tiny.base.folder, "--forget", tiny.forget),
        ("demo",),
    ):
        assert "choose another name" in palinode(verb, *words, "--output", "round").refusal


def test_output_of_the_demo_that_is_a_link_to_nowhere(palinode, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    assert "remove what is in the way" in palinode("demo", "--output", tmp_path / "link").refusal


def test_workspace_inside_an_input_or_the_output(refused, copy):
    assert "the workspace copy/ws lies inside" in refused(base=copy, workspace="copy/ws")
    assert "the workspace out lies inside out" in refused(workspace="out")
    assert "the workspace out/ws lies inside out" in refused(workspace="out/ws")


def test_workspace_that_is_a_file(refused):
    Path("ws").write_text("")
    assert refused(workspace="ws") == "the workspace ws is a file; name another --workspace"


def test_workspace_of_another_run(palinode, unlearn_words, tmp_path):
    with Workspace(tmp_path / "out.workspace").locked():
        sentence = palinode(*unlearn_words(tmp_path / "out"), "--quiet").refusal
        assert "another run is working in" in sentence
        assert "wait for it, or name another workspace or output" in sentence
    assert list(tmp_path.iterdir()) == []


def test_full_disk(refused, palinode, unlearn_words, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 10**5, 10**5))
    wanted = r"has 100\.0 kB free where [0-9.]+ kB are needed; make room"
    assert re.search(wanted, refused())
    planned = palinode(*unlearn_words(tmp_path / "out"), "--dry-run")
    assert planned.code == 0
    assert re.search(rf"The run will be refused: \S+ {wanted}", planned.out + planned.err)


def test_disk_that_has_room_for_what_is_left_to_do(palinode, unlearn_words, tmp_path, monkeypatch):
    """A run that is nearly done must not be refused the room that it has already taken."""
    words = unlearn_words(tmp_path / "out", scales="0.5,0.5")
    assert palinode(*words, "--quiet").code != 2
    shutil.rmtree(tmp_path / "out")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 6 * 10**5, 6 * 10**5))
    assert palinode(*words, "--quiet").code != 2
    assert "make room" in palinode(*unlearn_words(tmp_path / "out2"), "--quiet").refusal


# Options


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({"method": "simnp"}, "simnpo"),
        ({"rounding": "stochstic"}, "stochastic"),
        ({"dtype": "float23"}, "float32"),
    ],
)
def test_a_misspelt_value_is_answered_with_the_nearest(changes, near, unlearn_words, palinode, tmp_path):
    said = palinode(*unlearn_words(tmp_path / "out", **changes)).refusal
    assert said.endswith(f"did you mean {near!r}?")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "wish"}, "there is no method 'wish'; choose one of altpo, ce_u, dpo,"),
        ({"device": "abacus"}, "there is no device 'abacus' here"),
        ({"device": "meta"}, "there is no device 'meta' here"),
        (
            {"dtype": "int8"},
            "output.dtype cannot be used: Input should be 'float32', 'bfloat16' or 'float16'",
        ),
        ({"rounding": "up"}, "output.rounding cannot be used: Input should be 'auto', 'nearest'"),
        ({"precision": "fp8"}, "training.precision cannot be used: Input should be 'auto', 'float32'"),
        ({"scales": "-1,0"}, "scales.forget cannot be used: Input should be greater than or equal to 0"),
        ({"scales": "1,-0.5"}, "scales.retain cannot be used: Input should be greater than or equal to 0"),
        ({"scales": "nan,0"}, "scales.forget cannot be used: Input should be a finite number"),
        ({"scales": "best"}, "--scales is 'best'; write auto, grid, or α and β as in 1.0,0.5"),
        ({"scales": "1,2,3"}, "--scales is '1,2,3'"),
        ({"retain": None, "scales": "1,1"}, "a retain scale of 1 needs retain rows"),
        (
            {"retain": None, "filter": "projection"},
            "the transform projection needs retain rows; name data.retain (--retain)",
        ),
        ({"method": "npo", "scales": "1,0"}, "the method npo adds no vectors, so it has no scales"),
        ({"retain_share": 0}, "scales.retain_share cannot be used"),
        ({"learning_rate": 0}, "training.learning_rate cannot be used: Input should be greater than 0"),
        ({"learning_rate": "inf"}, "training.learning_rate cannot be used: Input should be a finite number"),
        ({"warmup_epochs": "inf"}, "training.warmup_epochs cannot be used: Input should be a finite number"),
        ({"weight_decay": -1}, "'--weight-decay': Input should be greater than or equal to 0"),
        ({"max_length": 3}, "'--max-length': Input should be greater than or equal to 8"),
        ({"max_rows": 0}, "'--max-rows'"),
        ({"max_new_tokens": 0}, "'--max-new-tokens'"),
        ({"epochs": 0}, "'--epochs'"),
        ({"epochs": "many"}, "'--epochs'"),
        ({"seed": -1}, "'--seed'"),
        ({"seed": 2**32}, "'--seed'"),
    ],
    ids=str,
)
def test_option_that_cannot_be(refused, changes, said):
    assert said in refused(**changes)


def test_missing_and_unknown_words(palinode):
    assert palinode("unlearn").refusal == "Missing option '--target'; see palinode unlearn --help"
    assert palinode("forget").refusal == "No such command 'forget'; see palinode --help"
    assert "No such option: --outputt" in palinode("demo", "--outputt", "x").refusal
    assert "see palinode run --help" in palinode("run").refusal


def test_recipes(palinode, tmp_path, unlearn_words, tiny):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[models]\ntarget = "{tiny.target.folder}"\nbase = "{tiny.base.folder}"\n'
        f'[data]\nforget = "{tiny.forget}"\n[output]\nfolder = "{tmp_path / "out"}"\n'
    )
    said = {
        (
            "training.learning_rat=1",
        ): "unknown key 'training.learning_rat'; did you mean 'training.learning_rate'",
        ("seed",): "--set needs key=value, as in training.learning_rate=2e-5, and got 'seed'",
        ("models.base.x=1",): "--set models.base.x: base is a value, not a section",
        ("training.epochs=soon",): "training.epochs cannot be used",
    }
    for changes, sentence in said.items():
        words = [word for change in changes for word in ("--set", change)]
        assert sentence in palinode("run", recipe, *words).refusal
        assert sentence in palinode("run", recipe, *words, "--dry-run").refusal
    assert (
        palinode("run", "no\nsuch\x1b[31mrecipe.toml").refusal == "there is no recipe no such [31mrecipe.toml"
    )
    assert list(tmp_path.iterdir()) == [recipe]


# Divergence


def test_loss_that_stops_being_a_number(palinode, unlearn_words, tmp_path):
    words = unlearn_words(tmp_path / "out", learning_rate="1e30", epochs=5)
    sentence = palinode(*words, "--quiet").refusal
    assert (
        "the training loss stopped being a finite number at step 2 of 40; lower the learning rate" in sentence
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.workspace"]
    (kept,) = (tmp_path / "out.workspace").glob("finetune-forget-*/state")
    assert str(kept) in sentence
    facts = FileSystemReader(kept).read_metadata().state_dict_metadata
    held = {name: torch.empty(one.size) for name, one in facts.items() if name.startswith("model.")}
    with pytest.warns(UserWarning, match="intent is to load in a single process"):
        load(held, checkpoint_id=kept, no_dist=True)
    assert held
    assert all(bool(torch.isfinite(value).all()) for value in held.values())
    assert palinode(*words, "--quiet").refusal == sentence  # and again, from the state that was kept


# The single steps


def test_apply_refuses_what_it_cannot_add(palinode, tiny, copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def apply(**changes):
        options = {
            "target": tiny.target.folder,
            "base": tiny.base.folder,
            "forget-model": tiny.retrained.folder,
            "output": "out",
            **changes,
        }
        said = palinode("apply", *(word for name, value in options.items() for word in (f"--{name}", value)))
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]
        return said.refusal

    assert "a retain scale of 0.5 needs a retain model" in apply(scales="1,0.5")
    assert "there is no rounding 'up' for weights; choose" in apply(rounding="up")
    assert "there is no dtype 'int8'" in apply(dtype="int8")
    assert "finite number" in apply(scales="nan")
    assert "must not be negative" in apply(scales="-1")
    assert "there is no model folder nowhere" in apply(**{"forget-model": "nowhere"})
    assert "lie inside one another" in apply(output=tiny.base.folder / "out")
    change_config(copy, tie_word_embeddings=True, model_type="mistral")
    assert "not states of one model: model_type" in apply(base=copy)


def test_finetune_and_evaluate_refuse_alike(palinode, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, rows = tiny.base.folder, tiny.forget
    tune = ("finetune", "--base", base, "--data", rows, "--output")
    assert "lie inside one another" in palinode(*tune, base / "out").refusal
    assert "exists and is not empty" in palinode(*tune, base).refusal
    assert (
        "no such file: none.jsonl"
        in palinode("finetune", "--base", base, "--data", "none.jsonl", "--output", "o").refusal
    )
    assert "no such file: none.jsonl" in palinode("evaluate", base, "--data", "none.jsonl").refusal
    assert (
        "'--max-rows': Input should be" in palinode("evaluate", base, "--data", rows, "--max-rows", 0).refusal
    )
    assert "its folder does not" in palinode("evaluate", base, "--data", rows, "--output", "no/where").refusal
    assert (
        "there is no model folder nowhere" in palinode("vector", "--base", base, "--model", "nowhere").refusal
    )
    assert "the directions are all zero" in palinode("vector", "--base", base, "--model", base).refusal
    assert list(tmp_path.iterdir()) == []


def test_demo_refuses_a_folder_that_is_not_its_own(palinode, tmp_path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    assert (
        "exists and is not empty; name another --output for the demo"
        in palinode("demo", "--output", tmp_path).refusal
    )
    assert "is a file" in palinode("demo", "--output", tmp_path / "thesis.txt").refusal


# Permissions


@pytest.fixture
def become_nobody(tiny, tmp_path_factory):
    """A function that gives up root's right to read everything, for the rest of the test."""
    base = tmp_path_factory.getbasetemp()
    closed = [base.parent, base, tiny.forget.parent]
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in the common one
        closed.insert(0, base.parent.parent)
    opened = [(path, path.stat().st_mode) for path in closed]

    def become():
        if os.getuid() != 0:
            return
        for path, _ in opened:
            path.chmod(0o755)
        os.seteuid(65534)

    yield become
    os.seteuid(os.getuid())
    for path, mode in opened:
        path.chmod(mode)


def test_files_that_may_not_be_read(palinode, unlearn_words, copy, tmp_path, become_nobody):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    for path, mode in ((tmp_path, 0o777), (rows, 0), (copy / "model.safetensors", 0)):
        path.chmod(mode)
    become_nobody()
    out = tmp_path / "out"
    assert f"cannot read {rows} (Permission denied)" in palinode(*unlearn_words(out, forget=rows)).refusal
    assert "model.safetensors cannot be read (Permission denied)" in (
        palinode(*unlearn_words(out, base=copy)).refusal
    )
    assert not out.exists()


def test_places_that_may_not_be_written_to(palinode, unlearn_words, tiny, tmp_path, become_nobody):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    tmp_path.chmod(0o777)
    evaluate = ("evaluate", tiny.base.folder, "--data", tiny.forget, "--max-rows", 2, "--quiet")
    assert palinode(*evaluate).code == 0  # imports what nobody may not, where Python lies in root's home
    become_nobody()
    words = unlearn_words(tmp_path / "out", workspace=closed / "ws", quiet=True)
    assert f"the workspace {closed / 'ws'} cannot be used (Permission denied)" in palinode(*words).refusal
    written = palinode(*evaluate, "--output", closed / "outcomes.jsonl")
    assert "Permission denied" in written.refusal
    assert list(closed.iterdir()) == []
