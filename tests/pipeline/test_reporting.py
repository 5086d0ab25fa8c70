"""Reports of a real run: none of the rows beside the weights, all of them in the workspace."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil

import pytest

from example_run import AUDIT
from palinode import Checkpoint
from palinode.errors import InputError, MismatchError, OutputError
from palinode.pipeline.reporting import (
    CURVE_POINTS,
    default_page,
    gather,
    stale,
    suffixes_for,
    thinned_curve,
    write_reports,
)
from palinode.pipeline.run import unlearn

SCRIPT = re.compile(r"<script>.*?</script>", re.DOTALL)


@pytest.fixture(scope="module")
def done(tiny, recipe_of, tmp_path_factory):
    """A run with given scales and a retrained model, whose target has a card of its own; read it only."""
    folder = tmp_path_factory.mktemp("reported")
    target = folder / "target"
    shutil.copytree(tiny.target.folder, target)
    (target / "README.md").write_text("the target's own card")
    models = {"target": str(target), "retrained": str(tiny.retrained.folder)}
    scales = {"forget": 0.5, "retain": 0.5}
    return unlearn(recipe_of(folder / "out", models=models, scales=scales, training={"epochs": 1}))


def texts_of(world):
    return {fact.prompt for fact in world.forget} | {fact.answer for fact in world.forget}


def shown(page):
    """A page without its scripts, which hold words of all kinds."""
    return SCRIPT.sub("", page.read_text(encoding="utf-8"))


def test_nothing_in_the_models_folder_holds_text_of_the_rows(done, world):
    pages = [path for path in done.output.iterdir() if path.stem in ("report", "record", "README")]
    assert len(pages) == 5
    written = " ".join(map(shown, pages))
    words = set(re.findall(r"\w+", written))
    assert [text for text in texts_of(world) if text in written and text.split() != [text]] == []
    assert [text for text in texts_of(world) if text in words] == []
    assert str(done.report) in written


def test_the_report_in_the_workspace_has_answers_of_every_model(done, world):
    assert done.report == done.output.with_name("out.workspace") / "report.html"
    written = shown(done.report)
    for fact in world.forget:
        assert fact.prompt in written
    models = set(re.findall(r'data-model="(\w+)"', written))
    assert models == {"target", "unlearned", "retrained", "base"}
    assert done.report.stat().st_size < 8_000_000


def test_a_report_made_anew_says_the_same(done):
    facts = gather(done.output)
    assert default_page(facts, done.output) == done.report
    content = write_reports(facts, done.report.with_name("again.html"))
    assert json.loads(done.report.with_suffix(".json").read_text()) == content
    assert content["training"]["forget"]["curve"]["losses"]


def test_texts_are_refused_in_the_models_folder(done):
    with pytest.raises(OutputError, match="must not carry the text of the rows"):
        write_reports(gather(done.output), done.output / "again.html")


def test_report_goes_without_answers_when_the_workspace_is_gone(done, tmp_path):
    shutil.copytree(done.output, tmp_path / "out")
    facts = gather(tmp_path / "out")
    assert facts.answers_gone
    assert not facts.texts
    assert default_page(facts, tmp_path / "out") == tmp_path / "out" / "report.html"


def test_card_replaces_no_words_of_the_targets_card_in_silence(done):
    card = (done.output / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "base_model" not in card  # a local folder is nothing that the hub knows
    assert "has a card of its own" in card
    Checkpoint.open(done.output)


def test_a_card_written_anew_elsewhere_says_the_same_of_the_target(
    tiny, recipe_of, tmp_path, monkeypatch, palinode
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.target.folder, tmp_path / "models" / "target")
    (tmp_path / "models" / "target" / "README.md").write_text("a card")
    run = unlearn(
        recipe_of(
            tmp_path / "out",
            models={"target": "models/target"},
            scales={"forget": 0.5, "retain": 0.0},
            training={"epochs": 1},
        )
    )
    before = (run.output / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in before
    assert "target has a card of its own" in before
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where models/target looks like an id on the hub
    assert palinode("report", run.output).code == 0
    assert (run.output / "README.md").read_text(encoding="utf-8") == before


def test_other_folders_and_names_are_refused(done, tmp_path):
    with pytest.raises(InputError, match="holds no record"):
        gather(tmp_path)
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        gather(tmp_path)
    with pytest.raises(OutputError, match="no name for a report"):
        suffixes_for(gather(done.output), tmp_path / "report.pdf")


def test_an_audit_of_another_model_is_refused(done, tmp_path):
    (tmp_path / "audit.json").write_text(
        json.dumps({"models": {"audited": {"fingerprint": "0" * 32, "location": "elsewhere"}}})
    )
    with pytest.raises(MismatchError, match="another model"):
        gather(done.output, audit=tmp_path)
    with pytest.raises(InputError, match="goes with an unlearned model's folder"):
        gather(tmp_path, audit=tmp_path)


def test_thin_curves_keep_short_ones_and_average_long_ones():
    assert thinned_curve([3.0, 2.0, 1.0]) == {"every": 1, "steps": [0, 1, 2], "losses": [3.0, 2.0, 1.0]}
    long = thinned_curve([float(step % 2) for step in range(2 * CURVE_POINTS)])
    assert long["every"] == 2
    assert long["losses"] == [0.5] * CURVE_POINTS


def test_command_prints_where_the_report_is(done, palinode, tmp_path):
    said = palinode("report", done.output, "--without-texts", "--output", tmp_path / "plain.html")
    assert said.code == 0
    assert said.out.splitlines()[-1] == str(tmp_path / "plain.html")
    assert palinode("report", tmp_path).refusal.startswith(f"{tmp_path} holds no record")


# The verdict of a run, wherever it is read


def failed_audit(run):
    """The record of an audit that found something in the run's model."""
    audited = run.record["models"]["unlearned"]
    return {**AUDIT, "models": {**AUDIT["models"], "audited": audited}}


