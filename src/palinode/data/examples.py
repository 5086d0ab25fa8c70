"""What a forget, retain or holdout set may be: questions, completions, conversations or documents.

An `Example` is what a model is trained on; a `Question` is what an evaluation asks. Benchmarks make
questions of their rows (spec: data.md); questions made from a user's own rows have one answer each.

Rows come from `sources`; here they become `Example`s, the one form in which the rest of Palinode
knows training data. Which columns a file has decides what its rows are, in this order:

    question + answer      a question, asked through the model's chat template if it has one
    prompt + completion    raw text and its raw continuation
    messages               a conversation; every assistant message in it is one example
    text                   a document, scored from its second token on

What a row or a message says besides is honoured (a weight of 0: an answer that is context and no example;
text parts, which are joined), or refused by name where it could change what a model is shown.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from palinode.data.sources import Row, json_type, read_rows
from palinode.errors import DataError, RecipeError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt with its right answer, and other answers that are scored under the same prompt."""

    example: Example
    """The prompt and the right answer."""
    alternatives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other answers by kind: "paraphrased" (right, other words), "perturbed" (wrong), …"""
    accepted: tuple[str, ...] = ()
    """Answers that count as right, where there are several; empty means the right answer only."""


def plain_questions(examples: Iterable[Example]) -> list[Question]:
    """Return examples as questions with one answer each."""
    return [Question(example) for example in examples]


Form = Literal["question", "completion", "chat", "document"]
"""What kind of training text an example is."""

SHAPES: Mapping[Form, tuple[str, ...]] = {
    "question": ("question", "answer"),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "document": ("text",),
}
"""Roles that the columns of a row play, by form; the first form whose roles are all there wins."""

SWITCHES = ("loss_mask", "train", "training", "trainable")
WEIGHTS = ("weight", "sample_weight", "loss_weight", *SWITCHES)
"""Keys with which a row or a message says whether it is trained on."""

ROW_FLAGS = (
    *WEIGHTS,
    *("system", "system_prompt", "system_message", "history", "reasoning_content"),
    *("tools", "builtin_tools", "custom_tools", "functions", "documents"),
    *("chat_template", "chat_template_kwargs", "enable_thinking"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
"""Columns that change what is shown or trained on: `WEIGHTS` in every form of row, the rest where a chat
template may be used."""

LABELS = frozenset(
    (
        *("id", "uuid", "index", "message_id", "parent_id", "turn", "timestamp", "created_at", "date"),
        *("lang", "language", "source", "url", "model", "metadata", "annotations", "cache_control"),
        *("tokens", "score", "rank"),
    )
)
"""Keys of a message, or of a part of one, that no template shows."""

ROLES = tuple(role for roles in SHAPES.values() for role in roles)
_KNOWN_ROLES = "question and answer, prompt and completion, messages, or text"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; raw text before a completion has the role `prompt`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One answer to learn or to forget, with everything that stands before it."""

    row: int
    """Row in the source, counted from 0; the answers of one conversation share it."""
    source: str
    """The file or hub data set it came from, as it was named."""
    form: Form
    turns: tuple[Message, ...]
    """What stands before the answer: one user message, one raw prompt, a conversation, or nothing."""
    answer: str
    """The text that is scored; for a document the whole text."""

    @property
    def prompt(self) -> str:
        """The last thing the model was asked, for showing; empty for a document."""
        asked = [turn.content for turn in self.turns if turn.role in ("user", "prompt")]
        return (asked or [turn.content for turn in self.turns] or [""])[-1]

    @property
    def key(self) -> str:
        """A hash of what is said, 32 hex digits: equal for examples that differ in form or spacing only.

        BLAKE2b-128 of the texts of all turns and the answer, one a line, each NFC-normalised with
        runs of white space folded to one space. Roles and form do not enter.
        """
        texts = [*(turn.content for turn in self.turns), self.answer]
        lines = "\n".join(" ".join(unicodedata.normalize("NFC", text).split()) for text in texts)
        return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()

    @property
    def place(self) -> str:
        """Where it stands, for error messages: `row 3 of forget.jsonl` (counted from 1)."""
        return f"row {self.row + 1} of {self.source}"


@dataclass(frozen=True, slots=True)
class _Shape:
    """A form and the columns that play its roles, in the order of `SHAPES`."""

    form: Form
    names: tuple[str, ...]


