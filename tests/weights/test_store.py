"""Writing a model folder: all of it under its name, or nothing; and never over anything else."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from palinode.errors import CheckpointError, OutputError, PalinodeError
from palinode.records import beside
from palinode.weights import Checkpoint, check_output, save
from palinode.weights.arithmetic import Slice, map_slices


@pytest.fixture
def point(four):
    target, base, theta_1, _ = four
    return target - 0.5 * (theta_1 - base)


@pytest.fixture
def out(models):
    """An output folder in a place of its own."""
    return models.place / "outputs" / "out"


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def open_files():
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the folder changes while it is listed


class Stop(Exception):  # noqa: N818 - a stand-in for any failure
    pass


def stop(_):
    raise Stop


# All or nothing


def test_a_finished_save_leaves_only_the_model(point, out):
    point.save(out)
    assert names(out.parent) == ["out"]
    assert names(out) == ["config.json", "model.safetensors", "weights.json"]


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_in_the_middle_leaves_no_output_and_no_leftovers(point, out, error):
    def fail(_):
        assert names(out.parent) == [".out.partial"]
        raise error

    with pytest.raises(error):
        save(point, out, on_progress=fail)
    assert names(out.parent) == []


def test_an_error_leaves_threads_and_files_as_they_were(point, out):
    threads, files, running = torch.get_num_threads(), open_files(), threading.active_count()
    with pytest.raises(Stop):
        save(point, out, on_progress=stop)
    (next(iter(point.terms)).folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        save(point, out)
    assert (torch.get_num_threads(), open_files(), threading.active_count()) == (threads, files, running)


def test_a_save_leaves_threads_and_files_as_they_were(point, out):
    threads, files, running = torch.get_num_threads(), open_files(), threading.active_count()
    point.save(out)
    assert (torch.get_num_threads(), open_files(), threading.active_count()) == (threads, files, running)
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [threads], "a new thread finds torch as it was"


def test_files_that_cannot_be_laid_out_are_all_closed_and_removed(models, out):
    target = models.make("target", {"a": torch.ones(2), "b": torch.ones(60_000)}, shards=2)
    files, limits = open_files(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the first is open by then
    try:
        with pytest.raises(OutputError, match=r"00002-of-00002.safetensors cannot be written \(File too"):
            save(target, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (open_files(), names(out.parent)) == (files, [])


@pytest.mark.parametrize("name", ["o" * 250, "o" * 255, "ö" * 127])
def test_an_output_may_have_as_long_a_name_as_the_file_system_takes(models, point, name):
    point.save(models.place / "here" / name)
    assert names(models.place / "here") == [name]


def test_longer_names_than_that_are_one_sentence(models, point):
    with pytest.raises(OutputError, match=r"cannot be used .File name too long.; choose another output"):
        point.save(models.place / ("o" * 256))


def test_two_long_names_have_neighbours_of_their_own(models):
    first, second = (beside(models.place / f"{'o' * 250}{end}") for end in "ab")
    assert first != second
    assert max(len(path.name) for path in (first, second)) == 255


def test_an_interrupt_from_the_keyboard_stops_a_save(point, out):
    with pytest.raises(KeyboardInterrupt):
        save(point, out, on_progress=lambda _: signal.raise_signal(signal.SIGINT))
    assert names(out.parent) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from palinode.weights import Checkpoint, save
target, base = map(Checkpoint.open, sys.argv[1:3])
def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)
save(target - 0.5 * (base - target), Path(sys.argv[3]), on_progress=kill)
"""


