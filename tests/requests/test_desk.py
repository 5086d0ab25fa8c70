"""What is done with requests, on the tiny world: one model for all that are open, nothing without a trace."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from datetime import date
from math import exp
from pathlib import Path
from statistics import fmean

import pytest
from ledgers import THIRD, begin

from palinode import Desk
from palinode.audit.attacks import ATTACKS
from palinode.data.examples import read_examples
from palinode.errors import DataError, LedgerError, PalinodeError, RecipeError
from palinode.history.duplicates import hashes
from palinode.history.exposures import ExposureLog
from palinode.requests.desk import hindrance, worse_scores
from palinode.requests.ledger import standing
from palinode.requests.telling import checked, export, export_csv, told
from palinode.settings import LocateSettings


def weights(desk, model):
    return (desk.place(model) / "model.safetensors").read_bytes()


def kinds(desk):
    return [event.kind for event in desk.ledger.events()]


@pytest.fixture(autouse=True)
def _few_attacks(monkeypatch):
    """Audits of three kinds of attack: what is tested here is what becomes of them."""
    for name in {*ATTACKS} - {"questions", "membership", "relearn_forget"}:
        monkeypatch.delitem(ATTACKS, name)


# Intake


def test_the_ledger_has_hashes_and_counts_and_no_rows(made, rows):
    everything = b"".join(path.read_bytes() for path in made.folder.glob("ledger.sqlite*"))
    for example in (one for name in "123" for one in read_examples(rows / f"{name}.jsonl")):
        assert example.prompt.encode() not in everything
        assert example.key.encode() not in everything  # the hash without the salt can be guessed
    assert [request.rows for request in made.standing().open] == [THIRD] * 3
    assert len({hash for request in made.standing().open for hash in request.hashes}) == 3 * THIRD
    for name in ("salt", "ledger.sqlite", "sets", "work"):
        assert not (made.folder / name).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), name


def test_the_same_rows_have_other_hashes_in_another_ledger(recipe, rows, tmp_path):
    first, second = (begin(tmp_path / name, recipe, rows, "1").standing().requests["r1"] for name in "ab")
    assert not {*first.hashes} & {*second.hashes}


def test_a_request_is_due_after_the_days_of_the_policy_or_when_it_says(recipe, rows, tmp_path):
    desk = begin(tmp_path, recipe, rows, "1", days=10)
    assert desk.standing().requests["r1"].due == date(2026, 1, 11)
    assert desk.add("r2", rows / "2.jsonl", due=date(2099, 5, 6)).due == date(2099, 5, 6)
    with pytest.raises(RecipeError, match="would be due on 2026-01-01, before it was received on 2026-01-02"):
        desk.add("r3", rows / "3.jsonl", received=date(2026, 1, 2), due=date(2026, 1, 1))


def test_a_request_can_move_but_not_change(mine, rows, tmp_path):
    moved = shutil.copy(rows / "1.jsonl", tmp_path / "elsewhere.jsonl")
    before = kinds(mine)
    assert mine.add("r1", rows / "1.jsonl").location == str(rows / "1.jsonl")
    assert kinds(mine) == before
    assert mine.add("r1", moved).location == str(moved)
    assert kinds(mine) == [*before, "rows moved"]
    with pytest.raises(
        LedgerError, match=r"there is a request r1 with other rows \(10, received 2026-01-01\)"
    ):
        mine.add("r1", rows / "2.jsonl")


def test_dates_and_reference_that_are_given_later_are_an_event(mine, rows):
    before, own = kinds(mine), rows / "1.jsonl"
    changed = mine.add("r1", own, reference="ticket 9", due=date(2026, 12, 1))
    assert (changed.reference, changed.due, changed.received) == (
        "ticket 9",
        date(2026, 12, 1),
        date(2026, 1, 1),
    )
    assert kinds(mine) == [*before, "changed"]
    event = mine.ledger.events()[-1]
    assert event.facts == {"reference": "ticket 9", "due": "2026-12-01"}
    assert told(event) == "r1: due 2026-12-01, reference ticket 9"
    assert mine.add("r1", own) == mine.add("r1", own, due=date(2026, 12, 1), reference="ticket 9") == changed
    assert kinds(mine) == [*before, "changed"]
    assert mine.add("r1", own, received=date(2026, 2, 1)).due == date(2026, 3, 3)  # the policy's 30 days
    with pytest.raises(RecipeError, match="would be due on 2026-01-31, before it was received on 2026-02-01"):
        mine.add("r1", own, due=date(2026, 1, 31))
    mine.withdraw("r3")
    with pytest.raises(LedgerError, match="r3 was withdrawn"):
        mine.add("r3", rows / "3.jsonl", due=date(2099, 1, 1))


@pytest.mark.parametrize("name", ["", "../x", "a b", "ä", ".x", "x" * 65, "All"])
def test_a_name_is_one_word(made, rows, name):
    with pytest.raises(RecipeError, match="is no name for a request"):
        made.add(name, rows / "1.jsonl")


def test_names_that_differ_only_in_case_are_one_on_some_disks(made, rows):
    with pytest.raises(LedgerError, match="there is a request r1, and some disks take R1 for the same"):
        made.add("R1", rows / "1.jsonl")


def test_nothing_is_received_in_the_future(made, rows):
    with pytest.raises(RecipeError, match="r9 would be received on 2999-01-01, and today is"):
        made.add("r9", rows / "1.jsonl", received=date(2999, 1, 1))


def test_what_cannot_be_read_or_kept_is_said_in_words_of_the_ledger(recipe, tmp_path):
    (tmp_path / "own.csv").write_text("frage,antwort\nwho,me\nwhere,here\n")
    desk = begin(tmp_path / "ledger", recipe, tmp_path, "")
    with pytest.raises(DataError, match="--columns question=frage,answer=antwort, to palinode requests init"):
        desk.add("r1", tmp_path / "own.csv")
    with pytest.raises(RecipeError, match=r"the policy cannot be kept: .*budget.*'quick', 'standard'"):
        desk.configure(recipe, {"budget": "huge"})


def test_rows_that_changed_since_are_told_before_anything_runs(mine, rows, tmp_path):
    lines = (rows / "1.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "kept.jsonl").write_text("".join(lines))
    mine.add("r1", tmp_path / "kept.jsonl")
    (tmp_path / "kept.jsonl").write_text("".join(lines[1:]) + lines[1].replace(': "', ': "x'))
    with pytest.raises(
        DataError, match=r"does not hold the rows of r1 any more \(9 of 10 are there, among 10\)"
    ):
        mine.carry_out(["r1"])


def test_rows_that_are_gone_are_told_with_their_request_and_the_way_out(mine, rows, tmp_path):
    kept = shutil.copy(rows / "1.jsonl", tmp_path / "kept.jsonl")
    mine.add("r1", kept)
    moved = Path(kept).rename(tmp_path / "moved.jsonl")
    gone = rf"{kept} does not hold the rows of r1 any more \(no such file: {kept}\); restore it, or say "
    gone += "where they are: palinode requests add r1 --rows FILE"
    before = kinds(mine)
    for act in (mine.carry_out, mine.audit, lambda: mine.audit(["r2"]), lambda: mine.locate("r1", "-")):
        with pytest.raises(DataError, match=gone):
            act()
    assert kinds(mine) == before
    with pytest.raises(DataError, match=f"r3 is withdrawn, and that stands; .* not made yet: {gone}; then "):
        mine.withdraw("r3")
    assert kinds(mine) == [*before, "withdrawn"]
    mine.add("r1", moved)
    assert mine.carry_out()[0].requests == ("r1", "r2")


def test_an_audit_finds_rows_where_they_moved(mine, rows, tmp_path):
    kept = Path(shutil.copy(rows / "1.jsonl", tmp_path / "kept.jsonl"))
    mine.add("r1", kept)
    mine.carry_out()
    mine.add("r1", shutil.move(kept, tmp_path / "moved.jsonl"))
    assert [*mine.audit(["r1"])] == ["r1"]
    listed = mine.folder / "sets" / f"{mine.standing().candidate.set}.list"
    places = [tmp_path / "moved.jsonl", rows / "2.jsonl", rows / "3.jsonl"]
    assert sorted(listed.read_text().split()) == sorted(map(str, places))


def test_a_lost_salt_is_said(mine, rows):
    (mine.folder / "salt").unlink()
    with pytest.raises(LedgerError, match="the salt of the hashes"):
        mine.add("r4", rows / "1.jsonl")


# One model for all


def test_one_model_stands_for_all_open_requests(made):
    now = made.standing()
    first, second = now.models
    assert (first.requests, second.requests) == (("r1", "r2"), ("r1", "r2", "r3"))
    record = json.loads((made.place(second) / "record.json").read_text())
    assert record["data"]["forget"]["rows"] == 3 * THIRD
    assert record["models"]["unlearned"]["fingerprint"] == second.fingerprint
    event = made.ledger.events()[-1]
    assert (event.before, event.after) == (first.fingerprint, second.fingerprint)
    assert event.user == "ada"


def test_each_requests_rows_are_asked_apart(made):
    model = made.standing().candidate
    assert {name: found["unlearned"]["n"] for name, found in model.scores.items()} == dict.fromkeys(
        ("r1", "r2", "r3"), 10
    )
    record = json.loads((made.place(model) / "record.json").read_text())
    whole = record["scores"]["unlearned"]["forget"]["answer_probability"]["value"]
    assert sum(found["unlearned"]["value"] for found in model.scores.values()) / 3 == pytest.approx(whole)
    assert all(found["target"]["value"] > found["unlearned"]["value"] for found in model.scores.values())


def test_a_withdrawn_request_leaves_the_model_that_never_had_it_bit_for_bit(mine, recipe, rows, tmp_path):
    model, _ = mine.withdraw("r2", reason="settled")
    never = begin(tmp_path / "never", recipe, rows, "31")
    other, _ = never.carry_out()
    assert weights(mine, model) == weights(never, other)
    assert model.fingerprint == other.fingerprint
    assert mine.standing().state(mine.standing().requests["r2"]) == "withdrawn"


def test_where_there_was_nothing_to_forget_the_target_is_audited(recipe, rows, tiny, tmp_path):
    models = {"target": str(tiny.retrained.folder), "base": str(tiny.base.folder)}
    desk = begin(tmp_path / "ledger", {**recipe, "models": models, "scales": {"choose": "grid"}}, rows, "1")
    model, _ = desk.carry_out()
    assert (model.requests, model.fingerprint) == (("r1",), tiny.retrained.fingerprint())
    assert model.verdict["code"] == "nothing to forget"
    assert {*desk.audit()} == {""}
    assert {*desk.standing().candidate.audits} == {"", "r1"}


def test_withdrawing_all_leaves_the_target_itself(mine, tiny):
    for name in ("r1", "r2", "r3"):
        mine.withdraw(name)
    now = mine.standing()
    assert (now.candidate.requests, now.candidate.fingerprint) == ((), tiny.target.fingerprint())
    mine.publish()
    assert (mine.folder / "served").resolve() == tiny.target.folder.resolve()
    with pytest.raises(LedgerError, match="the candidate is the target itself"):
        mine.audit()
    with pytest.raises(LedgerError, match="r1 was withdrawn"):
        mine.carry_out(["r1"])


def test_the_way_does_not_matter(made, recipe, rows, tmp_path):
    other = begin(tmp_path / "other", recipe, rows, "321")
    model, _ = other.carry_out()
    assert weights(other, model) == weights(made, made.standing().candidate)


def test_what_stands_is_not_made_again(mine):
    before = len(kinds(mine))
    model, result = mine.carry_out()
    assert result is None
    assert model.requests == ("r1", "r2", "r3")
    assert len(kinds(mine)) == before


def test_rows_that_two_requests_ask_for_stay_erased_while_one_stands(recipe, rows, tmp_path):
    lines = (rows / "1.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "both.jsonl").write_text("".join(lines[:5]) + (rows / "2.jsonl").read_text())
    desk = begin(tmp_path / "ledger", recipe, rows, "1")
    desk.add("both", tmp_path / "both.jsonl")
    model, _ = desk.carry_out()
    record = json.loads((desk.place(model) / "record.json").read_text())
    assert record["data"]["forget"]["rows"] == 2 * THIRD


@pytest.mark.parametrize("most", [40, 12])
def test_each_request_is_scored_on_all_of_its_own_rows_whoever_shares_them(recipe, rows, tmp_path, most):
    first, second = ((rows / f"{name}.jsonl").read_text().splitlines(keepends=True) for name in "12")
    (tmp_path / "same.jsonl").write_text("".join(first))
    (tmp_path / "half.jsonl").write_text("".join(second[:5] + first[5:] + first[9:]))
    desk = begin(
        tmp_path / "ledger", {**recipe, "evaluation": {**recipe["evaluation"], "max_rows": most}}, rows, "1"
    )
    desk.add("same", tmp_path / "same.jsonl")
    desk.add("half", tmp_path / "half.jsonl")
    model, run = desk.carry_out()
    asked = {one.prompt: exp(fmean(one.logprobs)) for one in run.outcomes["unlearned"]["forget"]}
    assert len(asked) == min(most, 15)
    for name, file in (
        ("r1", rows / "1.jsonl"),
        ("same", tmp_path / "same.jsonl"),
        ("half", tmp_path / "half.jsonl"),
    ):
        own = [asked[one.prompt] for one in read_examples(file) if one.prompt in asked]
        assert model.scores[name]["unlearned"]["n"] == len(own) > 5, name
        assert model.scores[name]["unlearned"]["value"] == pytest.approx(fmean(own)), name
    if most == 40:
        assert [model.scores[name]["target"]["n"] for name in ("r1", "same", "half")] == [10, 10, 11]
    assert model.scores["r1"] == model.scores["same"]


def test_a_request_that_got_worse_is_named(made):
    model, before = made.standing().candidate, made.standing().models[0]

    def told(now, then, base=None):
        def scores(value):
            return {"value": value, "low": value - 0.1, "high": value + 0.1}

        after, earlier = (
            type(model)((), "", "", {}, {"r1": {"unlearned": scores(value)}}) for value in (now, then)
        )
        if base:
            after.scores["r1"]["base"] = scores(base)
        return worse_scores(earlier, after)

    assert told(0.6, 0.2) == ["r1"]
    assert told(0.6, 0.2, base=0.3) == ["r1"]
    assert told(0.35, 0.2) == told(0.2, 0.6) == told(0.6, 0.2, base=0.55) == []
    assert worse_scores(None, model) == []
    assert "r3" not in worse_scores(before, model)


def test_rows_to_erase_are_left_out_of_the_retain_rows_and_one_row_is_a_request(recipe, rows, tmp_path):
    lines, one = (rows / "1.jsonl").read_text().splitlines(keepends=True), tmp_path / "one.jsonl"
    one.write_text(lines[0])
    everything = tmp_path / "trained.jsonl"
    everything.write_text(
        "".join(lines) + (rows / "2.jsonl").read_text() + Path(recipe["data"]["retain"]).read_text()
    )
    desk = begin(tmp_path / "ledger", {**recipe, "data": {"retain": str(everything)}}, rows, "2", audit=True)
    desk.add("one", one)
    _, run = desk.carry_out()
    assert "11 retain rows that also stand in the forget set were left out." in run.record["notes"]
    assert [*desk.audit()] == ["", "r2"]  # none is made by one row, and none has a row to erase to retain
    assert hindrance(desk.standing(), despite=True) is None
    with pytest.raises(DataError, match="has one row; an audit needs two at least"):
        desk.audit(["one"])


def test_the_base_is_the_earliest_that_a_request_asks_for(recipe, rows, tiny, tmp_path):
    ladder = tmp_path / "ladder"
    ladder.mkdir()
    for step, name in ((10, "start"), (20, "base"), (30, "exposed")):
        (ladder / f"step{step}").symlink_to(tiny.base.folder.parent / name)
    first, second = (read_examples(rows / f"{name}.jsonl") for name in "12")
    with ExposureLog.open(tmp_path / "log", data="d", tokenizer="t") as log:
        for step in range(1, 41):
            seen = {25: first, 15: second}.get(step, read_examples(tiny.retain)[step : step + 1])
            log.record(step, hashes(seen), tokens=1000)
    models = {"target": str(tiny.target.folder)}
    desk = begin(tmp_path / "ledger", {**recipe, "models": models}, rows, "12")
    with pytest.raises(RecipeError, match="base"):  # neither named nor located
        desk.carry_out(["r1"])
    evidence = {"log": tmp_path / "log", "settings": LocateSettings(target_step=40)}
    request, _ = desk.locate("r1", str(ladder), **evidence)
    assert (request.located["step"], desk.standing().state(request)) == (20, "located")
    model, _ = desk.carry_out(["r1"])
    record = json.loads((desk.place(model) / "record.json").read_text())
    assert record["models"]["base"]["location"] == str(ladder / "step20")
    assert record["located"]["first_exposure"] == 25
    with pytest.raises(LedgerError, match="r2 was not located, and others ask for the base"):
        desk.carry_out()
    desk.locate("r2", str(ladder), **evidence)
    model, _ = desk.carry_out()
    record = json.loads((desk.place(model) / "record.json").read_text())
    assert record["models"]["base"]["location"] == str(ladder / "step10")
    desk.audit(["r2"])
    (audited,) = (desk.folder / "audits").glob("*/r2/audit.json")
    assert json.loads(audited.read_text())["models"]["reference"]["location"] == str(ladder / "step10")


# Before it is served


def test_the_policy_is_kept(recipe, rows, tmp_path):
    desk = begin(tmp_path / "ledger", recipe, rows, "12", approval=True, audit=True)
    with pytest.raises(LedgerError, match="no request was carried out yet"):
        desk.publish()
    desk.carry_out(["r1"])
    with pytest.raises(LedgerError, match="r1 was not audited on this model, as the policy asks"):
        desk.publish(despite="x")
    found = desk.audit()
    assert [*found] == [""]
    assert {*desk.standing().candidate.audits} == {"", "r1"}
    assert json.loads((desk.place(desk.standing().candidate) / "audit.json").read_text())["answer"]
    with pytest.raises(LedgerError, match="nobody has approved this model"):
        desk.publish(despite="a test")
    with pytest.raises(RecipeError, match="the name of whoever gives it"):
        desk.approve(" ")
    desk.approve("Eve Owner", note="checked")
    model = desk.publish(despite="a test")
    assert (desk.folder / "served").resolve() == desk.place(model)
    assert [event.kind for event in desk.ledger.events()][-3:] == ["audited", "approved", "published"]

    desk.carry_out()
    assert "r1 was not audited on this model" in (hindrance(desk.standing()) or "")  # another model
    found = desk.audit()
    assert [*found] == ["", "r1", "r2"]
    assert {*found["r1"]["tests"]} >= {"questions.probability"}
    assert "nobody has approved" in (hindrance(desk.standing(), despite=True) or "")


def test_a_red_verdict_needs_a_reason_that_is_kept(mine):
    now = mine.standing()
    now.candidate.verdict = {**now.candidate.verdict, "light": "red", "sentence": "It knows all."}
    assert "red (It knows all.)" in hindrance(now)
    assert hindrance(now, despite=True) is None
    now.candidate.verdict["light"] = "amber"
    assert hindrance(now) is None


def test_a_model_that_was_changed_is_not_served(mine):
    model = mine.standing().candidate
    path = mine.place(model) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="is not what was written"):
        mine.publish(despite="x")
    assert not (mine.folder / "served").exists()


def test_an_audit_of_a_model_that_was_changed_says_so_before_it_runs(mine):
    path = mine.place(mine.standing().candidate) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=f"{path.parent} is not what was written; palinode verify"):
        mine.audit()
    assert not (mine.folder / "audits").exists()


def test_a_model_that_a_withdrawn_request_is_in_is_not_served(mine, monkeypatch):
    monkeypatch.setattr(Desk, "carry_out", lambda self, names=None: (None, None))  # as if it was killed there
    mine.withdraw("r1")
    with pytest.raises(LedgerError, match="a request was withdrawn after this model was made"):
        mine.publish(despite="x")


def test_a_target_that_changed_since_is_told_before_anything_runs(recipe, rows, tiny, tmp_path):
    shutil.copytree(tiny.target.folder, tmp_path / "target")
    models = {**recipe["models"], "target": str(tmp_path / "target")}
    desk = begin(tmp_path / "ledger", {**recipe, "models": models}, rows, "1")
    shutil.copy(tiny.retrained.folder / "model.safetensors", tmp_path / "target")
    with pytest.raises(LedgerError, match="is not the model that the ledger began with"):
        desk.carry_out()
    assert kinds(desk) == ["configured", "added"]


def test_another_target_is_another_ledger(mine, recipe, tiny):
    mine.configure({**recipe, "seed": 1})
    assert mine.standing().recipe["seed"] == 1
    with pytest.raises(LedgerError, match="begin a ledger of its own"):
        mine.configure(
            {**recipe, "models": {"target": str(tiny.retrained.folder), "base": str(tiny.base.folder)}}
        )


# What is handed over


def test_the_verdict_is_of_the_model_that_the_state_speaks_of(mine):
    def audited(name, code, light):
        facts = {"code": code, "light": light, "symbol": "?", "sentence": "", "tests": {}, "worse": []}
        model = mine.standing().candidate.fingerprint
        mine.ledger.append({"kind": "audited", "request": name, "after": model, "facts": facts})

    for name in ("r1", "r3"):
        audited(name, "audit passed", "green")
    served = mine.publish(despite="a test")
    model, _ = mine.withdraw("r3")
    assert (model.requests, model.fingerprint != served.fingerprint) == (("r1", "r2"), True)
    audited("r1", "audit failed", "red")
    found = export(mine.ledger.events())["requests"]
    assert [(one["state"], one["verdict"], one["model"]) for one in found] == [
        ("served", "audit passed", served.fingerprint),
        ("served", served.verdict["code"], served.fingerprint),
        ("to restore", "audit passed", served.fingerprint),
    ]
    mine.publish(despite="a test")
    found = export(mine.ledger.events())["requests"]
    assert [(one["state"], one["verdict"]) for one in found[::2]] == [
        ("served", "audit failed"),
        ("withdrawn", "audit passed"),
    ]


def test_an_export_has_all_and_shows_a_ledger_that_was_put_back(mine, rows, tmp_path):
    early = mine.folder / "ledger.sqlite"
    copy = shutil.copy(early, tmp_path / "early.sqlite")
    mine.publish(despite="a test")
    content = export(mine.ledger.events())
    assert [one["state"] for one in content["requests"]] == ["served"] * 3
    assert content["head"] == content["events"][-1]["hash"]
    (tmp_path / "export.json").write_text(json.dumps(content))
    assert checked(mine.ledger, tmp_path / "export.json")["ok"]
    table = [*csv.DictReader(io.StringIO(export_csv(mine.ledger.events())))]
    assert [(one["request"], one["reference"], one["rows"]) for one in table] == [
        (f"r{name}", f"case {name}", "10") for name in "123"
    ]
    shutil.copy(copy, early)
    found = checked(mine.ledger, tmp_path / "export.json")
    assert not found["ok"]
    assert "event 7 of" in found["sentence"]


def test_a_reference_that_looks_like_a_formula_is_none_in_the_csv(recipe, rows, tmp_path):
    desk = begin(tmp_path, recipe, rows, "")
    desk.add("r1", rows / "1.jsonl", reference="=HYPERLINK(1)")
    assert "'=HYPERLINK(1)" in export_csv(desk.ledger.events())


# Killed at fifty places

KILLED = """
import json, os, signal, shutil, sys
from pathlib import Path
from palinode import Desk

