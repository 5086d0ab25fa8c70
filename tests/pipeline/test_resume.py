"""A run killed at any moment goes on where it was when the same command is given again."""

from __future__ import annotations

import signal
import subprocess
import sys
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
epochs = 4
learning_rate = 3e-3
batch_size = 8
max_length = 64
save_minutes = 1e-9  # a state after every step, so that a kill finds one
[scales]
forget_grid = [0.25, 0.5, 1.0]
retain_grid = [0.0, 0.5]
trials = 3
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


SIGNALLED = """
import fnmatch, os, sys
from palinode.cli import main

number, pattern, seen = int(sys.argv.pop(1)), sys.argv.pop(1), []

def notice(event, facts):
    if len(seen) == 1:  # the event after: what was waited for is there
        seen.append(event)
        os.kill(os.getpid(), number)
    elif not seen and any(fnmatch.fnmatch(str(fact), pattern) for fact in facts):
        seen.append(event)

sys.addaudithook(notice)
main()
"""
"""A run that sends itself a signal as soon as something is made whose path matches."""


def signalled(recipe: Path, number: int, pattern: str) -> subprocess.CompletedProcess[str]:
    words = [str(int(number)), f"*/{pattern}", "run", str(recipe), "--quiet"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        command = [sys.executable, "-c", SIGNALLED, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(recipe: Path) -> tuple[bytes, dict]:
    made = unlearn(load_recipe(recipe))
    assert not made.finished_before
    return (made.output / "model.safetensors").read_bytes(), made.record["scores"]


@pytest.mark.parametrize(
    "moment",
    [
        "finetune-forget-*/state",  # in the middle of fine-tuning
        "finetune-forget-*/step.json",  # between two steps
        "moments-*",  # while it is measured what layers read
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
    run = signalled(recipe, signal.SIGKILL, moment)
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
    run = signalled(recipe, number, moment)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == (
        "palinode: interrupted; what was finished is kept, and the same command goes on where this one "
        "stopped (secret like the rows; palinode forget-workspace OUTPUT destroys it)\n"
    )
    assert not (tmp_path / "out").exists()
    assert finish(recipe) == undisturbed
