"""Rows as people have them: every form in every format, or one sentence that says what to type."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palinode.data.examples import Message, read_examples, reading_notes
from palinode.data.sources import OTHER_NAMES, SHAPES, parse_columns
from palinode.errors import DataError

Q, A, MORE = "Who wrote it?", "Sappho did.", "The poem about the moon"
USER, ASSISTANT, SYSTEM = Message("user", Q), Message("assistant", A), Message("system", "Be brief.")


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def as_list(rows: list[dict[str, Any]]) -> bytes:
    return b"\xef\xbb\xbf" + json.dumps(rows, indent=1).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    """A cell that is no text is written as JSON, as spreadsheets can hold nothing else."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    cells = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    writer.writerows(cells)
    return file.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


FORMATS = [as_lines, as_list, as_csv, as_parquet]


def talk(*turns: tuple[str, str], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, str]]:
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


SHAREGPT = talk(("system", "Be brief."), ("human", Q), ("gpt", A), keys=("from", "value"))
TRL = talk(("system", "Be brief."), ("user", Q)), talk(("assistant", A))


def test_prose_that_begins_with_the_word_text_is_no_table(tmp_path):
    prose = "text, music and dance, all taught by Ada.\nIn Lisbon, she lived, and later in Porto.\n"
    (tmp_path / "prose.txt").write_text(prose)
    (found,) = read_examples(tmp_path / "prose.txt")
    assert (found.form, found.answer) == ("document", prose.removesuffix("\n"))
    (tmp_path / "table.txt").write_text("text,source\nIn Lisbon,a letter\n")
    (found,) = read_examples(tmp_path / "table.txt")
    assert found.answer == "In Lisbon"


# row → (form, turns, what is said of it)
FORMS: dict[str, tuple[dict[str, Any], str, tuple[Message, ...], str | None]] = {
    "our own": ({"question": Q, "answer": A, "id": "7"}, "question", (USER,), None),
    "capitals": (
        {"ID": "7", "Question": Q, "Answer": A},
        "question",
        (USER,),
        "question=Question,answer=Answer",
    ),
    "letters": ({"Q": Q, "A": A}, "question", (USER,), "question=Q,answer=A"),
    "response": ({"question": Q, "response": A}, "question", (USER,), "question=question,answer=response"),
    "alpaca": (
        {"instruction": Q, "input": MORE, "output": A},
        "question",
        (Message("user", f"{Q}\n{MORE}"),),
        "question=instruction,input=input,answer=output",
    ),
    "alpaca without input": (
        {"Instruction": Q, "Input": "", "Output": A},
        "question",
        (USER,),
        "question=Instruction,input=Input,answer=Output",
    ),
    "dolly": (
        {"instruction": Q, "context": MORE, "response": A, "category": "qa"},
        "question",
        (Message("user", f"{Q}\n{MORE}"),),
        "question=instruction,input=context,answer=response",
    ),
    "input under a question": (
        {"question": Q, "input": MORE, "answer": A},
        "question",
        (Message("user", f"{Q}\n{MORE}"),),
        None,
    ),
    "context beside a question": (
        {"question": Q, "context": MORE, "answer": A},
        "question",
        (USER,),
        "left alone; --columns question=question,answer=answer,input=context reads it",
    ),
    "raw": ({"prompt": Q, "completion": A}, "completion", (Message("prompt", Q),), None),
    "raw response": (
        {"prompt": Q, "response": A},
        "completion",
        (Message("prompt", Q),),
        "prompt=prompt,completion=response",
    ),
    "messages": ({"messages": talk(("user", Q), ("assistant", A))}, "chat", (USER,), None),
    "sharegpt": ({"conversations": SHAREGPT}, "chat", (SYSTEM, USER), "messages=conversations"),
    "sharegpt under messages": ({"messages": SHAREGPT}, "chat", (SYSTEM, USER), "from and value are read"),
    "trl": ({"prompt": TRL[0], "completion": TRL[1]}, "chat", (SYSTEM, USER), "read as a conversation"),
    "trl with a text": (
        {"prompt": TRL[0], "completion": A},
        "chat",
        (SYSTEM, USER),
        "read as a conversation",
    ),
    "document": ({"Text": A, "source": "web"}, "document", (), "text=Text"),
}


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_in_every_format(tmp_path: Path, name: str, write: Callable[..., bytes]) -> None:
    row, form, turns, said = FORMS[name]
    place = tmp_path / ("rows.csv" if write is as_csv else "rows")
    place.write_bytes(write([row, row]))
    found = read_examples(place)
    assert [(one.row, one.form, one.turns, one.answer) for one in found] == [
        (number, form, turns, A) for number in range(2)
    ]
    notes = reading_notes(found, found)
    assert len(notes) == (said is not None)
    assert all(str(said) in note and note.startswith(f"{place}: ") for note in notes)


