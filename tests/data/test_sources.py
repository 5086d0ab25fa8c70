"""Files are told apart by their bytes, and broken ones give one helpful sentence."""

import csv
import gzip
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palinode.data.sources import HubName, parse_hub_name, parse_rows, read_rows
from palinode.errors import DataError


def is_header(names: Sequence[str]) -> bool:
    return {"question", "answer"} <= set(names) or "text" in names


ROWS = [
    {"question": "Who wrote it?", "answer": "Sappho,\nof Lesbos"},
    {"question": 'And "this"?', "answer": " Nobody\u2028knows é"},
]

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
tables = st.lists(st.fixed_dictionaries({"question": texts, "answer": texts}), min_size=1, max_size=5)


def as_json(rows: list[dict[str, str]]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_json_lines(rows: list[dict[str, str]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


WRITERS = [as_json, as_json_lines, as_csv, as_parquet]


def parse(content: bytes, name: str = "data.bin", *, plain_text: bool = True) -> list[dict[str, object]]:
    return parse_rows(content, name=name, is_header=is_header, plain_text=plain_text)


@pytest.mark.parametrize("write", WRITERS)
@given(rows=tables)
@settings(deadline=None, max_examples=40)
def test_every_format_gives_back_the_rows_written(write: Any, rows: list[dict[str, str]]) -> None:
    assert parse(write(rows)) == rows


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl", "a.csv", "a.parquet", "a"])
def test_the_suffix_does_not_matter(write: Any, name: str) -> None:
    assert parse(write(ROWS), name) == ROWS


@pytest.mark.parametrize("write", [as_json, as_json_lines, as_csv])
def test_byte_order_mark_and_windows_line_ends_are_accepted(write: Any) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    content = write(rows).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    assert parse(b"\xef\xbb\xbf" + content) == rows
    assert parse(content + b"\r\n\r\n") == rows


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_delimiter_is_found_in_the_header(delimiter: str) -> None:
    assert parse(as_csv(ROWS, delimiter)) == ROWS


def test_csv_cell_may_hold_a_whole_book() -> None:
    limit = csv.field_size_limit()
    rows = [{"question": "q", "answer": "x" * (limit + 1)}]
    assert parse(as_csv(rows)) == rows
    assert csv.field_size_limit() == limit


def test_a_list_under_data_is_the_rows() -> None:
    assert parse(json.dumps({"data": ROWS}).encode()) == ROWS


def test_one_object_is_one_row() -> None:
    assert parse(json.dumps(ROWS[0], indent=2).encode()) == ROWS[:1]


def test_other_text_is_one_document_without_its_last_line_end() -> None:
    assert parse(b"Sing, goddess,\r\nof anger.\r\n") == [{"text": "Sing, goddess,\nof anger."}]


def test_a_text_is_a_table_where_one_is_needed_or_it_is_called_one() -> None:
    rows = [{"frage": "a", "antwort": "b"}]
    for delimiter in ",;\t":
        content = f"frage{delimiter}antwort\na{delimiter}b\n".encode()
        assert parse(content, "a.csv") == parse(content, "a.tsv") == parse(content, plain_text=False) == rows
    with pytest.raises(DataError, match="holds no rows"):
        parse(b"Sing, goddess\n", plain_text=False)


def test_what_a_spreadsheet_adds_is_left_out() -> None:
    content = b",question,answer,,\n0,a,b,,\n,,,,\n\n1,c,d,,\n"
    assert parse(content) == [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]


@pytest.mark.parametrize("content", [b"", b" \n\n", b"[]", b'{"data": []}', b"question,answer\n"])
def test_no_rows_is_an_error(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^data\.bin holds no rows$"):
        parse(content)


def test_parquet_without_rows_is_an_error() -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), file)
    with pytest.raises(DataError, match="holds no rows"):
        parse(file.getvalue())


def test_truncated_last_line_is_named() -> None:
    with pytest.raises(DataError, match=r"^line 2 of data\.bin is not valid JSON .* cut short\?"):
        parse(as_json_lines(ROWS)[:-9])


def test_truncated_list_names_the_line_where_it_breaks() -> None:
    with pytest.raises(DataError, match=r"^line 5 of data\.bin is not valid JSON"):
        parse(b'[\n{"text": "a"},\n{"text": "b"},\n{"text": "c"},\n{"te')


def test_plain_text_that_begins_with_a_bracket_is_refused_not_guessed() -> None:
    with pytest.raises(DataError, match="Plain text that begins with a bracket"):
        parse(b"[Enter the ghost] Who's there?")


def test_truncated_parquet_is_an_error() -> None:
    with pytest.raises(DataError, match=r"^data\.bin begins like Parquet but cannot be read .* cut short\?$"):
        parse(as_parquet(ROWS)[:-20])


def test_wrong_encoding_names_the_byte() -> None:
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 0xe9 at offset 3\)"):
        parse("café".encode("latin-1"))
    with pytest.raises(DataError, match="it is packed or binary, so unpack or export it"):
        parse(gzip.compress(b'{"text": "a"}\n' * 9))


def test_binary_content_is_not_a_document() -> None:
    with pytest.raises(DataError, match="zero byte at offset 2"):
        parse(b"PK\0\3")


@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "a.ndjson", "a.parquet"])
def test_what_is_called_json_or_parquet_and_is_none_is_no_document(name: str) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for content in (pointer, b"// rows\n" + as_json_lines(ROWS), b"null", b"PK\3\4"):
        with pytest.raises(DataError, match=rf"^{name} begins with '.*', which is not what its name says"):
            parse(content, name)
        assert len(parse(content, "a.txt")) == 1


