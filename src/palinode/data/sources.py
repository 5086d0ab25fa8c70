"""Files and hub data sets as rows, and which columns play which roles (spec/data.md §4).

The format is told by content: Parquet by its magic bytes, then JSON, JSON lines, CSV (by a header that the
caller knows, or where the file is called a table), and what is left is plain text, one document. Whatever the
bytes are, the only error that comes out of reading is a `DataError`.

A role has its own name and others in use; case does not count. What a file's columns can be read as is told
in `--columns`' own words (`question=Q,answer=A`). Where two columns would do equally, or none does, nothing
is guessed: one sentence says what to type, filled in with the likeliest by name and content.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from palinode.errors import DataError, RecipeError, first_line, told_as
from palinode.records import read_bytes, unique_keys

Row = dict[str, object]
"""One row as it stands in the source: column name to value."""

IsHeader = Callable[[Sequence[str]], bool]
"""Whether the names on the first line of a text make it a table."""

LIST_SUFFIX = ".list"
"""Of a text that names files of rows, one a line, relative to its own folder."""

FILE_SUFFIXES = frozenset(
    {".csv", ".json", ".jsonl", LIST_SUFFIX, ".md", ".ndjson", ".parquet", ".tsv", ".txt"}
)
"""Suffixes that make a missing `folder/name` a missing file, not the name of a hub data set."""

MAX_UNPACKED, MAX_GROWTH, MAX_ROWS = 1 << 28, 50, 5_000_000
"""A Parquet file may unpack to so many bytes and so many times its own, and hold so many rows."""

DELIMITERS = (",", "\t", ";")

_HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:#]+))?(:(?P<config>[^#]+))?(#(?P<split>.+))?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A data set on the hub, written `org/name[@revision][:config][#split]`."""

    name: str
    revision: str | None
    """Branch, tag or commit; None means the main branch."""
    config: str | None
    split: str


def read_rows(location: str | Path, *, is_header: IsHeader, plain_text: bool = True) -> list[Row]:
    """Return the rows of a local file or, when there is no such file, of a hub data set.

    With `plain_text=False` every text is a CSV table, not only one that has a known header or is called one.
    A `Path` is always a local file; a string may be a hub name. Raises `DataError`.
    """
    content = _read_file(location)
    if content is not None:
        return parse_rows(content, name=str(location), is_header=is_header, plain_text=plain_text)
    hub_name = parse_hub_name(location) if isinstance(location, str) else None
    if hub_name is None:
        raise DataError(
            f"no such file: {location}; give a JSON, JSON lines, CSV, Parquet or text file, "
            "or a hub data set such as 'org/name:config#split'"
        )
    return _read_hub(hub_name, str(location))


def parse_rows(content: bytes, *, name: str, is_header: IsHeader, plain_text: bool = True) -> list[Row]:
    """Return the rows that a file's bytes hold; `name` is what errors call it.

    Raises `DataError` when the content is damaged, is no known format or holds no rows.
    """
    if content.startswith(b"PAR1"):
        rows = _parquet_rows(content, name)
    else:
        rows = _text_rows(_decode(content, name), name, is_header, plain_text)
    if not rows:
        raise DataError(f"{name} holds no rows")
    return rows


def parse_hub_name(location: str) -> HubName | None:
    """Return the hub data set that a location names, or None when it reads like a path."""
    match = _HUB_NAME.fullmatch(location)
    if match is None or Path(match["name"]).suffix.lower() in FILE_SUFFIXES:
        return None
    return HubName(match["name"], match["revision"], match["config"], match["split"] or "train")


def _read_file(location: str | Path) -> bytes | None:
    """Return a file's bytes, or None when nothing lies there."""
    try:
        return read_bytes(Path(location).expanduser())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (RuntimeError, ValueError):  # "~nobody/..." and a NUL in the name
        return None
    except IsADirectoryError as error:
        raise DataError(f"{location or 'an empty name'} is a folder; name one of the files in it") from error
    except OSError as error:
        raise DataError(f"cannot read {location} ({error.strerror}); is it a file you may open?") from error


def _read_hub(hub_name: HubName, location: str) -> list[Row]:
    """Return the rows of one split of a hub data set, downloaded or from the local cache."""
    from datasets import load_dataset

    what = f"{location} is neither a local file nor a hub data set we could load"
    advice = "check the name, or download it and give the path of the file"
    with told_as(DataError, what, advice, Exception):  # the hub's clients raise errors of many libraries
        split = load_dataset(hub_name.name, hub_name.config, revision=hub_name.revision, split=hub_name.split)
        rows: list[Row] = split.to_list()
    if not rows:
        raise DataError(f"{location} holds no rows")
    return rows


