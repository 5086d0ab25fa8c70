"""From evidence to a checkpoint: log, order and behaviour alone, together, and against each other."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from palinode.data.examples import Example
from palinode.errors import DataError
from palinode.history.duplicates import hashes
from palinode.history.exposures import ExposureLog
from palinode.history.locating import known_alternatives, locate
from palinode.history.orders import LoggedStage, PalinodeOrder, open_palinode, rebuild, write_stages
from palinode.history.reader import ExposureReader
from palinode.history.series import CheckpointSeries, SeriesCheckpoint
from palinode.report.location_report import location_picture, location_sentences
from palinode.report.reports import Facts, html_report, markdown_report, report_content
from palinode.settings import TrainingSettings
from palinode.training.finetune import Watch

SERIES = CheckpointSeries(
    tuple(SeriesCheckpoint(step, f"step{step}", 100 * step) for step in (10, 20, 30, 40))
)
WORDS = "the quick brown fox jumps over a lazy dog near some old stone bridge in warm evening light"


def markdown_of(record) -> str:
    return markdown_report(report_content(Facts("locate", record)))


def row(number: int, text: str) -> Example:
    return Example(number, "data.jsonl", "document", (), text)


DATA = [
    row(number, f"{number} {' '.join(f'{word}{number}' for word in WORDS.split())}") for number in range(8)
]
FORGET = [replace(DATA[number], source="forget.jsonl", row=place) for place, number in enumerate((2, 5))]


def batches(planted: dict[int, list[int]]) -> list[list[int]]:
    """Forty batches of the rows 6 and 7, with rows planted in some steps."""
    return [[6, 7, *planted.get(step, [])] for step in range(1, 41)]


@pytest.fixture
def logged(tmp_path):
    """A function that writes a real log of these batches and opens it."""

    def write(parts: list[list[int]], *, data=DATA, name: str = "log", start: int = 0) -> ExposureReader:
        with ExposureLog.open(tmp_path / name, data="d", tokenizer="t", start=start) as log:
            for step, part in enumerate(parts, start=start + 1):
                log.record(step, hashes([data[number] for number in part]), tokens=100)
        return ExposureReader.open(tmp_path / name)

    write.folder = tmp_path
    return write


PLANTED = {23: [2], 27: [5], 35: [2]}


def test_last_checkpoint_before_the_first_exposure_is_recommended(logged):
    found = locate(FORGET, SERIES, log=logged(batches(PLANTED)), target_step=40)
    assert (found.recommended.step, found.next_best.step) == (20, 10)
    assert [[seen.step for seen in entry.seen] for entry in found.rows] == [[23, 35], [27]]
    assert [checkpoint.seen for checkpoint in found.checkpoints] == [0, 0, 2, 2]
    assert (found.recommended.to_exposure.steps, found.recommended.to_exposure.tokens) == (3, 300)
    assert (found.first_to_target.steps, found.first_to_target.tokens) == (17, 1700)
    assert (found.last_to_target.steps, found.last_to_target.tokens) == (5, 500)
    assert found.recommended.evidence == ("log",)
    assert found.recommended.clean
    assert found.warnings == ()


@pytest.mark.parametrize(("first", "recommended"), [(20, 10), (21, 20), (11, 10), (40, 30)])
def test_checkpoint_of_the_very_step_has_seen_the_row(logged, first, recommended):
    found = locate(FORGET[:1], SERIES, log=logged(batches({first: [2]})), target_step=40)
    assert found.recommended.step == recommended


def test_log_and_order_that_agree_are_both_named(logged):
    parts = batches(PLANTED)
    found = locate(FORGET, SERIES, log=logged(parts), order=PalinodeOrder(parts), corpus=DATA, target_step=40)
    assert found.recommended.evidence == ("log", "order")
    assert {seen.evidence for entry in found.rows for seen in entry.seen} == {("log", "order")}
    alone = locate(FORGET, SERIES, order=PalinodeOrder(parts), corpus=DATA, target_step=40)
    assert alone.recommended.step == found.recommended.step
    assert [entry.first for entry in alone.rows] == [23, 27]


def test_order_that_disagrees_with_the_log_is_refused(logged):
    log = logged(batches(PLANTED))
    with pytest.raises(DataError, match=r"log and order disagree on row 1 of forget\.jsonl at step 23"):
        locate(FORGET, SERIES, log=log, order=PalinodeOrder(batches({24: [2]})), corpus=DATA)
    shifted = [[0, 1, *part] for part in batches(PLANTED)]
    with pytest.raises(DataError, match="log and order disagree on the batch at step 1"):
        locate(FORGET, SERIES, log=log, order=PalinodeOrder(shifted), corpus=DATA)


def test_order_is_compared_only_where_the_log_has_steps(logged):
    parts = batches(PLANTED)
    found = locate(FORGET, SERIES, log=logged(parts[30:], start=30), order=PalinodeOrder(parts), corpus=DATA)
    assert [entry.first for entry in found.rows] == [23, 27]
    late = logged(parts[30:], start=30, name="late")
    with pytest.raises(DataError, match="have no step in common"):
        locate(FORGET, SERIES, log=late, order=PalinodeOrder(parts[:20]), corpus=DATA)


def test_near_copy_counts_as_an_exposure_and_is_told_with_its_place(logged):
    copy = replace(DATA[2], answer=DATA[2].answer + " again", row=8)
    data = [*DATA, copy]
    parts = batches({14: [8], 23: [2], 27: [5]})
    found = locate(FORGET, SERIES, log=logged(parts, data=data), corpus=data, target_step=40)
    assert found.recommended.step == 10
    near, exact = found.rows[0].seen
    assert (near.step, near.copy, exact.step, exact.copy) == (14, "row 9 of data.jsonl", 23, None)
    assert 0.7 <= near.similarity < 1
    assert [(entry.place, entry.exact) for entry in found.rows[0].copies] == [
        ("row 3 of data.jsonl", True),
        ("row 9 of data.jsonl", False),
    ]
    by_order = locate(FORGET, SERIES, order=PalinodeOrder(parts), corpus=data, target_step=40)
    assert [seen.step for seen in by_order.rows[0].seen] == [14, 23]
    without = locate(FORGET, SERIES, log=logged(parts, data=data, name="again"), target_step=40)
    assert without.recommended.step == 20


def test_nothing_clean_names_the_least_contaminated_and_the_alternatives(logged):
    found = locate(FORGET, SERIES, log=logged(batches({5: [2], 33: [5]})), target_step=40)
    assert found.recommended is None
    assert [checkpoint.seen for checkpoint in found.checkpoints] == [1, 1, 1, 2]
    assert (found.next_best.step, found.next_best.clean) == (30, False)
    assert found.next_best.reason == "not clean: it has seen 1 of 2 forget rows"
    assert "No checkpoint of the series is clean." in found.warnings
    assert [entry["name"] for entry in found.alternatives] == [
        "earliest checkpoint",
        "paired vectors from the target",
        "train on from the earliest checkpoint",
    ]


def test_alternatives_have_their_cost_and_their_source():
    for entry in known_alternatives():
        assert set(entry) == {"name", "what", "cost", "known", "source"}


def test_rows_that_no_step_has_are_said(logged):
    found = locate(FORGET, SERIES, log=logged(batches({})), target_step=40)
    assert (found.recommended.step, found.first) == (30, None)
    assert any("holds none of the forget rows" in text for text in found.warnings)
    assert any("is there anything to unlearn?" in text for text in found.warnings)
    half = locate(FORGET, SERIES, log=logged(batches({23: [2]}), name="half"), target_step=40)
    assert any("1 of 2 forget rows are not in the log" in text for text in half.warnings)


def test_notes_of_the_log_become_warnings(logged, tmp_path):
    parts = batches(PLANTED)
    logged(parts[:10])
    log = logged(parts[15:], start=15)
    assert log.notes
    assert set(log.notes) <= set(locate(FORGET, SERIES, log=log, target_step=40).warnings)


def without(steps: range, parts: list[list[int]], logged, name: str) -> ExposureReader:
    """A log of one session that lacks some steps."""
    with ExposureLog.open(logged.folder / name, data="d", tokenizer="t") as log:
        for step, part in enumerate(parts, start=1):
            if step not in steps:
                log.record(step, hashes([DATA[number] for number in part]), tokens=100)
    return ExposureReader.open(logged.folder / name)


@pytest.mark.parametrize(
    ("missing", "recommended", "unrecorded"),
    [
        (range(25, 27), 20, [0, 0, 2, 2]),  # after the first exposure: it does not matter
        (range(15, 18), 10, [0, 3, 3, 3]),
        (range(20, 21), 10, [0, 1, 1, 1]),
        (range(1, 3), None, [2, 2, 2, 2]),
    ],
)
def test_checkpoint_behind_missing_steps_is_not_called_clean(logged, missing, recommended, unrecorded):
    found = locate(FORGET, SERIES, log=without(missing, batches(PLANTED), logged, "log"), target_step=40)
    assert (found.recommended.step if found.recommended else None) == recommended
    assert [checkpoint.unrecorded for checkpoint in found.checkpoints] == unrecorded
    assert any("what was seen in them is not known" in text for text in found.warnings)
    if recommended is None:
        assert found.next_best.reason == "no exposure known, but the log lacks 2 of the steps up to it"
        assert location_sentences(found.as_record())[0] == "No checkpoint of the series is known to be clean."
        assert "| 20 | 2,000 | at least 0 of 2 |" in markdown_of(found.as_record())


def test_log_that_ends_before_the_series_does_speaks_for_no_later_checkpoint(logged):
    found = locate(FORGET, SERIES, log=logged(batches({})[:25]), target_step=40)
    assert (found.recommended.step, found.first) == (20, None)
    assert any("since the log lacks steps 26 to 30" in text for text in found.warnings)


def test_order_fills_in_what_the_log_lacks(logged):
    parts = batches(PLANTED)
    log = without(range(15, 18), parts, logged, "log")
    found = locate(FORGET, SERIES, log=log, order=PalinodeOrder(parts), corpus=DATA, target_step=40)
    assert found.recommended.step == 20
    assert [checkpoint.unrecorded for checkpoint in found.checkpoints] == [0, 0, 0, 0]


def test_log_without_a_readable_step_is_refused(logged):
    reader = logged(batches(PLANTED))
    for path in reader.folder.rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"no step of the log in .* can be read: Lost"):
        locate(FORGET, SERIES, log=ExposureReader.open(reader.folder))


def test_of_equally_many_rows_the_least_often_seen_is_least_contaminated(logged):
    found = locate(FORGET, SERIES, log=logged(batches({5: [2], 13: [2], 33: [5]})), target_step=40)
    assert (found.recommended, found.next_best.step) == (None, 10)


def test_salted_log_is_asked_with_its_salt(tmp_path):
    with ExposureLog.open(tmp_path / "log", data="d", tokenizer="t", salt=b"sea") as log:
        for step, part in enumerate(batches(PLANTED), start=1):
            log.record(step, hashes([DATA[number] for number in part], salt=b"sea"))
    reader = ExposureReader.open(tmp_path / "log")
    assert locate(FORGET, SERIES, log=reader, salt=b"sea").recommended.step == 20
    with pytest.raises(DataError, match="salt"):
        locate(FORGET, SERIES, log=reader)


def test_without_evidence_or_data_the_call_is_refused():
    with pytest.raises(DataError, match="nothing to locate the rows by"):
        locate(FORGET, SERIES)
    with pytest.raises(DataError, match="name the data that they point into"):
        locate(FORGET, SERIES, order=PalinodeOrder(batches({})))
    with pytest.raises(DataError, match="also stand in the control set"):
        locate(FORGET, SERIES, control=FORGET)


def test_record_is_strict_json_and_holds_no_text_of_the_rows(logged):
    found = locate(FORGET, SERIES, log=logged(batches(PLANTED)), corpus=DATA, target_step=40)
    text = json.dumps(found.as_record(), allow_nan=False)
    assert json.loads(text)["version"] == 1
    assert "quick2" not in text


def test_report_says_what_the_record_says(logged):
    record = locate(FORGET, SERIES, log=logged(batches(PLANTED)), target_step=40).as_record()
    assert location_sentences(record)[0] == (
        "Take step 20 (step20): clean by the exposure log; 3 steps (300 tokens) before the first exposure."
    )
    page = markdown_of(record)
    assert "| row 1 of forget.jsonl | 23 | 23, 35 |  |" in page
    assert "| 20 | 2,000 | 0 of 2 |  | recommended | step20 |" in page
    picture = location_picture(record)
    assert picture.startswith("<svg")
    assert (
        picture.count('class="mark"') == 4 + 4 + 3 + 2
    )  # key, checkpoints, exposures, recommended and target


def test_text_of_the_user_is_escaped(logged):
    record = locate(FORGET, SERIES, log=logged(batches(PLANTED)), target_step=40).as_record()
    record["rungs"][0]["location"] = "<b>|x|"
    assert "&lt;b&gt;\\|x\\|" in markdown_of(record)
    assert "&lt;b&gt;" in location_picture(record)
    assert "<b>|x|" not in html_report(report_content(Facts("locate", record)))


# Palinode's own loop


def test_rebuilt_order_is_what_the_training_loop_does(tiny, tmp_path):
    """Two stages of real training, one with accumulation, step by step against what was heard."""
    from palinode.data.examples import read_examples
    from palinode.models.loading import load_tokenizer
    from palinode.training.finetune import finetune

    data = read_examples(tiny.retain)
    first = TrainingSettings(epochs=2, batch_size=8, max_length=64)
    second = TrainingSettings(epochs=1, batch_size=1, accumulation=2, max_length=64)
    stages = [
        LoggedStage(numbers=tuple(range(3, 40)), training=first, seed=5),
        LoggedStage(numbers=(50, 4, 60), training=second, seed=6),
    ]
    heard: list[list[int]] = []
    state = tiny.base
    for number, stage in enumerate(stages):
        state = finetune(
            state,
            [data[place] for place in stage.numbers],
            tmp_path / f"stage{number}",
            stage.training,
            seed=stage.seed,
            device="cpu",
            watch=Watch(
                on_step=lambda _, places, stage=stage: heard.append(
                    [stage.numbers[place] for place in places]
                )
            ),
        ).checkpoint
    order = rebuild(stages, data, load_tokenizer(tiny.base))
    assert order.steps == len(heard) == 2 * 5 + 2
    assert [list(order.rows(step)) for step in range(1, order.steps + 1)] == heard
    with pytest.raises(DataError, match="there is no step 0"):
        order.rows(0)

    (tmp_path / "data.jsonl").write_bytes(tiny.retain.read_bytes())
    write_stages(tmp_path / "order.json", stages, data="data.jsonl", model="stage0")
    opened, rows = open_palinode(tmp_path / "order.json")
    assert [opened.rows(step) for step in range(1, 13)] == [order.rows(step) for step in range(1, 13)]
    assert len(rows) == len(data)


def test_any_object_with_steps_and_rows_is_an_order():
    class Alternating:
        steps = 40

        def rows(self, step: int) -> list[int]:
            return [2 if step == 23 else 6]

    found = locate(FORGET[:1], SERIES, order=Alternating(), corpus=DATA, target_step=40)
    assert (found.first, found.recommended.step) == (23, 20)
