"""`palinode audit`: exit codes, what it prints, and refusals in one sentence."""

from __future__ import annotations

import json
import shutil

import pytest

POLICY = """
[budget]
preset = "quick"
max_new_tokens = 4
max_length = 64
"""


@pytest.fixture
def words(tiny, tmp_path):
    """A function that spells the command for the tiny world; None leaves an option out."""
    (tmp_path / "policy.toml").write_text(POLICY)

    def spell(model, **changes):
        options = {
            "against": tiny.retrained.folder,
            "forget": tiny.forget,
            "output": tmp_path / "out",
            "attacks": "questions",
            "policy": tmp_path / "policy.toml",
            "device": "cpu",
            **changes,
        }
        given = [(f"--{name}", value) for name, value in options.items() if value is not None]
        return ["audit", model, *(word for pair in given for word in pair), "--quiet"]

    return spell


def test_retrained_model_passes_with_exit_code_0(palinode, tiny, words, tmp_path):
    shutil.copytree(tiny.retrained.folder, tmp_path / "copy")
    said = palinode(*words(tmp_path / "copy"))
    assert said.code == 0
    assert "within" in said.out
    assert "Passed. Beside a model retrained without the forget set: 4 tests put it within" in said.out
    (untested,) = [line for line in said.out.splitlines() if "not asked for" in line]
    assert untested.startswith("Not tested: ")
    assert "membership" in untested
    assert untested.endswith(", because they were not asked for.")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"audit.json", "audit.md", "results"}


def test_target_fails_with_exit_code_1_and_prints_its_record(palinode, tiny, words, tmp_path):
    said = palinode(*words(tiny.target.folder, target=tiny.target.folder), "--json")
    assert said.code == 1
    record = json.loads(said.out)
    assert record == json.loads((tmp_path / "out" / "audit.json").read_text())
    assert record["answer"]["knows_more"] == [
        "questions.probability",
        "questions.extraction",
        "questions.rouge",
    ]
    assert record["command"].startswith("palinode audit ")
    assert record["policy"]["preset"] == "quick"


def test_kind_of_reference_model_is_recorded(palinode, tiny, words):
    said = palinode(*words(tiny.retrained.folder, against=tiny.base.folder, reference="base"), "--json")
    assert json.loads(said.out)["reference"] == "base"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reference": "target"}, "--reference is 'target'; say retrained or base"),
        ({"budget": "huge"}, "there is no budget 'huge'"),
        ({"attacks": "questions,jailbreak"}, "there is no attack jailbreak; choose among questions"),
        ({"policy": "nowhere.toml"}, "there is no policy nowhere.toml"),
        ({"forget": "nowhere.jsonl"}, "no such file: nowhere.jsonl"),
        ({"against": "nowhere"}, "there is no model folder nowhere"),
        ({"paraphrases": "nowhere.jsonl"}, "no such file: nowhere.jsonl"),
        ({"against": None}, "Missing option '--against'"),
        ({"device": "abacus"}, "there is no device 'abacus'"),
    ],
)
def test_what_cannot_be_used_is_exit_code_2_and_one_sentence(palinode, tiny, words, tmp_path, changes, says):
    assert says in palinode(*words(tiny.target.folder, **changes)).refusal
    assert not (tmp_path / "out").exists()


def test_nothing_is_held_against_itself(palinode, tiny, words, tmp_path):
    (tmp_path / "link").symlink_to(tiny.target.folder)
    for own in ({"against": tmp_path / "link"}, {"against": tiny.base.folder, "target": tiny.base.folder}):
        assert "cannot be held against itself" in palinode(*words(tiny.target.folder, **own)).refusal


def test_unknown_key_of_a_policy_names_the_nearest(palinode, tiny, words, tmp_path):
    (tmp_path / "wrong.toml").write_text("[margins.questions.probability]\nmor = 0.1\n")
    refusal = palinode(*words(tiny.target.folder, policy=tmp_path / "wrong.toml")).refusal
    assert "did you mean 'margins.questions.probability.more'?" in refusal


def test_dry_run_names_what_would_be_run_and_what_it_takes_and_writes_nothing(
    palinode, tiny, words, tmp_path
):
    asked = words(tiny.target.folder, attacks="questions,sampling,membership,inside")
    said = palinode(*asked, "--dry-run", "--json")
    assert said.code == 0
    plan = json.loads(said.out)
    rows = min(40, len(tiny.forget.read_text().splitlines()))
    assert plan["cost_of_each_model"] == {
        "questions": {"read": rows, "answers": rows, "trained": 0},
        "sampling": {"read": 0, "answers": 4 * rows, "trained": 0},
    }
    assert plan["not_tested"]["inside"] == "no target was named; name it with --target"
    assert "--holdout" in plan["not_tested"]["membership"]
    assert not (tmp_path / "out").exists()
    assert "For each of 2 models" in palinode(*asked, "--dry-run").out
    missing = words(tiny.target.folder, against="nowhere")
    assert "there is no model folder nowhere" in palinode(*missing, "--dry-run").refusal


def test_dry_run_refuses_what_the_audit_would(palinode, tiny, words, tmp_path):
    (taken := tmp_path / "taken").write_text("")
    places = {
        taken: "is a file",
        taken / "x": "cannot be written to",
        tiny.target.folder / "x": "lies inside",
    }
    for place, why in places.items():
        asked = words(tiny.target.folder, attacks="questions", output=place)
        assert why in palinode(*asked, "--dry-run").refusal
        assert palinode(*asked, "--dry-run") == palinode(*asked)
