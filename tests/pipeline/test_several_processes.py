"""Two processes make of a run what one makes, whichever of them is killed, and however many go on.

They are started as users start them: torchrun, and the command line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from palinode.pipeline.recipe import load_recipe
from palinode.pipeline.run import unlearn
from palinode.progress import NullListener

RECIPE = """
device = "cpu"
[models]
target = "{target}"
base = "{base}"
[data]
forget = "{forget}"
retain = "{retain}"
[training]
epochs = 5
learning_rate = 3e-3
batch_size = 7
max_length = 64
save_minutes = 1e-9  # a state after every step
[scales]
trials = 2
probe_rows = 30
[evaluation]
max_rows = 20
max_new_tokens = 3
max_length = 64
[output]
folder = "{folder}/out"
"""


COMPARISON = """
device = "cpu"
tries = 1
[models]
target = "{target}"
base = "{base}"
[data]
forget = "{forget}"
retain = "{retain}"
[training]
learning_rate = 3e-3
batch_size = 7
max_length = 64
[budget]
steps = 5
[evaluation]
max_rows = 20
max_new_tokens = 3
max_length = 64
[output]
folder = "{folder}/compared"
[[contestants]]
name = "NPO"
method = "npo"
"""
POLICY = """
[budget]
preset = "quick"
max_rows = 20
max_new_tokens = 3
max_length = 64
"""


@pytest.fixture(scope="module")
def recipe_in(tiny):
    def write(folder: Path) -> Path:
        places = {name: getattr(tiny, name).folder for name in ("target", "base")}
        text = RECIPE.format(**places, forget=tiny.forget, retain=tiny.retain, folder=folder)
        (folder / "recipe.toml").write_text(text)
        return folder / "recipe.toml"

    return write


@pytest.fixture(scope="module")
def alone(recipe_in, tmp_path_factory):
    """The record of a run in one process that nobody disturbs."""
    return unlearn(load_recipe(recipe_in(tmp_path_factory.mktemp("alone")))).record


def start(*words: object, **changes: str) -> subprocess.Popen[str]:
    """Start two processes of palinode, with changes to their environment."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*launcher, "-m", "palinode", *map(str, words)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sentences(errors: str) -> list[str]:
    """What palinode said on standard error, without what torchrun says."""
    return [line for line in errors.splitlines() if line.startswith("palinode: ")]


def assert_same_figures(record, other):
    assert record["scales"]["forget"] == pytest.approx(other["scales"]["forget"], abs=1e-9)
    assert record["scores"].keys() == other["scores"].keys()
    for name, sets in record["scores"].items():
        for label, scores in sets.items():
            for metric, score in scores.items():
                wanted = other["scores"][name][label][metric]["value"]
                known = wanted if wanted is None else pytest.approx(wanted, abs=1e-5)
                assert score["value"] == known, (name, label, metric)


def words_for(verb: str, tiny, folder: Path) -> list[object]:
    """The command line of a verb for the tiny world."""
    folder.mkdir()
    if verb == "compare":
        places = {name: getattr(tiny, name).folder for name in ("target", "base")}
        text = COMPARISON.format(**places, forget=tiny.forget, retain=tiny.retain, folder=folder)
        (folder / "comparison.toml").write_text(text)
        return [verb, folder / "comparison.toml", "--json"]
    own = [verb, tiny.target.folder, "--device", "cpu", "--json"]
    if verb == "evaluate":
        return [*own, "--data", tiny.forget, "--max-rows", 20, "--max-new-tokens", 3, "--max-length", 64]
    (folder / "policy.toml").write_text(POLICY)
    rows = ["--forget", tiny.forget, "--retain", tiny.retain, "--policy", folder / "policy.toml"]
    beside = ["--against", tiny.base.folder, "--reference", "base", "--output", folder / "audit"]
    return [*own, *rows, *beside, "--attacks", "questions,relearn_forget"]


