"""`palinode doctor`: every problem in one call, each with its fix, and nothing done to anything."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from packaging.requirements import Requirement
from safetensors.numpy import load_file, save_file

from palinode.pipeline.doctor import examine_library


@pytest.fixture
def broken(tiny, tmp_path):
    """A function that copies a model of the tiny world and lets one break its tensors."""

    def copy(name, change=None):
        folder = tmp_path / "models" / name
        shutil.copytree(tiny.target.folder, folder)
        if change:
            file = folder / "model.safetensors"
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
        return folder

    return copy


@pytest.fixture
def examine(palinode, tiny, tmp_path):
    """A function that looks at a run: (exit code, findings by area and name that are no ok)."""

    def run(**changes):
        options = {
            "target": tiny.target.folder,
            "base": tiny.base.folder,
            "forget": tiny.forget,
            "retain": tiny.retain,
            "output": tmp_path / "out",
            "max_length": 64,
            "device": "cpu",
            **changes,
        }
        words = [
            word
            for name, value in options.items()
            if value is not None
            for word in (f"--{name.replace('_', '-')}", *([] if value is True else [value]))
        ]
        before = sorted(tmp_path.rglob("*"))
        said = palinode("doctor", *words, "--json", "--quiet")
        assert said.err == ""
        assert sorted(tmp_path.rglob("*")) == before
        content = json.loads(said.out)
        assert content["ok"] == (said.code == 0)
        assert all(finding["fix"] for finding in content["findings"] if finding["state"] == "fail")
        return said.code, {
            (finding["area"], finding["name"]): finding
            for finding in content["findings"]
            if finding["area"] not in ("installed", "machine")
        }

    return run


def failures(found):
    return {name for _, name in (key for key, finding in found.items() if finding["state"] == "fail")}


def test_without_anything_named_it_looks_at_the_machine(palinode):
    said = palinode("doctor")
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[-1].startswith("All is well. To have a run looked at, name --target")
    for word in ("palinode", "transformers", "processor", "memory", "disk"):
        assert word in said.out
    assert "\x1b" not in said.out


def test_a_run_that_would_work_is_told_its_time_memory_and_place(examine):
    code, found = examine()
    assert code == 0
    assert {finding["state"] for finding in found.values()} == {"ok"}
    assert found["rows", "forget"]["text"] == "30 rows (30 as completion)"
    assert "31,040 weights" in found["models", "base"]["text"]
    assert {name for area, name in found if area == "run"} == {"time", "memory", "output"}


def test_all_problems_are_found_in_one_call(examine, broken, tiny, tmp_path):
    target = broken("target")
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])  # a download that was cut off
    base = broken("base", lambda tensors: tensors["model.norm.weight"].fill(np.nan))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("taken")
    code, found = examine(
        target=target, base=base, forget=tmp_path / "empty.jsonl", tracker="tensorbord", retrained="no/such"
    )
    assert code == 1
    assert failures(found) == {"target", "base", "retrained", "forget", "output", "tracker"}
    assert "bytes where its header needs" in found["models", "target"]["text"]
    assert found["models", "base"]["text"].startswith("32 NaN and 0 infinite values in 1 tensors")
    assert "in the hub's cache" in found["models", "retrained"]["text"]
    assert found["run", "pre-flight"]["state"] == "note"


def test_pairs_that_are_no_two_states_of_one_model_fail(examine, broken, tiny):
    def widen(tensors):
        tensors["model.norm.weight"] = np.ones(33, np.float32)

    assert failures(examine(base=tiny.target.folder)[1]) == {"two models"}
    copy = broken("copy")
    found = examine(base=copy)[1]
    assert "the same to the last bit" in found["pair", "two models"]["text"]
    other = broken("other", widen)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert {"architecture", "shapes", "tokens"} <= failures(examine(base=other)[1])


def test_one_thing_is_said_once_and_a_recipe_only_where_one_was_named(palinode, tiny, tmp_path):
    rows = [json.loads(line) for line in tiny.forget.read_text().splitlines()]
    rows = [{"Prompt": row["prompt"], "Completion": row["completion"]} for row in rows]
    rows[0]["Completion"] += " word" * 80
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = ["--target", tiny.target.folder, "--base", tiny.base.folder, "--max-length", 64]
    said = palinode("doctor", *models, "--forget", tmp_path / "f.jsonl", "--retain", tiny.retain, "--json")
    texts = [finding["text"] for finding in json.loads(said.out)["findings"]]
    assert sum("read as with --columns prompt=Prompt,completion=Completion" in text for text in texts) == 1
    assert sum("max_length 64" in text for text in texts) == 1
    for words in (["--forget", tiny.forget], models[:2], ["--retain", tiny.retain, "--method", "msaa"]):
        assert "recipe" not in palinode("doctor", *words).out


def test_a_dry_run_says_how_columns_are_read(palinode, tiny, tmp_path):
    text = tiny.forget.read_text().replace('"prompt"', '"Prompt"').replace('"completion"', '"Response"')
    (tmp_path / "f.jsonl").write_text(text)
    words = ["--target", tiny.target.folder, "--base", tiny.base.folder, "--forget", tmp_path / "f.jsonl"]
    said = palinode("unlearn", *words, "--output", tmp_path / "out", "--max-length", 64, "--dry-run")
    assert said.code == 0
    assert "read as with --columns prompt=Prompt,completion=Response; that is raw text" in said.err


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["forget"], "not gone through: there is no target and no base"),
        (["target", "forget"], "not gone through: there is no base"),
        (["target", "base"], "not gone through: there is no forget set"),
    ],
)
def test_a_part_that_was_left_out_is_no_fault(palinode, tiny, parts, said):
    places = {"target": tiny.target.folder, "base": tiny.base.folder, "forget": tiny.forget}
    found = palinode("doctor", *(word for part in parts for word in (f"--{part}", places[part])), "--json")
    assert found.code == 0
    assert said in [finding["text"] for finding in json.loads(found.out)["findings"]]


def test_an_unknown_method_is_a_finding(examine):
    code, found = examine(method="nosuch")
    assert (code, failures(found)) == (1, {"pre-flight"})
    assert "nosuch" in found["run", "pre-flight"]["text"]


def test_rows_in_both_sets_fail_unless_they_may_be_left_out(examine, tiny, tmp_path):
    both = tmp_path / "both.jsonl"
    both.write_text(tiny.retain.read_text() + tiny.forget.read_text())
    found = examine(retain=both)[1]
    assert found["rows", "overlap"]["text"].startswith(
        "30 retain rows also stand in the forget set (first: row "
    )
    assert "--allow-overlap" in found["rows", "overlap"]["fix"]
    code, found = examine(retain=both, allow_overlap=True)
    assert (code, found["rows", "overlap"]["state"]) == (0, "note")
    twice = tmp_path / "twice.jsonl"
    twice.write_text(tiny.forget.read_text() * 2)
    assert examine(forget=twice)[1]["rows", "forget"]["state"] == "warn"


def test_parts_may_be_left_out_and_a_recipe_may_name_them(examine, palinode, tiny, tmp_path):
    code, found = examine(forget=None, retain=None, output=None)
    assert (code, found["run", "pre-flight"]["state"]) == (0, "note")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[models]\ntarget = "{tiny.target.folder}"\n[data]\nforget = "{tiny.forget}"\n')
    said = palinode("doctor", "--recipe", recipe, "--base", tiny.base.folder, "--max-length", 64, "--quiet")
    assert said.code == 0
    assert "β is 0" in " ".join(said.out.split())
    assert said.out.splitlines()[-1] == "Nothing fails; 1 thing needs a look."
    wrong = palinode("doctor", "--recipe", recipe, "--base", tiny.base.folder, "--set", "seeds=1", "--quiet")
    assert wrong.code == 1
    assert "unknown key 'seeds'" in " ".join(wrong.out.split())
    assert "there is no recipe" in palinode("doctor", "--recipe", tmp_path / "none.toml").refusal


@pytest.mark.parametrize(
    ("older", "newer"), [("1.9", "1.10"), ("2.12.1+cpu", "2.13"), ("5.0rc1", "5.0.1"), ("0.34", "1")]
)
def test_versions_are_compared_by_their_numbers(older, newer):
    found = examine_library(Requirement(f"torch>={newer}"), older)
    assert (found.state, found.fix) == ("fail", f'pip install "torch>={newer}"')
    assert f"version {older}, and Palinode needs torch>={newer}" in found.text
    assert examine_library(Requirement(f"torch>={older.split('+')[0]}"), newer).state == "ok"
    assert examine_library(Requirement("torch>=2.13"), "2.13.0+cpu").state == "ok"
    assert examine_library(Requirement("torch>=2.13"), None).text == "not installed"
