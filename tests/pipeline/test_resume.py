"""A run killed at any moment goes on where it was when the same command is given again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from palinode.pipeline.recipe import load_recipe
from palinode.pipeline.run import unlearn

RECIPE = """
device = "cpu"
[models]
target = "{target}"
base = "{base}"
[data]
forget = "{forget}"
retain = "{retain}"
[training]
epochs = 8
learning_rate = 3e-3
batch_size = 8
max_length = 64
save_minutes = 1e-9  # a state after every step, so that a kill finds one
[scales]
forget_grid = [0.25, 0.5, 1.0]
retain_grid = [0.0, 0.5]
probe_rows = 30
[evaluation]
max_rows = 40
max_new_tokens = 3
max_length = 64
[output]
folder = "{folder}/out"
"""


@pytest.fixture(scope="module")
def write_recipe(tiny):
    def write(folder: Path) -> Path:
        text = RECIPE.format(
            target=tiny.target.folder,
            base=tiny.base.folder,
            forget=tiny.forget,
            retain=tiny.retain,
            folder=folder,
        )
        (folder / "recipe.toml").write_text(text)
        return folder / "recipe.toml"

    return write


@pytest.fixture(scope="module")
def undisturbed(write_recipe, tmp_path_factory):
    """The weights and scores of a run that nobody disturbs."""
    made = unlearn(load_recipe(write_recipe(tmp_path_factory.mktemp("undisturbed"))))
    return (made.output / "model.safetensors").read_bytes(), made.record["scores"]


def start(recipe: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "palinode", "run", str(recipe), "--quiet"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(run: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """Wait until something in the folder matches; fail when the run ends before."""
    while not any(folder.glob(pattern)):
        assert run.poll() is None, run.communicate()
        time.sleep(0.001)


def finish(recipe: Path) -> tuple[bytes, dict]:
    made = unlearn(load_recipe(recipe))
    assert not made.finished_before
    return (made.output / "model.safetensors").read_bytes(), made.record["scores"]


@pytest.mark.parametrize(
    "moment",
    [
        "finetune-forget-*/state",  # in the middle of fine-tuning
        "finetune-forget-*/step.json",  # between two steps
        "moments-*/moments-000.safetensors",  # while it is measured what layers read
        "transform-least_squares-*",  # while a vector is filtered
        "scales-*/probes.json",  # in the middle of the search
        "evaluate-*/forget.jsonl",  # in the middle of an evaluation
    ],
)
def test_killed_run_finishes_with_the_weights_of_an_undisturbed_one(
    write_recipe, undisturbed, tmp_path, moment
):
    recipe = write_recipe(tmp_path)
    workspace = tmp_path / "out.workspace"
    run = start(recipe)
    wait_for(run, workspace, moment)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    finished = {path: path.stat().st_mtime_ns for path in workspace.glob("*/step.json")}
    assert finish(recipe) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # done once


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "finetune-forget-*/state"), (signal.SIGTERM, "scales-*/probes.json")],
)
def test_interrupted_run_says_so_in_one_sentence_and_goes_on_when_asked(
    write_recipe, undisturbed, tmp_path, number, moment
):
    recipe = write_recipe(tmp_path)
    run = start(recipe)
    wait_for(run, tmp_path / "out.workspace", moment)
    os.kill(run.pid, number)
    out, err = run.communicate()
    assert run.returncode == 2
    assert out == ""
    assert err == (
        "palinode: interrupted; what was finished is kept, and the same command goes on where this one "
        "stopped (secret like the rows; palinode forget-workspace OUTPUT destroys it)\n"
    )
    assert not (tmp_path / "out").exists()
    assert finish(recipe) == undisturbed
