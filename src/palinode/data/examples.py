"""What a forget, retain or holdout set may be: questions, completions, conversations or documents.

An `Example` is what a model is trained on; a `Question` is what an evaluation asks. Benchmarks make
questions of their rows (spec: data.md); questions made from a user's own rows have one answer each.

Rows, and what their columns are, come from `sources`; here they become `Example`s, the one form in which
the rest of Palinode knows training data:

    question + answer      a question, asked through the model's chat template if it has one
    prompt + completion    raw text and its raw continuation; or two lists of messages, a conversation
    messages               a conversation; every assistant message in it is one example
    text                   a document, scored from its second token on

A message is a role and a content, or as ShareGPT has it a from (human, gpt) and a value. What a row or a
message says besides is honoured (a weight of 0: an answer that is context and no example; text parts, which
are joined), or refused by name where it could change what a model is shown.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from sys import intern
from typing import Any, TypeVar

from palinode.data.sources import (
    INPUT,
    LIST_SUFFIX,
    SHAPES,
    Form,
    Reading,
    Row,
    folded,
    is_header,
    json_type,
    read_as,
    read_rows,
)
from palinode.errors import DataError, told_as
from palinode.records import MAX_TOML, read_bytes

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

OTHER_ANSWERS = {"paraphrased_answer": "paraphrased", "perturbed_answer": "perturbed"}
"""Columns of answers in other words, and of wrong ones, and the kinds that they are."""

SPEAKERS = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")}
SPEAKERS |= {role: role for role in ("user", "assistant", "system")}
"""Other names of the roles of messages; case does not count."""


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
    matched: str = field(default="", compare=False)
    """How its columns and messages were matched, where not by our own names for them."""

    @property
    def prompt(self) -> str:
        """The last thing the model was asked, for showing; empty for a document."""
        asked = [turn.content for turn in self.turns if turn.role in ("user", "prompt")]
        return (asked or [turn.content for turn in self.turns] or [""])[-1]

    @property
    def key(self) -> str:
        """What is said, as `hash_texts` has it of all turns and the answer; roles and form do not enter."""
        return hash_texts(self.texts).hex()

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is said in it: the turns, then the answer."""
        return (*(turn.content for turn in self.turns), self.answer)

    @property
    def place(self) -> str:
        """Where it stands, for error messages: `row 3 of forget.jsonl` (counted from 1)."""
        return f"row {self.row + 1} of {self.source}"


def hash_texts(texts: Iterable[str], *, salt: bytes = b"") -> bytes:
    """Return BLAKE2b-128 of texts, one a line, each NFC-normalised with white space folded: 16 bytes."""
    lines = "\n".join(" ".join(unicodedata.normalize("NFC", text).split()) for text in texts)
    return hashlib.blake2b(lines.encode(), digest_size=16, key=salt).digest()


def read_examples(
    location: str | Path, *, columns: Mapping[str, str] | None = None, beside: bool = False
) -> list[Example]:
    """Return the examples of a local file or a hub data set (`org/name[@revision][:config][#split]`).

    Reads JSON, JSON lines, CSV, Parquet and plain text (one document), told apart by content.
    `columns` maps roles to the file's own names, such as `{"question": "q", "answer": "a"}`; roles
    left out keep their name. With `beside`, for a set beside the one that was meant, a file that has none of
    these columns is read by its own. A file whose name ends in .list names several, one a line; what stands
    in more than one of them counts once. Raises `DataError` naming the row, `RecipeError` for unknown roles.
    """
    return read_set(location, columns=columns, beside=beside)[0]


def read_set(
    location: str | Path, *, columns: Mapping[str, str] | None = None, beside: bool = False
) -> tuple[list[Example], list[Row]]:
    """Return what `read_examples` returns, and the rows as they stand in the source."""
    if (files := listed_files(location)) is not None:
        return _read_listed(files, str(location), columns, beside=beside)
    named, source = columns or {}, str(location)
    plain = beside or not named
    rows = read_rows(location, is_header=lambda names: is_header(names, named), plain_text=plain)
    reading = read_as(rows, source, named, beside=beside)
    examples = [
        example
        for position, row in enumerate(rows)
        for example in _examples_of_row(row, position, source, reading)
    ]
    return examples, rows


def listed_files(location: str | Path) -> list[str] | None:
    """Return the files that a local file of that name lists; None where it is no list. Raises DataError."""
    place = Path(location).expanduser()
    if place.suffix.lower() != LIST_SUFFIX or not place.is_file():
        return None
    with told_as(DataError, f"{location} cannot be read", "let it name one file a line"):
        lines = [line.strip() for line in read_bytes(place, limit=MAX_TOML).decode("utf-8-sig").splitlines()]
    files = [str(place.parent / line) for line in lines if line]
    inner = next((name for name in files if name.lower().endswith(LIST_SUFFIX)), None)
    if inner or not files:
        told = f"names another list ({inner})" if inner else "names no file"
        raise DataError(f"{location} {told}; let it name files of rows, one a line")
    return files