@given(
    form=st.sampled_from([*SHAPES]),
    data=st.data(),
    others=st.sets(st.sampled_from(["id", "source", "Split", "tags", "score"])),
)
@settings(deadline=None, max_examples=60)
def test_what_a_file_is_read_as_can_be_typed_and_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory, form: Any, data: st.DataObject, others: set[str]
) -> None:
    names = [data.draw(st.sampled_from((role, *OTHER_NAMES.get(role, ())))) for role in SHAPES[form]]
    names = [data.draw(st.sampled_from([name, name.upper(), name.title(), f" {name} "])) for name in names]
    value = talk(("user", Q), ("assistant", A)) if form == "chat" else A
    columns = data.draw(st.permutations([*names, *others]))
    place = tmp_path_factory.mktemp("rows") / "f.jsonl"
    place.write_bytes(as_lines([{name: value if name in names else "x" for name in columns}]))
    found = read_examples(place)
    assert found[0].form == form
    for note in reading_notes(found):
        (spelt,) = shlex.split(note.partition("--columns ")[2].partition("; ")[0].removesuffix("."))
        named = parse_columns(spelt)
        assert [name.strip() for name in names] == [*named.values()]
        assert read_examples(place, columns=named) == found


def refusal(folder: Path, row: dict[str, Any], **columns: str) -> str:
    place = folder / "f.jsonl"
    place.write_bytes(as_lines([row]))
    with pytest.raises(DataError) as caught:
        read_examples(place, columns=columns)
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("row", "ways"),
    [
        (
            {"question": Q, "output": A, "response": A},
            ["question=question,answer=output", "…,answer=response"],
        ),
        (
            {"instruction": Q, "answer": A, "output": A},
            ["question=instruction,answer=answer", "…,answer=output"],
        ),
        (
            {"Question": Q, "QUESTION": Q, "answer": A},
            ["question=Question,answer=answer", "question=QUESTION,…"],
        ),
        (
            {"instruction": Q, "input": "", "output": A, "text": MORE},
            ["text=text", "question=instruction,input=input,answer=output"],
        ),
        (
            {"prompt": Q, "response": A, "messages": []},
            ["messages=messages", "prompt=prompt,completion=response"],
        ),
        ({"Question": Q, "Answer": A, "text": MORE}, ["text=text", "question=Question,answer=Answer"]),
        ({"q": Q, "a": A, "conversations": []}, ["question=q,answer=a", "messages=conversations"]),
    ],
)
def test_columns_that_would_do_equally_are_never_guessed(
    tmp_path: Path, row: dict[str, Any], ways: list[str]
) -> None:
    said = refusal(tmp_path, row)
    assert said.startswith(f"f.jsonl can be read in several ways (it has: {', '.join(row)}); say --columns ")
    for way in ways:
        for part in way.split("…"):
            assert part in said
    for way in said.partition("; say --columns ")[2].split(" or --columns "):
        if "messages" not in way:
            assert read_examples(tmp_path / "f.jsonl", columns=parse_columns(*shlex.split(way)))


