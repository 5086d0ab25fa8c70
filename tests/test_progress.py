"""How fast a task goes and what it still needs, and who hears of its curves."""

from __future__ import annotations

import doctest

import pytest

from palinode import progress
from palinode.progress import Pace, Silence, record


def test_rate_and_time_left_count_from_the_first_report_on():
    pace = Pace(1000)
    assert pace.rate(5.0) is None
    pace.advance(400, 10.0)  # what an interrupted call had done before
    assert pace.rate(11.0) is None
    pace.advance(50, 12.0)
    assert pace.rate(12.0) == 25.0
    assert pace.seconds_left(12.0) == 550 / 25
    assert pace.rate(14.0) == 12.5  # it slows down while nothing comes
    pace.advance(600, 15.0)
    assert pace.seconds_left(15.0) == 0


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
    class Recorder(Silence):
        def __init__(self):
            self.points = []

        def record(self, series, step, figures):
            self.points.append((series, step, dict(figures)))

    recorder = Recorder()
    record(recorder, "scales", 1, {"retain": 0.5})
    record(Silence(), "scales", 1, {"retain": 0.5})
    assert recorder.points == [("scales", 1, {"retain": 0.5})]


def test_examples_in_the_docstrings_are_right():
    assert doctest.testmod(progress).failed == 0
