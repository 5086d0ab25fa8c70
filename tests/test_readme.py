"""README's Python runs as printed, on a small world in the place where the demo would have put its own."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from palinode.benchmarks.demo import DemoStage, build_demo
from palinode.data.world import invent_world

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """A folder that holds palinode-demo/world as `palinode demo` leaves it, but smaller."""
    folder = tmp_path_factory.mktemp("readme")
    world = invent_world(0, early=4, middle=3, forget=2, late=2)
    stages = (DemoStage(2, 3e-3), DemoStage(2, 2e-3), DemoStage(1, 2e-3))
    build_demo(world, folder / "palinode-demo" / "world", seed=0, stages=stages, width=32, layers=1)
    return folder


def test_readme_has_one_python_block_of_few_lines():
    (code,) = blocks("python")
    statements = [line for line in code.splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(statements) <= 6


def test_readme_python_runs_and_prints_what_it_shows(demo_folder, monkeypatch):
    monkeypatch.chdir(demo_folder)
    (code,) = blocks("python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    (shown,) = (block for block in blocks("text") if block.startswith("Score("))
    assert without_numbers(printed.getvalue()) == without_numbers(shown)


def test_readme_main_command_runs_as_printed(demo_folder, tmp_path):
    (line,) = [
        line
        for code in blocks("sh")
        for line in code.splitlines()
        if line.startswith("palinode unlearn --target")
    ]
    world = demo_folder / "palinode-demo" / "world"
    for name, place in {"MODEL": "target", "CHECKPOINT": "base"}.items():
        (tmp_path / name).symlink_to(world / place)
    for name in ("forget.jsonl", "retain.jsonl"):
        (tmp_path / name).symlink_to(world / name)
    words = shlex.split(line)[1:]
    run = subprocess.run(
        [sys.executable, "-m", "palinode", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert {"config.json", "model.safetensors", "record.json", "report.md", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "OUT").iterdir()
    }


def without_numbers(text: str) -> list[str]:
    """The shape of an output: another world gives other numbers."""
    return re.sub(r"\d+(\.\d+)?(e-\d+)?", "#", text).splitlines()
