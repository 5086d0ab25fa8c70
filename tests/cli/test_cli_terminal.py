"""Bars on a terminal, lines elsewhere; no colours where unwanted, no control codes in a pipe."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from palinode.cli import console as module
from palinode.cli.console import Terminal, hush_libraries

COLOUR = re.compile(rb"\x1b\[(?:3[0-7]|4[0-7]|9[0-7]|10[0-7]|38|48)[;\d]*m")
SCRIPT = """
import sys
from palinode.cli.console import listener, out
listen = listener(quiet="quiet" in sys.argv)
with listen.task("counting [things]", 4, "things") as advance:
    for _ in range(4):
        advance(1)
listen.say("a line [bold]as it is")
out().print("the [bold green]result[/]")
"""


def on_terminal(*words, script=SCRIPT, **environment):
    """What a short script leaves on a terminal of its own."""
    main, other = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdin=other,
        stdout=other,
        stderr=other,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment},
    )
    os.close(other)
    found = b""
    try:
        while part := os.read(main, 65536):
            found += part
    except OSError:  # the other end is closed
        pass
    os.close(main)
    assert run.wait() == 0
    return found


def test_a_terminal_shows_a_bar_and_leaves_one_line():
    found = on_terminal()
    assert b"4/4" in found
    assert COLOUR.search(found)
    assert b"counting [things]: 4 things in" in found
    assert b"a line [bold]as it is" in found


@pytest.mark.parametrize("columns", [80, 120])
def test_lists_stay_within_the_terminal_and_keep_their_columns(columns, palinode):
    whole = palinode("list", "transforms").out
    script = "from palinode.cli import main; main()"
    said = on_terminal("list", "transforms", script=script, COLUMNS=str(columns)).decode()
    assert max(map(len, said.splitlines())) <= columns
    assert said.split() == whole.split()
    assert {len(line) - len(line.lstrip()) for line in said.splitlines()[1:]} == {2, 17}


def test_no_color_means_none():
    found = on_terminal(NO_COLOR="1")
    assert not COLOUR.search(found)
    assert b"4/4" in found


def test_a_terminal_that_cannot_move_its_cursor_gets_lines():
    found = on_terminal(TERM="dumb")
    assert b"\x1b" not in found
    assert b"counting [things]: 4 things in" in found


def test_quiet_shows_the_result_alone():
    found = on_terminal("quiet")
    assert b"counting" not in found
    assert b"result" in found


def test_a_pipe_gets_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0)
    with Terminal().task("counting", 4, "things") as advance:
        for _ in range(4):
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "counting: 1 of 4 things"
    assert re.fullmatch(r"counting: 2 of 4 things, [\d,.]+ things/s, about \d+ s left", lines[1])
    assert re.fullmatch(r"counting: 4 things in \d+\.\d s", lines[-1])
    assert len(lines) == 4


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_bar_stays_on_one_line_and_keeps_its_numbers(width):
    terminal = Terminal()
    terminal.console = Console(width=width, force_terminal=True, record=True, file=io.StringIO())
    bars, clock = terminal._bars(), [0.0]
    bars.get_time = lambda: clock[0]
    label = "retrained model, paraphrased_questions: likelihoods"
    number = bars.add_task(label, total=8_000_000, unit="weights")
    for clock[0], amount in ((50.0, 1_000_000), (100.0, 500_000), (150.0, 500_000)):
        bars.advance(number, amount)  # the first, of an interrupted call perhaps, tells nothing of the rate
    terminal.console.print(bars.get_renderable())
    (line,) = terminal.console.export_text().splitlines()
    assert len(line) <= width
    assert re.search(r"2M/8M +\d+,\d+ weights/s, 10 min left", line)


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (999, "999"), (999.6, "1k"), (839_936, "840k"), (16_100_000_000, "16.1G")]
)
def test_large_numbers_are_short(count, text):
    assert module._short(count) == text


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_keeps_the_notes_of_libraries_away_but_not_what_the_user_set(monkeypatch, quiet):
    for name in (*module.BARS_OFF, *module.NOTES_OFF):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATASETS_VERBOSITY", "debug")
    assert hush_libraries(quiet) is quiet
    assert os.environ["DATASETS_VERBOSITY"] == "debug"
    assert os.environ.get("HF_HUB_VERBOSITY") == ("critical" if quiet else None)
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"  # no terminal here in any case