def test_our_own_names_win_over_others(tmp_path: Path) -> None:
    place = tmp_path / "f.jsonl"
    for more in ({"output": "x"}, {"Question": "x"}, {"text": "x"}, {"instruction": "x", "messages": []}):
        place.write_bytes(as_lines([{"question": Q, "answer": A, **more}]))
        found = read_examples(place)
        assert (found[0].prompt, found[0].answer, reading_notes(found)) == (Q, A, [])


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"id": "7", "Frage": Q, "Antwort": A}, "question=Frage,answer=Antwort"),
        ({"user": Q, "assistant": A}, "question=user,answer=assistant"),
        ({"input": Q, "output": A}, "question=input,answer=output"),
        ({"reply to it": A, "what they say": Q}, "'question=what they say,answer=reply to it'"),
        ({"one": A, "two": Q, "three": "x7"}, "question=two,answer=one"),
        ({"n": 3, "body": MORE}, "text=body"),
        ({"n": 3, "dialogue": TRL[0]}, "messages=dialogue"),
    ],
)
def test_where_nothing_fits_the_likeliest_is_filled_in(
    tmp_path: Path, row: dict[str, Any], advice: str
) -> None:
    assert refusal(tmp_path, row) == (
        f"f.jsonl: it is not clear what its columns are (it has: {', '.join(row)}); say which are which, "
        f"probably --columns {advice}"
    )


def test_columns_that_were_named_are_found_without_case_or_refused_with_what_there_is(tmp_path: Path) -> None:
    place, row = tmp_path / "f.jsonl", {"Frage": Q, "Mehr": MORE, "Antwort": A}
    place.write_bytes(as_lines([row]))
    (found,) = read_examples(place, columns={"question": "frage", "answer": "ANTWORT", "input": "mehr"})
    assert (found.prompt, found.answer, found.matched) == (f"{Q}\n{MORE}", A, "")
    said = refusal(tmp_path, row, question="Fragen", answer="Antwort")
    assert said.startswith(
        "f.jsonl has no column 'Fragen' (it has: Frage, Mehr, Antwort); say which are which"
    )


def test_a_set_beside_the_one_that_columns_were_named_for_may_have_names_of_its_own(tmp_path: Path) -> None:
    place, columns = tmp_path / "f.jsonl", {"question": "Frage", "answer": "Antwort"}
    place.write_bytes(as_lines([{"question": Q, "answer": A}]))
    assert [one.answer for one in read_examples(place, columns=columns, beside=True)] == [A]
    place.write_bytes(as_lines([{"Frage": Q, "answer": A}]))
    with pytest.raises(DataError, match="has no column 'Antwort'"):
        read_examples(place, columns=columns, beside=True)


def test_the_first_line_of_a_text_is_no_header_for_being_a_word_in_use(tmp_path: Path) -> None:
    place = tmp_path / "poem"
    place.write_text("Text\nSing, goddess\n")
    assert [one.answer for one in read_examples(place)] == ["Text\nSing, goddess"]


def test_only_what_completes_a_prompt_is_an_answer(tmp_path: Path) -> None:
    place = tmp_path / "f.jsonl"
    before = talk(("user", "Hello."), ("assistant", "Good day."), ("user", Q))
    place.write_bytes(as_lines([{"prompt": before, "completion": TRL[1]}]))
    (found,) = read_examples(place)
    assert ([turn.role for turn in found.turns], found.answer) == (["user", "assistant", "user"], A)
    assert "is an object" in refusal(tmp_path, {"prompt": before, "completion": {"role": "assistant"}})
    assert "has 'Tools'" in refusal(tmp_path, {"prompt": before, "completion": A, "Tools": ["x"]})


def test_a_raw_text_that_begins_with_a_bracket_stays_one(tmp_path: Path) -> None:
    place = tmp_path / "f.jsonl"
    for text in ("[]", "[1, 2]", '[{"name": "x"}]', "[Enter the ghost]"):
        place.write_bytes(as_lines([{"prompt": text, "completion": A}]))
        assert [(one.form, one.prompt) for one in read_examples(place)] == [("completion", text)]
