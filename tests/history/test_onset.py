"""Behaviour: where the gap between forget and control rows begins, and what can be said of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from palinode.data.examples import Example
from palinode.errors import DataError, RecipeError
from palinode.history.onset import MEASURES, Reading, find_onset, search_onset
from palinode.history.series import CheckpointSeries, SeriesCheckpoint
from palinode.records import Outcome
from palinode.settings import LocateSettings

ROWS = 40


class Course:
    """A training whose checkpoints know the forget rows `jump` better from `begin` until before `end`."""

    def __init__(self, count: int, begin: int | None, end: int | None = None, *, jump: float = 2.0) -> None:
        self.steps = [100 * (place + 1) for place in range(count)]
        self.loaded: list[int] = []
        self._begin, self._end, self._jump = begin, end, jump
        self._difficulty = np.random.default_rng(1).normal(-3, 0.5, (2, ROWS))

    def read(self, place: int) -> Reading:
        self.loaded.append(place)
        noise = np.random.default_rng(100 + place).normal(0, 0.2, (2, ROWS))
        forget, control = self._difficulty + 0.2 * place + noise
        if self._begin is not None and place >= self._begin and (self._end is None or place < self._end):
            forget = forget + self._jump
        return tuple({name: values.tolist() for name in MEASURES} for values in (forget, control))

    def onset(self, **options):
        return search_onset(self.steps, self.read, **options)


@pytest.mark.parametrize("begin", range(1, 12))
def test_gap_is_placed_between_the_right_two_checkpoints(begin):
    onset = Course(12, begin).onset()
    assert (onset.state, onset.clean, onset.exposed) == ("begins", begin - 1, begin)
    assert onset.conclusion == f"The gap begins between steps {100 * begin:,} and {100 * (begin + 1):,}."


@pytest.mark.parametrize("count", [12, 100, 1000])
def test_about_two_log2_of_the_checkpoints_are_loaded(count):
    course = Course(count, count // 3)
    assert course.onset().clean == count // 3 - 1
    assert len(course.loaded) == len(set(course.loaded)) <= 2 * math.ceil(math.log2(count)) + 2


def test_gap_that_came_went_and_came_again_is_placed_where_it_first_came():
    course, second = Course(12, 3, 5), Course(12, 7)

    def read(place: int) -> Reading:
        return course.read(place) if place < 7 else second.read(place)

    onset = search_onset(course.steps, read)  # halving alone looks at 5 and 8, and finds the second
    assert (onset.state, onset.clean, onset.exposed) == ("begins", 2, 3)


def test_every_checkpoint_is_loaded_on_request_and_the_answer_is_the_same():
    course = Course(12, 7)
    onset = course.onset(every=True)
    assert (onset.clean, onset.exposed) == (6, 7)
    assert sorted(course.loaded) == list(range(12))
    assert [gap.exposed for gap in onset.gaps] == [False] * 7 + [True] * 5


def test_training_that_teaches_every_row_alike_shows_no_gap():
    onset = Course(12, None).onset()
    assert (onset.state, onset.exposed) == ("never", None)
    assert "No checkpoint looked at" in onset.conclusion


def test_gap_that_the_earliest_checkpoint_has_began_before_it():
    onset = Course(12, 0).onset()
    assert (onset.state, onset.clean, onset.exposed) == ("before", None, 0)
    assert "Already the earliest checkpoint (step 100)" in onset.conclusion


def test_gap_that_came_and_went_is_gone_again():
    onset = Course(12, 3, 7).onset()
    assert (onset.state, onset.clean, onset.exposed) == ("gone", 2, 3)
    assert onset.conclusion.endswith("gone again in the last checkpoint.")


def test_clear_gap_has_a_narrow_interval_and_a_faint_one_a_wide_one():
    clear = Course(12, 5).onset(every=True)
    assert clear.interval == (600, 600)
    assert clear.certainty == 1.0
    faint = Course(12, 5, jump=0.15).onset(every=True)
    assert faint.interval is not None
    assert faint.interval[0] < faint.interval[1]
    assert faint.certainty is not None
    assert faint.certainty < 1


def test_gap_of_a_checkpoint_is_the_difference_of_the_gains():
    def read(place: int) -> Reading:
        forget, control = [(-4.0, -2.0), (-1.0, -1.0)][place], [(-3.0, -3.0), (-2.5, -2.5)][place]
        return tuple({name: list(values) for name in MEASURES} for values in (forget, control))

    gaps = search_onset([1, 2], read).gaps
    assert gaps[0].values["mean_logprob"][0] == pytest.approx(-3.0 - -3.0)
    assert gaps[1].values["mean_logprob"][0] == pytest.approx((3.0 + 1.0) / 2 - 0.5)


def test_two_checkpoints_and_one_say_what_can_still_be_concluded():
    two = Course(2, 1).onset()
    assert (two.state, two.clean, two.exposed) == ("begins", 0, 1)
    assert "placed before, between or after them" in two.notes[0]
    one = Course(1, 0).onset()
    assert one.state == "before"
    assert "With one checkpoint there is no earlier state" in one.notes[0]
    assert Course(1, None).onset().state == "never"


def test_rows_without_a_value_are_left_out_and_none_left_is_an_error():
    def read(place: int) -> Reading:
        values = [None, -3.0, -3.0 + place]
        return tuple(dict.fromkeys(MEASURES, values) for _ in range(2))

    assert search_onset([1, 2], read).state == "never"

    def empty(place: int) -> Reading:
        return tuple({name: [None] for name in MEASURES} for _ in range(2))

    with pytest.raises(DataError, match="has a token that can be scored in every checkpoint"):
        search_onset([1, 2], empty)


def test_few_rows_are_said():
    def read(place: int) -> Reading:
        return {name: [float(place)] * 2 for name in MEASURES}, {name: [0.0] * 3 for name in MEASURES}

    assert "2 forget rows and 3 control rows are few" in " ".join(search_onset([1, 2, 3], read).notes)


def test_unknown_measure_is_refused():
    with pytest.raises(RecipeError, match="there is no measure 'loss'; choose one of mean_logprob"):
        Course(3, 1).onset(measure="loss")


def test_measures_by_hand():
    outcome = Outcome(0, "", "", None, (-1.0, -2.0, -3.0, -4.0, -5.0, 0.0), (True,) * 6)
    assert MEASURES["mean_logprob"]([outcome]) == [-2.5]
    # two of the five answer tokens (40 %), the least likely; the end token does not count
    assert MEASURES["min_k"]([outcome]) == [-4.5]
    assert MEASURES["mean_logprob"]([Outcome(0, "", "", None, (), ())]) == [None]


def example(text: str) -> Example:
    return Example(0, "rows.jsonl", "document", (), text)


def test_control_set_that_overlaps_the_forget_set_is_refused():
    series = CheckpointSeries((SeriesCheckpoint(1, "a"), SeriesCheckpoint(2, "b")))
    rows = [example("one  fact"), example("another")]
    with pytest.raises(DataError, match="1 of 2 forget rows also stand in the control set"):
        find_onset(rows, [example("one fact"), example("third")], series)
    with pytest.raises(DataError, match="there are no control rows"):
        find_onset(rows, [], series)


def test_real_checkpoints_show_where_people_were_learned(tiny, world, tmp_path):
    """base had not seen the middle people, the stage after it had; late people came with the target."""
    from palinode.data.examples import read_examples
    from palinode.data.world import write_facts
    from palinode.history.series import open_series

    home = tiny.base.folder.parent
    for step, name in ((1, "start"), (2, "base"), (3, "exposed"), (4, "target")):
        (tmp_path / f"step{step}").symlink_to(home / name)
    for name, facts in (("middle", world.middle), ("forget", world.forget), ("late", world.late)):
        write_facts(tmp_path / f"{name}.jsonl", facts)
    middle, late = (read_examples(tmp_path / f"{name}.jsonl") for name in ("middle", "late"))
    series = open_series(tmp_path)
    onset = find_onset(middle, late, series, settings=LocateSettings(max_length=64, device="cpu"))
    assert (onset.clean, onset.exposed) == (1, 2)


def test_sets_that_differ_from_the_start_do_not_hide_a_later_onset():
    course = Course(12, 5, jump=3.0)
    course._difficulty[0] += 1.0  # the forget rows are easier than the control rows all along
    onset = course.onset()
    assert (onset.state, onset.clean, onset.exposed) == ("begins", 4, 5)
    assert "taken for a difference between the two sets" in onset.notes[0]