def _read_listed(
    files: Sequence[str], source: str, columns: Mapping[str, str] | None, *, beside: bool
) -> tuple[list[Example], list[Row]]:
    """Return examples and rows of several files as if they were one, each thing that is said once."""
    examples, rows, known = list[Example](), list[Row](), set[str]()
    for name in files:
        found, own = read_set(name, columns=columns, beside=beside)
        new = [example for example in found if example.key not in known]
        known |= {example.key for example in new}
        examples += [replace(example, row=example.row + len(rows), source=source) for example in new]
        rows += own
    return examples, rows


def read_questions(
    location: str, *, columns: Mapping[str, str] | None = None, beside: bool = False
) -> list[Question]:
    """Return what `read_examples` returns as questions, with the other answers that its columns hold."""
    examples, rows = read_set(location, columns=columns, beside=beside)
    single = [example.form in ("question", "completion") for example in examples]
    return [
        Question(example, other_answers(rows[example.row], example.place) if one else {})
        for example, one in zip(examples, single, strict=True)
    ]


def other_answers(row: Row, place: str) -> dict[str, tuple[str, ...]]:
    """Return the other answers of a row by kind; a column of them holds one text or a list."""
    found: dict[str, tuple[str, ...]] = {}
    for column, kind in OTHER_ANSWERS.items():
        value = row.get(column)
        if _says_nothing(value):
            continue
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{place}: {column!r} must be one text or a list of texts, none of them empty")
        found[kind] = tuple(map(str, texts))
        _check_letters("".join(found[kind]), f"{place}: {column!r}")
    return found


def reading_notes(*sets: Iterable[Example]) -> list[str]:
    """Return, in words, what was matched by other names than our own, each once."""
    matched = (example for examples in sets for example in examples if example.matched)
    return list(dict.fromkeys(f"{example.source}: {example.matched}." for example in matched))


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


def _examples_of_row(row: Row, position: int, source: str, reading: Reading) -> list[Example]:
    """Return the examples of one row: one, or one for each assistant message of a conversation."""
    where, form = f"row {position + 1} of {source}", reading.form
    listed = {name: _listed(row.get(name)) for name in reading.columns.values()}
    talks = {name: talk for name, talk in listed.items() if talk is not None}
    spoken = form == "chat" or (form == "completion" and bool(talks))
    _check_flags(row, reading, where, ROW_FLAGS if spoken or form == "question" else WEIGHTS)
    matched = intern("; ".join(_ways(reading, talks, row)))
    if spoken:
        exchanges = _exchanges(_conversation(row, talks, reading, where), where)
        return [Example(position, source, "chat", turns, answer, matched) for turns, answer in exchanges]
    columns = dict(reading.columns)
    below = columns.pop(INPUT, None)
    *before, answer = (_text(row, name, where) for name in columns.values())
    if below is not None and row.get(below) is not None:
        before = ["\n".join(filter(str.strip, [*before, _text(row, below, where, blank=True)]))]
    role = "user" if form == "question" else "prompt"
    turns = tuple(Message(role, text) for text in before)
    return [Example(position, source, form, turns, answer, matched)]


def _check_flags(row: Row, reading: Reading, where: str, known: Sequence[str]) -> None:
    """Refuse a row with a column that would change what is shown or trained on."""
    for name, value in row.items():
        if folded(name) not in known or name in reading.columns.values() or _says_nothing(value):
            continue
        weight = folded(name) in WEIGHTS
        if weight and _is_trained(value, f"{where}: {name!r}"):
            continue
        do = "leave the row out" if weight else "leave that column out, or write it as messages"
        raise DataError(f"{where} has {name!r}, which Palinode cannot honour for a whole row; {do}")


def _says_nothing(value: object) -> bool:
    return value is None or value in ("", [], {})


def _is_trained(value: object, what: str) -> bool:
    """Return whether a weight, mask or switch says that something is trained on."""
    known = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    if (found := known.get(str(value).strip().lower())) is not None:
        return found
    raise DataError(f"{what} is {json.dumps(value, default=str)[:40]}; it must be 0 or 1")