def test_a_killed_save_leaves_nothing_under_the_final_name_and_the_next_one_works(models, four, out):
    target, base, *_ = four
    call = [sys.executable, "-c", KILLED, str(target.folder), str(base.folder), str(out)]
    killed = subprocess.run(call, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert names(out.parent) == [".out.partial"]
    with pytest.raises(CheckpointError):
        Checkpoint.open(out.with_name(".out.partial"))
    (target - 0.5 * (base - target)).save(out)
    assert names(out.parent) == ["out"]
    (target - 0.5 * (base - target)).save(models.place / "again")
    assert models.same_model(out, models.place / "again")


def test_leftovers_of_any_kind_are_cleared_away(point, out):
    partial = out.with_name(".out.partial")
    (partial / "additional_chat_templates").mkdir(parents=True)
    (partial / "additional_chat_templates" / "old.jinja").write_text("x")
    (partial / "model-00001-of-00002.safetensors").write_text("x")
    (partial / "link").symlink_to(out.parent)
    point.save(out)
    assert names(out) == ["config.json", "model.safetensors", "weights.json"]


def test_two_saves_to_one_place_do_not_mix(models, point, four, out):
    def meanwhile(_):
        with pytest.raises(OutputError, match=r"another run is writing .*out"):
            save(four[1], out)

    save(point, out, on_progress=meanwhile)
    point.save(models.place / "again")
    assert models.same_model(out, models.place / "again")


def test_an_output_that_appears_meanwhile_is_not_overwritten(point, out):
    def appear(_):
        out.mkdir(exist_ok=True)
        (out / "precious").touch()

    with pytest.raises(OutputError, match="was taken while it was written"):
        save(point, out, on_progress=appear)
    assert names(out) == ["precious"]
    assert names(out.parent) == ["out"]


def test_a_link_in_the_neighbours_place_is_not_followed(models, point, out):
    precious = models.write("precious", {"w": torch.ones(1)})
    out.parent.mkdir()
    out.with_name(".out.partial").symlink_to(precious)
    with pytest.raises(OutputError, match="cannot be made"):
        point.save(out)
    assert names(precious) == ["config.json", "model.safetensors"]


# Places to write to


def test_an_empty_folder_gives_way(point, out):
    out.mkdir(parents=True)
    point.save(out)
    assert names(out) == ["config.json", "model.safetensors", "weights.json"]


def test_an_output_that_is_not_empty_is_kept(point, out):
    out.mkdir(parents=True)
    (out / "precious").touch()
    with pytest.raises(OutputError, match="exists and is not empty; choose another"):
        point.save(out)
    assert names(out) == ["precious"]


def test_a_file_in_the_outputs_place_is_kept(point, models):
    (models.place / "out").write_text("precious")
    with pytest.raises(OutputError, match="exists and is not empty"):
        point.save(models.place / "out")
    assert (models.place / "out").read_text() == "precious"


def test_a_file_above_the_output_is_kept(point, models):
    (models.place / "file").write_text("precious")
    with pytest.raises(OutputError, match="file cannot be written to"):
        point.save(models.place / "file" / "deeper" / "out")


@pytest.mark.parametrize(
    "place", ["target", "theta_1", "target/inside", "base/deep/inside", "link/inside", "."]
)
def test_an_output_inside_an_input_or_around_it_is_refused(point, models, place):
    (models.place / "link").symlink_to(models.place / "theta_1")
    before = sorted(models.place.rglob("*"))
    with pytest.raises(OutputError, match=r"lie inside one another|is not empty"):
        point.save(models.place / place)
    assert sorted(models.place.rglob("*")) == before


def test_an_output_around_an_input_is_refused_even_when_only_the_dose_reads_it(models, four):
    target, base, theta_1, theta_2 = four
    with pytest.raises(OutputError, match="lie inside one another"):
        (target - (theta_1 - base)).save(theta_2.folder / "out", along={"retain": theta_2 - base})


def test_too_little_disk_is_said_before_anything_is_written(point, out, monkeypatch):
    # The disk is the operating system's, and the one thing here that a test cannot fill.
    usage = shutil.disk_usage(out.parent.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"1\.0 kB free where [0-9.]+ [kM]B are needed; make room"):
        point.save(out)
    assert names(out.parent) == []
    check_output(out, [], needs=1000)
    with pytest.raises(OutputError):
        check_output(out, [], needs=1001)


def test_leftovers_of_a_killed_save_do_not_count_as_used_disk(point, out, monkeypatch):
    usage = shutil.disk_usage(out.parent.parent)
    partial = out.with_name(".out.partial")
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(bytes(10_000))

    def free(_):
        return usage._replace(free=1000 if (partial / "model.safetensors").exists() else 10_000)

    monkeypatch.setattr(shutil, "disk_usage", free)
    point.save(out)


@pytest.mark.parametrize("name", [".", "./", "~/out", "new/../out", "out/"])
def test_outputs_may_be_named_from_here_or_from_home(point, models, monkeypatch, name):
    here = models.place / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    saved = point.save(name)
    assert saved.checkpoint.folder == here / ("." if name.startswith("./") or name == "." else "out")
    assert names(saved.checkpoint.folder) == ["config.json", "model.safetensors", "weights.json"]


def test_a_link_to_an_empty_folder_is_followed(point, models):
    (models.place / "elsewhere").mkdir()
    (models.place / "out").symlink_to(models.place / "elsewhere")
    point.save(models.place / "out")
    assert names(models.place / "elsewhere") == ["config.json", "model.safetensors", "weights.json"]
    assert (models.place / "out").is_symlink()


# Threads


PARTS = [Slice(None, start, 1) for start in range(3000)]


def test_results_come_in_order_from_any_number_of_threads():
    for workers in (1, 2, 7):
        found, heard = [], []
        map_slices(
            PARTS,
            lambda: lambda part: part.start,
            collect=lambda _, start, found=found: found.append(start),
            workers=workers,
            on_progress=heard.append,
        )
        assert found == list(range(3000))
        assert heard == [1] * 3000


def test_the_first_error_stops_the_rest():
    done = []

    def work(part):
        if part.start == 5:
            raise Stop
        done.append(part.start)

    with pytest.raises(Stop):
        map_slices(PARTS, lambda: work, workers=1)
    assert len(done) < 3000 / 2


def test_an_interrupt_stops_the_rest_and_waits_for_what_is_under_way():
    begun, ended, running = [], [], threading.active_count()

    def work(part):
        begun.append(part.start)
        time.sleep(0.001)
        ended.append(part.start)
        return part.start

    def collect(_, number):
        if number == 20:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        map_slices(PARTS, lambda: work, collect=collect, workers=2)
    assert sorted(begun) == sorted(ended)
    assert len(begun) < 100
    assert threading.active_count() == running


def test_saves_and_errors_in_several_threads_do_not_disturb_one_another(models, four):
    target, base, theta_1, _ = four
    point = target - 0.5 * (theta_1 - base)
    failures = []

    def run(number):
        try:
            save(point, models.place / f"out{number}", on_progress=stop if number % 2 else None)
        except Stop:
            failures.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(failures) == [1, 3, 5]
    assert all(models.same_model(models.place / f"out{i}", models.place / "out0") for i in (2, 4))


def test_every_error_here_is_a_users_error():
    assert issubclass(OutputError, PalinodeError)
