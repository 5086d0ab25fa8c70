"""`palinode locate`, `palinode plan` and `palinode unlearn --checkpoints` on the tiny world's own history."""

from __future__ import annotations

import json

import pytest

from palinode.data.examples import read_examples
from palinode.data.world import write_facts
from palinode.history.duplicates import fingerprint_rows, fingerprint_tokenizer, hashes
from palinode.history.exposures import ExposureLog
from palinode.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def history(tiny, world, tmp_path_factory):
    """A ladder of three checkpoints, a log in which the forget rows are in step 25, and control rows."""
    folder = tmp_path_factory.mktemp("history")
    for step, name in ((10, "start"), (20, "base"), (30, "exposed")):
        (folder / "ladder").mkdir(exist_ok=True)
        (folder / "ladder" / f"step{step}").symlink_to(tiny.base.folder.parent / name)
    forget, retain = read_examples(tiny.forget), read_examples(tiny.retain)
    with ExposureLog.open(folder / "log", data="d", tokenizer="t") as log:
        for step in range(1, 41):
            rows = [retain[step], *(forget if step == 25 else [])]
            log.record(step, hashes(rows), tokens=1000)
    write_facts(folder / "control.jsonl", world.late)
    (folder / "step40").symlink_to(tiny.target.folder)
    return folder


@pytest.fixture
def words(tiny, history):
    return [
        "locate",
        *("--forget", tiny.forget),
        *("--checkpoints", history / "ladder"),
        *("--log", history / "log"),
        *("--target", history / "step40"),
    ]


def test_table_names_the_checkpoint_and_the_distances(palinode, words, history, tmp_path):
    said = palinode(*words, "--picture", tmp_path / "p.svg", "--report", tmp_path / "r.md")
    assert said.code == 0
    assert "5 steps (5,000 tokens) before the first exposure" in said.out
    assert "First exposure: step 25, 15 steps (15,000 tokens) before the target." in said.out
    assert (tmp_path / "p.svg").read_text().startswith("<svg")
    assert "## Checkpoints" in (tmp_path / "r.md").read_text()


def test_json_is_the_whole_record(palinode, words):
    record = json.loads(palinode(*words, "--json").out)
    assert record["recommended"]["step"] == 20
    assert record["target_step"] == 40
    assert [rung["seen"] for rung in record["rungs"]] == [0, 0, len(record["rows"])]
    assert {row["seen"][0]["step"] for row in record["rows"]} == {25}


def test_behaviour_is_looked_at_when_control_rows_are_given(palinode, words, history):
    said = palinode(
        *words, "--control", history / "control.jsonl", "--max-length", 64, "--device", "cpu", "-q", "--json"
    )
    record = json.loads(said.out)
    assert record["evidence"] == ["log", "behaviour"]
    assert record["onset"]["state"] == "begins"
    assert (record["recommended"]["step"], record["recommended"]["evidence"]) == (20, ["log", "behaviour"])


