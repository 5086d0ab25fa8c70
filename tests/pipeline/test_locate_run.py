"""The demo of a checkpoint series on a small world, and the real one against the issue's goals (slow)."""

from __future__ import annotations

import json

import pytest

from palinode.data.examples import read_examples
from palinode.data.world import invent_world
from palinode.errors import OutputError
from palinode.history.reader import ExposureReader
from palinode.pipeline.demo_run import CHECKPOINTS, Size, demo_locate, train_logged
from palinode.progress import NullListener
from palinode.report.location_report import demo_brief, demo_sentence

SMALL = Size(first_epochs=12, epochs=4, replayed=40, learning_rate=6e-3, batch_size=16, width=32, layers=2)
SETTINGS = {
    "training": {
        "epochs": 2,
        "learning_rate": 3e-3,
        "batch_size": 16,
        "max_length": 64,
        "precision": "float32",
    },
    "scales": {"forget": 0.5, "retain": 0.0},
    "evaluation": {"max_rows": 60, "max_new_tokens": 3, "batch_rows": 512, "max_length": 64},
}


@pytest.fixture(scope="module")
def small_world():
    return invent_world(3, early=3, middle=CHECKPOINTS - 1, forget=5, late=4)


def run(world, folder):
    return demo_locate(folder, world=world, seed=3, size=SMALL, settings=SETTINGS)


@pytest.fixture(scope="module")
def finished(small_world, tmp_path_factory):
    return run(small_world, tmp_path_factory.mktemp("demo") / "locate")


def test_log_and_order_agree_with_the_truth_in_every_exposure(finished):
    for request in finished.record["requests"].values():
        for kind in ("log", "order"):
            assert request["found"][kind]["every_exposure_right"]
            assert request["found"][kind]["right"]


def test_truth_is_what_was_planted(finished):
    requests = finished.record["requests"]
    # planted in stretches 5 and 9, in other words in 3 and word for word in 7, and before every checkpoint
    assert {name: request["clean_place"] for name, request in requests.items()} == {
        "main": 4,
        "copied": 2,
        "early": None,
    }
    assert requests["early"]["first"] <= 12 * 10
    assert requests["early"]["found"]["all"]["recommended_step"] is None


def test_every_checkpoint_is_tried_and_the_target_itself(finished):
    tried = finished.record["rungs"]
    assert len(tried) == CHECKPOINTS + 1
    assert [entry["method"] for entry in tried] == ["msa"] * CHECKPOINTS + ["task_vector"]
    assert [entry["seen"] > 0 for entry in tried] == [False] * 5 + [True] * 8
    for entry in tried:
        assert 0 <= entry["unlearned"]["forget"] <= 1


def test_folder_holds_page_picture_log_and_order(finished):
    for name in ("report.html", "location.svg", "record.json", "order.json", "log/log.json"):
        assert (finished.folder / name).exists()
    assert json.loads((finished.folder / "record.json").read_text()) == finished.record
    assert "of 3 requests" in demo_sentence(finished.record)
    assert [len(grid.rows) for grid in demo_brief(finished.record)[:2]] == [3, CHECKPOINTS + 2]


def test_second_call_reuses_everything(small_world, finished):
    assert run(small_world, finished.folder).record == finished.record


def test_demo_of_another_kind_or_seed_is_refused(small_world, finished, tmp_path):
    with pytest.raises(OutputError, match="holds the demo of seed 3"):
        demo_locate(finished.folder, world=small_world, seed=4, size=SMALL)
    (tmp_path / "demo.json").write_text('{"seed": 3}')
    with pytest.raises(OutputError, match="exists and is not empty"):
        run(small_world, tmp_path)


def test_training_that_was_cut_off_goes_on_with_its_log(small_world, finished, tmp_path):
    """Killed in the middle of a stretch: the log holds steps that are taken again, and they count once."""

    class KilledError(Exception):
        pass

    class Killer(NullListener):
        steps = 0

        def record(self, series, step, figures):
            self.steps += 1
            if self.steps == finished.record["requests"]["main"]["first"] + 2:
                raise KilledError

    places = tmp_path / "world", tmp_path / "log"
    with pytest.raises(KilledError):
        train_logged(small_world, *places, seed=3, size=SMALL, listener=Killer())
    models = train_logged(small_world, *places, seed=3, size=SMALL)
    whole = ExposureReader.open(finished.folder / "log")
    resumed = ExposureReader.open(tmp_path / "log")

    rows = read_examples(models.requests["main"])
    assert [(found.row, found.step) for found in resumed.find(rows)] == [
        (found.row, found.step) for found in whole.find(rows)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_real_demo_reaches_its_goals(tmp_path, seed):
    """Log and order right in every exposure, behaviour within one checkpoint, the right recommendation."""
    record = demo_locate(tmp_path / "demo", seed=seed).record
    for request in record["requests"].values():
        found = request["found"]
        assert found["log"]["every_exposure_right"]
        assert found["order"]["every_exposure_right"]
        assert found["behaviour"]["rungs_off"] <= 1
        assert found["all"]["right"]