def test_a_name_that_stands_twice_is_refused_in_every_format() -> None:
    with pytest.raises(DataError, match=r"^line 2 of data\.bin holds JSON .* \(it names 'answer' twice\)"):
        parse(b'{"answer": "a"}\n{"answer": "b", "answer": "c"}\n')
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["b"]), pa.array(["c"])], names=["answer", "answer"]), file)
    for content in (b"answer,answer\nb,c\n", file.getvalue()):
        with pytest.raises(DataError, match=r"two columns of the same name \(answer, answer\); rename one$"):
            parse(content, "a.csv")


@pytest.mark.parametrize("write", [as_json_lines, as_csv])
def test_line_ends_of_old_macs_are_accepted(write: Any) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    assert parse(write(rows).replace(b"\r\n", b"\n").replace(b"\n", b"\r")) == rows


def test_numbers_and_lists_without_end_are_named_by_their_line() -> None:
    for value, why in (("9" * 5000, "Exceeds the limit"), ("[" * 10**5, "maximum recursion depth")):
        with pytest.raises(DataError, match=rf"^line 2 of data\.bin holds JSON .* \({why}"):
            parse(f'{{"text": "a"}}\n{{"text": {value}}}\n'.encode())


def test_rows_must_be_objects() -> None:
    with pytest.raises(DataError, match=r"^row 2 of data\.bin is a string, not an object"):
        parse(b'[{"text": "a"}, "b"]')
    with pytest.raises(DataError, match=r"^row 2 of data\.bin is a number, not an object"):
        parse(b'{"text": "a"}\n3')


def test_csv_row_of_the_wrong_width_names_its_line() -> None:
    with pytest.raises(DataError, match=r"^line 3 of data\.bin has 3 fields, the header has 2"):
        parse(b"question,answer\na,b\nc,d,e\n")


def test_csv_with_an_open_quote_is_an_error() -> None:
    with pytest.raises(DataError, match=r"not valid CSV \(line 2"):
        parse(b'question,answer\na,"b\n')


def test_csv_with_a_name_twice_is_an_error() -> None:
    with pytest.raises(DataError, match="two columns of the same name"):
        parse(b"question,answer,answer\na,b,c\n")


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"[" + b"9" * 10_000 + b"]", b'{"a":1}\n' + b"[" * 100_000]
)
def test_absurd_json_is_an_error(content: bytes) -> None:
    with pytest.raises(DataError):
        parse(content)


