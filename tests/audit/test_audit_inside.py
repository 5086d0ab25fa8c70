"""Looking inside: what a model's states still hold, whatever it says; and questions after other ones."""

from __future__ import annotations

import json
import math

import pytest
import torch

from palinode.audit.attack import AuditBudget, Subject
from palinode.audit.attacks import TALKS, after, ask_in_talk, ask_indirect, ask_questions, show_examples
from palinode.audit.inside import left, look_inside
from palinode.audit.material import read_material
from palinode.audit.rounding import ask_quantised
from palinode.data.examples import Example, Message
from palinode.errors import MismatchError
from palinode.models.loading import load_tokenizer
from palinode.settings import AuditSettings
from palinode.weights import Checkpoint

BUDGET = AuditBudget(max_new_tokens=4, max_length=64)


@pytest.fixture
def subject(scene):
    """A function that makes a subject of a model folder, beside target and retrained model."""

    def make(folder, name="audited", **others):
        beside = {"target": Checkpoint.open(scene.target), "reference": Checkpoint.open(scene.retrained)}
        beside |= {role: Checkpoint.open(place) for role, place in others.items()}
        checkpoint = Checkpoint.open(folder)
        tokenizer = load_tokenizer(checkpoint)
        return Subject(name, checkpoint, tokenizer, device=torch.device("cpu"), beside=beside)

    return make


@pytest.fixture(scope="module")
def rows(scene):
    return read_material(scene.forget, retain=scene.retain, max_rows=12)


def values(result, test="depth"):
    return [value for value in result.tests[test]["forget"] if value is not None]


def changed(folder, to, change):
    """Write a model folder anew with `change` made to its tensors."""
    from palinode.models import load_model

    model = load_model(Checkpoint.open(folder), device=torch.device("cpu"))
    with torch.no_grad():
        change(model)
    model.save_pretrained(to)
    load_tokenizer(Checkpoint.open(folder)).save_pretrained(to)
    return to


def test_share_left_is_weighted_by_what_the_reference_model_lacks_and_clipped_at_both_ends():
    assert left([1.0, 3.0], [1.0, 3.0]) == 0.0
    assert left([1.0, 3.0], [0.0, 0.0]) == 1.0
    assert left([1.0, 3.0], [1.0, 0.0]) == 0.75  # three quarters of the gap are at the second block
    assert left([1.0, 3.0], [9.0, -9.0]) == 0.75  # more than all of it, and better than the target
    assert left([0.05, 0.01], [1.0, 1.0]) is None  # the reference model lacks nothing
    assert left([float("nan")], [0.0]) is None  # no token of the answer to look at


def test_target_has_all_of_it_and_the_reference_model_nothing(scene, subject, rows):
    for name, folder, share in (("target", scene.target, 1.0), ("reference", scene.retrained, 0.0)):
        found = look_inside(subject(folder, name), rows, BUDGET)
        for test in ("depth", "lens"):
            assert len(values(found, test)) > 6
            assert set(values(found, test)) == {share}
    copy = look_inside(subject(scene.target), rows, BUDGET)
    assert values(copy) == pytest.approx([1.0] * len(values(copy)), abs=1e-5)  # measured, not by its name


def test_answer_that_is_only_kept_back_is_found_inside(scene, subject, rows, tmp_path):
    mute = changed(scene.target, tmp_path / "mute", lambda model: model.model.norm.weight.zero_())
    said = ask_questions(subject(mute), rows, BUDGET).tests["probability"]["forget"]
    known = ask_questions(subject(scene.target), rows, BUDGET).tests["probability"]["forget"]
    assert max(said) < 0.02 < sum(known) / len(known)
    found = look_inside(subject(mute), rows, BUDGET)
    assert values(found) == pytest.approx([1.0] * len(values(found)), abs=1e-5)
    assert values(found, "lens") == pytest.approx([1.0] * len(values(found, "lens")), abs=1e-5)


def test_after_the_last_block_to_put_in_and_to_read_off_are_one(scene, subject, rows):
    last = BUDGET.model_copy(update={"inside_blocks": 1})
    found = look_inside(subject(scene.base), rows, last)
    assert found.details["blocks"] == [found.details["blocks"][0]]
    assert values(found) == pytest.approx(values(found, "lens"), abs=1e-4)


def test_what_the_reference_model_knows_as_well_has_no_value(scene, subject, rows):
    found = look_inside(subject(scene.base, reference=scene.target), rows, BUDGET)
    assert values(found) == values(found, "lens") == []
    assert found.details["nats_lacking"] == {"reference": [], "subject": []}


