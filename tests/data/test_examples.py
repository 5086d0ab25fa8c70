"""Rows become examples by the columns they have; every refusal names the row."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palinode.data.examples import Example, Message, at_most, fingerprint_examples, read_examples, shared_rows
from palinode.data.sources import parse_columns
from palinode.errors import DataError, RecipeError

USER, ASSISTANT = "user", "assistant"


def question(text: str, answer: str, row: int = 0) -> Example:
    return Example(row, "f.jsonl", "question", (Message("user", text),), answer)


def save(folder: Path, rows: list[Any]) -> str:
    path = folder / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refusal(folder: Path, *rows: Any, columns: dict[str, str] | None = None) -> str:
    """Return what reading these rows is refused with, without the folder's name."""
    with pytest.raises(DataError) as caught:
        read_examples(save(folder, list(rows)), columns=columns)
    return str(caught.value).replace(f"{folder}/", "")


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_question_and_answer_columns_are_questions(tmp_path: Path) -> None:
    file = save(tmp_path, [{"question": "Q?", "answer": "A.", "extra": 1}])
    assert read_examples(file) == [Example(0, file, "question", (Message("user", "Q?"),), "A.")]


def test_prompt_and_completion_columns_are_raw_text(tmp_path: Path) -> None:
    file = save(tmp_path, [{"prompt": "It was ", "completion": " dark"}])
    assert read_examples(file) == [Example(0, file, "completion", (Message("prompt", "It was "),), " dark")]


def test_text_column_is_a_document(tmp_path: Path) -> None:
    file = save(tmp_path, [{"text": "one"}, {"text": "two"}])
    assert read_examples(Path(file)) == [
        Example(0, file, "document", (), "one"),
        Example(1, file, "document", (), "two"),
    ]


def test_plain_text_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "book").write_text("Sing, goddess.\n")
    (example,) = read_examples(tmp_path / "book")
    assert (example.form, example.answer) == ("document", "Sing, goddess.")


def test_every_assistant_message_is_an_example(tmp_path: Path) -> None:
    turns = [("system", ""), (USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d"), (USER, "e")]
    file = save(tmp_path, [{"messages": chat((USER, "x"), (ASSISTANT, "y"))["messages"]}, chat(*turns)])
    messages = tuple(Message(role, content) for role, content in turns)
    assert read_examples(file) == [
        Example(0, file, "chat", (Message(USER, "x"),), "y"),
        Example(1, file, "chat", messages[:2], "b"),
        Example(1, file, "chat", messages[:4], "d"),
    ]


def test_question_and_answer_win_over_text(tmp_path: Path) -> None:
    (example,) = read_examples(save(tmp_path, [{"text": "T", "prompt": "P", "answer": "A", "question": "Q"}]))
    assert example.form == "question"


def test_columns_win_over_everything(tmp_path: Path) -> None:
    rows = [{"question": "Q", "answer": "A", "q": "other Q", "body": "B"}]
    file = save(tmp_path, rows)
    (asked,) = read_examples(file, columns={"question": "q"})
    (document,) = read_examples(file, columns={"text": "body"})
    assert (asked.prompt, asked.answer) == ("other Q", "A")
    assert (document.form, document.answer) == ("document", "B")


def test_columns_name_the_header_of_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "forget.data"
    path.write_text("Frage;Antwort\nWer?;Sappho\n")
    (example,) = read_examples(path, columns={"question": "Frage", "answer": "Antwort"})
    assert (example.prompt, example.answer) == ("Wer?", "Sappho")


def test_misspelt_columns_do_not_turn_a_table_into_a_document(tmp_path: Path) -> None:
    path = tmp_path / "forget.data"
    path.write_text("Frage;Antwort\nWer?;Sappho\n")
    with pytest.raises(DataError, match=r"no column 'Fragen' \(it has: Frage, Antwort\)"):
        read_examples(path, columns={"question": "Fragen", "answer": "Antwort"})


def test_missing_column_names_the_row_and_what_it_has(tmp_path: Path) -> None:
    good = {"question": "Q", "answer": "A"}
    said = refusal(tmp_path, good, good, {"question": "Q", "reply": "A"})
    assert said == "row 3 of f.jsonl has no 'answer' (it has: question, reply)"


def test_unknown_columns_are_listed(tmp_path: Path) -> None:
    assert refusal(tmp_path, {"n": 1, "m": True}) == (
        "f.jsonl: it is not clear what its columns are (it has: n, m); we need question and answer "
        "(and input), prompt and completion, messages, or text"
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["a", "b"], "is a list; it must be one string"),
        (None, "is null; fill it in or leave the row out"),
        (3, 'is a number; it must be one string, such as "3"'),
        (True, 'is a boolean; it must be one string, such as "True"'),
        ({}, "is an object; it must be one string"),
        ("", "is empty; fill it in or leave the row out"),
        (" \n", "is empty; fill it in or leave the row out"),
        ("\ud83d", "holds half of a surrogate pair, which is not a character"),
    ],
)
@pytest.mark.parametrize("role", ["question", "answer"])
def test_a_cell_that_is_no_text_names_its_row(tmp_path: Path, value: Any, words: str, role: str) -> None:
    good = {"question": "Q", "answer": "A"}
    assert refusal(tmp_path, good, {**good, role: value}) == f"row 2 of f.jsonl: '{role}' {words}"