def read_examples(location: str | Path, *, columns: Mapping[str, str] | None = None) -> list[Example]:
    """Return the examples of a local file or a hub data set (`org/name[@revision][:config][#split]`).

    Reads JSON, JSON lines, CSV, Parquet and plain text (one document), told apart by content.
    `columns` maps roles to the file's own names, such as `{"question": "q", "answer": "a"}`; roles
    left out keep their name. Raises `DataError` naming the row, `RecipeError` for unknown roles.
    """
    chosen = _shape_of_columns(columns) if columns else None
    headers = [chosen.names] if chosen else list(SHAPES.values())
    rows = read_rows(location, headers=headers, plain_text=chosen is None)
    shape = chosen or _detect_shape(rows, str(location))
    return [
        example
        for position, row in enumerate(rows)
        for example in _examples_of_row(row, position, str(location), shape)
    ]


def parse_columns(text: str) -> dict[str, str]:
    """Return the mapping that `question=q,answer=a` spells: role to column name.

    >>> parse_columns("question=q, answer=a")
    {'question': 'q', 'answer': 'a'}
    """
    columns: dict[str, str] = {}
    for part in text.split(","):
        role, _, name = (piece.strip() for piece in part.partition("="))
        if role not in ROLES or not name or role in columns:
            raise RecipeError(
                f"columns has {part.strip()!r}; write ROLE=NAME pairs with commas between them, each role "
                f"once, where the roles are {_KNOWN_ROLES}"
            )
        columns[role] = name
    return columns


def sample_examples(examples: Sequence[Example], size: int, *, seed: int) -> list[Example]:
    """Return `size` examples drawn as `at_most` draws. Raises `DataError` when there are too few."""
    if not 0 < size <= len(examples):
        raise DataError(f"cannot draw {size} examples from {len(examples)}; ask for 1 to {len(examples)}")
    return at_most(examples, size, seed=seed)


def at_most(items: Sequence[Item], most: int, *, seed: int) -> list[Item]:
    """Return the items, or `most` of them drawn without replacement, in their original order.

    The draw is numpy's PCG64 seeded with `seed`.
    """
    if len(items) <= most:
        return list(items)
    import numpy as np

    drawn = np.random.Generator(np.random.PCG64(seed)).choice(len(items), most, replace=False)
    return [items[place] for place in sorted(drawn.tolist())]


def shared_rows(first: Sequence[Example], second: Sequence[Example]) -> list[tuple[int, int]]:
    """Return the positions of examples in `first` that `second` also holds, with where it first does."""
    places: dict[str, int] = {}
    for position, example in enumerate(second):
        places.setdefault(example.key, position)
    keys = (example.key for example in first)
    return [(position, places[key]) for position, key in enumerate(keys) if key in places]


def check_no_forget_rows(forget: Sequence[Example], others: Mapping[str, Sequence[Example]]) -> None:
    """Refuse forget rows in another set, where they would make every comparison of the two meaningless."""
    for name, examples in others.items():
        if shared := shared_rows(examples, forget):
            raise DataError(
                f"{len(shared)} of the {len(examples)} {name} rows are forget rows too "
                f"(first: {examples[shared[0][0]].place}); take them out of one of the two"
            )


def fingerprint_examples(examples: Iterable[Example]) -> str:
    """Return a hash of the exact texts, roles, forms and order, 64 hex digits.

    Unlike `Example.key` it sees every blank, because a blank changes what a model is trained on.
    Where the examples came from does not enter.
    """
    digest = hashlib.blake2b(digest_size=32)
    for example in examples:
        turns = [[turn.role, turn.content] for turn in example.turns]
        digest.update(json.dumps([example.form, turns, example.answer]).encode() + b"\n")
    return digest.hexdigest()


def _shape_of_columns(columns: Mapping[str, str]) -> _Shape:
    """Return the shape whose roles the user named."""
    for form, roles in SHAPES.items():
        if set(columns) <= set(roles):
            return _Shape(form, tuple(columns.get(role, role) for role in roles))
    raise RecipeError(f"columns names the roles {', '.join(columns)}; name {_KNOWN_ROLES}")