def _decode(content: bytes, name: str) -> str:
    """Return the text of UTF-8 bytes, without a byte-order mark."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, do = content[error.start], "save it as UTF-8"
        if content.startswith((b"\x1f\x8b", b"PK", b"ARROW1", b"\xff\xff\xff\xff", b"BZh", b"\xfd7zXZ")):
            do = "it is packed or binary, so unpack or export it"
        raise DataError(
            f"{name} is not UTF-8 text (byte 0x{byte:02x} at offset {error.start}); {do}"
        ) from error
    if "\0" in text:
        offset = content.index(b"\0")
        raise DataError(f"{name} is not a text file (a zero byte at offset {offset}); unpack or export it")
    text = text.removeprefix("\ufeff")
    return text if "\n" in text else text.replace("\r", "\n")  # the line ends of old Macs


def _text_rows(text: str, name: str, is_header: IsHeader, plain_text: bool) -> list[Row]:
    """Return the rows of a text in the first format that fits: JSON, JSON lines, CSV, plain text."""
    if not text.strip():
        return []
    if text.lstrip()[0] in "{[":
        return _json_rows(text, name)
    delimiter = next((mark for mark in DELIMITERS if is_header(_header(text, mark))), None)
    if delimiter is None and (name.lower().endswith((".csv", ".tsv")) or not plain_text):
        delimiter = max(DELIMITERS, key=text.strip().partition("\n")[0].count)
    if delimiter is not None:
        return _csv_rows(text, name, delimiter)
    if name.lower().endswith((".json", ".jsonl", ".ndjson", ".parquet")):
        raise DataError(
            f"{name} begins with {text.strip()[:20]!r}, which is not what its name says; fetch it again (in "
            "a git clone: git lfs pull), or call a plain text .txt"
        )
    # Windows line ends and the last line end come from the editor, not from the author.
    return [{"text": text.replace("\r\n", "\n").removesuffix("\n")}]


def _json_rows(text: str, name: str) -> list[Row]:
    """Return the rows of JSON lines when the first line is an object by itself, else of one JSON value."""
    # Not splitlines(): that also cuts at U+2028 and others, which JSON allows inside a string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    apart = False
    with suppress(ValueError, RecursionError):
        apart = len(lines) > 1 and isinstance(json.loads(lines[0][1]), dict)
    if apart:
        return _check_objects([_load_json(line, name, number) for number, line in lines], name)
    content = _load_json(text, name)
    if isinstance(content, dict) and set(content) == {"data"} and isinstance(content["data"], list):
        content = content["data"]
    return _check_objects(content if isinstance(content, list) else [content], name)


def _load_json(text: str, name: str, line: int | None = None) -> object:
    """Parse JSON; `line` is where the text stands in the file when it is only one line of it."""
    try:
        content: object = json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise DataError(
            f"line {line or error.lineno} of {name} is not valid JSON ({error.msg}, column {error.colno}); "
            'is the file cut short? Plain text that begins with a bracket must be given as {"text": "..."}'
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
        where = f"line {line} of {name}" if line else name
        raise DataError(f"{where} holds JSON that cannot be read ({first_line(error):.61})") from error
    return content


def _check_objects(values: Sequence[object], name: str) -> list[Row]:
    """Return the values as rows; raise `DataError` naming the first one that is no JSON object."""
    rows: list[Row] = []
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError(f"row {number} of {name} is {json_type(value)}, not an object with named columns")
        rows.append(value)
    return rows


def json_type(value: object) -> str:
    """Return what JSON calls a value, with its article, for error messages."""
    if value is None:
        return "null"
    words = {bool: "a boolean", dict: "an object", float: "a number", int: "a number", list: "a list"}
    return words.get(type(value), "a string" if isinstance(value, str) else f"a {type(value).__name__}")


def _header(text: str, delimiter: str) -> list[str]:
    """Return the column names on the first line of a text read as CSV; none when it is not CSV."""
    line = text.lstrip("\r\n").partition("\n")[0].rstrip("\r")
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, strict=True), [])]
    except csv.Error:
        return []


def _csv_rows(text: str, name: str, delimiter: str) -> list[Row]:
    """Return the rows of a CSV table, every cell a string exactly as quoted.

    As spreadsheets write them: lines of empty cells are no rows, and columns without a name are left out.
    """
    names = _header(text, delimiter)
    _refuse_twice([column for column in names if column], name)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(max(len(text), 1))  # a cell may hold a whole book, not 128 KiB alone
    try:
        records = [(reader.line_num, record) for record in reader if any(map(str.strip, record))][1:]
    except csv.Error as error:
        raise DataError(f"{name} is not valid CSV (line {reader.line_num}: {error})") from error
    finally:
        csv.field_size_limit(before)
    for line, record in records:
        if len(record) != len(names):
            raise DataError(
                f"line {line} of {name} has {len(record)} fields, the header has {len(names)} "
                f'({", ".join(names)}); put cells that hold a delimiter or a line break in "quotes"'
            )
    return [{key: cell for key, cell in zip(names, record, strict=True) if key} for _, record in records]


def _refuse_twice(names: Sequence[str], name: str) -> None:
    if len({*names}) < len(names):
        raise DataError(f"{name} has two columns of the same name ({', '.join(names)}); rename one")


def _parquet_rows(content: bytes, name: str) -> list[Row]:
    """Return the rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    damaged = (pa.ArrowException, ArithmeticError, OSError, ValueError)
    with (
        told_as(DataError, f"{name} begins like Parquet but cannot be read", "is it cut short?", *damaged),
        pq.ParquetFile(io.BytesIO(content)) as file,
    ):
        if file.metadata.num_rows > MAX_ROWS:
            raise DataError(f"{name} has {file.metadata.num_rows:,} rows; take {MAX_ROWS:,} at most")
        _refuse_twice(file.schema_arrow.names, name)
        room, rows = MAX_UNPACKED + MAX_GROWTH * len(content), list[Row]()
        for batch in file.iter_batches(batch_size=64):
            room -= batch.nbytes
            if room < 0:
                raise DataError(f"{name} unpacks to far more than its size; write it again as JSON lines")
            rows += batch.to_pylist()
        return rows