def test_row_has_the_same_share_alone_and_among_longer_ones(scene, subject, rows, tmp_path):
    whole = look_inside(subject(scene.base), rows, BUDGET).tests["depth"]["forget"]
    lines = scene.forget.read_text().splitlines()
    chosen = [one.row for one in rows.forget][:2]
    (tmp_path / "two.jsonl").write_text("\n".join(lines[row] for row in sorted(chosen)))
    two = read_material(tmp_path / "two.jsonl")
    alone = look_inside(subject(scene.base), two, BUDGET).tests["depth"]["forget"]
    by_row = dict(zip((one.row for one in rows.forget), whole, strict=True))
    assert list(alone) == pytest.approx([by_row[row] for row in sorted(chosen)], abs=1e-5)


def test_models_of_two_shapes_are_refused_in_words(scene, subject, rows, tmp_path):
    config = json.loads((scene.target / "config.json").read_text())

    def shorten(model):
        del model.model.layers[-1]
        model.config.num_hidden_layers -= 1

    shorter = changed(scene.target, tmp_path / "shorter", shorten)
    with pytest.raises(MismatchError, match=f"{config['num_hidden_layers']} blocks of width"):
        look_inside(subject(shorter), rows, BUDGET)


def test_what_was_said_before_stands_before_the_question_and_after_the_system_message():
    turns = (Message("system", "Be short."), Message("user", "Who?"))
    asked = after(Example(0, "rows", "chat", turns, "Ada."), [("When?", "Then.")])
    assert [(turn.role, turn.content) for turn in asked.turns] == [
        ("system", "Be short."),
        ("user", "When?"),
        ("assistant", "Then."),
        ("user", "Who?"),
    ]
    raw = after(Example(0, "rows", "completion", (Message("prompt", "Ada lives in"),), "Rome"), [("a", "b")])
    assert raw.prompt == "a b\nAda lives in"
    assert raw.answer == "Rome"


def test_few_shot_and_conversation_ask_every_question_after_other_words(scene, subject, rows):
    target = subject(scene.target)
    plain = ask_questions(target, rows, BUDGET).tests["probability"]["forget"]
    shown = show_examples(target, rows, BUDGET)
    assert shown.details == {"demonstrations": BUDGET.demonstrations}
    talked = ask_in_talk(target, rows, BUDGET)
    for found in (shown, talked):
        asked = found.tests["probability"]["forget"]
        assert len(asked) == len(rows.forget)
        assert sum(abs(one - other) > 1e-3 for one, other in zip(asked, plain, strict=True)) > len(asked) / 2
    each = []
    for talk in TALKS:
        examples = [after(example, [talk(example.prompt)]) for example in rows.forget]
        outcomes = target.ask(examples, BUDGET.likelihoods)
        each.append([math.exp(math.fsum(one.logprobs) / len(one.logprobs)) for one in outcomes])
    best = [max(pair) for pair in zip(*each, strict=True)]
    assert list(talked.tests["probability"]["forget"]) == pytest.approx(best)


def test_indirect_questions_are_asked_as_they_stand_and_kinds_told_apart(scene, subject, rows, tmp_path):
    given = [
        {"prompt": one.prompt, "completion": one.answer, "kind": "ab"[one.row % 2]} for one in rows.forget
    ]
    (tmp_path / "given.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in given))
    settings = AuditSettings(indirect=str(tmp_path / "given.jsonl"))
    asked = read_material(scene.forget, settings=settings, max_rows=12)
    found = ask_indirect(subject(scene.target), asked, BUDGET)
    plain = ask_questions(subject(scene.target), rows, BUDGET).tests["probability"]["forget"]
    assert found.tests["given"]["forget"] == pytest.approx(plain)
    assert found.tests["alias"]["forget"] == ()  # the names of this world have no capitals
    kinds = found.details["kinds"]
    assert set(kinds) <= {"a", "b"}
    for kind, mean in kinds.items():
        own = [value for value, row in zip(plain, given, strict=True) if row["kind"] == kind]
        assert mean == pytest.approx(sum(own) / len(own))


def test_share_of_moved_weights_is_told_beside_a_target_alone(scene, subject, rows):
    found = {
        name: ask_quantised(subject(place), rows, BUDGET, name="quantise_4").details["moved_share"]
        for name, place in (("same", scene.target), ("other", scene.retrained))
    }
    assert found["same"] == 0 < found["other"] < 1
    lone = subject(scene.retrained)
    lone.beside = {}
    assert "moved_share" not in ask_quantised(lone, rows, BUDGET, name="quantise_4").details
