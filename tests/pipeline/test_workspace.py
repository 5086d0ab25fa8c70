"""Workspaces: steps named after their inputs, one run at a time, nothing left by a run that did nothing."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable

import pytest

from palinode.errors import OutputError, WorkspaceError
from palinode.pipeline.workspace import Workspace, fingerprint


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws")


def test_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint(a=1, b={"c": 2, "d": 3}) == fingerprint(b={"d": 3, "c": 2}, a=1)


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"a": [1]}, {"a": 1.5}, {"a": None}, {"b": 1}, {}])
def test_fingerprint_tells_other_inputs_apart(other):
    assert fingerprint(a=1) != fingerprint(**other)


def test_fingerprint_is_the_same_on_every_machine():
    """Raise STEP_VERSION when this has to change: results of older versions are not to be reused."""
    assert fingerprint(a=1, b=["ü", 0.1]) == "34442d01c392807c8cf81b4daf48ecdb"


def test_step_is_named_after_its_inputs(workspace):
    step = workspace.step("finetune", rows="abc")
    assert step.folder.name.startswith("finetune-")
    assert step == workspace.step("finetune", rows="abc")
    assert step.folder != workspace.step("finetune", rows="abd").folder
    assert step.key != workspace.step("evaluate", rows="abc").key
    assert not workspace.folder.exists()  # to ask for a step leaves nothing on disk


def test_step_is_finished_when_it_says_so_and_not_before(workspace):
    step = workspace.step("finetune", rows="abc")
    assert step.facts is None
    step.begin()
    (step.folder / "model.safetensors").write_bytes(b"half a model")
    assert step.facts is None
    step.finish({"loss": 0.5})
    assert workspace.step("finetune", rows="abc").facts == {"loss": 0.5}


def test_step_that_is_cleared_is_not_finished_any_more(workspace):
    step = workspace.step("apply")
    step.begin()
    step.finish({})
    step.clear()
    assert step.facts is None
    assert list(step.folder.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({"key": "another", "facts": {}}),
        lambda text: text.replace('"facts"', '"fakts"'),
    ],
)
def test_damaged_step_is_named_and_not_guessed_at(workspace, damage):
    step = workspace.step("scales")
    step.begin()
    step.finish({"forget": 1.0})
    path = step.folder / "step.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(WorkspaceError, match=r"step\.json cannot be read \(.*\); remove .* to redo the step"):
        _ = step.facts


def test_second_run_is_refused_while_the_first_works(workspace):
    with (
        workspace.locked(),
        pytest.raises(WorkspaceError, match=r"another run is working in .*ws; wait for it"),
        Workspace(workspace.folder).locked(),
    ):
        raise AssertionError
    with workspace.locked():
        pass  # free again


def fail_in(workspace, *, finished: bool) -> None:
    """Break off a run that has begun a step, with or without a finished one before it."""
    with workspace.locked():
        if finished:
            step = workspace.step("finetune")
            step.begin()
            step.finish({})
        workspace.step("evaluate").begin()
        raise ZeroDivisionError


def test_run_that_did_nothing_leaves_no_workspace(workspace):
    with pytest.raises(ZeroDivisionError):
        fail_in(workspace, finished=False)
    assert not workspace.folder.exists()


def test_run_that_did_something_leaves_it_and_no_empty_step(workspace):
    with pytest.raises(ZeroDivisionError):
        fail_in(workspace, finished=True)
    kept = workspace.step("finetune").folder.name
    assert sorted(path.name for path in workspace.folder.iterdir()) == [kept, "lock"]


def test_workspace_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match=r"the workspace .*file cannot be used"),
        Workspace(tmp_path / "file").locked(),
    ):
        raise AssertionError


def finish_one(space: Workspace, before: Callable[[], object]) -> None:
    with space.locked():
        step = space.step("s" * 300, rows=1)
        step.begin()
        before()
        step.finish({"much": "x" * 2000})


def test_a_workspace_that_is_removed_while_it_is_used_is_named(workspace):
    with pytest.raises(
        OutputError, match=r"step\.json cannot be written: .*/ws is not there, or was removed"
    ):
        finish_one(workspace, lambda: shutil.rmtree(workspace.folder))


def test_a_workspace_that_is_full_is_named(workspace):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OutputError, match=r"step\.json cannot be written \(File too large\); make room"):
            finish_one(workspace, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not workspace.folder.exists()  # nothing is left of the step, so nothing of the workspace
