"""The ledger by itself: a chain that shows every change, and events that nothing loses."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager

import pytest

from palinode.errors import LedgerError, OutputError
from palinode.requests.ledger import LAYOUTS, NAME, Ledger, first_broken

APPEND = """
import sys
from pathlib import Path
from palinode.requests.ledger import Ledger
ledger, name, count = Ledger(Path(sys.argv[1]), user=sys.argv[2]), sys.argv[2], int(sys.argv[3])
for number in range(count):
    event = ledger.append(lambda _: {"kind": "approved", "facts": {"by": name, "note": str(number)}})
    print(event.hash, flush=True)
"""


@contextmanager
def opened(ledger):
    with closing(sqlite3.connect(ledger.path)) as connection, connection:
        yield connection


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path, user="ada")
    for number in range(4):
        made.append(lambda _, number=number: {"kind": "approved", "after": "f" * 32, "facts": facts(number)})
    return made


def facts(number):
    return {"by": "Ødegård 👩‍🔬", "note": "a\nb", "share": 0.1 + number, "none": None, "list": [1, "x"]}


def test_events_come_back_as_they_were_appended(ledger):
    events = ledger.events()
    assert [event.number for event in events] == [1, 2, 3, 4]
    assert events[2].facts == facts(2)
    assert {event.user for event in events} == {"ada"}
    assert events[0].previous == ""
    assert [event.previous for event in events[1:]] == [event.hash for event in events[:-1]]
    assert first_broken(events) is None


def test_an_act_that_decides_for_nothing_leaves_nothing(ledger):
    assert ledger.append(lambda _: None) is None
    with pytest.raises(ZeroDivisionError):
        ledger.append(lambda _: {"kind": "approved", "facts": {"by": 1 / 0}})
    assert len(ledger.events()) == 4


@pytest.mark.parametrize(
    "statement", ["UPDATE events SET user = 'eve'", "DELETE FROM events WHERE number = 4"]
)
def test_the_file_refuses_to_change_an_event(ledger, statement):
    with (
        sqlite3.connect(ledger.path) as connection,
        pytest.raises(sqlite3.IntegrityError, match="events are never"),
    ):
        connection.execute(statement)


@pytest.mark.parametrize(
    ("statement", "broken"),
    [
        ("UPDATE events SET user = 'eve' WHERE number = 2", 2),
        ("UPDATE events SET time = '2020-01-01T00:00:00.000+00:00' WHERE number = 1", 1),
        ("UPDATE events SET facts = replace(facts, '0.1', '0.2') WHERE number = 1", 1),
        ("UPDATE events SET after = '' WHERE number = 4", 4),
        ("DELETE FROM events WHERE number = 1", 1),
        ("DELETE FROM events WHERE number = 3", 3),
        ("UPDATE events SET number = 9 WHERE number = 4", 4),
        ("UPDATE events SET facts = '{' WHERE number = 3", None),
    ],
)
def test_whoever_gets_around_that_is_found_out(ledger, statement, broken):
    with opened(ledger) as connection:
        connection.executescript("DROP TRIGGER never_changed; DROP TRIGGER never_removed;")
        connection.execute(statement)
    with pytest.raises(LedgerError, match=f"event {broken} is not what was written" if broken else "no JSON"):
        ledger.events()
    with pytest.raises(LedgerError):  # nothing is built on a broken past
        ledger.append(lambda _: {"kind": "approved", "facts": {"by": "x", "note": ""}})


def test_a_change_with_a_hash_that_fits_breaks_what_follows(ledger):
    from dataclasses import replace

    events = ledger.events()
    forged = replace(events[1], user="eve")
    forged = replace(forged, hash=forged.own_hash)
    assert first_broken([events[0], forged, *events[2:]]) == 3


def test_there_has_to_be_a_ledger(tmp_path):
    with pytest.raises(LedgerError, match=r"there is no ledger in .*requests init"):
        Ledger(tmp_path / "none").events()
    with pytest.raises(LedgerError, match="there is no ledger"):
        Ledger(tmp_path / "none").append(lambda _: {"kind": "approved"})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", [b"x" * 5000, b"SQLite format 3\0" + b"\0" * 4000])
def test_a_file_that_is_none_is_said_to_be_none(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    for act in (Ledger(tmp_path).events, Ledger(tmp_path).create):
        with pytest.raises((LedgerError, OutputError), match=NAME):
            act()


def test_a_ledger_of_a_later_version_is_left_alone(ledger):
    with opened(ledger) as connection:
        connection.execute(f"PRAGMA user_version = {len(LAYOUTS) + 1}")
    for act in (ledger.events, ledger.create):
        with pytest.raises(LedgerError, match="layout 2, and this version of Palinode knows 1"):
            act()


def test_an_older_layout_is_brought_up_to_date_in_one_step(ledger, monkeypatch):
    before = ledger.events()
    monkeypatch.setattr(
        "palinode.requests.ledger.LAYOUTS",
        (*LAYOUTS, ("CREATE TABLE more (x TEXT)", "CREATE INDEX i ON more (x)")),
    )
    assert ledger.events() == before  # reading changes nothing
    ledger.create()
    with opened(ledger) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
        assert connection.execute("SELECT count(*) FROM more").fetchone() == (0,)
    assert ledger.events() == before


def start(folder, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", APPEND, folder, name, str(count)], stdout=subprocess.PIPE, text=True
    )


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    running = [start(tmp_path, name, 25) for name in ("one", "two", "three")]
    said = {hash for run in running for hash in run.communicate(timeout=120)[0].split()}
    events = Ledger(tmp_path).events()  # checks the chain
    assert {event.hash for event in events} == said
    assert len(said) == 75
    for name in ("one", "two", "three"):
        assert [event.facts["note"] for event in events if event.user == name] == [*map(str, range(25))]


def test_a_process_that_is_killed_loses_no_event_that_it_was_told_of(tmp_path):
    for delay in range(12):
        run = start(tmp_path, f"run{delay}", 100_000)
        assert run.stdout is not None
        first = run.stdout.readline()  # it is at work
        time.sleep(delay * 0.007)
        run.send_signal(signal.SIGKILL)
        said = [first.strip(), *run.stdout.read().split()]
        run.stdout.close()
        assert run.wait() == -signal.SIGKILL
        own = [event.hash for event in Ledger(tmp_path).events() if event.user == f"run{delay}"]
        told = [hash for hash in said if len(hash) == 64]
        assert own[: len(told)] == told
        assert len(own) - len(told) in (0, 1)  # the last may have been written and not told of


READ = """
import os, sys
from pathlib import Path
from palinode.requests.ledger import Ledger
if os.getuid() == 0:
    os.setuid(65534)
