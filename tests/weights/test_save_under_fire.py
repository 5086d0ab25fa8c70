"""A save that is killed, runs out of disk, or reads and writes on a failing one: all or nothing is there."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from palinode.errors import CheckpointError, OutputError
from palinode.weights import kernels, save
from palinode.weights.store import check_manifest, read_manifest
from palinode.weights.vectors import save_vector

KILLED = """
import sys
from pathlib import Path
from palinode.weights import Checkpoint, save
target, base = map(Checkpoint.open, sys.argv[1:3])
print("ready", flush=True)
save(target - 0.5 * (base - target), Path(sys.argv[3]), workers=1, rounding="stochastic")
"""


@pytest.fixture
def pair(models):
    """Two states of a model whose sum takes some tenths of a second to write."""
    shapes = {f"model.layers.{i}.w": (300, 700 + i) for i in range(12)} | {"model.norm.weight": (700,)}
    return [
        models.make(
            name,
            {key: models.noise(state + len(key), *shape).bfloat16() for key, shape in shapes.items()},
            shards=3,
        )
        for state, name in enumerate(("target", "base"))
    ]


def point(pair):
    target, base = pair
    return target - 0.5 * (base - target)


def test_a_save_killed_at_any_moment_leaves_nothing_or_all(pair, models):
    started = time.monotonic()
    expected = save(point(pair), models.place / "expected", rounding="stochastic").checkpoint
    usual = 3 * (time.monotonic() - started) + 0.5
    folders, chance, found = [str(checkpoint.folder) for checkpoint in pair], random.Random(0), set()
    for attempt in range(5):
        out = models.place / f"out{attempt}"
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, *folders, str(out)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(usual * chance.random() ** 2)
            process.send_signal(signal.SIGKILL)
        found.add(out.exists())
        if out.exists():
            assert check_manifest(out).ok
        save(point(pair), out, rounding="stochastic") if not out.exists() else None
        assert contents(out) == contents(expected.folder)
        assert not out.with_name(f".out{attempt}.partial").exists()
    assert False in found, "no attempt was killed in time"


def contents(folder):
    """Every file of a model folder, byte for byte, weights.json among them."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def failing(call, number, error):
    """The same call, which fails the given time it is made."""
    made = iter(range(1, 1_000_000))

    def attempt(*args):
        if next(made) == number:
            raise OSError(error, os.strerror(error))
        return call(*args)

    return attempt


@pytest.mark.parametrize("number", [1, 2, 9, 20])
def test_a_read_error_leaves_nothing(pair, models, monkeypatch, number):
    monkeypatch.setattr(kernels, "read_rows", lambda *_: False)  # all that it says of an error
    monkeypatch.setattr(os, "preadv", failing(os.preadv, number, errno.EIO))
    with pytest.raises(CheckpointError, match=r"cannot be read at byte \d+ \(Input/output error\)"):
        save(point(pair), models.place / "out")
    assert sorted(path.name for path in models.place.iterdir()) == ["base", "target"]


def test_a_file_cut_short_while_it_is_read_leaves_nothing(pair, models, monkeypatch):
    read_rows = kernels.read_rows

    def cut_first(*arguments):
        for file in (models.place / "base").glob("*.safetensors"):
            os.truncate(file, 1000)
        return read_rows(*arguments)

    monkeypatch.setattr(kernels, "read_rows", cut_first)
    with pytest.raises(CheckpointError, match=r"ended at byte \d+; it was cut off while being read"):
        save(point(pair), models.place / "out")
    assert not (models.place / "out").exists()


@pytest.mark.parametrize("number", [4, 5, 12, 16])
def test_a_write_error_leaves_nothing(pair, models, monkeypatch, number):
    monkeypatch.setattr(os, "pwrite", failing(os.pwrite, number, errno.ENOSPC))
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); make room"):
        save(point(pair), models.place / "out")
    assert sorted(path.name for path in models.place.iterdir()) == ["base", "target"]