ready, scratch, rows, places = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
recipe = json.loads(sys.argv[5])


def story(folder, told):
    desk = Desk(folder, user="ada")
    acts = [
        lambda: desk.configure(recipe),
        lambda: desk.add("r1", rows / "1.jsonl"),
        lambda: desk.add("r2", rows / "2.jsonl"),
        lambda: desk.carry_out(),
        lambda: desk.approve("eve") if "approved" not in kinds(desk) else None,
        lambda: desk.publish(despite="a test"),
        lambda: desk.withdraw("r2"),
        lambda: desk.publish(despite="a test"),
    ]
    done = kinds(desk)
    if "withdrawn" in done:  # what comes before is done, and done otherwise it would be another story
        acts = acts[6:]
    for act in acts:
        act()
        told(desk.ledger.events()[-1].hash)
    return desk


def kinds(desk):
    return [event.kind for event in desk.ledger.events()] if desk.ledger.path.exists() else []


def result(desk):
    now = desk.standing()
    states = {name: now.state(request) for name, request in now.requests.items()}
    link = desk.folder / "served"
    return [states, now.served.fingerprint, os.readlink(link), kinds(desk)]


def in_child(act):
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def lines(stop, act):
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if "/palinode/requests/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == stop:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return count


def prepared(name):
    folder = scratch / name
    folder.mkdir()
    shutil.copytree(ready / "models", folder / "models")  # so that no run is repeated
    (folder / "work").symlink_to(ready / "work")
    return folder


