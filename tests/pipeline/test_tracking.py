"""Curves in trackers: the points that training and search made, where they belong, and no harm to the run."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from accelerate import tracking as accelerate_tracking
from accelerate.tracking import GeneralTracker

from palinode.errors import RecipeError
from palinode.pipeline.run import unlearn
from palinode.pipeline.tracking import TRACKERS, check_trackers, is_installed, tracked
from palinode.progress import NullListener, record

SILENT = NullListener()


class Lines(GeneralTracker):
    """A tracker that a user might register: one line of JSON a point."""

    name = "lines"
    requires_logging_directory = True

    def __init__(self, run_name, logging_dir, **_):
        super().__init__()
        self.path = Path(logging_dir) / f"{run_name}.jsonl"

    @property
    def tracker(self):
        return self.path

    def start(self):
        self.path.write_text("")

    def store_init_configuration(self, values):
        self._write({"settings": values})

    def log(self, values, step=None, **_):
        self._write({"step": step, **values})

    def finish(self):
        self._write({"finished": True})

    def _write(self, entry):
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


class Full(Lines):
    """A tracker whose disk is full after its first point."""

    name = "full"

    def log(self, values, step=None, **_):
        if step > 1:
            raise OSError("no space left")
        super().log(values, step)


@pytest.fixture
def registered(monkeypatch):
    """Both trackers, known to accelerate while the test runs."""
    for kind in (Lines, Full):
        monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, kind.name, kind)


class Ear(NullListener):
    """A listener that remembers what it was told."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars_in(folder):
    """Tag → [(step, value)] of all event files in a folder: records of length, CRC, Event message, CRC."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for path in sorted(folder.glob("events.out.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
            place += length + 16
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_a_run_leaves_its_curves_and_its_search_in_both_trackers(recipe_of, tmp_path, registered):
    pytest.importorskip("tensorboardX")
    recipe = recipe_of(
        tmp_path / "out", tracker="lines, tensorboard", training={"epochs": 2}, data={"retain": None}
    )
    done = unlearn(recipe)
    workspace = tmp_path / "out.workspace"
    (step,) = workspace.glob("finetune-forget-*")
    curve = json.loads((step / "model" / "training.json").read_text())

    first, *points, last = lines_of(workspace / "tracking" / "out.jsonl")
    assert first["settings"]["training.epochs"] == 2
    assert not any(key.startswith(("models", "data", "output")) for key in first["settings"])
    assert last == {"finished": True}
    trained = [point for point in points if "fine-tuning-forget/loss" in point]
    assert [point["step"] for point in trained] == [1, 2, 3, 4]
    for name, field in {
        "loss": "loss",
        "learning_rate": "learning_rate",
        "gradient_norm": "grad_norm",
    }.items():
        told = [point[f"fine-tuning-forget/{name}"] for point in trained]
        assert told == [point[field] for point in curve]
    tried = [point for point in points if "scales/forget_scale" in point]
    assert len(tried) == len(done.record["scales"]["points"]) > 0
    assert [point["step"] for point in tried] == [*range(1, len(tried) + 1)]

    drawn = scalars_in(workspace / "tracking" / "out")
    assert drawn["fine-tuning-forget/loss"] == [
        (point["step"] + 1, pytest.approx(point["loss"], rel=1e-6)) for point in curve
    ]
    assert len(drawn["scales/forget_scale"]) == len(tried)


def test_a_tracker_decides_nothing_of_the_result(recipe_of, tmp_path, registered):
    changes = {"training": {"epochs": 1}, "scales": {"forget": 0.5, "retain": 0.0}}
    plain = unlearn(recipe_of(tmp_path / "out", **changes))
    again = unlearn(recipe_of(tmp_path / "out", tracker="lines", **changes))
    assert again.finished_before
    assert again.record["run"] == plain.record["run"]


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path, registered):
    ear = Ear()
    with tracked(ear, "full,lines", folder=tmp_path, run="both", settings={}, cpu=True) as listener:
        (tmp_path / "both.jsonl").write_text("")
        for step in (1, 2, 3):
            record(listener, "fine-tuning forget", step, {"loss": float(step), "broken": float("nan")})
    assert ear.lines == ["Nothing more is tracked with full: no space left"]
    steps = [entry["step"] for entry in lines_of(tmp_path / "both.jsonl") if "step" in entry]
    assert steps == [1, 1, 2, 3]
    assert all("fine-tuning-forget/broken" not in entry for entry in lines_of(tmp_path / "both.jsonl"))


def test_without_trackers_the_listener_itself_is_given(tmp_path):
    with tracked(SILENT, None, folder=tmp_path / "t", run="x", settings={}, cpu=True) as listener:
        assert listener is SILENT
    assert not (tmp_path / "t").exists()


def test_trackers_that_cannot_be_used_are_refused_before_any_work(recipe_of, tmp_path):
    with pytest.raises(
        RecipeError, match=r"no tracker 'tensorbord'; there are .*; did you mean 'tensorboard'"
    ):
        unlearn(recipe_of(tmp_path / "out", tracker="tensorbord"))
    missing = [name for name in TRACKERS if not is_installed(name)]
    for name in missing[:1]:
        with pytest.raises(
            RecipeError, match=f"not installed; pip install {TRACKERS[name]['libraries'][0]}, or leave"
        ):
            check_trackers(name)
    assert not (tmp_path / "out.workspace").exists()
