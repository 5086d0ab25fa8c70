"""Reports of a real run: none of the rows beside the weights, all of them in the workspace."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from palinode import Checkpoint
from palinode.errors import InputError, MismatchError, OutputError
from palinode.pipeline.record import CURVE_POINTS, thinned_curve
from palinode.pipeline.reporting import default_page, gather, suffixes_for, write_reports
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


def test_audits_and_comparisons_of_earlier_versions_are_read_with_todays_keys(tmp_path):
    (tmp_path / "audit.json").write_text(
        '{"version": 1, "yardstick": "retrained", "tests": [{"yardstick": 0.5}]}'
    )
    assert gather(tmp_path).audit == {"version": 1, "reference": "retrained", "tests": [{"reference": 0.5}]}
    (tmp_path / "audit.json").unlink()
    (tmp_path / "table.json").write_text('{"entries": [{"rows": {"forget": {"recall": 0.1}}}]}')
    assert gather(tmp_path).record == {"entries": [{"rows": {"forget": {"exact_match": 0.1}}}]}


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