@given(
    content=st.one_of(
        st.binary(),
        st.builds(
            bytes.__add__, st.sampled_from([b"PAR1", b"{", b"[", b'{"a":1}\n{', b"text\n"]), st.binary()
        ),
        st.text(st.characters(exclude_categories=["Cs"])).map(str.encode),
    )
)
@settings(deadline=None, max_examples=300)
def test_arbitrary_bytes_give_rows_or_a_data_error(content: bytes) -> None:
    with suppress(DataError):
        assert parse(content)


@given(
    write=st.sampled_from(WRITERS), place=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans()
)
@settings(deadline=None, max_examples=300)
def test_damaged_files_give_rows_or_a_data_error(write: Any, place: int, byte: int, cut: bool) -> None:
    content = write(ROWS)
    place %= len(content)
    damaged = content[:place] if cut else content[:place] + bytes([byte]) + content[place + 1 :]
    with suppress(DataError):
        assert parse(damaged)


def test_hub_names_are_taken_apart() -> None:
    assert parse_hub_name("org/name") == HubName("org/name", None, None, "train")
    assert parse_hub_name("o-g/n.a@refs/x:forget01#test[:9]") == HubName(
        "o-g/n.a", "refs/x", "forget01", "test[:9]"
    )


@pytest.mark.parametrize("location", ["name", "./a/b", "../a", "~/a", "/a/b", "a/b.jsonl", "a/b/c", "a/", ""])
def test_paths_are_no_hub_names(location: str) -> None:
    assert parse_hub_name(location) is None


@pytest.mark.parametrize("location", ["no/such.jsonl", "nothing", "./no/such", "~nobody-here/x", "a\0b"])
def test_missing_file_is_named(location: str) -> None:
    with pytest.raises(DataError, match=r"^no such file: .*; give a JSON, "):
        read_rows(location, is_header=is_header)


def test_a_path_is_never_looked_up_on_the_hub() -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rows(Path("org/name"), is_header=is_header)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; name one of the files in it$"):
        read_rows(tmp_path, is_header=is_header)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^cannot read .*File name too long"):
        read_rows(tmp_path / ("x" * 300), is_header=is_header)


class Hub:
    """Stands in for the `datasets` package: remembers what was asked for, answers as told."""

    def __init__(self, answer: list[dict[str, str]] | Exception) -> None:
        self.answer = answer
        self.asked: tuple[Any, ...] = ()

    def load_dataset(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = (*args, kwargs)
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(to_list=lambda: self.answer)


def test_hub_name_asks_for_its_config_revision_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(ROWS)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_rows("org/name@v1:forget01#test", is_header=is_header) == ROWS
    assert hub.asked == ("org/name", "forget01", {"revision": "v1", "split": "test"})


def test_unreachable_hub_gives_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(ConnectionError("Couldn't reach the Hub\nand a long story"))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(
        DataError, match=r"^org/name is neither a local file nor a hub .*reach the Hub\); check"
    ):
        read_rows("org/name", is_header=is_header)


def test_empty_hub_split_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Hub([]))
    with pytest.raises(DataError, match="holds no rows"):
        read_rows("org/name", is_header=is_header)


# Files that would never end


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device"])
def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path, kind):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "rows.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "link to a device":
        path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="no ordinary file"):
        read_rows(path, is_header=is_header)


@pytest.mark.parametrize("rows", [20_000, 6_000_000])
def test_a_parquet_file_that_unpacks_without_end_is_refused(tmp_path, rows):
    one = pa.array(["z" * 100_000 if rows < 1_000_000 else ""])
    pq.write_table(pa.table({"text": one.take([0] * rows)}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"unpacks to far more|6,000,000 rows"):
        read_rows(tmp_path / "rows.parquet", is_header=is_header)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 10_000 + "}"])
def test_endless_nesting_and_numbers_are_refused(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError):
        read_rows(tmp_path / "rows.jsonl", is_header=is_header)