def _listed(value: object) -> list[Any] | None:
    """Return a cell that holds messages: a list as it is, or out of its JSON text; None for another."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value if isinstance(value, list) else None
    with suppress(ValueError, RecursionError):
        found = json.loads(value)
        if found and all(isinstance(entry, dict) and {"role", "from"} & set(entry) for entry in found):
            return list(found)
    return None


def _conversation(
    row: Row, talks: Mapping[str, list[Any]], reading: Reading, where: str
) -> list[tuple[Message, bool]]:
    """Return a conversation as messages, and whether each may be an example.

    Those of a prompt may not; a text that completes one is an assistant's. Raises `DataError`.
    """
    found: list[tuple[Message, bool]] = []
    for role, name in reading.columns.items():
        value = _value(row, name, where)
        if role == "completion" and isinstance(value, str) and name not in talks:
            talk: list[Any] = [{"role": "assistant", "content": value}]
        elif name in talks:
            talk = talks[name]
        else:
            raise DataError(f"{where}: {name!r} is {json_type(value)}; it must be a list of messages")
        named = f"message {{}} in {where}" if role == "messages" else f"message {{}} of {name!r} in {where}"
        messages = [_message(entry, named.format(number)) for number, entry in enumerate(talk, start=1)]
        found += [(message, trained and role != "prompt") for message, trained in messages]
    return found


def _message(entry: object, where: str) -> tuple[Message, bool]:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {json_type(entry)}; it must be an object with role and content")
    for theirs, ours in {"from": "role", "value": "content"}.items():  # ShareGPT's, and ours
        if entry.get(ours) is None and entry.get(theirs) is not None:
            entry = {name: value for name, value in entry.items() if name != theirs} | {ours: entry[theirs]}
    role = _text(entry, "role", where)
    role = SPEAKERS.get(folded(role), role)
    answers = role == "assistant"
    _check_keys(entry, ("role", "content", *WEIGHTS, *LABELS), where)
    given = [name for name in WEIGHTS if entry.get(name) is not None]
    said = {name: _is_trained(entry[name], f"{where}: {name!r}") for name in given}
    if not answers and any(said.get(name) for name in SWITCHES):
        raise DataError(f"{where} is the {role}'s and asks to be trained on; only an assistant's can be")
    # A system or user message may be empty; an answer may not.
    shown = entry | {"content": _joined(entry["content"], where)} if "content" in entry else entry
    content = _text(shown, "content", where, blank=not answers)
    return Message(role, content), answers and all(said.values())


def _ways(reading: Reading, talks: Mapping[str, list[Any]], row: Row) -> Iterator[str]:
    """Yield, in words, what is read otherwise than by our own names, or left alone and may be missed."""
    if reading.form == "question" and "context" in set(row) - {*reading.columns.values()}:
        below = replace(reading, columns={**reading.columns, INPUT: "context"})
        yield f"its column 'context' is left alone; --columns {below.spelt} reads it below the question"
    if reading.rank:
        yield f"its columns are read as with --columns {reading.spelt}"
    if reading.form == "completion" and talks:
        yield f"messages under {' and '.join(talks)} are read as a conversation"
    elif reading.form == "completion" and reading.rank == 2:
        asked = Reading("question", dict(zip(SHAPES["question"], reading.columns.values(), strict=True)))
        yield f"that is raw text, and --columns {asked.spelt} would ask it as a question"
    entries = [entry for talk in talks.values() for entry in talk if isinstance(entry, dict)]
    if any(entry.get("from") for entry in entries):
        yield "from and value are read as role and content"
    for role in dict.fromkeys(str(entry.get("role") or entry.get("from")) for entry in entries):
        if (ours := SPEAKERS.get(folded(role), role)) != role:
            yield f"{role} is {ours}"


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
        raise DataError(
            f"{where} has a weight of 0 on every assistant message, or none but in the prompt; leave the row "
            "out"
        )
    return [(turns[:place], turns[place].content) for place in answers]


def _text(row: Row, name: str, where: str, *, blank: bool = False) -> str:
    """Return a cell that must be a text; `blank` says whether it may be empty."""
    value = _value(row, name, where)
    if not isinstance(value, str):
        fix = "fill it in or leave the row out" if value is None else "it must be one string"
        fix += f", such as {json.dumps(str(value))}" if isinstance(value, int | float) else ""
        raise DataError(f"{where}: {name!r} is {json_type(value)}; {fix}")
    if not blank and not value.strip():
        raise DataError(f"{where}: {name!r} is empty; fill it in or leave the row out")
    _check_letters(value, f"{where}: {name!r}")
    return value


def _check_letters(text: str, what: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{what} holds half of a surrogate pair, which is not a character")


def _value(row: Row, name: str, where: str) -> object:
    if name not in row:
        raise DataError(f"{where} has no {name!r} (it has: {', '.join(row) or 'nothing'})")
    return row[name]
