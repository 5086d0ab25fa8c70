"""From an answer to the rows behind it, to a model without them, to its audit."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest

import palinode
from palinode import Example, read_examples
from palinode.data.examples import Message, fingerprint_examples
from palinode.influence.sets import write_sets
from palinode.pipeline.workspace import Workspace
from palinode.progress import NullListener
from palinode.settings import InfluenceSettings

SETTINGS = InfluenceSettings(top=3, width=509, device="cpu", max_new_tokens=3, max_length=64)


class Interrupted(NullListener):
    """Ctrl-C when a task of this name has begun."""

    def __init__(self, name):
        self.name, self.seen = name, []

    @contextmanager
    def task(self, label, total, unit):
        self.seen.append(label)
        if self.name and self.name in label:
            raise KeyboardInterrupt
        yield lambda _: None


@pytest.fixture(scope="module")
def undone(tiny, learned, tmp_path_factory):
    """What came of it, after an interruption while training and one while auditing."""
    folder = tmp_path_factory.mktemp("undone")
    ways = {
        "device": "cpu",
        "models": {"target": str(tiny.target.folder), "base": str(tiny.base.folder)},
        "data": {"forget": str(tiny.forget), "retain": str(tiny.retain)},
        "training": {"epochs": 4, "learning_rate": 3e-3, "batch_size": 16, "max_length": 64},
        "scales": {"forget": 1.0, "retain": 0.0},
        "evaluation": {"max_rows": 20, "max_new_tokens": 3, "max_length": 64},
    }
    fact = learned

    def go(interrupted):
        hear = Interrupted(interrupted)
        done = palinode.influence_then_unlearn(
            {fact.prompt: fact.answer},
            ways,
            output=folder / "out",
            settings=SETTINGS,
            budget="quick",
            listener=hear,
        )
        return done, hear.seen

    for name in ("fine-tuning", "audited, "):
        with pytest.raises(KeyboardInterrupt):
            go(name)
    return *go(None), go, fact


def test_the_highest_rows_are_the_forget_set_and_all_others_the_retain_set(undone, tiny):
    done, *_ = undone
    data = done.unlearned.record["data"]
    every = [*read_examples(tiny.forget), *read_examples(tiny.retain)]
    chosen = {every[one["row"]].key for one in done.found.record["ranking"]["top"][0]}
    assert {row.key for row in read_examples(data["forget"]["location"])} == chosen
    assert data["forget"]["rows"] + data["retain"]["rows"] == len(every)


def test_an_interrupted_call_goes_on_and_a_finished_one_is_found(undone):
    done, seen, go, _ = undone
    assert not any("fine-tuning" in label for label in seen)  # it was through before the second Ctrl-C
    again, labels = go(None)
    assert not any(word in label for label in labels for word in ("fine-tuning", "audited"))
    assert again.unlearned.record == done.unlearned.record


def test_record_and_report_tell_rows_and_both_answers_without_a_text(undone):
    done, _, _, fact = undone
    told = done.unlearned.record["influence"]
    (answer,) = told["answers"]
    before, after = answer["probability"]
    assert after < before / 2
    assert [one["place"] for one in answer["rows"]] == [
        one["place"] for one in done.found.record["ranking"]["top"][0]
    ]
    assert all(one["interval"][0] < one["score"] < one["interval"][1] for one in answer["rows"])
    output = done.unlearned.output
    for name in ("record.json", "report.json", "report.md", "README.md"):
        assert fact.prompt not in (output / name).read_text()
    assert "Rows behind an answer" in (output / "report.md").read_text()
    assert done.audited.output.name == "out-audit"
    assert (output / "audit.json").read_text() == (done.audited.output / "audit.json").read_text()
    assert [one.prompt for one in done.outcomes] == [fact.prompt]


def test_rows_of_any_form_are_written_as_they_are_read(tmp_path):
    user = (Message("user", "a?"),)
    talk = (Message("system", "be kind"), *user, Message("assistant", "b"), Message("user", "c?"))
    rows = [
        Example(0, "x", "question", user, "b "),
        Example(1, "x", "completion", (Message("prompt", "once "),), " upon"),
        Example(2, "x", "chat", talk, "d"),
        Example(3, "x", "document", (), "a text\nof two lines"),
        Example(4, "x", "document", (), "another"),
    ]
    top = [[{"row": row, "score": 1.0} for row in range(4)] + [{"row": 4, "score": -0.1}]]
    data = write_sets(Workspace(tmp_path), rows, {"ranking": {"top": top}})
    assert fingerprint_examples(read_examples(data["forget"])) == fingerprint_examples(rows[:4])
    assert fingerprint_examples(read_examples(data["retain"])) == fingerprint_examples(rows[4:])
    with pytest.raises(palinode.PalinodeError, match="no row has a score above 0"):
        write_sets(Workspace(tmp_path), rows, {"ranking": {"top": [top[0][4:]]}})


def test_the_command_line_says_what_was_done_and_keeps_texts_out(undone, tiny, palinode, tmp_path):
    *_, fact = undone
    asked = (
        "--ask",
        fact.prompt,
        f"--answer={fact.answer}",
        "--rows",
        tiny.forget,
        "--top",
        2,
        "--width",
        509,
    )
    models = (
        "--target",
        tiny.target.folder,
        "--base",
        tiny.base.folder,
        "--device",
        "cpu",
        "--scales",
        "1,0",
    )
    training = ("--epochs", 4, "--learning-rate", 3e-3, "--batch-size", 16, "--max-length", 64)
    words = ["influence", *asked, *models, *training, "--max-new-tokens", 3, "--then", "unlearn", "--output"]
    words += [tmp_path / "new"]
    said = palinode(*words, "--budget", "quick")
    assert "Traceback" not in said.err
    assert "before and after" in said.out
    assert f"Audit:    {tmp_path / 'new-audit'}" in said.out
    record = (tmp_path / "new" / "record.json").read_text()
    assert fact.prompt not in record
    assert "--ask … " in json.loads(record)["command"].replace("'", "")
    assert "exists and is not empty" in palinode(*words[:-1], tiny.forget.parent).refusal