def test_a_disk_that_is_full_when_the_files_are_laid_out_leaves_nothing(pair, models):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(
            OutputError, match=r"model-0000.* cannot be written \(File too large\); make room"
        ):
            save(point(pair), models.place / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert sorted(path.name for path in models.place.iterdir()) == ["base", "target"]


@pytest.mark.parametrize("damage", ["flipped", "lost", "elsewhere"])
def test_what_does_not_read_as_it_was_written_is_noticed(pair, models, monkeypatch, damage):
    write = os.pwrite
    done = iter(range(1_000_000))

    def damaged(handle, data, offset):
        if next(done) != 8:
            return write(handle, data, offset)
        if damage == "lost":
            return len(data)
        if damage == "elsewhere":
            return write(handle, data, offset + 2)
        changed = bytearray(data)
        changed[-1] ^= 1
        return write(handle, changed, offset)

    monkeypatch.setattr(os, "pwrite", damaged)
    with pytest.raises(OutputError, match="does not read as it was written; is the disk sound"):
        save(point(pair), models.place / "out")
    assert sorted(path.name for path in models.place.iterdir()) == ["base", "target"]


def test_without_the_check_no_manifest_is_written(pair, models):
    save(point(pair), models.place / "out", check=False)
    assert not (models.place / "out" / "weights.json").exists()
    save(point(pair), models.place / "checked")
    assert models.same_model(models.place / "out", models.place / "checked")


def test_the_manifest_tells_what_was_done(pair, models):
    saved = save(point(pair), models.place / "out", rounding="stochastic", seed=3)
    assert check_manifest(models.place / "out").ok
    content = read_manifest(models.place / "out").content
    assert {term["model"]: term["coefficient"] for term in content["terms"]} == {"target": 1.5, "base": -0.5}
    assert content["rounding"] == {"asked": "stochastic", "used": "stochastic", "seed": 3}
    assert content["dose"]["weights"] == saved.dose.weights


def overwrite(folder):
    """Other numbers in place, the same shapes: what a copying program or a trainer does."""
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as stream:
            stream.seek(-64, os.SEEK_END)
            stream.write(bytes(64))


@pytest.mark.parametrize("name", ["target", "base"])
@pytest.mark.parametrize("kept", [False, True])
def test_an_input_that_is_overwritten_while_it_is_read_leaves_nothing(pair, models, name, kept):
    def meanwhile(_):
        for file in (models.place / name).glob("*.safetensors"):
            status = file.stat()
            overwrite(models.place / name)
            if kept:  # as a copy that keeps times would leave it
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(CheckpointError, match=rf"{name}/model.* changed while it was read; wait for"):
        save(point(pair), models.place / "out", on_progress=meanwhile)
    assert sorted(path.name for path in models.place.iterdir()) == ["base", "target"]


def test_a_config_that_changes_while_the_sum_is_written_leaves_nothing(pair, models):
    config = models.place / "target" / "config.json"
    with pytest.raises(CheckpointError, match=r"config.json changed while it was read"):
        save(point(pair), models.place / "out", on_progress=lambda _: config.write_text(config.read_text()))
    assert not (models.place / "out").exists()


@pytest.mark.parametrize("kind", ["sum", "vector"])
def test_a_tokenizer_that_comes_while_a_model_is_read_leaves_nothing(pair, models, kind):
    target, base = pair
    new, out = models.place / "base" / "tokenizer_config.json", models.place / "out"

    def meanwhile(_):
        new.write_text("{}")

    write, what = (save, point(pair)) if kind == "sum" else (save_vector, base - target)
    with pytest.raises(CheckpointError, match=r"base/tokenizer_config.json changed while it was read"):
        write(what, out, on_progress=meanwhile)
    assert not out.exists()


def test_a_vector_of_a_model_that_changes_meanwhile_is_not_stored(pair, models):
    target, base = pair
    with pytest.raises(CheckpointError, match="changed while it was read"):
        save_vector(base - target, models.place / "v", on_progress=lambda _: overwrite(base.folder))
    assert not (models.place / "v").exists()


def test_the_manifest_has_the_fingerprint_of_every_term_though_none_was_hashed_before(pair, models):
    target, base = pair
    vector = save_vector(base - target, models.place / "v")
    save(target - 0.5 * vector, models.place / "out")
    terms = read_manifest(models.place / "out").content["terms"]
    assert {term["model"]: term["fingerprint"] for term in terms} == {
        "target": target.fingerprint(),
        "v": vector.fingerprint(),
    }


@pytest.mark.parametrize(
    ("gone", "said"), [(".out.partial", "/new/.out.partial is not there"), ("", "/new is not there")]
)
def test_folders_that_are_removed_while_they_are_filled_are_named(pair, models, gone, said):
    out = models.place / "new" / "out"
    with pytest.raises(OutputError, match=rf"cannot be written: .*{said}, or was removed meanwhile"):
        save(point(pair), out, on_progress=lambda _: shutil.rmtree(out.parent / gone, ignore_errors=True))
    assert not out.exists()
    assert not (out.parent / ".out.partial").exists()


def test_a_partial_folder_that_somebody_else_made_anew_is_left_alone(pair, models):
    partial = models.place / ".out.partial"

    def replace(_):
        shutil.rmtree(partial)
        partial.mkdir()
        (partial / "precious").touch()

    with pytest.raises(OutputError, match=r"\.out\.partial"):
        save(point(pair), models.place / "out", on_progress=replace)
    assert (partial / "precious").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("lacking", ["model-00001-of-00003.safetensors", "tokenizer.json", "weights.json"])
def test_a_small_file_system_that_fills_up_is_named_and_left_empty(pair, models, lacking):
    """There is room for all that is written before this file, and for no page of it."""
    (models.place / "target" / "tokenizer.json").write_text(json.dumps({"x": "y" * 500_000}))
    whole = contents(save(point(pair), models.place / "whole").checkpoint.folder)
    order = ["model-0000", "model.safetensors.index", "config", "tokenizer", "weights"]
    last = next(place for place, name in enumerate(order) if lacking.startswith(name))
    kept = [raw for name, raw in whole.items() if name.startswith(tuple(order[:last]))]
    pages = sum(-(-len(raw) // 4096) for raw in kept)
    place = models.place / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * pages + 4}k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(OutputError, match=r"/small.*make room"):
            save(point(pair), place / "out")
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("call", ["preadv", "posix_fallocate", "sched_getaffinity"])
def test_a_system_without_a_call_of_linux_writes_the_same(pair, models, monkeypatch, call):
    save(point(pair), models.place / "linux")
    monkeypatch.delattr(os, call)
    monkeypatch.setattr(kernels, "read_rows", lambda *_: False)
    save(point(pair), models.place / "out")
    assert contents(models.place / "out") == contents(models.place / "linux")


ELSEWHERE = """
import os, sys
del os.sched_getaffinity, os.fdatasync, os.preadv, os.posix_fallocate
from palinode.history import exposures, reader
exposures.SYNC_SECONDS = -1
log = exposures.ExposureLog.open(sys.argv[1], data="d", tokenizer="t", run="r")
log.record(1, [bytes(16)])
log.close()
assert reader.WORKERS >= 1
"""


def test_an_exposure_log_needs_no_call_of_linux(tmp_path):
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path / "log")], check=True)
    assert [*(tmp_path / "log").rglob("*.parquet")]