def test_a_conversation_needs_an_answer_after_something(tmp_path: Path) -> None:
    assert "row 1 of f.jsonl has no assistant message" in refusal(tmp_path, chat((USER, "a")))
    assert "row 1 of f.jsonl has no assistant message" in refusal(tmp_path, chat())
    assert "begins with an assistant message" in refusal(tmp_path, chat((ASSISTANT, "a"), (USER, "b")))


def test_a_broken_message_is_named(tmp_path: Path) -> None:
    said = refusal(tmp_path, chat((USER, "a"), (ASSISTANT, " ")))
    assert said == "message 2 in row 1 of f.jsonl: 'content' is empty; fill it in or leave the row out"
    assert refusal(tmp_path, {"messages": [{"role": "user"}]}) == (
        "message 1 in row 1 of f.jsonl has no 'content' (it has: role)"
    )
    assert "message 1 in row 1 of f.jsonl is a string" in refusal(tmp_path, {"messages": ["a"]})
    assert "row 1 of f.jsonl: 'messages' is a string" in refusal(tmp_path, {"messages": "a"})


def test_columns_are_parsed() -> None:
    assert parse_columns("question=q, answer = a b") == {"question": "q", "answer": "a b"}


@pytest.mark.parametrize(
    "text", ["", "question", "question=", "reply=a", "text=a,text=b", "question=a,answer=a", "text=a,"]
)
def test_bad_columns_name_the_roles(text: str) -> None:
    with pytest.raises(
        RecipeError, match=r"question and answer \(and input\), prompt and completion, messages, or text"
    ):
        parse_columns(text)


def test_roles_of_two_forms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="columns names the roles question, text"):
        read_examples(save(tmp_path, [{"q": "a"}]), columns={"question": "q", "text": "t"})


def test_prompt_is_the_last_thing_asked() -> None:
    turns = (Message("system", "s"), Message(USER, "a"), Message(ASSISTANT, "b"), Message(USER, "c"))
    assert Example(0, "", "chat", turns, "d").prompt == "c"
    assert Example(0, "", "chat", turns[:1], "d").prompt == "s"
    assert Example(0, "", "completion", (Message("prompt", "p"),), "d").prompt == "p"
    assert Example(0, "", "document", (), "d").prompt == ""


def test_key_sees_content_not_form_or_spacing() -> None:
    first = question("Where  is\nit?", "Cafe\u0301")
    same = Example(7, "g.csv", "completion", (Message("prompt", " Where is it?"),), "Caf\u00e9 ")
    assert first.key == same.key
    assert len(first.key) == 32
    assert first.key != question("Where is it?", "Cafe").key
    assert first.key != question("Where is", "it? Caf\u00e9").key


def test_fingerprint_sees_spacing_form_and_order_but_not_origin() -> None:
    first, second = question("Q", "A"), question("Q", " A")
    moved = Example(5, "elsewhere", "question", first.turns, "A")
    raw = Example(0, "f.jsonl", "chat", first.turns, "A")
    assert fingerprint_examples([first]) == fingerprint_examples([moved])
    others = [[second], [raw], [first, second], [second, first], []]
    assert len({fingerprint_examples(examples) for examples in [[first], *others]}) == 6


def test_shared_rows_pairs_positions_of_equal_content() -> None:
    first = [question("a", "1"), question("b", "2"), question("a", "1")]
    second = [question("c", "3"), question("a ", "1"), question("a", "1")]
    assert shared_rows(first, second) == [(0, 1), (2, 1)]
    assert shared_rows(first, []) == []


@given(total=st.integers(1, 50), data=st.data(), seed=st.integers(0, 2**32))
def test_sample_is_a_seeded_subset_in_the_original_order(total: int, data: st.DataObject, seed: int) -> None:
    examples = [question(str(number), "A", row=number) for number in range(total)]
    size = data.draw(st.integers(1, total))
    drawn = at_most(examples, size, seed=seed)
    rows = [example.row for example in drawn]
    assert len(drawn) == size
    assert rows == sorted(set(rows))
    assert drawn == at_most(examples, size, seed=seed)


def test_samples_of_two_seeds_differ() -> None:
    examples = [question(str(number), "A", row=number) for number in range(100)]
    assert at_most(examples, 10, seed=0) != at_most(examples, 10, seed=1)