# Columns and their roles

Form = Literal["question", "completion", "chat", "document"]
"""What kind of training text an example is."""

SHAPES: Mapping[Form, tuple[str, ...]] = {
    "question": ("question", "answer"),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "document": ("text",),
}
"""Roles that the columns of a row play, by form; the first form whose roles are all there wins."""

INPUT = "input"
"""A role that a question may have besides: what stands below the question."""
ROLES = (*(role for roles in SHAPES.values() for role in roles), INPUT)
_KNOWN_ROLES = "question and answer (and input), prompt and completion, messages, or text"

OTHER_NAMES = {
    "question": ("q", "instruction"),
    "answer": ("a", "output", "response"),
    "completion": ("response",),
    "messages": ("conversations", "conversation"),
}
"""Names of columns that are read as a role where its own is missing."""

ASKED = re.compile(r"quest|query|ask|instr|prompt|input|user|human|problem|frage|^q\d*$", re.IGNORECASE)
ANSWERED = re.compile(
    r"answ|repl|respon|output|complet|target|assist|chosen|solution|antwort|^a\d*$", re.IGNORECASE
)
"""What is in the name of a column that may be a question, or an answer: for advice alone."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A form, and the columns that play its roles."""

    form: Form
    columns: Mapping[str, str]
    rank: int = 0
    """0: the roles' own names; 1: but for case; 2: other names in use."""

    @property
    def spelt(self) -> str:
        """What `--columns` takes to read a file like this."""
        return shlex.quote(",".join(f"{role}={name}" for role, name in self.columns.items()))


def folded(name: object) -> str:
    """Return a column's name as it is compared: case and blanks around it do not count."""
    return str(name).strip().casefold()


def parse_columns(text: str) -> dict[str, str]:
    """Return the mapping that `question=q,answer=a` spells: role to column name.

    >>> parse_columns("question=q, answer=a")
    {'question': 'q', 'answer': 'a'}
    """
    columns: dict[str, str] = {}
    for part in text.split(","):
        role, _, name = (piece.strip() for piece in part.partition("="))
        if role not in ROLES or not name or role in columns or name in columns.values():
            raise RecipeError(
                f"columns has {part.strip()!r}; write ROLE=NAME pairs with commas between them, each role "
                f"and name once, where the roles are {_KNOWN_ROLES}"
            )
        columns[role] = name
    return columns


def is_header(names: Sequence[str], columns: Mapping[str, str]) -> bool:
    """Tell whether the first line of a text makes it a table: by the columns named, or those of a form."""
    if columns and set(map(folded, columns.values())) <= set(map(folded, names)):
        return True
    # A single word may as well be the first line of a text, and must be a role's own name; "text" may begin
    # a sentence with commas.
    prose = any(" " in name.strip() for name in names)
    readings = [one for one in _readings(names) if not (prose and one.form == "document")]
    return any(len(names) > 1 or reading.rank == 0 for reading in readings)


