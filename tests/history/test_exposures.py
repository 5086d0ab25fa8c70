"""The exposure log: written, killed, resumed, re-sharded, damaged, sorted; and found in again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from palinode.errors import DataError
from palinode.history.duplicates import hashes, row_hash
from palinode.history.exposures import ExposureLog
from palinode.history.reader import ExposureReader

TEXTS = [f"fact number {n}" for n in range(40)]
ROWS = hashes(TEXTS)
OF = {"data": "d" * 32, "tokenizer": "t" * 32}


def batch(step: int, *, size: int = 4, rank: int = 0) -> list[int]:
    """The rows of a step: any rule will do, as long as the truth knows it too."""
    return [(step * 7 + place * 3 + rank * 11) % len(TEXTS) for place in range(size)]


def write(folder, first, last, *, close=True, **options):
    rank = options.get("rank", 0)
    log = ExposureLog.open(folder, **{**OF, "start": first - 1, **options})
    for step in range(first, last + 1):
        log.record(step, ROWS[batch(step, rank=rank)], tokens=10, epoch=step / 10)
    if close:
        log.close()
    return log


def truth(steps, ranks=(0,)):
    """All exposures as (row, step): times."""
    return Counter((row, step) for step in steps for rank in ranks for row in batch(step, rank=rank))


def found(folder, **options):
    reader = ExposureReader.open(folder, **options)
    return Counter({(entry.row, entry.step): entry.times for entry in reader.find(TEXTS)})


# Writing and finding


def test_every_exposure_is_found_at_its_step_and_nothing_else(tmp_path):
    write(tmp_path, 1, 30, segment_rows=20)
    assert len(list(tmp_path.rglob("*.parquet"))) == 6
    reader = ExposureReader.open(tmp_path)
    assert reader.notes == ()
    assert found(tmp_path) == truth(range(1, 31))
    assert reader.find(["never trained on"]) == []
    assert reader.find([]) == []


def test_rows_are_asked_for_by_text_hash_or_array_and_keep_their_position(tmp_path):
    write(tmp_path, 1, 3)
    reader = ExposureReader.open(tmp_path)
    by_text = reader.find([TEXTS[7], "unknown", TEXTS[7]])
    assert [entry.row for entry in by_text] == [0, 2]
    assert reader.find([row_hash(TEXTS[7]), b"\0" * 16, row_hash(TEXTS[7])]) == by_text
    assert reader.find(ROWS[[7, 8, 7]])[0] == by_text[0]


def test_a_row_twice_in_one_batch_is_one_exposure_with_its_count(tmp_path):
    with ExposureLog.open(tmp_path, **OF) as log:
        log.record(1, ROWS[[5, 5, 6]])
    (exposure,) = ExposureReader.open(tmp_path).find([TEXTS[5]])
    assert (exposure.step, exposure.times, exposure.tokens) == (1, 2, None)


def test_tokens_count_up_to_the_end_of_the_step_over_all_processes(tmp_path):
    for rank in range(2):
        write(tmp_path, 1, 3, rank=rank, world_size=2, session=1, run="r")
    reader = ExposureReader.open(tmp_path)
    assert [reader.tokens_at(step) for step in (0, 1, 3)] == [0, 20, 60]
    assert {entry.tokens for entry in reader.find(TEXTS) if entry.step == 2} == {40}


def test_tokens_are_unknown_from_the_first_step_where_nobody_counted(tmp_path):
    with ExposureLog.open(tmp_path, **OF) as log:
        log.record(1, ROWS[:2], tokens=8)
        log.record(2, ROWS[:2])
        log.record(3, ROWS[:2], tokens=8)
    reader = ExposureReader.open(tmp_path)
    assert [reader.tokens_at(step) for step in (1, 2, 3)] == [8, None, None]


def test_the_batch_of_a_step_can_be_looked_up(tmp_path):
    write(tmp_path, 1, 9, segment_rows=8)
    reader = ExposureReader.open(tmp_path)
    assert Counter(map(bytes, reader.at(5))) == Counter(map(bytes, ROWS[batch(5)]))
    assert len(reader.at(99)) == 0


def test_a_row_takes_at_most_twenty_bytes_before_compression(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (30_000, 16), dtype=np.uint8)
    with ExposureLog.open(tmp_path, **OF) as log:
        for step in range(1, 11):
            log.record(step, rows[(step - 1) * 3000 : step * 3000])
    (segment,) = tmp_path.rglob("*.parquet")
    schema = pq.read_schema(segment)
    assert sum(schema.field(name).type.bit_width for name in schema.names) == 20 * 8
    assert segment.stat().st_size < 20 * len(rows)


def test_the_log_holds_no_text_and_says_what_it_is(tmp_path):
    write(tmp_path, 1, 2, run="first run")
    header = json.loads((tmp_path / "log.json").read_text())
    assert (header["run"], header["data"], header["salted"]) == ("first run", OF["data"], False)
    (segment,) = tmp_path.rglob("*.parquet")
    about = json.loads(pq.read_metadata(segment).metadata[b"palinode.exposures"])
    assert about["steps"] == {"step": [1, 2], "rows": [4, 4], "tokens": [10, 10], "epoch": [0.1, 0.2]}
    assert not any(b"fact" in path.read_bytes() for path in tmp_path.rglob("*.*"))


# Kills, resumes, other world sizes


def test_what_a_killed_process_recorded_is_all_there(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(__file__.rpartition('/')[0])!r})\n"
        "import test_exposures as t\n"
        "t.write(Path(sys.argv[1]), 1, 13, close=False, segment_rows=20)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert run.returncode == -signal.SIGKILL
    assert [path.suffix for path in sorted(tmp_path.rglob("0*"))] == [".parquet", ".parquet", ".journal"]
    reader = ExposureReader.open(tmp_path)
    assert reader.notes == ()
    assert found(tmp_path) == truth(range(1, 14))


def test_a_resumed_training_supersedes_what_was_done_again(tmp_path):
    write(tmp_path, 1, 9, segment_rows=8, close=False)
    log = ExposureLog.open(tmp_path, **OF, start=6)
    log.record(7, ROWS[[0]])
    log.record(8, ROWS[[1]])
    log.close()
    expected = truth(range(1, 7)) + Counter({(0, 7): 1, (1, 8): 1})
    assert found(tmp_path) == expected
    (note,) = ExposureReader.open(tmp_path).notes
    assert "back to step 6 after session 1: its steps 7 to 9" in note


def test_going_back_further_supersedes_every_session_in_between(tmp_path):
    write(tmp_path, 1, 6)
    write(tmp_path, 5, 9)
    write(tmp_path, 3, 4)
    assert found(tmp_path) == truth(range(1, 5))


def test_a_training_resumed_on_other_processes_is_one_log(tmp_path):
    for rank in range(2):
        write(tmp_path, 1, 5, rank=rank, world_size=2, session=1, run="r")
    for rank in range(3):
        write(tmp_path, 6, 8, rank=rank, world_size=3, session=2, run="r")
    assert found(tmp_path) == truth(range(1, 6), (0, 1)) + truth(range(6, 9), (0, 1, 2))
    assert ExposureReader.open(tmp_path).notes == ()


def test_processes_that_cannot_talk_must_name_the_session(tmp_path):
    with pytest.raises(DataError, match="must all name the same session"):
        ExposureLog.open(tmp_path, **OF, world_size=2)
    write(tmp_path, 1, 2, session=1)
    with pytest.raises(DataError, match="has a session 1 already; the next one is 2"):
        ExposureLog.open(tmp_path, **OF, session=1)


def test_steps_must_grow_within_a_session(tmp_path):
    log = ExposureLog.open(tmp_path, **OF, start=3)
    with pytest.raises(DataError, match="step 3 cannot be recorded after step 3"):
        log.record(3, ROWS[:1])
    log.record(4, ROWS[:1])
    with pytest.raises(DataError, match="step 4 cannot be recorded after step 4"):
        log.record(4, ROWS[:1])


# Salt and fingerprints


def test_a_salted_log_is_found_in_with_its_salt_only(tmp_path):
    salted = hashes(TEXTS, salt=b"pepper")
    with ExposureLog.open(tmp_path, **OF, salt=b"pepper") as log:
        log.record(1, salted[:3])
    assert b"pepper" not in (tmp_path / "log.json").read_bytes()
    reader = ExposureReader.open(tmp_path)
    assert [entry.row for entry in reader.find(TEXTS, salt=b"pepper")] == [0, 1, 2]
    with pytest.raises(DataError, match="is salted and none was given"):
        reader.find(TEXTS)
    with pytest.raises(DataError, match="is salted and another salt was given"):
        reader.find(TEXTS, salt=b"salt")
    with pytest.raises(DataError, match="was written with another salt"):
        ExposureLog.open(tmp_path, **OF, salt=b"salt")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": "x" * 32}, "another data set"),
        ({"tokenizer": "x" * 32}, "another tokenizer"),
        ({"run": "x"}, "another run"),
    ],
)
def test_a_log_of_something_else_is_refused_for_writing_and_reading(tmp_path, changed, words):
    write(tmp_path, 1, 2, run="mine")
    with pytest.raises(DataError, match=words):
        ExposureLog.open(tmp_path, **{**OF, **changed})
    with pytest.raises(DataError, match=words):
        ExposureReader.open(tmp_path, **changed)
    assert ExposureReader.open(tmp_path, **OF, run="mine").header.run == "mine"


def test_a_run_without_a_name_keeps_the_one_that_was_drawn(tmp_path):
    first = write(tmp_path, 1, 2).header.run
    assert len(first) == 32
    assert write(tmp_path, 3, 4).header.run == first


def test_a_segment_of_another_training_is_refused(tmp_path):
    write(tmp_path / "mine", 1, 2)
    write(tmp_path / "theirs", 1, 2)
    (segment,) = (tmp_path / "theirs").rglob("*.parquet")
    shutil.copy(segment, tmp_path / "mine" / "session-0001" / "rank-00000" / "000009.parquet")
    with pytest.raises(DataError, match="is of another training than its log"):
        ExposureReader.open(tmp_path / "mine")


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no exposure log"):
        ExposureReader.open(tmp_path)
    (tmp_path / "log.json").write_text('{"version": 99}')
    with pytest.raises(DataError, match="has format 99, newer than 1"):
        ExposureReader.open(tmp_path)


# Damage


def segments(folder):
    return sorted(folder.rglob("session-*/rank-*/*.parquet"))


def test_a_truncated_segment_is_named_and_the_rest_is_used(tmp_path):
    write(tmp_path, 1, 30, segment_rows=20)
    broken = segments(tmp_path)[2]
    broken.write_bytes(broken.read_bytes()[:-100])
    notes = ExposureReader.open(tmp_path).notes
    assert "Lost: session-0001/rank-00000/000002.parquet cannot be read" in notes[0]
    assert "Gap: steps 11 to 15 of session 1 are in no file of the log." in notes
    assert found(tmp_path) == truth([*range(1, 11), *range(16, 31)])


def test_a_damaged_page_is_noticed_when_it_is_read(tmp_path):
    write(tmp_path, 1, 10, segment_rows=20)
    broken = segments(tmp_path)[0]
    content = bytearray(broken.read_bytes())
    content[content.index(ROWS[batch(1)[0]].tobytes())] ^= 1
    broken.write_bytes(content)
    reader = ExposureReader.open(tmp_path)
    assert reader.notes == ()
    exposures = reader.find(TEXTS)
    assert {entry.step for entry in exposures} == set(range(6, 11))
    assert "rows in it are not found" in reader.notes[0]


@pytest.mark.parametrize("cut", [1, 40, 90])
def test_a_torn_journal_gives_its_whole_records(tmp_path, cut):
    write(tmp_path, 1, 5, close=False)
    (journal,) = tmp_path.rglob("*.journal")
    journal.write_bytes(journal.read_bytes()[:-cut])
    assert found(tmp_path) == truth(range(1, 5))
    (note,) = ExposureReader.open(tmp_path).notes
    assert "is cut off after step 4" in note


def test_a_flipped_bit_in_a_journal_ends_it_there(tmp_path):
    write(tmp_path, 1, 5, close=False)
    (journal,) = tmp_path.rglob("*.journal")
    content = bytearray(journal.read_bytes())
    content[-100] ^= 1  # in the record of step 4, whose size is 96
    journal.write_bytes(content)
    assert found(tmp_path) == truth(range(1, 4))


def test_a_missing_file_and_a_missing_process_are_gaps(tmp_path):
    for rank in range(2):
        write(tmp_path, 1, 10, rank=rank, world_size=3, session=1, run="r", segment_rows=8)
    segments(tmp_path)[1].unlink()
    notes = ExposureReader.open(tmp_path).notes
    assert notes == (
        "Gap: process 0 of session 1 lacks steps 3 to 4.",
        "Gap: process 2 of session 1 lacks steps 1 to 10.",
    )


def test_a_gap_between_sessions_and_before_the_first_is_said(tmp_path):
    write(tmp_path, 3, 4)
    write(tmp_path, 8, 9)
    notes = ExposureReader.open(tmp_path).notes
    assert notes == (
        "The log begins after step 2; what was seen before is not in it.",
        "Gap: steps 5 to 7 of session 1 are in no file of the log.",
    )


def test_an_overlap_is_said_and_counted_once(tmp_path):
    write(tmp_path, 1, 4, segment_rows=8)
    first = segments(tmp_path)[0]
    shutil.copy(first, first.with_name("000009.parquet"))
    (note,) = ExposureReader.open(tmp_path).notes
    assert "000009.parquet overlaps an earlier file of its process at steps 1 to 2" in note
    assert found(tmp_path) == truth(range(1, 5))


def test_a_journal_beside_its_sealed_segment_is_not_counted_again(tmp_path):
    write(tmp_path, 1, 3, close=False)
    (journal,) = tmp_path.rglob("*.journal")
    kept = journal.read_bytes()
    shutil.rmtree(tmp_path)
    write(tmp_path, 1, 3, run=json.loads(kept.split(b"\n")[1])["run"])
    journal.write_bytes(kept)  # the kill came between the two
    assert found(tmp_path) == truth(range(1, 4))
    assert ExposureReader.open(tmp_path).notes == ()