@pytest.mark.parametrize(
    ("logged", "recommended", "next_best", "said"),
    [
        (35, 20, 30, "they may have been seen in other words"),
        (15, 10, None, "Behaviour shows the rows known only later than the log has them"),
    ],
)
def test_behaviour_that_contradicts_the_log(
    palinode, tiny, history, tmp_path, logged, recommended, next_best, said
):
    """The model learned the rows between the steps 20 and 30; the log has them elsewhere."""
    forget, retain = read_examples(tiny.forget), read_examples(tiny.retain)
    with ExposureLog.open(tmp_path / "log", data="d", tokenizer="t") as log:
        for step in range(1, 41):
            log.record(step, hashes([retain[step], *(forget if step == logged else [])]))
    words = [
        "locate",
        "--forget",
        tiny.forget,
        "--checkpoints",
        history / "ladder",
        "--log",
        tmp_path / "log",
    ]
    words += ["--control", history / "control.jsonl", "--max-length", 64, "--device", "cpu", "-q", "--json"]
    record = json.loads(palinode(*words).out)
    assert record["recommended"]["step"] == recommended
    assert (record["next_best"] or {}).get("step") == next_best
    assert any(said in text for text in record["warnings"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--steps", "1,two,3"], "write whole numbers with commas"),
        (["--steps", "1,2"], "2 steps were given for 3 checkpoints"),
        (["--pattern", "nothing*"], "holds no checkpoints"),
        (["--picture", "no/such/place.svg"], "cannot be written"),
        (["--similarity", "7"], "similarity"),
        (["--salt", "missing"], "the salt missing cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(palinode, words, changes, said):
    assert said in palinode(*words, *changes).refusal


@pytest.mark.parametrize(
    ("wrong", "said"), [("data", "another data set"), ("tokenizer", "another tokenizer")]
)
def test_log_of_another_training_is_refused(palinode, words, history, tiny, tmp_path, wrong, said):
    """Fingerprints of the log are held against the corpus and the ladder's tokenizer."""
    true = {
        "data": fingerprint_rows(hashes(read_examples(tiny.retain))),
        "tokenizer": fingerprint_tokenizer(load_tokenizer(tiny.base)),
    }
    for name, prints in (("right", true), ("wrong", {**true, wrong: "0" * 32})):
        with ExposureLog.open(tmp_path / name, **prints) as log:
            for step in range(1, 41):
                log.record(step, hashes(read_examples(tiny.forget)[:1]))
    words = [*words, "--corpus", tiny.retain]
    assert palinode(*words, "--log", tmp_path / "right").code == 0
    assert said in palinode(*words, "--log", tmp_path / "wrong").refusal


def test_locate_without_evidence_says_what_to_name(palinode, tiny, history):
    said = palinode("locate", "--forget", tiny.forget, "--checkpoints", history / "ladder")
    assert "name an exposure log (--log)" in said.refusal


def test_unlearn_takes_its_base_from_a_ladder_and_records_why(
    palinode, unlearn_words, history, tiny, tmp_path
):
    words = unlearn_words(
        tmp_path / "out",
        base=None,
        retain=None,
        scales=1.0,
        checkpoints=history / "ladder",
        log=history / "log",
        quiet=True,
    )
    said = palinode(*words)
    assert said.code == 0
    assert "the base is step 20 of the ladder" in said.err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["located"]["step"] == 20
    assert record["located"]["first_exposure"] == 25
    assert record["models"]["base"]["location"] == str(history / "ladder" / "step20")
    assert "The base was chosen from a ladder: step 20, clean by the exposure log." in record["notes"]


def test_unlearn_wants_a_base_or_a_ladder_and_not_both(palinode, unlearn_words, history, tmp_path):
    assert (
        "name an earlier checkpoint with --base"
        in palinode(*unlearn_words(tmp_path / "out", base=None)).refusal
    )
    both = unlearn_words(tmp_path / "out", checkpoints=history / "ladder")
    assert "leave one of them out" in palinode(*both).refusal


def test_unlearn_from_a_ladder_without_a_clean_rung_is_refused(palinode, unlearn_words, history, tmp_path):
    words = unlearn_words(
        tmp_path / "out", base=None, checkpoints=history / "ladder" / "step30", log=history / "log"
    )
    assert "no checkpoint of the ladder is known to be clean" in palinode(*words).refusal


def test_plan_prints_schedules_and_writes_a_picture(palinode, tmp_path):
    words = ["plan", "--steps", 1000, "--every", 10, "--checkpoint-size", "2GB", "--budget", "10GB"]
    said = palinode(*words, "--picture", tmp_path / "plan.svg")
    assert said.code == 0
    assert "Keep (" in said.out
    assert (tmp_path / "plan.svg").read_text().count('class="mark"') == 3 * 5
    assert json.loads(palinode(*words, "--json").out)["room"] == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--budget", "lots"], "'lots' is no size"),
        (["--checkpoint-size", "2,5GB"], "'2,5GB' is no size"),
        (["--budget", "1GB"], "no room for one"),
        (["--interest", "old"], "say uniform or recent"),
        (["--half-life", "50"], "--half-life is for --interest recent"),
    ],
)
def test_plan_refuses_in_one_sentence(palinode, changes, said):
    words = ["plan", "--steps", 1000, "--checkpoint-size", "2GB", "--budget", "10GB", *changes]
    assert said in palinode(*words).refusal


def test_plan_prints_every_step_to_keep(palinode):
    words = ["plan", "--steps", 1000, "--every", 10, "--checkpoint-size", "1GB", "--budget", "90GB"]
    best = json.loads(palinode(*words, "--json").out)["schedules"][0]
    assert len(best["kept"]) == 90
    assert f"Keep ({best['name']}): {', '.join(map(str, best['kept']))}." in palinode(*words).out


def test_plan_takes_the_size_of_a_folder(palinode, tiny):
    words = ["plan", "--steps", 1000, "--checkpoint-size", tiny.base.folder, "--budget", "1GB", "--json"]
    assert json.loads(palinode(*words).out)["wish"]["checkpoint_bytes"] == tiny.base.nbytes