def _detect_shape(rows: Sequence[Row], source: str) -> _Shape:
    """Return the first shape whose roles all occur as column names, in whatever row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    for form, roles in SHAPES.items():
        if set(roles) <= set(names):
            return _Shape(form, roles)
    found = ", ".join(names)[:200] or "none"
    raise DataError(
        f"{source} has the columns {found}, but we need {_KNOWN_ROLES}; "
        "name yours with columns, such as 'question=Q,answer=A'"
    )


def _examples_of_row(row: Row, position: int, source: str, shape: _Shape) -> list[Example]:
    """Return the examples of one row: one, or one for each assistant message of a conversation."""
    where = f"row {position + 1} of {source}"
    _check_flags(row, shape, where)
    if shape.form == "chat":
        exchanges = _exchanges(_messages(row, shape.names[0], where), where)
        return [Example(position, source, "chat", turns, answer) for turns, answer in exchanges]
    *before, answer = (_text(row, name, where) for name in shape.names)
    role = "user" if shape.form == "question" else "prompt"
    turns = tuple(Message(role, text) for text in before)
    return [Example(position, source, shape.form, turns, answer)]


def _check_flags(row: Row, shape: _Shape, where: str) -> None:
    """Refuse a row with a column that would change what is shown or trained on."""
    known = ROW_FLAGS if shape.form in ("question", "chat") else WEIGHTS
    for name in known:
        if name in shape.names or name not in row or _says_nothing(row[name]):
            continue
        if name in WEIGHTS and _is_trained(row[name], f"{where}: {name!r}"):
            continue
        do = "leave the row out" if name in WEIGHTS else "leave that column out, or write it as messages"
        raise DataError(f"{where} has {name!r}, which Palinode cannot honour for a whole row; {do}")


def _says_nothing(value: object) -> bool:
    return value is None or value in ("", [], {})


def _is_trained(value: object, what: str) -> bool:
    """Return whether a weight, mask or switch says that something is trained on."""
    known = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    if (found := known.get(str(value).strip().lower())) is not None:
        return found
    raise DataError(f"{what} is {json.dumps(value, default=str)[:40]}; it must be 0 or 1")


def _messages(row: Row, name: str, where: str) -> list[tuple[Message, bool]]:
    """Return a conversation as messages, and whether each may be an example.

    Raises `DataError` unless each is a role and a content.
    """
    messages = _value(row, name, where)
    if not isinstance(messages, list):
        raise DataError(f"{where}: {name!r} is {json_type(messages)}; it must be a list of messages")
    return [_message(entry, f"message {number} in {where}") for number, entry in enumerate(messages, start=1)]


def _message(entry: object, where: str) -> tuple[Message, bool]:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {json_type(entry)}; it must be an object with role and content")
    role = _text(entry, "role", where)
    answers = role == "assistant"
    _check_keys(entry, ("role", "content", *WEIGHTS, *LABELS), where)
    said = {
        name: _is_trained(entry[name], f"{where}: {name!r}")
        for name in WEIGHTS
        if entry.get(name) is not None
    }
    if not answers and any(said.get(name) for name in SWITCHES):
        raise DataError(f"{where} is the {role}'s and asks to be trained on; only an assistant's can be")
    # A system or user message may be empty; an answer may not.
    shown = entry | {"content": _joined(entry["content"], where)} if "content" in entry else entry
    content = _text(shown, "content", where, blank=not answers)
    return Message(role, content), answers and all(said.values())


def _check_keys(entry: Mapping[str, object], known: Sequence[str], where: str) -> None:
    for name, value in entry.items():
        if name not in known and not _says_nothing(value):
            raise DataError(
                f"{where} has {str(name)[:40]!r}, which could change what a model is shown and is not passed "
                "on; leave that key or the row out"
            )


def _joined(content: object, where: str) -> object:
    """Return a content in parts as one text; anything but a list as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(text, str):
            raise DataError(
                f"{where} has a part that is {str(kind)[:40]!r} and no text; Palinode reads text alone"
            )
        if isinstance(part, dict):
            _check_keys(part, ("type", "text", *LABELS), f"a part of {where}")
        texts.append(text)
    return "".join(texts)


def _exchanges(messages: Sequence[tuple[Message, bool]], where: str) -> list[tuple[tuple[Message, ...], str]]:
    """Return every assistant message of a conversation that is trained on, after the messages before it."""
    roles = [message.role for message, _ in messages]
    if "assistant" not in roles:
        raise DataError(f"{where} has no assistant message; there is nothing in it to learn or forget")
    if roles[0] == "assistant":
        raise DataError(f"{where} begins with an assistant message; a user message must come before it")
    turns = tuple(message for message, _ in messages)
    answers = [place for place, (_, trained) in enumerate(messages) if trained]
    if not answers:
        raise DataError(f"{where} has a weight of 0 on every assistant message; leave the row out")
    return [(turns[:place], turns[place].content) for place in answers]


def _text(row: Row, name: str, where: str, *, blank: bool = False) -> str:
    """Return a cell that must be a text; `blank` says whether it may be empty."""
    value = _value(row, name, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {name!r} is {json_type(value)}; it must be one string")
    if not blank and not value.strip():
        raise DataError(f"{where}: {name!r} is empty; fill it in or leave the row out")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{where}: {name!r} holds half of a surrogate pair, which is not a character")
    return value


def _value(row: Row, name: str, where: str) -> object:
    if name not in row:
        raise DataError(f"{where} has no {name!r} (it has: {', '.join(row) or 'nothing'})")
    return row[name]
