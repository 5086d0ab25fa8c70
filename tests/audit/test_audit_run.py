"""Whole audits of tiny models: what passes, what fails, and what a stopped one leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from palinode.audit.attacks import ATTACKS
from palinode.audit.material import read_material
from palinode.audit.policy import build_policy
from palinode.audit.rounding import QUANTISERS
from palinode.errors import DataError, InputError, OutputError, RecipeError
from palinode.pipeline.audit_run import AuditPlan, audit
from palinode.records import COMMAND, holding
from palinode.settings import AuditSettings

POLICY = {
    "budget": {
        "preset": "quick",
        "relearn_rate": 3e-3,
        "relearn_steps": [0, 2, 4, 8],
        "max_new_tokens": 4,
        "max_length": 64,
    }
}
ASKING = ("questions", "membership")


@pytest.fixture
def plan(scene):
    """A function that makes a plan to audit one model of the scene against its retrained model."""

    def make(model, *, attacks=tuple(ATTACKS), kind="retrained", policy=POLICY, target=None, **sets):
        rules = build_policy(policy)
        given = {"retain": scene.retain, "holdout": scene.holdout, "max_rows": rules.budget.max_rows}
        given |= {name: sets.pop(name) for name in ("retain", "holdout") if name in sets}
        named = AuditSettings(**{name: value and str(value) for name, value in sets.items()})
        material = read_material(scene.forget, settings=named, **given)
        models = {"audited": str(model), "reference": str(scene.base if kind == "base" else scene.retrained)}
        if target:
            models["target"] = str(target)
        settings = AuditSettings(attacks=attacks, device="cpu")
        return AuditPlan(models, kind, material, {"forget": str(scene.forget)}, rules, settings)

    return make


def verdicts(record):
    return {
        f"{name}.{test}": entry["findings"]["audited"]["verdict"]
        for name, attack in record["attacks"].items()
        for test, entry in attack.get("tests", {}).items()
    }


def test_retrained_model_passes_against_itself_and_the_target_shows_that_attacks_work(scene, plan, tmp_path):
    record = audit(plan(scene.retrained, target=scene.target), tmp_path / "out")
    answer = record["answer"]
    assert answer["passed"]
    assert set(verdicts(record).values()) == {"within", "not judged", "not tested"}
    assert set(answer["not_tested"]) == {
        "paraphrases",
        "indirect",
        "relearn_lookalikes",
        "prefixes.rest",  # answers of one token
        "membership.gradient_norm",
        *(name for name, way in QUANTISERS.items() if way.unavailable()),
    }
    assert "The audited and the reference model have the same weights." in record["notes"]
    target = {
        f"{name}.{test}": entry["findings"]["target"]["verdict"]
        for name, attack in record["attacks"].items()
        for test, entry in attack.get("tests", {}).items()
    }
    for name in (
        "questions.probability",
        "quantise_8.probability",
        "quantise_4.probability",
        "sampling.leak",
    ):
        assert target[name] == "knows more"
    assert {target["relearn_forget.area"], target["relearn_retain.area"]} == {"knows more"}
    assert json.loads((tmp_path / "out" / "audit.json").read_text()) == record
    assert (tmp_path / "out" / "audit.md").read_text().startswith("# Audit report")


def test_target_fails_because_it_knows_more(scene, plan, tmp_path):
    record = audit(plan(scene.target, attacks=ASKING), tmp_path / "out")
    assert not record["answer"]["passed"]
    assert {"questions.probability", "questions.rouge", "membership.reference"} <= set(
        record["answer"]["knows_more"]
    )
    assert record["answer"]["knows_less"] == []
    finding = record["attacks"]["questions"]["tests"]["probability"]["findings"]["audited"]
    gap = finding["score"]["value"] - finding["reference"]["value"]
    assert finding["difference"]["value"] == pytest.approx(gap)
    assert 0 < finding["difference"]["low"] < gap < finding["difference"]["high"]


@pytest.mark.parametrize(
    ("name", "mu", "advised"),
    [("least_squares", 100.0, True), ("least_squares", 0.0, False), ("projection", None, False)],
)
def test_what_was_filtered_by_least_squares_and_knows_more_is_told_of_projection(
    scene, plan, tmp_path, name, mu, advised
):
    shutil.copytree(scene.target, tmp_path / "model")
    done = {"recipe": {}, "models": {}, "vectors": {"transforms": [{"name": name, "settings": {"mu": mu}}]}}
    (tmp_path / "model" / "record.json").write_text(json.dumps(done))
    record = audit(plan(tmp_path / "model", attacks=ASKING), tmp_path / "out")
    told = [note for note in record["notes"] if "--filter projection" in note]
    assert bool(told) is advised
    assert all("membership.reference" in note and "questions" not in note for note in told)


def test_model_pushed_too_far_fails_because_it_knows_less(scene, plan, tmp_path):
    record = audit(plan(scene.pushed, attacks=ASKING), tmp_path / "out")
    answer = record["answer"]
    assert not answer["passed"]
    assert "questions.log_probability" in answer["knows_less"]
    assert set(answer["knows_more"]) <= {"questions.rouge"}  # a ruined model may share a word by chance


def test_base_as_reference_is_recorded_with_a_caveat(scene, plan, tmp_path):
    record = audit(plan(scene.base, kind="base", attacks=("questions",)), tmp_path / "out")
    assert record["reference"] == "base"
    assert any("The reference model is a base checkpoint" in note for note in record["notes"])


def test_attacks_not_asked_for_are_named(scene, plan, tmp_path):
    record = audit(plan(scene.retrained, attacks=("questions",)), tmp_path / "out")
    assert record["answer"]["passed"]
    assert record["answer"]["not_tested"]["membership"] == "it was not asked for"
    assert record["attacks"]["membership"]["reason"] == "it was not asked for"


def test_required_attack_that_gave_nothing_fails(scene, plan, tmp_path):
    policy = {**POLICY, "require": ["membership"]}
    record = audit(plan(scene.retrained, attacks=ASKING, holdout=None, policy=policy), tmp_path / "out")
    assert not record["answer"]["passed"]
    assert record["answer"]["required"] == ["membership"]
    assert "name them with --holdout" in record["answer"]["not_tested"]["membership"]


def test_audit_in_which_nothing_could_be_told_does_not_pass(scene, plan, tmp_path):
    policy = {**POLICY, "min_rows": 100}
    record = audit(plan(scene.retrained, attacks=("questions",), policy=policy), tmp_path / "out")
    assert not record["answer"]["passed"]
    assert set(verdicts(record).values()) == {"unclear"}


def test_tests_that_judge_only_over_forgetting_are_no_evidence_of_forgetting(scene, plan, tmp_path):
    """The same weights, so every test is within; but no test asks whether the model knows more."""
    unjudged = {test: {"more": False} for test in ("probability", "log_probability", "extraction", "rouge")}
    policy = {**POLICY, "margins": {"questions": unjudged}}
    record = audit(plan(scene.retrained, attacks=("questions",), policy=policy), tmp_path / "out")
    assert set(verdicts(record).values()) == {"within"}
    assert not record["answer"]["passed"]


def test_holdout_rows_unlike_the_forget_rows_are_noted(scene, plan, tmp_path):
    """The retrained model has learned the retain rows, so as holdout they stand apart."""
    record = audit(
        plan(scene.retrained, attacks=("membership",), holdout=scene.retain, retain=None), tmp_path / "out"
    )
    assert any(
        "The reference model itself tells forget rows from holdout" in text for text in record["notes"]
    )
    assert all("reference 0." not in text for text in record["notes"])


def test_damage_beside_the_forget_rows_is_told_apart_from_the_rest(scene, plan, tmp_path):
    """Half of the forget people's rows stand among the retain rows, and the audited model lost them too."""
    rows = scene.forget.read_text().splitlines(keepends=True)
    forget, retain = tmp_path / "forget.jsonl", tmp_path / "retain.jsonl"
    forget.write_text("".join(rows[::2]))
    retain.write_text("".join([*rows[1::2], *scene.retain.read_text().splitlines(keepends=True)[:25]]))
    lost = plan(scene.retrained, attacks=("neighbours",))
    lost = replace(
        lost,
        models={**lost.models, "reference": str(scene.target)},
        material=read_material(forget, retain=retain, max_rows=40),
    )
    record = audit(lost, tmp_path / "out")
    tests = record["attacks"]["neighbours"]["tests"]
    apart = {name: entry["findings"]["audited"]["difference"]["value"] for name, entry in tests.items()}
    assert apart["words"] < -0.3
    assert apart["words"] < apart["rest"] - 0.2
    assert "neighbours.words" in record["answer"]["knows_less"]
    assert any("nearest to the forget rows lost more than the rest" in note for note in record["notes"])
    assert (
        record["data"]["near"]["rows"]
        == record["attacks"]["neighbours"]["details"]["audited"]["rows"]["words"]
    )