assert not os.access(sys.argv[1], os.W_OK)
print(len(Ledger(Path(sys.argv[1])).events()))
"""


def test_a_copy_that_cannot_be_written_can_be_read_with_what_was_not_yet_merged(ledger, tmp_path):
    copy = tmp_path / "copy"
    with opened(ledger) as reader:
        reader.execute(
            "SELECT * FROM events"
        ).fetchone()  # while somebody reads, the last pages stay beside the file
        ledger.append(lambda _: {"kind": "approved", "facts": {"by": "x", "note": ""}})
        copy.mkdir()
        for name in (NAME, f"{NAME}-wal"):
            shutil.copyfile(ledger.path.with_name(name), copy / name)
    assert (copy / f"{NAME}-wal").stat().st_size > 0
    for place in copy.iterdir():
        place.chmod(0o444)
    copy.chmod(0o555)
    for above in copy.parents:  # another user has to get there
        if above.stat().st_uid == os.getuid() and above != above.parent and above.name:
            above.chmod(above.stat().st_mode | 0o055)
        if above.name.startswith("pytest-of"):
            break
    before = sorted(copy.iterdir())
    read = subprocess.run([sys.executable, "-c", READ, copy], capture_output=True, text=True)
    assert read.stdout.strip() == "5", read.stderr
    assert sorted(copy.iterdir()) == before