def read_as(rows: Sequence[Row], source: str, columns: Mapping[str, str], *, beside: bool = False) -> Reading:
    """Return how rows are read: as `columns` says, else by their own names.

    Columns that were named must be there; with `beside`, for a set beside the one they were named for, a file
    that has none of them is read by its own names. Raises `DataError`, `RecipeError` for roles of two forms.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    form = next((form for form, roles in SHAPES.items() if set(columns) - {INPUT} <= set(roles)), None)
    if form is None or (INPUT in columns and form != "question"):
        raise RecipeError(f"columns names the roles {', '.join(columns)}; name {_KNOWN_ROLES}")
    if not columns or (beside and not any(_named(name, names) for name in columns.values())):
        return _by_name(names, rows, source)
    wanted = {role: columns.get(role, role) for role in dict.fromkeys((*SHAPES[form], *columns))}
    found = {role: _named(name, names) for role, name in wanted.items()}
    if missing := [repr(wanted[role]) for role, name in found.items() if name is None]:
        raise DataError(f"{source} has no column {' and no '.join(missing)} {_advice(names, rows)}")
    return Reading(form, {role: str(name) for role, name in found.items()})


def _by_name(names: Sequence[str], rows: Sequence[Row], source: str) -> Reading:
    """Return the one reading that the names allow."""
    found = sorted(_readings(names), key=lambda reading: reading.rank)
    if not found:
        raise DataError(f"{source}: it is not clear what its columns are {_advice(names, rows)}")
    first, order = found[0], [*SHAPES]
    rivals = [
        other
        for other in found[1:]
        if order.index(other.form) < order.index(first.form)
        or (other.rank == first.rank and (other.rank == 2 or other.form == first.form))
    ]
    if rivals:
        ways = " or ".join(f"--columns {reading.spelt}" for reading in (first, *rivals))
        raise DataError(f"{source} can be read in several ways ({_told(names)}); say {ways}")
    return first


def _readings(names: Sequence[str]) -> Iterator[Reading]:
    """Yield every form that the columns can be read as, by every choice of columns for its roles."""
    for form, roles in SHAPES.items():
        for chosen in product(*([name for name in names if _rank(name, role) < 3] for role in roles)):
            rank = max(_rank(name, role) for name, role in zip(chosen, roles, strict=True))
            columns = dict(zip(roles, chosen, strict=True))
            told = {INPUT, "context"} if folded(chosen[0]) == "instruction" else {INPUT}
            below = [name for name in names if form == "question" and folded(name) in told]
            for place in [{"question": chosen[0], INPUT: name} for name in below] or [{}]:
                yield Reading(form, place | columns, rank)


def _rank(name: str, role: str) -> int:
    """Return how well a column's name fits a role, as `Reading.rank` has it; 3 where it does not."""
    if name == role:
        return 0
    return 1 if folded(name) == role else 2 if folded(name) in OTHER_NAMES.get(role, ()) else 3


def _named(name: str, names: Sequence[str]) -> str | None:
    """Return the column of this name, or the only one but for case."""
    alike = [other for other in names if folded(other) == folded(name)]
    return name if name in names else alike[0] if len(alike) == 1 else None


def _told(names: Sequence[str]) -> str:
    return f"it has: {', '.join(map(str, names))[:200] or 'none'}"


def _advice(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Return the end of a sentence: what there is, and what to type, or what is needed."""
    guess = _likeliest(names, rows[:200])
    say = f"say which are which, probably --columns {guess.spelt}" if guess else f"we need {_KNOWN_ROLES}"
    return f"({_told(names)}); {say}"


def _likeliest(names: Sequence[str], rows: Sequence[Row]) -> Reading | None:
    """Return what these columns most likely are, by name and content."""
    values = {name: [row[name] for row in rows if row.get(name) not in (None, "")] for name in names}
    talks = [name for name, found in values.items() if found and all(isinstance(one, list) for one in found)]
    texts = {
        name: [one.strip() for one in found if isinstance(one, str)]
        for name, found in values.items()
        if found and all(isinstance(one, str) for one in found) and not set(",=") & set(name)
    }

    def most(name: str, mark: str) -> bool:
        return sum(mark in one for one in texts[name]) * 2 > len(texts[name])

    wordy = [name for name in texts if most(name, " ")]
    asked = [*filter(ASKED.search, texts), *(name for name in wordy if most(name, "?")), *wordy][:1]
    others = [name for name in texts if name not in asked]
    answered = [*filter(ANSWERED.search, others), *(name for name in others if name in wordy)]
    if talks:
        return Reading("chat", {"messages": talks[0]})
    if asked and answered:
        return Reading("question", {"question": asked[0], "answer": answered[0]})
    return Reading("document", {"text": [*wordy, *texts][0]}) if texts else None
