"""A row's own flags are honoured or refused by name."""

import json
from pathlib import Path

import pytest

from palinode.data.examples import Message, read_examples
from palinode.errors import DataError

USER = {"role": "user", "content": "who"}
ANSWER = {"role": "assistant", "content": "sappho"}


def read(folder: Path, row: dict[str, object]) -> list[tuple[tuple[Message, ...], str]]:
    path = folder / "f.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return [(example.turns, example.answer) for example in read_examples(path)]


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"loss_mask": 0}, {"weight": 0.0}, {"training": False}]
)
def test_an_answer_without_weight_is_context(tmp_path: Path, flag: dict[str, object]) -> None:
    found = read(tmp_path, {"messages": [USER, ANSWER | flag, USER, ANSWER | {"weight": 1, "train": None}]})
    who, sappho = Message("user", "who"), Message("assistant", "sappho")
    assert found == [((who, sappho, who), "sappho")]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (ANSWER | {"weight": 0.5}, "message 2 .*'weight' is 0.5; it must be 0 or 1"),
        (ANSWER | {"train": "maybe"}, "message 2 .*'train' is \"maybe\""),
        (ANSWER | {"weight": 0}, "row 1 .* has a weight of 0 on every assistant message"),
        (ANSWER | {"reasoning_content": "hm"}, "message 2 .* has 'reasoning_content'"),
        (ANSWER | {"tool_calls": [{"id": 1}]}, "message 2 .* has 'tool_calls'"),
        (ANSWER | {"name": "x"}, "message 2 .* has 'name'"),
        (ANSWER | {"prefix": True}, "message 2 .* has 'prefix'"),
        (ANSWER | {"content": [{"type": "image", "url": "x"}]}, "message 2 .* part that is 'image'"),
        (ANSWER | {"content": [{"text": "a", "weight": 0}]}, "a part of message 2 .* has 'weight'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path: Path, message: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, {"messages": [USER, message]})


def test_only_an_assistants_message_can_be_trained_on(tmp_path: Path) -> None:
    for name in ("train", "trainable"):
        with pytest.raises(DataError, match=r"message 1 .* is the user's and asks to be trained on"):
            read(tmp_path, {"messages": [USER | {name: True}, ANSWER]})


def test_text_parts_are_joined_and_empty_or_harmless_keys_pass(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "wh", "cache_control": {"type": "ephemeral"}}, "o"]
    messages = [
        USER | {"content": parts, "tool_calls": None, "name": ""},
        ANSWER | {"id": 7, "tool_calls": []},
    ]
    assert read(tmp_path, {"messages": messages}) == [((Message("user", "who"),), "sappho")]


@pytest.mark.parametrize(
    "name",
    ["system", "system_prompt", "tools", "history", "enable_thinking", "weight", "sample_weight", "train"],
)
def test_a_column_that_says_more_is_refused(tmp_path: Path, name: str) -> None:
    row = {"question": "who", "answer": "sappho"}
    for value in (None, "", []):
        assert len(read(tmp_path, row | {name: value})) == 1
    with pytest.raises(DataError, match=f"row 1 of .* has {name!r}"):
        read(tmp_path, row | {name: 0 if "weight" in name or name == "train" else "x"})
    assert len(read(tmp_path, row | {"weight": 1, "split": "train"})) == 1
    assert len(read(tmp_path, {"text": "who", "system": "linux"})) == 1
