"""What holds for every benchmark: it says what it is, loads, and scores every metric or says why not."""

from __future__ import annotations

from functools import partial

import pytest

import invented_benchmarks as invented
from palinode.benchmarks import BENCHMARKS
from palinode.errors import DataError, RecipeError
from palinode.evaluation.benchmark import Places
from palinode.evaluation.evaluate import evaluate_benchmark
from palinode.settings import EvaluationSettings

FOLDERS = {
    "tofu": partial(invented.tofu_folder, holdout=True),
    "restor": partial(invented.restor_folder, options=True),
    "muse": invented.muse_folder,
    "rwku": invented.rwku_folder,
    "lume": invented.lume_folder,
    "pistol": invented.pistol_folder,
    "hubble": invented.hubble_folder,
}
"""An invented folder of each benchmark that reads one."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    known = {name: Places(str(make(folder / name))) for name, make in FOLDERS.items()}
    return known | {"own": Places(**invented.own_files(folder / "own"))}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_says_what_it_is(name):
    benchmark = BENCHMARKS[name]
    assert benchmark.name == name
    for text in (benchmark.description, benchmark.source, *benchmark.splits.values()):
        assert text
        assert "\n" not in text
    for cell in benchmark.cells:
        assert cell.description
        assert "\n" not in cell.description
    places_in_table = [(cell.set, cell.metric) for cell in benchmark.cells]
    assert len(set(places_in_table)) == len(places_in_table)
    for option in benchmark.options:
        assert option.description
        assert not option.choices or option.default in option.choices


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_set_that_a_metric_needs_is_there_or_told_missing(name, places):
    benchmark = BENCHMARKS[name]
    loaded = benchmark.load(places[name], benchmark.check_split(None), benchmark.check_options({}))
    known = {questions.name for questions in loaded.sets} | set(loaded.missing)
    assert {name for cell in benchmark.cells for name in cell.sets} == known
    for questions in loaded.sets:
        assert len(questions.questions) > 0
        assert len(questions.groups) in (0, len(questions.questions))
        assert len(questions.shown) in (0, len(questions.questions))
    assert sum(table.rows for table in loaded.tables) > 0
    assert all(len(table.sha256) == 64 for table in loaded.tables)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_metric_has_a_value_when_everything_it_needs_is_there(name, places, tiny):
    settings = EvaluationSettings(
        metrics=("every",),
        against=str(tiny.retrained.folder),
        judge="overlap",
        max_rows=6,
        max_new_tokens=3,
        device="cpu",
    )
    found = evaluate_benchmark(str(tiny.target.folder), BENCHMARKS[name], places[name], settings)
    without = {
        (cell.set, cell.metric): found.scores[cell.set][cell.metric].reason
        for cell in BENCHMARKS[name].cells
        if found.scores[cell.set][cell.metric].value is None
    }
    assert without == {}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_metric_that_lacks_something_says_what(name, places, tiny):
    settings = EvaluationSettings(metrics=("every",), max_rows=2, max_new_tokens=3, device="cpu")
    found = evaluate_benchmark(str(tiny.target.folder), BENCHMARKS[name], places[name], settings)
    for cell in BENCHMARKS[name].cells:
        score = found.scores[cell.set][cell.metric]
        if cell.reference:
            assert score.value is None
            assert "not computed, because there is no retrained model" in score.reason
        elif cell.judge:
            assert score.value is None
            assert score.reason == "not computed, because there is no judge; name one with --judge"
        else:
            assert score.value is not None


@pytest.mark.parametrize("name", BENCHMARKS)
def test_unknown_split_option_and_metric_are_refused(name):
    benchmark = BENCHMARKS[name]
    with pytest.raises(RecipeError, match="no split 'nonsense'; it has "):
        benchmark.check_split("nonsense")
    with pytest.raises(RecipeError, match="no option 'nonsense'"):
        benchmark.check_options({"nonsense": "1"})
    with pytest.raises(RecipeError, match="no metric 'nonsense'; it has "):
        benchmark.check_metrics(["nonsense"])


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_without_its_files_is_refused(name, tmp_path):
    benchmark = BENCHMARKS[name]
    with pytest.raises(DataError, match=r"holds no|facts\.json"):
        benchmark.load(Places(str(tmp_path)), benchmark.check_split(None), benchmark.check_options({}))
    with pytest.raises(DataError, match="not a folder"):
        benchmark.load(
            Places(str(tmp_path / "none")), benchmark.check_split(None), benchmark.check_options({})
        )
