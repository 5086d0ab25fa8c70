"""What every record begins and ends with: who wrote it and when, and on what machine."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from palinode.version import __version__

LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
    "rouge-score",
)
"""What results may depend on."""


def heading(layout: int, *, started: datetime, command: str) -> dict[str, Any]:
    """Return the versions of a record's layout and of Palinode, start and end (now), and the command."""
    return {
        "version": layout,
        "palinode": __version__,
        "created": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def environment(device: object) -> dict[str, Any]:
    """Return the Python, machine, device and versions of libraries."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(device),
        **{name: version(name) for name in LIBRARIES},
    }
