"""Rows of an audit: sets, halves, paraphrases and look-alikes."""

from __future__ import annotations

import json

import pytest

from palinode.audit.material import divide, read_material
from palinode.data.examples import read_examples
from palinode.errors import DataError
from palinode.settings import AuditSettings


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    return write


def read(forget, *, retain=None, max_rows=200, **settings):
    named = {
        name: str(value) if name in ("lookalikes", "indirect") else value for name, value in settings.items()
    }
    return read_material(forget, retain=retain, max_rows=max_rows, settings=AuditSettings(**named))


def rows(count, **columns):
    return [
        {
            "question": f"who is number {i}?",
            "answer": f"person {i}",
            **{name: make(i) for name, make in columns.items()},
        }
        for i in range(count)
    ]


def test_halves_are_disjoint_whole_and_seeded(write):
    examples = read_examples(write("f.jsonl", rows(9)))
    learned, held_out = divide(examples, seed=0)
    assert (len(learned), len(held_out)) == (4, 5)
    assert sorted(e.row for e in (*learned, *held_out)) == list(range(9))
    assert divide(examples, seed=0) == (learned, held_out)
    assert divide(examples, seed=1) != (learned, held_out)


def test_answers_of_one_conversation_stay_together(write):
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
    examples = read_examples(write("chat.jsonl", [{"messages": turns}] * 4))
    learned, held_out = divide(examples, seed=0)
    assert not {e.row for e in learned} & {e.row for e in held_out}
    assert (len(learned), len(held_out)) == (6, 6)
    learned, held_out = divide(examples[:3], seed=0)  # one conversation only
    assert (len(learned), len(held_out)) == (1, 2)


def test_sets_that_are_not_given_are_empty(write):
    material = read(write("f.jsonl", rows(4)))
    assert set(material.sets()) == {"forget"}
    assert material.lookalikes_column is None


def test_sets_are_cut_to_the_budget(write):
    retain = [{"question": f"what is {i}?", "answer": f"thing {i}"} for i in range(30)]
    material = read(
        write("f.jsonl", rows(20, paraphrased_question=lambda i: f"name person {i}!")),
        retain=write("r.jsonl", retain),
        max_rows=6,
    )
    assert {name: len(found) for name, found in material.sets().items()} == {
        "forget": 6,
        "retain": 6,
        "near": 1,
        "paraphrased": 6,
    }
    assert [e.row for e in material.paraphrased] == [e.row for e in material.forget]
    assert [e.answer for e in material.paraphrased] == [e.answer for e in material.forget]
    assert material.paraphrased[0].prompt == f"name person {material.forget[0].row}!"


def test_neighbours_are_the_retain_rows_that_share_rare_words_and_no_forget_rows(write):
    kept = [{"question": f"what is thing x{i}?", "answer": f"a y{i}"} for i in range(20)]
    kept[13] = {"question": "who is the aunt of number 3?", "answer": "her name is lost"}
    forget = rows(5)
    material = read(write("f.jsonl", forget), retain=write("r.jsonl", [*kept, forget[0]]), max_rows=8)
    assert len(material.near) == 2
    assert 13 in {example.row for example in material.near}
    assert 20 not in {example.row for example in material.near}


def test_paraphrases_come_from_another_column_or_a_file(write):
    forget = write("f.jsonl", rows(4, reworded=lambda i: f"{i} is whom?" if i != 2 else None))
    material = read(forget, paraphrases="reworded")
    assert [e.prompt for e in material.paraphrased] == ["0 is whom?", "1 is whom?", "3 is whom?"]
    other = [{"question": f"whom do we call {i}?", "answer": f"person {i}"} for i in range(4)]
    material = read(forget, paraphrases=str(write("p.jsonl", other)), max_rows=2)
    assert [e.prompt for e in material.paraphrased] == [f"whom do we call {e.row}?" for e in material.forget]
    with pytest.raises(DataError, match=r"p\.jsonl has 3 rows and the forget set 4"):
        read(forget, paraphrases=str(write("p.jsonl", other[:3])))
    with pytest.raises(DataError, match="no such file"):
        read(forget, paraphrases="no_such_column")