def numbers_in(content) -> list[float]:
    """All that was measured, without times and places."""
    if isinstance(content, dict):
        kept = {name: one for name, one in content.items() if name not in UNLIKE}
        return [number for name in sorted(kept) for number in numbers_in(kept[name])]
    if isinstance(content, list):
        return [number for one in content for number in numbers_in(one)]
    return [content] if isinstance(content, float) else []


UNLIKE = {"environment", "created", "finished", "seconds", "search_seconds"}


@pytest.mark.parametrize(
    "verb", ["evaluate", *(pytest.param(verb, marks=pytest.mark.slow) for verb in ("audit", "compare"))]
)
def test_other_verbs_make_the_same_of_two_processes(palinode, tiny, tmp_path, verb):
    one = palinode(*words_for(verb, tiny, tmp_path / "one"))
    run = start(*words_for(verb, tiny, tmp_path / "two"))
    out, err = run.communicate(timeout=200)
    assert sentences(err) == []
    wanted = numbers_in(json.loads(one.out))
    assert len(wanted) >= 9
    assert numbers_in(json.loads(out)) == pytest.approx(wanted, abs=1e-5)


def test_environment_that_makes_no_sense_is_one_sentence():
    for changes in ({"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "x"}):
        words = [sys.executable, "-m", "palinode", "list", "methods"]
        run = subprocess.run(words, env={**os.environ, **changes}, capture_output=True, text=True)
        assert run.returncode == 2
        (said,) = sentences(run.stderr)
        assert "RANK" in said


class Interrupting(NullListener):
    """Presses Ctrl-C in the middle of the first fine-tuning."""

    def task(self, label, total, unit):
        task = super().task(label, total, unit)
        return task if "fine-tuning" not in label else self.cut(total)

    class cut:  # noqa: N801 - a context, as a function would be
        def __init__(self, total):
            self.left = total / 2

        def __enter__(self):
            return self.advance

        def advance(self, amount):
            self.left -= amount
            if self.left < 0:
                raise KeyboardInterrupt

        def __exit__(self, *_):
            return None


@pytest.mark.parametrize("fsdp", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_two_processes_go_on_where_one_was_interrupted_and_come_to_its_figures(
    recipe_in, alone, tmp_path, fsdp
):
    recipe = recipe_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        unlearn(load_recipe(recipe), listener=Interrupting())
    assert list(tmp_path.glob("out.workspace/finetune-*/state/.metadata"))
    run = start("run", recipe, ACCELERATE_USE_FSDP=fsdp)
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    assert [line.partition(":")[0] for line in out.splitlines()].count("Strength") == 1  # one speaks
    assert sentences(err) == []
    assert_same_figures(json.loads((tmp_path / "out/record.json").read_text()), alone)


def stopped(recipe, number, rank, **changes):
    """What two processes say when one of them (None: torchrun) gets a signal while it trains."""
    run = start("run", recipe, "--quiet", **changes)
    while not list(recipe.parent.glob("out.workspace/finetune-*/state/curve.json")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    os.kill(run.pid if rank is None else process(run.pid, rank), number)
    out, err = run.communicate(timeout=100)
    assert run.returncode
    assert out == ""
    assert not (recipe.parent / "out").exists()
    (said,) = sentences(err)
    return said


def test_one_process_goes_on_where_two_were_when_one_of_them_was_killed(recipe_in, alone, tmp_path):
    said = stopped(recipe_in(tmp_path), signal.SIGKILL, 1)
    assert "the same command goes on where" in said
    assert_same_figures(unlearn(load_recipe(tmp_path / "recipe.toml")).record, alone)


def test_one_process_goes_on_where_two_with_half_the_weights_each_were_interrupted(
    recipe_in, alone, tmp_path
):
    said = stopped(recipe_in(tmp_path), signal.SIGINT, None, ACCELERATE_USE_FSDP="true")
    assert "the same command goes on where" in said
    assert_same_figures(unlearn(load_recipe(tmp_path / "recipe.toml")).record, alone)


def process(launcher: int, rank: int) -> int:
    """The process of that rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == launcher and b"\0RANK=%d\0" % rank in b"\0" + (folder / "environ").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"there is no process of rank {rank}")
