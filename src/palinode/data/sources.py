"""Files and hub data sets as rows, before anyone asks what the rows mean (spec/data.md §4).

The format is told by content: Parquet by its magic bytes, then JSON, JSON lines, CSV (by a header that the
caller knows, or where the file is called a table), and what is left is plain text, one document. Whatever the
bytes are, the only error that comes out of here is a `DataError`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palinode.errors import DataError
from palinode.records import read_bytes

Row = dict[str, object]
"""One row as it stands in the source: column name to value."""

IsHeader = Callable[[Sequence[str]], bool]
"""Whether the names on the first line of a text make it a table."""

FILE_SUFFIXES = frozenset({".csv", ".json", ".jsonl", ".md", ".ndjson", ".parquet", ".tsv", ".txt"})
"""Suffixes that make a missing `folder/name` a missing file, not the name of a hub data set."""

MAX_UNPACKED, MAX_GROWTH, MAX_ROWS = 1 << 28, 50, 5_000_000
"""A Parquet file may unpack to so many bytes and so many times its own, and hold so many rows."""

TABLE_SUFFIXES = (".csv", ".tsv")
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
        raise DataError(f"{location} is a folder; name one of the files in it") from error
    except OSError as error:
        raise DataError(f"cannot read {location} ({error.strerror}); is it a file you may open?") from error


def _read_hub(hub_name: HubName, location: str) -> list[Row]:
    """Return the rows of one split of a hub data set, downloaded or from the local cache."""
    from datasets import load_dataset

    try:
        split = load_dataset(hub_name.name, hub_name.config, revision=hub_name.revision, split=hub_name.split)
        rows: list[Row] = split.to_list()
    except Exception as error:  # the hub's clients raise errors of many libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"{location} is neither a local file nor a hub data set we could load ({reason}); "
            "check the name, or download it and give the path of the file"
        ) from error
    if not rows:
        raise DataError(f"{location} holds no rows")
    return rows


def _decode(content: bytes, name: str) -> str:
    """Return the text of UTF-8 bytes, without a byte-order mark."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise DataError(
            f"{name} is not UTF-8 text (byte 0x{byte:02x} at offset {error.start}); save it as UTF-8"
        ) from error
    if "\0" in text:
        offset = content.index(b"\0")
        raise DataError(f"{name} is not a text file (a zero byte at offset {offset}); unpack or export it")
    return text.removeprefix("\ufeff")


def _text_rows(text: str, name: str, is_header: IsHeader, plain_text: bool) -> list[Row]:
    """Return the rows of a text in the first format that fits: JSON, JSON lines, CSV, plain text."""
    if not text.strip():
        return []
    if text.lstrip()[0] in "{[":
        return _json_rows(text, name)
    delimiter = next((mark for mark in DELIMITERS if is_header(_header(text, mark))), None)
    if delimiter is None and (name.lower().endswith(TABLE_SUFFIXES) or not plain_text):
        delimiter = max(DELIMITERS, key=text.strip().partition("\n")[0].count)
    if delimiter is not None:
        return _csv_rows(text, name, delimiter)
    # Windows line ends and the last line end come from the editor, not from the author.
    return [{"text": text.replace("\r\n", "\n").removesuffix("\n")}]


def _json_rows(text: str, name: str) -> list[Row]:
    """Return the rows of JSON lines when the first line is an object by itself, else of one JSON value."""
    # Not splitlines(): that also cuts at U+2028 and others, which JSON allows inside a string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) > 1 and _is_object(lines[0][1]):
        return _check_objects([_load_json(line, name, number) for number, line in lines], name)
    content = _load_json(text, name)
    if isinstance(content, dict) and set(content) == {"data"} and isinstance(content["data"], list):
        content = content["data"]
    return _check_objects(content if isinstance(content, list) else [content], name)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _load_json(text: str, name: str, line: int | None = None) -> object:
    """Parse JSON; `line` is where the text stands in the file when it is only one line of it."""
    try:
        content: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"line {line or error.lineno} of {name} is not valid JSON ({error.msg}, column {error.colno}); "
            'is the file cut short? Plain text that begins with a bracket must be given as {"text": "..."}'
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
        raise DataError(f"{name} holds JSON that cannot be read ({error})") from error
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
    if len({*names} - {""}) < len(names) - names.count(""):
        raise DataError(f"{name} has two columns of the same name ({', '.join(names)}); rename one")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        with _fields_up_to(len(text)):
            records = [(reader.line_num, record) for record in reader if any(map(str.strip, record))]
    except csv.Error as error:
        raise DataError(f"{name} is not valid CSV (line {reader.line_num}: {error})") from error
    return [_csv_row(names, record, f"line {line} of {name}") for line, record in records[1:]]


@contextmanager
def _fields_up_to(size: int) -> Iterator[None]:
    """Let csv read cells longer than its 128 KiB for a while: a cell may hold a whole book."""
    before = csv.field_size_limit(max(size, 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_row(names: Sequence[str], record: Sequence[str], where: str) -> Row:
    if len(record) != len(names):
        raise DataError(
            f"{where} has {len(record)} fields, the header has {len(names)} ({', '.join(names)}); "
            'put cells that hold a delimiter or a line break in "quotes"'
        )
    return {name: cell for name, cell in zip(names, record, strict=True) if name}


def _parquet_rows(content: bytes, name: str) -> list[Row]:
    """Return the rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(io.BytesIO(content)) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise DataError(f"{name} has {file.metadata.num_rows:,} rows; take {MAX_ROWS:,} at most")
            return _unpacked(file.iter_batches(batch_size=64), name, most=MAX_GROWTH * len(content))
    except (pa.ArrowException, ArithmeticError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"{name} begins like Parquet but cannot be read ({reason}); is it cut short?"
        ) from error


def _unpacked(batches: Iterator[Any], name: str, *, most: int) -> list[Row]:
    """Return the rows of a packed table; raises DataError when a small file unpacks to a vast one."""
    rows: list[Row] = []
    nbytes = 0
    for batch in batches:
        nbytes += batch.nbytes
        if nbytes > most + MAX_UNPACKED:
            raise DataError(f"{name} unpacks to far more than its size; write it again as JSON lines")
        rows += batch.to_pylist()
    return rows
