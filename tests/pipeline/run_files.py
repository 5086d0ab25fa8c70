"""What a run's tests write and read back: rows, steps of a workspace, weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

GIVEN = {"forget": 0.5, "retain": 0.0}
"""Scales that spare a test the search."""


def workspace_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.workspace")


def steps(output: Path) -> dict[str, int]:
    """How many finished steps of each kind the workspace holds."""
    names = [path.parent.name.rpartition("-")[0] for path in workspace_of(output).glob("*/step.json")]
    return {name: names.count(name) for name in sorted(set(names))}


def stamps(*folders: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
