"""The demo, on the tiny world, and the real one against the issue's goals (slow)."""

from __future__ import annotations

import json
import shutil

import pytest

from palinode.errors import OutputError, WorkspaceError
from palinode.pipeline.demo_run import demo, exact_match
from palinode.pipeline.workspace import Workspace
from palinode.records import Outcome

SETTINGS = {
    "training": {
        "epochs": 8,
        "learning_rate": 3e-3,
        "batch_size": 16,
        "max_length": 64,
        "precision": "float32",
    },
    "scales": {"forget_grid": [0.25, 0.5, 1.0], "retain_grid": [0.0, 0.5], "probe_rows": 100},
    "evaluation": {"max_rows": 1000, "max_new_tokens": 3, "batch_rows": 512, "max_length": 64},
}


def run(world, folder):
    return demo(folder, seed=3, world=world, settings=SETTINGS, width=32, layers=2)


@pytest.fixture(scope="module")
def finished(world, tiny, tmp_path_factory):
    """The demo of the tiny world, whose models were made before; read it only."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "demo.json").write_text('{"seed": 3}')
    shutil.copytree(tiny.base.folder.parent, folder / "world")
    return run(world, folder)


def outcome(expected: str, generated: str) -> Outcome:
    return Outcome(0, "", expected, generated, (-1.0,), (True,))


def test_recall_is_the_share_of_answers_that_are_exactly_right():
    said = [("ba", "ba"), ("ba", "ba do"), ("ba", "Ba"), ("ba", "")]
    assert exact_match([outcome(*pair) for pair in said]) == 0.25


def test_record_has_the_recall_of_every_model_on_every_group(finished):
    record = json.loads((finished.folder / "record.json").read_text())
    assert record == finished.record
    assert set(record["recall"]) == {"target", "base", "unlearned", "retrained", "task_vector"}
    for groups in record["recall"].values():
        assert set(groups) == {"forget", "others", "general"}
        assert all(0 <= value <= 1 for value in groups.values())
    assert record["people"] == {"forget": 2, "others": 11}
    assert set(record["scales"]) == {"unlearned", "task_vector"}
    assert record["seed"] == 3
    assert record["version"] == 1


def test_recall_of_the_record_is_that_of_the_outcomes(finished):
    (step,) = [
        path.parent
        for path in (finished.folder / "workspace").glob("evaluate-*/step.json")
        if json.loads(path.read_text())["facts"]["model"] == "target"
    ]
    rows = [json.loads(line) for line in (step / "retain.jsonl").read_text().splitlines()]
    others = [row for row in rows if row["row"] < 165]  # eleven people, fifteen rows each
    right = sum(row["generated"] == row["expected"] for row in others)
    assert len(others) == 165
    assert finished.record["recall"]["target"]["others"] == right / 165


def test_target_knows_everyone_and_retrained_does_not_know_the_forget_people(finished):
    found = finished.record["recall"]
    assert found["target"]["others"] > 0.95
    assert found["target"]["forget"] > found["retrained"]["forget"] + 0.2
    assert found["unlearned"]["forget"] < found["target"]["forget"]


def test_unlearned_models_of_both_methods_are_there_with_their_records(finished):
    for name, method in (("unlearned", "msa"), ("task_vector", "task_vector")):
        record = json.loads((finished.folder / name / "record.json").read_text())
        assert record["recipe"]["method"] == method
        assert record["command"] == "palinode demo --seed 3"
        assert "retrained" in record["scores"]


def test_second_call_reuses_everything(world, finished):
    def stamps():
        return {
            path: path.stat().st_mtime_ns
            for path in finished.folder.rglob("*")
            if path.is_file()
            and "start" not in path.parts
            and path.suffix != ".jsonl"
            and path.name != "lock"
        }

    before = stamps()
    assert run(world, finished.folder).record == finished.record
    assert stamps() == before


def test_demo_goes_on_where_it_was(world, finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "demo")
    shutil.rmtree(tmp_path / "demo" / "task_vector")
    (tmp_path / "demo" / "record.json").unlink()
    again = run(world, tmp_path / "demo")
    assert again.record["recall"] == finished.record["recall"]


def test_demo_whose_workspace_is_gone_says_what_to_do(world, finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "demo")
    shutil.rmtree(tmp_path / "demo" / "workspace")
    (tmp_path / "demo" / "record.json").unlink()
    with pytest.raises(WorkspaceError, match="workspace is gone; remove its folder to run it anew"):
        run(world, tmp_path / "demo")


def test_folder_that_is_not_the_demos_is_refused(world, tmp_path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(OutputError, match="exists and is not empty; name another --output for the demo"):
        run(world, tmp_path)
    with pytest.raises(OutputError, match="is a file; name another --output for the demo"):
        run(world, tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_demo_of_another_seed_is_refused(world, tmp_path):
    (tmp_path / "demo.json").write_text('{"seed": 4}')
    with pytest.raises(OutputError, match="holds the demo of seed 4; name another --output for seed 3"):
        run(world, tmp_path)


@pytest.mark.parametrize("mark", ["", "{", "[]", "{}"])
def test_damaged_mark_is_one_sentence(world, tmp_path, mark):
    (tmp_path / "demo.json").write_text(mark)
    with pytest.raises(OutputError, match=r"demo\.json cannot be read \(.*\); name another --output"):
        run(world, tmp_path)


def test_second_demo_in_the_folder_is_refused(world, tmp_path):
    (tmp_path / "demo.json").write_text('{"seed": 3}')
    with (
        Workspace(tmp_path / "workspace").locked(),
        pytest.raises(WorkspaceError, match="another run is working"),
    ):
        run(world, tmp_path)


@pytest.mark.slow
def test_real_demo_reaches_its_goals(tmp_path):
    """Forgotten people within 5 points of the retrained model's recall, all others of the target's."""
    found = demo(tmp_path / "demo", seed=0).record["recall"]
    assert abs(found["unlearned"]["forget"] - found["retrained"]["forget"]) <= 0.05
    assert found["unlearned"]["others"] >= found["target"]["others"] - 0.05