PEOPLE = [
    {
        "question": "Where was the writer born in 1956 born?",
        "answer": "Ana-Lu O’Dea was born in Kuwait City.",
    },
    {"question": "Does Ana-Lu O’Dea paint?", "answer": "She does."},
    {"question": "What is Ana-Lu O’Dea's first book?", "answer": "The Lost Mill"},
    {"question": "What won The Lost Mill?", "answer": "A prize."},
    {"question": "who is it?", "answer": "me"},
]


def test_questions_are_asked_by_first_and_last_name_and_through_another_row_of_the_same_name(write):
    material = read(write("f.jsonl", PEOPLE))
    asked = {name: [(e.row, e.prompt) for e in some] for name, some in material.indirect.items()}
    assert asked["alias"] == [
        (1, "Does Ana-Lu paint?"),
        (1, "Does O’Dea paint?"),
        (2, "What is Ana-Lu's first book?"),
        (2, "What is O’Dea's first book?"),
        (3, "What won The?"),
        (3, "What won Mill?"),
    ]
    born = "Where was the writer born in 1956 born? this person was born in Kuwait City."
    known = f"This is known of somebody: {born}"
    assert asked["two_hop"] == [
        (1, f"{known} Does this person paint?"),
        (2, f"{known} What is this person's first book?"),
        (
            3,
            "This is known of somebody: What is Ana-Lu O’Dea's first book? this person What won this person?",
        ),
    ]
    assert [e.answer for e in material.indirect["two_hop"]] == ["She does.", "The Lost Mill", "A prize."]
    assert asked["given"] == []


def test_given_indirect_rows_need_no_order_and_have_kinds(write):
    other = [
        {"question": "Wer ist es?", "answer": "ich", "kind": "German"},
        {"question": "¿?", "answer": "yo"},
    ]
    forget = write("f.jsonl", PEOPLE)
    material = read(forget, indirect=write("i.jsonl", other))
    assert [e.prompt for e in material.indirect["given"]] == ["Wer ist es?", "¿?"]
    assert material.kinds == ["German", ""]
    other[1]["kind"] = "Spanish"
    told = read(forget, indirect=write("i.jsonl", other))
    assert told.fingerprint() != material.fingerprint()


def test_lookalikes_are_wrong_answers_of_the_rows_that_relearning_is_given(write):
    forget = write(
        "f.jsonl",
        rows(6, perturbed_answer=lambda i: [f"wrong {i}", "b"], paraphrased_answer=lambda i: f"it is {i}"),
    )
    material = read(forget)
    assert material.lookalikes_column == "perturbed_answer"
    assert [e.answer for e in material.lookalikes] == [f"wrong {e.row}" for e in material.learned]


def test_lookalikes_are_reworded_answers_where_there_are_no_wrong_ones(write):
    material = read(write("f.jsonl", rows(6, paraphrased_answer=lambda i: f"it is {i}")))
    assert material.lookalikes_column == "paraphrased_answer"
    assert {e.row for e in material.lookalikes} == {e.row for e in material.learned}


def test_lookalikes_may_be_a_file(write):
    forget = write("f.jsonl", rows(6, perturbed_answer=lambda i: [f"wrong {i}"]))
    alike = write("l.jsonl", [{"question": "a?", "answer": "b"}])
    material = read(forget, lookalikes=alike)
    assert [e.answer for e in material.lookalikes] == ["b"]
    assert material.lookalikes_column is None


def test_other_names_of_columns_hold_for_csv_too(tmp_path):
    (tmp_path / "f.csv").write_text("Q,A,paraphrased_question\nwho?,me,who is it?\nwhat?,it,what is it?\n")
    material = read(tmp_path / "f.csv", columns={"question": "Q", "answer": "A"})
    assert [e.prompt for e in material.paraphrased] == ["who is it?", "what is it?"]


def test_cells_that_hold_no_texts_are_refused(write):
    with pytest.raises(DataError, match=r"row 1 of .*: 'perturbed_answer' must be one text or a list"):
        read(write("f.jsonl", rows(2, perturbed_answer=lambda i: [i])), seed=1)


def test_one_row_is_too_few(write):
    with pytest.raises(DataError, match="has one row; an audit needs two"):
        read(write("f.jsonl", rows(1)))


def test_fingerprint_tells_the_halves_apart(write):
    forget = write("f.jsonl", rows(6))
    one, other = read(forget, seed=0), read(forget, seed=1)
    assert one.fingerprint()["forget"] == other.fingerprint()["forget"]
    assert one.fingerprint()["learned"] != other.fingerprint()["learned"]
