"""The programs of docs/python.md run as printed, on the tests' tiny world."""

from __future__ import annotations

import inspect

import pytest
from doc_pages import DOCS, FENCE

import palinode
from palinode.pipeline.signing import new_key

PROGRAMS = [
    found["code"]
    for found in FENCE.finditer((DOCS / "python.md").read_text(encoding="utf-8"))
    if found["language"] == "python"
]


@pytest.fixture
def scratch(tiny, tmp_path, monkeypatch):
    """A folder with the tiny world under the names that the page uses."""
    world = tiny.target.folder.parent
    for name in ("target", "base", "retrained"):
        (tmp_path / name.upper()).symlink_to(world / name)
    for name in ("forget", "retain", "holdout"):
        (tmp_path / f"{name}.jsonl").symlink_to(world / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(word: str, capsys) -> list[str]:
    """What the program that has this word in it prints."""
    (code,) = [code for code in PROGRAMS if word in code]
    exec(compile(code, "docs/python.md", "exec"), {})
    return capsys.readouterr().out.split()


def test_unlearn(scratch, capsys):
    output, *sentence, probability = run("palinode.unlearn(\n", capsys)
    assert " ".join(sentence).endswith(".")
    assert (scratch / output / "record.json").exists()
    assert 0 <= float(probability) <= 1


def test_sign_and_reproduce(scratch, capsys):
    run("palinode.unlearn(\n", capsys)
    new_key(scratch / "owner.key")
    assert " ".join(run("palinode.sign_folder(", capsys)) == "signed the same bytes"


def test_evaluate(scratch, capsys):
    (probability,) = run("palinode.evaluate(", capsys)
    assert 0 <= float(probability) <= 1


def test_compare(scratch, capsys):
    printed = run("palinode.compare(\n", capsys)
    assert printed[::2] == ["msa", "npo"]
    assert all(0 <= float(value) <= 1 for value in printed[1::2])


def test_audit(scratch, capsys):
    assert run("palinode.audit(\n", capsys) == ["failed", "False"]  # the target was never unlearned
    assert (scratch / "audited" / "report.html").exists()


def test_locate(scratch, capsys):
    printed = " ".join(run("palinode.locate(\n", capsys))
    assert printed == "first seen by step 200 take BASE"


def test_influence(scratch, capsys):
    run("palinode.unlearn(\n", capsys)
    before, after, nats = run("palinode.influence(", capsys)
    assert 0 <= float(before) <= 1
    assert (float(after) < float(before)) == (float(nats) > 0)


DOORS = "unlearn compare audit locate evaluate influence plan dry_run reproduce sign_folder"


@pytest.mark.parametrize("name", DOORS.split())
def test_what_the_command_line_does_is_a_function_of_few_arguments(name):
    function = getattr(palinode, name)
    assert callable(function)
    assert len(inspect.signature(function).parameters) <= 12


def test_importing_a_room_leaves_its_name_to_the_function():
    import palinode.audit.material
    import palinode.compare.comparing

    assert inspect.isfunction(palinode.audit)
    assert inspect.isfunction(palinode.compare)