def test_policy_decides_whether_an_unclear_test_fails(scene, plan, tmp_path):
    """The base checkpoint is somewhat less sure of the answers than the retrained model, by chance."""
    margins = {
        "log_probability": {"less": 10},
        "rouge": {"more": 1},
        "extraction": {"more": 1, "less": 1},
        "probability": {"less": 0.05, "more": 1},
    }
    for unclear in ("pass", "fail"):
        policy = {**POLICY, "unclear": unclear, "margins": {"questions": margins}}
        record = audit(plan(scene.base, attacks=("questions",), policy=policy), tmp_path)
        assert record["answer"]["knows_more"] == record["answer"]["knows_less"] == []
        assert record["answer"]["unclear"] == ["questions.probability"]
        assert record["answer"]["passed"] == (unclear == "pass")


def test_relearning_that_diverges_is_not_tested(scene, plan, tmp_path):
    policy = {"budget": {**POLICY["budget"], "relearn_rate": 1e30}}
    record = audit(
        plan(scene.target, attacks=("questions", "relearn_forget"), policy=policy), tmp_path / "out"
    )
    assert "finite" in record["answer"]["not_tested"]["relearn_forget"]
    assert "tests" not in record["attacks"]["relearn_forget"]


def test_record_states_budget_versions_and_fingerprints_but_no_text_of_the_rows(scene, plan, tmp_path, world):
    with holding(COMMAND, "palinode audit X"):
        record = audit(plan(scene.target, attacks=ASKING), tmp_path / "out")
    assert record["policy"]["budget"]["max_length"] == 64
    assert set(record["policy"]["margins"]) >= {"questions.probability", "relearn_forget.area"}
    assert record["environment"]["device"] == "cpu"
    assert {"torch", "transformers", "numpy"} <= set(record["environment"])
    assert all(len(model["fingerprint"]) == 32 for model in record["models"].values())
    assert record["data"]["forget"]["rows"] == 30
    everything = "".join(path.read_text() for path in (tmp_path / "out").rglob("*.*") if path.is_file())
    assert not [fact.subject for fact in world.forget if fact.subject in everything]


