"""Several processes write byte for byte what one would."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from palinode.errors import InputError, OutputError
from palinode.weights import Checkpoint, Crew, save, store
from palinode.weights.arithmetic import Settings, formula, slices
from palinode.weights.atomic import RankSide

PROGRAM = """
import sys
from palinode import ApplySettings
from palinode.methods import apply
from palinode.weights import Crew
target, base, forget, out = sys.argv[1:5]
settings = ApplySettings(dtype=sys.argv[5])
saved = apply(target, base, forget, out, forget_scale=0.7, settings=settings, crew=Crew.from_environment())
print(saved.dose.effective["forget"])
"""


def states(models, shards=2):
    """Three states of a model of a few million weights: enough slices to share out."""
    shapes = {
        "model.embed_tokens.weight": (3000, 700),
        "model.layers.0.w": (900, 700),
        "model.norm.weight": (700,),
    }
    start = {
        name: models.noise(place, *shape, scale=0.02) for place, (name, shape) in enumerate(shapes.items())
    }
    return [
        models.make(
            name,
            {
                key: (values + models.noise(7 * state, *values.shape, scale=1e-4)).bfloat16()
                for key, values in start.items()
            },
            shards=shards,
        )
        for state, name in enumerate(("target", "base", "theta_1"))
    ]


@pytest.fixture
def start():
    """Start a process of a crew; whatever still runs at the end is killed."""
    running = []

    def begin(rank, count, folders, out, *, dtype="bfloat16"):
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *(str(folder) for folder in folders), str(out), dtype],
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return running[-1]

    yield begin
    for process in running:
        with process:  # closes its pipes
            process.kill()


def finished(process):
    """What a process printed, once it has ended well."""
    printed, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints
    return printed


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_writes_the_same_files(models, start, count):
    checkpoints = states(models)
    folders = [checkpoint.folder for checkpoint in checkpoints]
    alone = float(finished(start(0, 1, folders, models.place / "alone")))
    crew = [start(rank, count, folders, models.place / "together") for rank in reversed(range(count))]
    scales = [float(finished(process)) for process in crew]
    one, many = contents(models.place / "alone"), contents(models.place / "together")
    assert one.keys() == many.keys()
    files = [name for name in one if name != "weights.json"]
    assert all(one[name] == many[name] for name in files)
    notes = [json.loads(found["weights.json"]) for found in (one, many)]
    assert notes[0]["tensors"] == notes[1]["tensors"]
    assert len(set(scales)) == 1
    assert scales[0] == pytest.approx(alone, rel=1e-9)
    assert [path.name for path in models.place.iterdir() if path.name.startswith(".")] == []


def test_work_is_shared_by_bytes(models):
    parts = list(slices(states(models)[0]))
    total = sum(part.count for part in parts)
    for count in (1, 2, 3, 5):
        shares = [store.share(parts, Crew(rank, count)) for rank in range(count)]
        assert [part for share in shares for part in share] == parts
        for share in shares:
            assert abs(sum(part.count for part in share) - total / count) <= max(part.count for part in parts)


def test_a_process_that_fails_is_named_and_nothing_is_left(models, start):
    target, base, theta_1 = states(models)
    folders = [target.folder, base.folder, theta_1.folder]
    first = start(0, 2, folders, models.place / "out")
    broken = Checkpoint.open(theta_1.folder)
    info = broken.tensors["model.norm.weight"]
    crew, out = Crew(1, 2), models.place / "out"

    def fill():
        raise InputError(f"{info.name} is broken")

    form = formula(target, (target - 0.7 * (theta_1 - base)).terms, {"forget": (base - theta_1).terms})
    job = store.plan(form, out, Settings(dtype="bfloat16"), "refuse", None)
    rank = RankSide(crew, out.with_name(".out.partial"), out, job.key())
    with pytest.raises(InputError, match="is broken"):
        rank.work(fill)
    _, complaints = first.communicate(timeout=60)
    assert first.returncode != 0
    assert "process 1 of 2 failed: model.norm.weight is broken" in complaints
    assert not out.exists()
    assert not out.with_name(".out.partial").exists()


def test_processes_with_different_commands_notice(models, start):
    folders = [checkpoint.folder for checkpoint in states(models)]
    other = start(1, 2, folders, models.place / "out", dtype="float32")
    first = start(0, 2, folders, models.place / "out")
    _, complaints = other.communicate(timeout=60)
    assert other.returncode != 0
    assert "give every process the same command" in complaints
    assert first.poll() is None, "it waits for one that does as it does"


def test_a_killed_first_process_is_noticed_and_the_next_run_works(models, start):
    folders = [checkpoint.folder for checkpoint in states(models)]
    out = models.place / "out"
    first = start(0, 3, folders, out)  # waits for two others, of which only one ever comes
    second = start(1, 3, folders, out)
    note = out.with_name(".out.partial") / ".crew"
    deadline = time.monotonic() + 60
    while not list(note.glob("report-1-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    _, complaints = second.communicate(timeout=60)
    assert "process 0 ended before" in complaints
    assert not out.exists()
    for process in [start(rank, 2, folders, out) for rank in (1, 0)]:
        finished(process)
    assert Checkpoint.open(out).parameters == Checkpoint.open(folders[0]).parameters


def test_a_process_that_falls_silent_is_given_up(models, monkeypatch):
    monkeypatch.setattr("palinode.weights.atomic.PATIENCE", 0.3)
    target, base, theta_1 = states(models)
    with pytest.raises(OutputError, match=r"nothing was heard of process 1 of 2 for 0 s; is it running\?"):
        save(target - (theta_1 - base), models.place / "out", crew=Crew(0, 2))
    with pytest.raises(OutputError, match="nothing was heard of process 0"):
        save(target - (theta_1 - base), models.place / "out", crew=Crew(1, 2))
    assert not (models.place / "out").exists()


@pytest.mark.parametrize(("rank", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_ranks_that_cannot_be_are_refused(rank, count):
    with pytest.raises(InputError, match="number them from 0"):
        Crew(rank, count)


def test_an_environment_that_makes_no_sense_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(InputError, match="not numbers"):
        Crew.from_environment()
