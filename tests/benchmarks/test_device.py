"""benchmarks/device.py runs as it stands, every part of it, on two cores and without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "device.py"
PARTS = ["train", "read", "answers", "filter", "search", "unlearn", "eight"]


def lines_of(*words: str) -> list[dict]:
    found = subprocess.run([sys.executable, SCRIPT, *words], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_every_part_ends_with_a_line_of_what_it_found():
    first, *lines = lines_of("--cpu-small")
    parts = [line for line in lines if "part" in line]  # the others are what a part says on its way
    assert first["device"] == "processor"
    assert [part["part"] for part in parts] == PARTS
    assert not [part for part in parts if "stopped" in part or "skipped" in part]
    assert all(part["took_s"] <= part["limit_s"] for part in parts)
    assert all(part["plain"] > 0 for part in parts[:3])