# Refusals


def test_holdout_rows_that_are_forget_rows_are_refused(scene, plan, tmp_path):
    with pytest.raises(DataError, match="30 of the 30 holdout rows are forget rows too"):
        audit(plan(scene.target, holdout=scene.forget), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_attack_is_refused(scene, plan, tmp_path):
    with pytest.raises(RecipeError, match="no attack member; choose among questions"):
        audit(plan(scene.target, attacks=("member",)), tmp_path / "out")


def test_folder_with_other_things_is_refused(scene, plan, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match=r"holds thesis\.txt, which is no part of an audit"):
        audit(plan(scene.target), tmp_path)
    with pytest.raises(OutputError, match="lies inside the model"):
        audit(plan(scene.target), scene.target / "audit")
    with pytest.raises(OutputError, match="is a file"):
        audit(plan(scene.target), tmp_path / "thesis.txt")


def test_model_that_is_not_there_is_refused(plan, tmp_path):
    with pytest.raises(InputError, match="there is no model folder"):
        audit(plan(tmp_path / "nowhere"), tmp_path / "out")


# Going on


def steps(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("results/*/step.json")}


def test_another_policy_measures_nothing_again(scene, plan, tmp_path):
    audit(plan(scene.target, attacks=ASKING), tmp_path)
    before = steps(tmp_path)
    assert len(before) == 4
    policy = {**POLICY, "margins": {"questions": {"probability": {"more": 0.9}}}}
    record = audit(plan(scene.target, attacks=ASKING, policy=policy), tmp_path)
    assert steps(tmp_path) == before
    assert verdicts(record)["questions.probability"] != "knows more"


def test_another_budget_measures_again(scene, plan, tmp_path):
    audit(plan(scene.target, attacks=("questions",)), tmp_path)
    policy = {"budget": {**POLICY["budget"], "max_new_tokens": 3}}
    audit(plan(scene.target, attacks=("questions",), policy=policy), tmp_path)
    assert len(steps(tmp_path)) == 4


class Impatient:
    """A listener that presses Ctrl-C when it hears of a certain task."""

    def __init__(self, words):
        self.words = words

    def say(self, text):
        raise AssertionError(text)

    def task(self, label, total, unit):
        if self.words in label:
            raise KeyboardInterrupt
        return contextlib.nullcontext(lambda amount: None)


def test_interrupted_audit_keeps_what_was_finished(scene, plan, tmp_path):
    wanted = plan(scene.target, attacks=("questions", "relearn_retain"))
    with pytest.raises(KeyboardInterrupt):
        audit(wanted, tmp_path / "out", listener=Impatient("after 4 steps"))
    kept = steps(tmp_path / "out")
    assert [name.split("-")[0] for name in kept] == ["questions"]
    assert not (tmp_path / "out" / "audit.json").exists()
    record = audit(wanted, tmp_path / "out")
    after = steps(tmp_path / "out")
    assert len(after) == 4
    assert kept.items() <= after.items()
    whole = audit(wanted, tmp_path / "other")
    assert record["attacks"]["relearn_retain"]["tests"] == whole["attacks"]["relearn_retain"]["tests"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_audit_goes_on_where_it_was(scene, tmp_path, number):
    (tmp_path / "policy.toml").write_text(
        "[budget]\npreset = 'quick'\nrelearn_steps = [0, 1, 20]\nmax_new_tokens = 4\nmax_length = 64\n"
    )
    words = [sys.executable, "-m", "palinode", "audit", scene.target, "--against", scene.retrained]
    words += ["--forget", scene.forget, "--retain", scene.retain, "--output", tmp_path / "out"]
    words += ["--policy", tmp_path / "policy.toml", "--device", "cpu", "--quiet"]
    words += ["--attacks", "questions,relearn_retain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    while not list((tmp_path / "out").glob("results/relearn_retain-*")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.005)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == (2 if number == signal.SIGINT else -signal.SIGKILL), said
    if number == signal.SIGINT:
        assert "the same command goes on where this one stopped" in said
    kept = steps(tmp_path / "out")
    assert len(kept) == 1
    assert not (tmp_path / "out" / "audit.json").exists()
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    after = steps(tmp_path / "out")
    assert len(after) == 4
    assert kept.items() <= after.items()
