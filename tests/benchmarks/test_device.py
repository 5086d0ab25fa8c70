"""benchmarks/device.py runs as it stands, every part of it, on two cores and without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "device.py"
PARTS = ["train", "read", "answers", "filter", "search", "unlearn", "eight"]


def lines_of(*words: str) -> list[dict]:
    found = subprocess.run([sys.executable, SCRIPT, *words], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


def test_every_part_ends_with_a_line_of_what_it_found():
    first, *parts = lines_of("--cpu-small")
    assert first["device"] == "processor"
    assert [part["part"] for part in parts] == PARTS
    assert not [part for part in parts if "stopped" in part or "skipped" in part]
    assert all(part["took_s"] <= part["limit_s"] for part in parts)
    assert all(part["plain"] > 0 for part in parts[:3])
