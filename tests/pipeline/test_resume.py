"""A run killed at any moment goes on where it was when the same command is given again."""

from __future__ import annotations

import json
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
import fnmatch, json, os, signal, sys
import palinode.pipeline.run
from palinode.cli import main

def notice(event, facts):
    if len(seen) == 1:  # the event after: what was waited for is there
        seen.append(event)
        os.kill(os.getpid(), number)
    elif not seen and any(fnmatch.fnmatch(str(fact), pattern) for fact in facts):
        seen.append(event)

for line in sys.stdin:
    number, pattern, words, *places = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for place, stream in zip(places, (1, 2), strict=True):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    seen, sys.argv = [], ["palinode", *words]
    sys.addaudithook(notice)
    main()
"""
"""Runs that send themselves a signal as soon as something is made whose path matches, each in a process of
its own, forked from one that has imported everything once."""


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-c", SIGNALLED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def signalled(server: subprocess.Popen[str], recipe: Path, number: int, pattern: str) -> tuple[int, str, str]:
    """Return a run's exit code and what it says on stdout and stderr."""
    places = [recipe.with_suffix(suffix) for suffix in (".stdout", ".stderr")]
    asked = [int(number), f"*/{pattern}", ["run", str(recipe), "--quiet"], *map(str, places)]
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    code = int(server.stdout.readline())
    return code, *(place.read_text() for place in places)


def finish(recipe: Path) -> tuple[bytes, dict]:
    made = unlearn(load_recipe(recipe))
    assert not made.finished_before
    return (made.output / "model.safetensors").read_bytes(), made.record["scores"]


@pytest.mark.parametrize(
    "moment",
    [
        "finetune-forget-*/state",  # in the middle of fine-tuning
        "finetune-forget-*/step.json",  # between two steps
        pytest.param("moments-*", marks=pytest.mark.slow),  # while it is measured what layers read
        "transform-least_squares-*",  # while a vector is filtered
        "scales-*/probes.json",  # in the middle of the search
        pytest.param("evaluate-*/forget.jsonl", marks=pytest.mark.slow),  # in the middle of an evaluation
    ],
)
def test_killed_run_finishes_with_the_weights_of_an_undisturbed_one(
    write_recipe, undisturbed, server, tmp_path, moment
):
    recipe = write_recipe(tmp_path)
    workspace = tmp_path / "out.workspace"
    code, *_ = signalled(server, recipe, signal.SIGKILL, moment)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    finished = {path: path.stat().st_mtime_ns for path in workspace.glob("*/step.json")}
    assert finish(recipe) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # done once


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "finetune-forget-*/state"), (signal.SIGTERM, "scales-*/probes.json")],
)
def test_interrupted_run_says_so_in_one_sentence_and_goes_on_when_asked(
    write_recipe, undisturbed, server, tmp_path, number, moment
):
    recipe = write_recipe(tmp_path)
    code, said, complained = signalled(server, recipe, number, moment)
    assert code == 2
    assert said == ""
    assert complained == (
        "palinode: interrupted; what was finished is kept, and the same command goes on where this one "
        "stopped (secret like the rows; palinode forget-workspace OUTPUT destroys it)\n"
    )
    assert not (tmp_path / "out").exists()
    assert finish(recipe) == undisturbed