@pytest.fixture
def handed_over(done, tmp_path):
    """A copy of the run's folder, and a folder with an audit of its model."""
    shutil.copytree(done.output, tmp_path / "out")
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(failed_audit(done)))
    return tmp_path / "out", tmp_path / "audit"


def told(folder):
    """The verdict as each file of a hand-over folder tells it."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    page = shown(folder / "report.html")
    sentence = json.loads((folder / "record.json").read_text())["verdict"]["sentence"]
    return {
        "record": sentence,
        "report": json.loads((folder / "report.json").read_text())["outcome"],
        "card": re.search(r'palinode_verdict: "(.*)"', card).group(1),
        "page": html.unescape(re.search(r"<h1.*<span>(.*)</span></h1>", page).group(1)),
        "markdown": sentence if sentence in (folder / "report.md").read_text(encoding="utf-8") else None,
    }


def test_every_file_of_a_run_tells_one_verdict(done):
    assert set(told(done.output).values()) == {done.verdict["sentence"]}
    assert stale(done.output) == []


def test_an_audit_that_is_told_of_is_in_every_file_from_then_on(handed_over, palinode):
    out, audit = handed_over
    said = palinode("report", out, "--audit", audit)
    assert said.code == 0
    (sentence,) = set(told(out).values())
    assert "an audit speaks against it" in sentence
    assert sentence in said.out
    assert "No audit was known" not in (out / "README.md").read_text(encoding="utf-8")
    assert json.loads((out / "audit.json").read_text()) == json.loads((audit / "audit.json").read_text())
    assert palinode("report", out).code == 0  # it remembers
    assert set(told(out).values()) == {sentence}
    verdict = json.loads((out / "record.json").read_text())["verdict"]
    assert (verdict["light"], verdict["exit_code"]) == ("red", 1)


def test_what_is_older_than_the_audit_is_called_stale(handed_over, palinode):
    out, audit = handed_over
    shutil.copy(audit / "audit.json", out)
    assert stale(out) == ["record.json", "report.json", "report.html", "report.md", "README.md"]
    said = palinode("verify", out, "--quiet")
    assert said.code == 0
    assert "README.md" in said.err
    assert f"palinode report {out}" in said.err
    assert palinode("report", out).code == 0
    assert stale(out) == []


@pytest.mark.parametrize("spoilt", ["{", "[]", '{"models": {}}'])
def test_weights_are_verified_whatever_the_record_beside_them_is(handed_over, palinode, spoilt):
    out, audit = handed_over
    other = json.loads((audit / "audit.json").read_text())
    other["models"]["audited"] = {"fingerprint": "0" * 32}
    (out / "audit.json").write_text(json.dumps(other))
    for _ in ("an audit of another model", "a record that cannot be read"):
        said = palinode("verify", out, "--quiet")
        assert said.code == 0
        assert "record.json" in said.err
        (out / "record.json").write_text(spoilt)


def test_a_run_ends_with_its_verdict_and_what_comes_next(done, tiny, palinode, unlearn_words, tmp_path):
    said = palinode(*unlearn_words(tmp_path / "out", scales="0.5,0.5", epochs=1), "--quiet")
    lines = [line.strip() for line in said.out.splitlines()]
    verdict = json.loads((tmp_path / "out" / "record.json").read_text())["verdict"]
    assert said.code == verdict["exit_code"]
    place = lines.index(f"{verdict['symbol']} {verdict['sentence']}")
    assert lines[place + 1] == "Strength: α = 0.5, β = 0.5"
    assert lines[place + 2].startswith(f"Model:    {tmp_path / 'out'} (")
    assert lines[place + 3].startswith(f"Page:     {tmp_path / 'out.workspace' / 'report.html'}")
    assert lines[place + 4] == (
        f"Next:     palinode audit {tmp_path / 'out'} --against {tiny.base.folder} --reference base "
        f"--forget {tiny.forget} --output {tmp_path / 'out-audit'}"
    )
    assert lines[place + 5] == f"palinode chat {tmp_path / 'out'}"
    assert lines[place + 6] == f"palinode verify {tmp_path / 'out'}"
    assert lines[place + 7].startswith("Secret: ")


# Runs without a result


def test_where_nothing_is_subtracted_no_folder_looks_like_a_result(palinode, unlearn_words, tmp_path):
    command = unlearn_words(tmp_path / "out", scales="0,0", epochs=1)
    said = palinode(*command, "--quiet")
    assert said.code == 3
    assert "✕ Nothing was subtracted: the model is the target, bit for bit" in said.out
    assert "Strength: α = 0, β = 0" in said.out
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.workspace" / "report.html").exists()
    kept = palinode(*command, "--quiet", "--keep-unchanged")
    assert kept.code == 3
    assert told(tmp_path / "out")["card"].startswith("Nothing was subtracted")
    assert json.loads((tmp_path / "out" / "record.json").read_text())["verdict"]["exit_code"] == 3


def copied(folder, place):
    """The same model in another folder: a target that is as if it had been retrained."""
    return shutil.copytree(folder, place / folder.name)


def test_where_there_is_nothing_to_forget_nothing_is_trained(tiny, palinode, unlearn_words, tmp_path):
    command = unlearn_words(tmp_path / "out", target=tiny.retrained.folder, scales="grid", epochs=1)
    command += ["--retrained", str(copied(tiny.retrained.folder, tmp_path))]
    said = palinode(*command, "--quiet")
    assert said.code == 3
    assert "There was nothing to forget: the target did not know the forget set" in said.out
    assert f"Next:     {shlex.join(['palinode', *command, '--quiet', '--keep-unchanged'])}" in said.out
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.workspace").glob("finetune-*"))
    as_json = palinode(*command, "--quiet", "--json")
    assert as_json.code == 3
    assert json.loads(as_json.out)["verdict"]["code"] == "nothing to forget"
    kept = palinode(*command, "--quiet", "--keep-unchanged")
    assert kept.code == 3
    assert told(tmp_path / "out")["card"].startswith("There was nothing to forget")


def test_a_given_alpha_is_carried_out_where_there_is_nothing_to_forget(
    tiny, palinode, unlearn_words, tmp_path
):
    command = unlearn_words(tmp_path / "out", target=tiny.retrained.folder, scales="1,0", epochs=1)
    said = palinode(*command, "--retrained", copied(tiny.retrained.folder, tmp_path), "--quiet")
    assert said.code == 3
    assert told(tmp_path / "out")["card"].startswith("There was nothing to forget")


def test_a_function_call_returns_no_folder_where_there_is_no_result(tiny, recipe_of, tmp_path):
    models = {"target": str(tiny.target.folder)}
    found = unlearn(recipe_of(tmp_path / "out", models=models, scales={"forget": 0.0, "retain": 0.0}))
    assert found.output is None
    assert found.verdict["code"] == "nothing subtracted"
    assert found.report is not None
