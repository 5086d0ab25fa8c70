"""What runs leave behind is their owner's alone under any umask: every file of every verb is looked at."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from comparing import Heard, tiny_comparison
from invented_benchmarks import own_files
from palinode.benchmarks import BENCHMARKS
from palinode.compare.comparing import compare
from palinode.compare.comparison_recipe import build_comparison
from palinode.data.examples import read_examples
from palinode.errors import InputError, OutputError, WorkspaceError
from palinode.evaluation.benchmark import Places
from palinode.evaluation.evaluate import evaluate, evaluate_benchmark
from palinode.evaluation.judging import DecisionCache
from palinode.jobs import finetune_file
from palinode.pipeline.audit_run import AuditPlan, audit
from palinode.pipeline.demo_run import demo
from palinode.pipeline.forgetting import describe_leftovers, leftovers
from palinode.pipeline.reporting import gather, write_reports
from palinode.pipeline.run import unlearn
from palinode.pipeline.workspace import Workspace
from palinode.records import beside, cache_folder, private, share, workspace_beside, write_text
from palinode.settings import AuditSettings, EvaluationSettings, TrainingSettings
from palinode.training.finetune import finetune
from palinode.weights import save_vector
from palinode.weights.fingerprints import tensor_digests

TRAINING = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 16, "max_length": 64, "precision": "float32"}
TRACKER = "tensorboard" if find_spec("tensorboardX") else None
MSA = {"name": "MSA", "method": "msa", "set": {"scales.forget": 1.0, "scales.retain": 0.0}}
NPO = {"name": "NPO", "method": "npo"}


@pytest.fixture(scope="module")
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def left(tiny, world, recipe_of, usual_umask, tmp_path_factory):
    """The folder in which every verb that writes has written something, under the umask 022."""
    home = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALINODE_CACHE", str(home / "caches" / "palinode"))
        patch.setattr("palinode.weights.fingerprints.SETTLED", 0)
        sections = {"training": TRAINING, "scales": {"forget_grid": [1.0], "retain_grid": [0.5]}}
        unlearn(recipe_of(home / "out", tracker=TRACKER, transforms=[{"name": "projection"}], **sections))
        write_reports(gather(home / "out"), home / "own-report.html")
        contents = tiny_comparison(
            tiny, home / "compared", tries=1, budget={"steps": 2}, contestants=[MSA, NPO]
        )
        compare(build_comparison(contents))
        run_audit(tiny, home / "audited")
        target = str(tiny.target.folder)
        own = Places(**own_files(tmp_path_factory.mktemp("rows")))
        evaluate_benchmark(target, BENCHMARKS["own"], own, measuring(home), listener=Heard())
        asked = EvaluationSettings(max_new_tokens=3, device="cpu", output=home / "answers.jsonl")
        evaluate(target, tiny.forget, asked)
        finetune_file(target, str(tiny.forget), home / "theta_1", TRAINING, device="cpu")
        lora = {**TRAINING, "lora": {"rank": 2}}
        finetune_file(target, str(tiny.forget), home / "adapter", lora, device="cpu")
        save_vector(tiny.target - tiny.base, home / "vector")
        demo(home / "demo", seed=3, world=world, settings=DEMO, width=16, layers=1, stages=short_stages())
        tensor_digests(tiny.base)
        DecisionCache(home / "caches" / "palinode" / "judge").put("ab" * 32, (0,), judge="somebody")
    return home


DEMO = {
    "training": TRAINING,
    "scales": {"forget": 1.0, "retain": 0.0},
    "evaluation": {"max_rows": 20, "max_new_tokens": 3, "max_length": 64},
}


def short_stages():
    from palinode.benchmarks.demo import DemoStage

    return [DemoStage(1, 1e-3)] * 3


def measuring(home: Path) -> EvaluationSettings:
    return EvaluationSettings(
        max_new_tokens=3,
        device="cpu",
        judge="overlap",
        output=home / "measured",
        open_unlearning=home / "log.json",
    )


def run_audit(tiny, output: Path) -> None:
    from palinode.audit.material import read_material
    from palinode.audit.policy import load_policy

    rules = output.with_name("policy.toml")
    rules.write_text("[budget]\npreset = 'quick'\nmax_new_tokens = 4\nmax_length = 64\n")
    policy = load_policy(rules, preset=None)
    rules.unlink()
    material = read_material(str(tiny.forget), max_rows=10)
    folder = str(tiny.target.folder)
    plan = AuditPlan(
        models={"audited": folder, "reference": str(tiny.base.folder)},
        kind="base",
        material=material,
        locations={},
        policy=policy,
        settings=AuditSettings(attacks=["questions"], device="cpu"),
    )
    audit(plan, output)


def open_to_others(*places: Path) -> list[str]:
    """Return what others could read, with its mode, and everything that is not there."""
    found = []
    for place in places:
        assert place.exists(), place
        for path in (place, *place.rglob("*")):
            mode = stat.S_IMODE(path.lstat().st_mode)
            if mode != (0o700 if path.is_dir() else 0o600):
                found.append(f"{mode:o} {path}")
    return found


PRIVATE = (
    "out.workspace",
    "own-report.html",
    "own-report.md",
    "own-report.json",
    "compared.workspace",
    "audited/results",
    "measured",
    "log.json",
    "answers.jsonl",
    "theta_1",
    "adapter",
    "vector",
    "demo/workspace",
    "demo/world",
    "demo/report.html",
    "caches",
)
SHOWN = ("out", "compared", "demo/unlearned", "demo/task_vector")


@pytest.mark.parametrize("name", PRIVATE)
def test_what_holds_rows_is_closed_to_others(left, name):
    assert open_to_others(left / name) == []


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_made_to_be_shown_follows_the_umask(left, name):
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in (left / name).rglob("*")}
    assert modes <= {(True, 0o755), (False, 0o644)}
    assert (False, 0o644) in modes
    assert stat.S_IMODE((left / name).stat().st_mode) == 0o755


def test_record_of_an_audit_follows_the_umask(left):
    for name in ("audit.json", "audit.md", "report.html"):
        assert stat.S_IMODE((left / "audited" / name).stat().st_mode) == 0o644


def test_every_place_that_a_verb_wrote_is_named_here(left):
    known = {name.split("/")[0] for name in (*PRIVATE, *SHOWN, "audited")}
    assert {path.name for path in left.iterdir()} == known


def test_umask_of_the_process_is_its_own_again(left):
    before = os.umask(0o022)
    assert before == 0o022


# The mechanism


def test_private_holds_until_the_last_of_several_threads_has_left(usual_umask, tmp_path):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with private():
            inside.set()
            leave.wait(5)

    thread = threading.Thread(target=other)
    with private():
        thread.start()
        inside.wait(5)
    (tmp_path / "while").write_text("")
    leave.set()
    thread.join()
    (tmp_path / "after").write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("while", "after")]
    assert modes == [0o600, 0o644]


def test_text_that_is_written_again_is_no_wider_than_it_was(usual_umask, tmp_path):
    place = tmp_path / "text"
    write_text(place, "one")
    assert stat.S_IMODE(place.stat().st_mode) == 0o644
    place.chmod(0o600)
    write_text(place, "two")
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    (tmp_path / ".text.partial").write_text("left by a killed run")
    write_text(place, "three")
    assert stat.S_IMODE(place.stat().st_mode) == 0o600


def test_sharing_gives_what_the_umask_gives_and_nothing_while_it_is_private(usual_umask, tmp_path):
    (tmp_path / "a").mkdir()
    with private():
        (tmp_path / "a" / "b").write_text("")
        share(tmp_path / "a")
        assert open_to_others(tmp_path / "a") == []
    share(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o644


def test_cache_folder_of_an_older_version_is_closed_and_what_is_above_it_left(usual_umask, tmp_path):
    (tmp_path / "judge").mkdir()
    DecisionCache(tmp_path / "judge")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path, tmp_path / "judge")]
    assert modes == [stat.S_IMODE(tmp_path.stat().st_mode), 0o700]
    tmp_path.chmod(0o755)
    DecisionCache(tmp_path / "judge").put("cd" * 32, (1,), judge="somebody")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert open_to_others(tmp_path / "judge") == []


def test_workspace_of_an_older_version_is_closed_with_a_note(usual_umask, tmp_path):
    step = tmp_path / "ws" / "finetune-forget-0123456789ab"
    step.mkdir(parents=True)
    (tmp_path / "ws" / "lock").touch()
    (step / "model.safetensors").write_text("θ_1")
    (tmp_path / "outside").write_text("")
    (step / "link").symlink_to(tmp_path / "outside")
    heard = Heard()
    with Workspace(tmp_path / "ws").locked(heard):
        shutil.copy(tmp_path / "outside", step / "copy")  # with its mode, as some library might
        assert heard.labels == [
            f"{tmp_path / 'ws'} was open to other users of this machine; it is closed to them now."
        ]
    assert stat.S_IMODE((step / "copy").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "outside").stat().st_mode) == 0o644
    (step / "link").unlink()
    assert open_to_others(tmp_path / "ws") == []
    with Workspace(tmp_path / "ws").locked(heard):
        assert len(heard.labels) == 1


def test_file_system_without_modes_is_told(usual_umask, tmp_path, monkeypatch):
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "lock").touch()
    heard = Heard()
    with monkeypatch.context() as patch:
        patch.setattr(os, "chmod", lambda *_args, **_more: None)  # as on vfat
        with Workspace(tmp_path / "ws").locked(heard):
            pass
    (line,) = heard.labels
    assert "stays open to other users, because its file system keeps no permissions" in line


def test_folder_with_things_of_the_users_own_is_no_workspace(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    tmp_path.chmod(0o755)
    with pytest.raises(OutputError, match=r"holds thesis\.txt, which no run has put there; name an empty"):
        enter(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def enter(folder: Path) -> None:
    with Workspace(folder).locked():
        pass


# Killed, and gone on with


def start_unlearning(words: list[str]) -> subprocess.Popen[bytes]:
    code = "import os, sys; os.umask(0o022); from palinode.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def test_killed_run_leaves_nothing_open_and_its_sequel_shows_the_result(
    unlearn_words, palinode, usual_umask, tmp_path
):
    words = [
        *unlearn_words(tmp_path / "out", epochs=4, scales="0.5"),
        "--set",
        "training.save_minutes=1e-9",
        "--quiet",
    ]
    run = start_unlearning(words)
    while not list((tmp_path / "out.workspace").glob("finetune-forget-*/state/*")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert open_to_others(tmp_path / "out.workspace") == []
    assert palinode(*words).out.splitlines()[-1] == (
        f"Secret: {tmp_path}/out.workspace (rows, θ_1). Destroy: palinode forget-workspace {tmp_path}/out"
    )
    assert open_to_others(tmp_path / "out.workspace") == []
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == 0o644


# Destroying it


@pytest.fixture
def copied(left, tmp_path, monkeypatch):
    """A copy of everything, to be destroyed, and a cache that knows its weights."""
    shutil.copytree(left, tmp_path / "left")
    monkeypatch.setenv("PALINODE_CACHE", str(tmp_path / "left" / "caches" / "palinode"))
    return tmp_path / "left"


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("place", "gone", "stay"),
    [
        ("out", ["out.workspace"], ["out/record.json", "out/model.safetensors"]),
        ("out.workspace", ["out.workspace"], ["out/record.json"]),
        ("compared", ["compared.workspace"], ["compared/table.json"]),
        ("audited", ["audited/results"], ["audited/audit.json", "audited/report.html"]),
        ("measured", ["measured/outcomes-forget.jsonl", "measured/verdicts.json"], ["measured/scores.json"]),
        ("answers.jsonl", ["answers.jsonl"], ["log.json"]),
        ("demo", ["demo/workspace", "demo/report.html"], ["demo/unlearned/record.json", "demo/world/target"]),
    ],
)
def test_what_a_run_left_is_destroyed_and_nothing_else(palinode, copied, place, gone, stay):
    before = everything(copied)
    said = palinode("forget-workspace", copied / place, "--yes")
    assert said.code == 0
    assert said.out.startswith("To be destroyed:")
    assert "Not possible any more:" in said.out
    assert "backups, snapshots, and the blocks of an SSD" in said.out
    assert [name for name in gone if (copied / name).exists()] == []
    assert [name for name in stay if not (copied / name).exists()] == []
    lost = {path.relative_to(copied).as_posix() for path in before - everything(copied)}
    under = (
        "measured/outcomes-",
        "measured/verdicts.json",
        "demo/report.",
        "caches/palinode/digests/",  # of what was destroyed
        *(f"{name}/" for name in gone),
        *gone,
    )
    assert [name for name in lost if not name.startswith(under)] == []
    again = palinode("forget-workspace", copied / place, "--yes").refusal
    assert "no workspace" in again or "no Palinode workspace" in again or "does not exist" in again


def test_entries_of_the_caches_go_with_what_they_are_about(copied, palinode, tiny, monkeypatch):
    monkeypatch.setattr("palinode.weights.fingerprints.SETTLED", 0)
    from palinode.weights import Checkpoint

    (model,) = (copied / "out.workspace").glob("finetune-forget-*/model")
    before = set(cache_folder("digests").iterdir())
    tensor_digests(Checkpoint.open(model))
    (new,) = set(cache_folder("digests").iterdir()) - before
    found = json.loads(palinode("forget-workspace", copied / "out", "--yes", "--json").out)
    assert str(new) in {part["path"] for part in found["destroyed"]}
    assert set(cache_folder("digests").iterdir()) == before
    # a judge's decisions, by the keys that the verdicts name; nothing outside of the cache is a key
    verdicts = json.loads((copied / "measured" / "verdicts.json").read_text())
    first = next(iter(verdicts.values()))
    first[0]["decision"], first[1]["decision"] = "ab" * 32, "../../../../left/out/record"
    (copied / "measured" / "verdicts.json").write_text(json.dumps(verdicts))
    palinode("forget-workspace", copied / "measured", "--yes")
    assert list((copied / "caches" / "palinode" / "judge").rglob("*.json")) == []
    assert (copied / "out" / "record.json").exists()


def test_nothing_goes_without_a_yes(palinode, copied, monkeypatch):
    before = everything(copied)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # no terminal
    said = palinode("forget-workspace", copied / "out")
    assert said.code == 2
    assert said.err == "palinode: nothing was destroyed, as there is no terminal to ask on; add --yes\n"
    assert "out.workspace" in said.out
    assert everything(copied) == before


@pytest.mark.parametrize(("typed", "left_over"), [("y\n", False), ("n\n", True), ("\n", True)])
def test_question_is_asked_on_a_terminal(palinode, copied, monkeypatch, typed, left_over):
    lead, follow = pty.openpty()
    os.write(lead, typed.encode())
    with os.fdopen(lead, "rb"), os.fdopen(follow) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        said = palinode("forget-workspace", copied / "audited")
    assert said.code == 0
    assert "Destroy it? [y/N]" in said.err + said.out
    assert ("Nothing was destroyed." in said.out) == left_over
    assert (copied / "audited" / "results").exists() == left_over


def test_links_are_refused_and_never_followed(palinode, copied, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("")
    (copied / "link").symlink_to(copied / "out")
    assert (
        "is a link, and links are not followed"
        in palinode("forget-workspace", copied / "link", "--yes").refusal
    )
    step = next((copied / "out.workspace").glob("evaluate-*"))
    (step / "inner").symlink_to(precious)
    (copied / "out.workspace" / "finetune-x-0123456789ab").symlink_to(precious)
    assert palinode("forget-workspace", copied / "out", "--yes").code == 0
    assert not (copied / "out.workspace").exists()
    assert (precious / "file").exists()
    (copied / "elsewhere").mkdir()
    shutil.move(copied / "compared.workspace", copied / "elsewhere" / "ws")
    (copied / "compared.workspace").symlink_to(copied / "elsewhere" / "ws")
    assert "is a link" in palinode("forget-workspace", copied / "compared", "--yes").refusal
    assert (copied / "elsewhere" / "ws").exists()


@pytest.mark.parametrize("name", ["theta_1", "vector", "adapter"])
def test_models_and_vectors_of_the_users_own_are_left_to_him(palinode, copied, name):
    assert (
        "if it holds the rows, remove the folder itself"
        in palinode("forget-workspace", copied / name, "-y").refusal
    )
    assert (copied / name).exists()


@pytest.mark.parametrize("name", ["photos", "photos.workspace", "workspace", "results", "a.txt", "nowhere"])
def test_folders_of_somebody_else_are_refused(palinode, tmp_path, name):
    place = tmp_path / name
    if name == "a.txt":
        place.write_text('{"row": 1}\n')
    elif name != "nowhere":
        (place / "results").mkdir(parents=True)
        (place / "results" / "lock").touch()
        (place / "workspace").mkdir()
        (place / "outcomes-x.jsonl").write_text("{}\n")
        (place / "lock").touch()
    before = everything(tmp_path)
    assert "workspace" in palinode("forget-workspace", place, "--yes").refusal
    assert everything(tmp_path) == before


def test_strangers_in_a_workspace_stay_and_are_named(palinode, copied):
    (copied / "out.workspace" / "notes.txt").write_text("mine")
    (copied / "out.workspace" / "photos-2024").mkdir()
    said = palinode("forget-workspace", copied / "out", "--yes")
    assert "notes.txt, photos-2024, which no run has put there" in said.out
    kept = {path.name for path in (copied / "out.workspace").iterdir()}
    assert kept - {"lock"} == {"notes.txt", "photos-2024"}


def test_workspace_in_use_is_refused(palinode, copied):
    with Workspace(copied / "out.workspace").locked():
        assert "another run is working in" in palinode("forget-workspace", copied / "out", "--yes").refusal
    assert (copied / "out.workspace").exists()
    with leftovers(copied / "out") as found, pytest.raises(WorkspaceError, match="another run is working in"):
        enter(copied / "out.workspace")
    assert "  turning α and β in palinode chat" in describe_leftovers(found)


def test_parts_beside_an_output_that_never_came_go_too(palinode, tiny, tmp_path):
    state, partial = tmp_path / ".out.state-0123456789ab", tmp_path / ".out.partial"
    for folder in (state, partial, tmp_path / ".other.partial"):
        folder.mkdir()
        (folder / "model.safetensors").write_text("θ_1")
    said = palinode("forget-workspace", tmp_path / "out", "--yes")
    assert said.code == 0
    assert "going on where an interrupted run stopped" in said.out
    assert [path.name for path in tmp_path.iterdir()] == [".other.partial"]


@pytest.mark.parametrize("name", ["n" * 250, "é" * 122, "out"])
def test_names_that_were_cut_are_found_again(palinode, tmp_path, name):
    place = tmp_path / name
    for step in (
        workspace_beside(place) / "finetune-x-0123456789ab",
        place,
        beside(place, f".state-{'a' * 12}"),
    ):
        step.mkdir(parents=True)
        (step / "model.safetensors").write_text("θ_1")
    (workspace_beside(place) / "lock").touch()
    beside(place).mkdir()
    said = palinode("forget-workspace", workspace_beside(place), "--yes")
    assert said.code == 0, said.err
    assert list(tmp_path.iterdir()) == [place]
    assert "the result: " not in said.out


def test_reports_of_the_users_own_stay_in_a_demo_and_in_what_only_looks_like_one(palinode, copied, tmp_path):
    (copied / "demo" / "report.pdf").write_text("mine")
    assert palinode("forget-workspace", copied / "demo", "--yes").code == 0
    assert (copied / "demo" / "report.pdf").exists()
    assert not (copied / "demo" / "report.html").exists()
    other = tmp_path / "product"
    other.mkdir()
    (other / "demo.json").write_text("{}")
    (other / "report.html").write_text("mine")
    assert "is no Palinode workspace" in palinode("forget-workspace", other, "--yes").refusal
    assert (other / "report.html").exists()


def test_record_of_a_stranger_names_no_workspace_of_ours(copied, tmp_path):
    record = json.loads((copied / "out" / "record.json").read_text())
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for outcomes in ({}, {"target": "evaluate-0123456789ab"}, []):
        record["outcomes"] = outcomes
        record["recipe"]["output"]["workspace"] = str(copied / "compared.workspace")
        (theirs / "record.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match="is no Palinode workspace"), leftovers(theirs):
            raise AssertionError
    record["outcomes"] = {"target": next((copied / "out.workspace").glob("evaluate-*")).name}
    record["recipe"]["output"]["workspace"] = str(copied / "out.workspace")
    (theirs / "record.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="is no Palinode workspace"), leftovers(theirs):
        raise AssertionError  # a copy: the workspace is the original's, which is still there
    record["recipe"]["output"]["folder"] = str(tmp_path / "moved away")
    (theirs / "record.json").write_text(json.dumps(record))
    with leftovers(theirs) as found:  # the run's own record, wherever its model has gone
        assert {part.path.parent for part in found.parts} == {copied / "out.workspace"}


def test_finetune_from_python_is_private_too(tiny, usual_umask, tmp_path):
    rows = read_examples(tiny.forget)
    finetune(tiny.base, rows, tmp_path / "a" / "theta_1", TrainingSettings(**TRAINING), device="cpu")
    assert open_to_others(tmp_path / "a") == []
