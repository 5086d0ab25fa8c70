"""Every command in the documentation is one that palinode has, and those of its two guides run as printed.

The tour makes its world with `palinode demo`, which takes minutes and has tests of its own; here the tests'
tiny world stands in its place. The models and rows that the how-to speaks of are that world's too.
"""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import typer
from doc_pages import DOCS, ELLIPSES, PAGES, ROOT, Block, blocks, palinode_words

from palinode.cli.app import app

TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SHOWN = [(block, command) for page in TEXTS for block in blocks(page) for command in block.commands]
RUN = [
    ("tour.md", "limits.md"),
    ("how-to.md", "chat.md"),
    *[(f"{name}.md",) for name in ("doctor", "influence", "requests", "signing")],
]
"""Pages whose commands run in one folder, one page after the other."""
LONG = ("influence.md", "requests.md", "signing.md")
RECIPE = """
models = { target = "TARGET", base = "BASE" }
data = { forget = "forget.jsonl" }
output = { folder = "from-recipe" }
"""
COMMANDS = typer.main.get_command(app)


@pytest.fixture
def scratch(tiny, tmp_path, monkeypatch):
    """A folder to work in, with the tiny world where the demo puts its own, and under the how-to's names."""
    world = tiny.target.folder.parent
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "world").symlink_to(world)
    for name in ("target", "base", "retrained"):
        (tmp_path / name.upper()).symlink_to(world / name)
    for name in ("forget", "retain", "holdout"):
        (tmp_path / f"{name}.jsonl").symlink_to(world / f"{name}.jsonl")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_run():
    counts = {name: sum(block.runs for block in blocks(DOCS / name)) for names in RUN for name in names}
    assert counts["tour.md"] > 8
    assert counts["how-to.md"] > 10
    assert all(counts.values())


@pytest.mark.parametrize(
    ("block", "command"),
    [pair for pair in SHOWN if palinode_words(pair[1])],
    ids=lambda value: str(value) if isinstance(value, Block) else "",
)
def test_palinode_has_the_command_and_its_options(block, command):
    _, words = palinode_words(command)
    understand(COMMANDS, "palinode", words)


def understand(command, name: str, words: list[str], *, partly: bool = False) -> None:
    """Parse a command line as palinode would; where a part is left out as …, its options at least."""
    partly = partly or any(word in ELLIPSES for word in words)
    if partly:
        words = [word for word in words if word not in ELLIPSES]
        context = command.context_class(command, info_name=name, resilient_parsing=True)
        rest = command.make_parser(context).parse_args(args=list(words))[1]
    else:
        context = command.make_context(name, list(words), resilient_parsing="--help" in words)
        rest = [*context._protected_args, *context.args]
    if hasattr(command, "resolve_command") and rest:
        inner, found, rest = command.resolve_command(context, rest)
        understand(found, inner, rest, partly=partly)


@pytest.mark.parametrize("words", [["unlern"], ["unlearn", "--tarlet", "a"], ["list", "--jsn"], ["verify"]])
def test_what_palinode_does_not_have_is_noticed(words):
    with pytest.raises(Exception, match=r"No such|Missing"):
        understand(COMMANDS, "palinode", words)


@pytest.mark.parametrize(
    "names",
    [pytest.param(names, marks=[pytest.mark.slow] if names[0] in LONG else []) for names in RUN],
    ids=lambda names: names[0],
)
def test_commands_of_the_pages_run_in_order(names, scratch, palinode, monkeypatch):
    for block in (block for name in names for block in blocks(DOCS / name) if block.runs):
        for command in block.commands:
            before, words = palinode_words(command) or (command, None)
            piped = shell(before, block) if before else ""
            if words is None:
                continue
            monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
            said = palinode(*words)
            judged = {1} if words[0] in JUDGED else set()  # by a stand-in that hardly trains
            assert said.code in block.codes | judged, f"{block}\n{command}\n{said.out}\n{said.err}"
            assert missing_outputs(words, scratch) == [], f"{block}\n{command}\n{said.out}"


JUDGED = ("unlearn", "run", "filter", "influence")
"""Verbs whose exit code tells the verdict on the model."""


def shell(command: str, block: Block) -> str:
    """What a command of the shell prints."""
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, f"{block}\n{command}\n{done.stderr}"
    return done.stdout


def missing_outputs(words: list[str], folder) -> list[str]:
    """The files and folders that the command says it writes and that are not there."""
    if "--dry-run" in words or words[0] == "doctor":
        return []
    writes = ("--output", "--report", "--picture")
    named = [words[place + 1] for place, word in enumerate(words) if word in writes]
    return [name for name in named if not (folder / name).exists()]
