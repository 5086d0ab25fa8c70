"""A comparison on the tiny world, and a listener that stops it: for the tests of all kinds of comparison."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any


def tiny_comparison(tiny: Any, output: Path, **changes: Any) -> dict[str, Any]:
    """Return a comparison as plain values without contestants, and with these keys laid over it."""
    return {
        "device": "cpu",
        "models": {
            "target": str(tiny.target.folder),
            "base": str(tiny.base.folder),
            "retrained": str(tiny.retrained.folder),
        },
        "data": {"forget": str(tiny.forget), "retain": str(tiny.retain)},
        "training": {"learning_rate": 3e-3, "batch_size": 16, "max_length": 64, "precision": "float32"},
        "evaluation": {"max_rows": 40, "max_new_tokens": 3, "max_length": 64, "batch_rows": 64},
        "output": {"folder": str(output)},
        **changes,
    }


class Heard:
    """A listener that keeps what it is told, and interrupts at the first line or task with these words."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.stop_at = stop_at
        self.labels: list[str] = []

    def say(self, text: str) -> None:
        self._hear(text)

    @contextmanager
    def task(self, label: str, total: int, unit: str):
        self._hear(label)
        yield lambda _amount: None

    def trainings(self) -> list[str]:
        """Return the tasks that trained something."""
        return [label for label in self.labels if label.startswith("fine-tuning")]

    def _hear(self, text: str) -> None:
        self.labels.append(text)
        if self.stop_at and self.stop_at in text:
            raise KeyboardInterrupt
