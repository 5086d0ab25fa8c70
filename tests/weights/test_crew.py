"""Several processes write byte for byte what one would."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest

from palinode import processes
from palinode.errors import InputError
from palinode.weights import Checkpoint, save_vector, store
from palinode.weights.arithmetic import Evaluator, Settings, formula, slices
from palinode.weights.tensors import Files

PROGRAM = """
import sys
from palinode import ApplySettings
from palinode.errors import InputError, PalinodeError
from palinode.methods import apply
from palinode.processes import together, world
from palinode.weights import store
target, base, forget, out, breaks = sys.argv[1:6]
share = store.share
def broken(parts, rank, count):
    if breaks == f"{rank}":
        raise InputError("a weight is broken")
    while breaks == f"{rank} never ends":
        pass
    return share(parts, rank, count)
store.share = broken
def work():
    saved = apply(target, base, forget, out, forget_scale=0.7, settings=ApplySettings(dtype="bfloat16"))
    print(saved.dose.effective["forget"])
try:
    together(work)
except PalinodeError as error:
    sys.exit(str(error))
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
    """Start so many processes; whatever still runs at the end is killed."""
    running = []

    def begin(count, folders, out, breaks="none"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        words = [sys.executable, "-c", PROGRAM, *(str(folder) for folder in folders), str(out), breaks]
        begun = [
            subprocess.Popen(
                words,
                env={**os.environ, **place, "RANK": str(rank), "WORLD_SIZE": str(count)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        running.extend(begun)
        return begun

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


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_writes_the_same_files(models, start, count):
    folders = [checkpoint.folder for checkpoint in states(models)]
    (alone,) = map(finished, start(1, folders, models.place / "alone"))
    first, *others = map(finished, start(count, folders, models.place / "together"))
    one, many = contents(models.place / "alone"), contents(models.place / "together")
    assert one.keys() == many.keys()
    files = [name for name in one if name != "weights.json"]
    assert all(one[name] == many[name] for name in files)
    notes = [json.loads(found["weights.json"]) for found in (one, many)]
    assert notes[0]["tensors"] == notes[1]["tensors"]
    assert float(first) == pytest.approx(float(alone), rel=1e-9)
    assert others == [""] * (count - 1)
    assert [path.name for path in models.place.iterdir() if path.name.startswith(".")] == []


def test_work_is_shared_by_bytes(models):
    parts = list(slices(states(models)[0]))
    total = sum(part.count for part in parts)
    for count in (1, 2, 3, 5):
        shares = [store.share(parts, rank, count) for rank in range(count)]
        assert [part for share in shares for part in share] == parts
        for share in shares:
            assert abs(sum(part.count for part in share) - total / count) <= max(part.count for part in parts)


def test_a_process_that_fails_is_named_and_nothing_is_left(models, start):
    folders, out = [checkpoint.folder for checkpoint in states(models)], models.place / "out"
    first, _ = start(2, folders, out, breaks="1")
    _, complaints = first.communicate(timeout=60)
    assert first.returncode != 0
    assert "process 1 of 2 failed: a weight is broken" in complaints
    assert not out.exists()
    assert not out.with_name(".out.partial").exists()


def test_processes_end_with_the_first_and_the_next_run_works(models, start):
    folders, out = [checkpoint.folder for checkpoint in states(models)], models.place / "out"
    first, second = start(2, folders, out, breaks="0 never ends")
    deadline = time.monotonic() + 60
    while not list(models.place.glob(".out.partial/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    second.communicate(timeout=60)
    assert not out.exists()
    for process in start(2, folders, out):
        finished(process)
    assert Checkpoint.open(out).parameters == Checkpoint.open(folders[0]).parameters


@pytest.mark.parametrize(("rank", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_ranks_that_cannot_be_are_refused(monkeypatch, rank, count):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))
    with pytest.raises(InputError, match="number them from 0"):
        processes.together(lambda: None)


def test_an_environment_that_makes_no_sense_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(InputError, match="not numbers"):
        processes.together(lambda: None)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_sum_with_a_stored_vector_can_be_sent(models, rank):
    target, base, theta_1 = states(models)
    vector = save_vector(theta_1 - base, models.place / "vector", rank=rank)
    form = formula(target, (target - 0.7 * vector).terms)
    sent = pickle.loads(cloudpickle.dumps(store.plan(form, models.place / "out", Settings(), "refuse", 1)))
    part = next(part for part in sent.parts if part.info.name == "model.layers.0.w")
    with Files() as files:
        found, expected = (
            Evaluator(one, Settings(rounding="nearest"), files).evaluate(part)[0].copy()
            for one in (sent.formula, form)
        )
    assert found.tobytes() == expected.tobytes()
