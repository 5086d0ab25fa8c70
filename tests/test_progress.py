"""How fast a task goes and what it still needs, and who hears of its curves."""

from __future__ import annotations

import doctest
import os
from pathlib import Path

import pytest

from palinode import progress
from palinode.progress import NullListener, plain, record


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (25000.4, "25,000 rows/s"),
        (9.96, "10.0 rows/s"),
        (1.0, "1.0 rows/s"),
        (0.5, "0.50 rows/s"),
        (0.04, "25 s for each of the rows"),
    ],
)
def test_rates_are_told_so_that_slow_ones_are_no_zeros(rate, text):
    assert progress.rate_text(rate, "rows") == text


def test_points_of_curves_reach_only_those_who_record():
    class Recorder(NullListener):
        def __init__(self):
            self.points = []

        def record(self, series, step, figures):
            self.points.append((series, step, dict(figures)))

    recorder = Recorder()
    record(recorder, "scales", 1, {"retain": 0.5})
    record(NullListener(), "scales", 1, {"retain": 0.5})
    assert recorder.points == [("scales", 1, {"retain": 0.5})]


def test_examples_in_the_docstrings_are_right():
    assert doctest.testmod(progress).failed == 0


# Texts from outside


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a name", "a name"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("\x9b31m", "\\x9b31m"),
        ("over\rwritten\x08\x7f\0", "over\\rwritten\\x08\\x7f\\x00"),
        ("\u202egnp.exe\u2066\u200f", "\\u202egnp.exe\\u2066\\u200f"),
        ("pay\u200bpal\ufeff\u00ad", "pay\\u200bpal\\ufeff\\xad"),
        ("a\u200db", "a\\u200db"),
        ("line\u2028break\u0085", "line\\u2028break\\x85"),
        ("\ud800", "\\ud800"),
        ("全角\u3000空白\u00a0", "全角 空白 "),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🚀 naïve Ω", "👩\u200d🚀 naïve Ω"),
    ],
)
def test_what_would_steer_or_hide_is_spelt_out(text, shown):
    assert plain(text) == shown


def test_markdown_shows_what_stands_there():
    from palinode.report.words import escaped, fenced, in_picture

    assert escaped("a\x1b[31m\u202e<b>|![x](http://y) *") == (
        "a\\\\x1b\\[31m\\\\u202e&lt;b&gt;\\|!\\[x\\](http\\://y) \\*"
    )
    assert escaped("see www.evil.org or HTTPS://evil.org") == "see www\\.evil.org or HTTPS\\://evil.org"
    assert in_picture("<\x1b\u202e&") == "&lt;\\x1b\\u202e&amp;"
    assert "\x1b" not in "".join(fenced("\x1b[2J"))


def test_nothing_on_the_terminal_styles_or_steers_it(capsys):
    from rich.table import Table
    from rich.text import Text

    from palinode.cli.console import out, warn

    hostile = "[red]x[/red] :bomb: \x1b]0;t\x07 \u202e [link=http://e]y[/link]"
    table = Table("[bold]name", title=hostile)
    table.add_row(hostile)
    table.add_row(Text(hostile))
    out().print(hostile, soft_wrap=True)
    out().print(table)
    warn(hostile)
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert "[red]x[/red] :bomb: \\x1b]0;t" in text
        assert all(sign.isprintable() or sign == "\n" for sign in text)


# Files that others wrote


def test_only_ordinary_files_of_a_bounded_size_are_read(tmp_path):
    from palinode.records import ordinary, read_bytes, read_json, read_toml

    os.mkfifo(tmp_path / "pipe")
    for path, said in [(tmp_path / "pipe", "no ordinary file"), (Path("/dev/zero"), "no ordinary file")]:
        for read in (read_bytes, read_json, read_toml, ordinary):
            with pytest.raises(OSError, match=said):
                read(path)
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", limit=5) == b"12345"
    with pytest.raises(OSError, match="5 bytes where 4 would be many"):
        read_bytes(tmp_path / "file", limit=4)
    with (tmp_path / "vast").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(OSError, match="would be many"):
        read_toml(tmp_path / "vast")


@pytest.mark.parametrize("text", ["[" * 200_000, "a = " + "[" * 200_000, "{" * 10])
def test_endless_nesting_is_a_broken_file(tmp_path, text):
    from palinode.records import read_json, read_toml

    (tmp_path / "file").write_text(text)
    for read in (read_json, read_toml):
        with pytest.raises(ValueError, match=r".+"):
            read(tmp_path / "file")