total = lines(0, lambda: story(prepared("whole"), print))
whole = result(Desk(scratch / "whole"))
print("WHOLE", json.dumps([total, whole]))
for place in range(places):
    folder, log = prepared(f"killed{place}"), scratch / f"told{place}"

    def act():
        with log.open("w") as file:
            def told(hash):
                file.write(hash + "\\n")
                file.flush()
            lines(1 + total * place // places, lambda: story(folder, told))

    code = in_child(act)
    told = log.read_text().split() if log.exists() else []
    there = (folder / "ledger.sqlite").exists()
    after = [event.hash for event in Desk(folder).ledger.events()] if there else []
    kept = all(hash in after for hash in told)
    print("PLACE", json.dumps([place, code, kept, len(after), result(story(folder, lambda _: None))]))
    shutil.rmtree(folder)
"""


@pytest.mark.parametrize("places", [9, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_many_places_the_ledger_goes_on_and_comes_to_the_same(recipe, rows, tmp_path, places):
    ready = begin(tmp_path / "ready", recipe, rows, "12")
    ready.carry_out()
    ready.withdraw("r2")
    (tmp_path / "scratch").mkdir()
    told = [ready.folder, tmp_path / "scratch", rows, str(places), json.dumps(recipe)]
    words = [sys.executable, "-c", KILLED, *told]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    said = [line.partition(" ") for line in run.stdout.splitlines()]
    total, whole = next(json.loads(text) for word, _, text in said if word == "WHOLE")
    found = [json.loads(text) for word, _, text in said if word == "PLACE"]
    assert total > 500
    assert len(found) == places
    states, served, link, kinds = whole
    assert states == {"r1": "served", "r2": "withdrawn"}
    assert link == os.path.relpath(ready.place(ready.standing().candidate), ready.folder)
    for place, code, kept, _, result in found:
        assert code == -9, place
        assert kept, f"an event that was told of is gone after place {place}"
        assert result[:3] == [states, served, link], place
        assert result[3] == kinds, place
    assert len({length for *_, length, _ in found}) > 5  # they were killed all along the way


def test_an_interrupted_carry_out_finds_its_own_steps(recipe, rows, tmp_path, monkeypatch):
    desk = begin(tmp_path / "ledger", recipe, rows, "1")
    append = desk.ledger.append
    monkeypatch.setattr(desk.ledger, "append", lambda decide: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        desk.carry_out()
    assert desk.standing().candidate is None
    monkeypatch.setattr(desk.ledger, "append", append)
    model, result = desk.carry_out()
    assert result.finished_before
    assert model.requests == ("r1",)
    assert model.scores["r1"]["unlearned"]["n"] == THIRD


def test_nothing_to_do_is_said(recipe, tmp_path):
    desk = Desk(tmp_path / "ledger")
    with pytest.raises(LedgerError, match="there is no ledger"):
        desk.carry_out()
    desk.configure(recipe)
    for act in (
        desk.carry_out,
        desk.audit,
        desk.publish,
        lambda: desk.approve("x"),
        lambda: desk.withdraw("r1"),
    ):
        with pytest.raises(PalinodeError):
            act()
    assert kinds(desk) == ["configured"]
    assert standing(desk.ledger.events()).served is None


def test_ctrl_c_in_a_carry_out_is_one_sentence_and_the_same_command_goes_on(recipe, rows, tmp_path):
    desk = begin(tmp_path / "ledger", recipe, rows, "1")
    words = [sys.executable, "-m", "palinode", "requests", "carry-out", "--ledger", str(desk.folder)]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = ""
    for line in run.stderr:
        said += line
        if line.startswith("What will be done"):
            run.send_signal(signal.SIGINT)
    run.stderr.close()
    run.stdout.close()
    assert run.wait() == 2
    assert "the same command goes on where this one stopped" in said
    assert "Traceback" not in said
    assert kinds(desk) == ["configured", "added"]
    assert desk.carry_out()[0].requests == ("r1",)
