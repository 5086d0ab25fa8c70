"""A workspace: every step of a run keeps its result under the fingerprint of what went into it.

A step is finished when its `step.json` exists, which is written last and in one rename. So a killed run
leaves finished steps and at most one unfinished one; the same command finds the finished ones by their
inputs, goes on with the other, and never mistakes a part for a whole. Changed inputs have another
fingerprint, hence another folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3

from palinode.errors import OutputError, WorkspaceError, unwritable
from palinode.records import fitting, write_json

STEP_VERSION = 1
"""Raised when a step's meaning changes, so that results of older versions are not reused."""


def fingerprint(**inputs: Any) -> str:
    """Return a hash of JSON-like inputs, 32 hex digits; the order of keys does not matter."""
    text = json.dumps({"version": STEP_VERSION, **inputs}, sort_keys=True, allow_nan=False)
    return blake3.blake3(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run and the folder that is its own."""

    name: str
    key: str
    """Fingerprint of everything that decides the result."""
    folder: Path

    @property
    def facts(self) -> dict[str, Any] | None:
        """What the step recorded when it finished; None while it has not."""
        path = self.folder / "step.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] != self.key:
                raise ValueError("it belongs to another step")
            facts: dict[str, Any] = content["facts"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WorkspaceError(
                f"{path} cannot be read ({error}); remove {self.folder} to redo the step"
            ) from None
        return facts

    def begin(self) -> None:
        """Make the step's folder; what an interrupted try left in it stays."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Record the step as finished."""
        write_json(self.folder / "step.json", {"name": self.name, "key": self.key, "facts": dict(facts)})

    def clear(self) -> None:
        """Throw the step's results away, so that it is done anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.begin()


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder of steps, used by one run at a time."""

    folder: Path

    def step(self, name: str, **inputs: Any) -> Step:
        """Return the step of that name with these inputs, finished or not."""
        key = fingerprint(step=name, **inputs)
        return Step(name, key, self.folder / fitting(name, f"-{key[:12]}"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out while this one works; the lock goes with the process, however it ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise OutputError(f"the workspace {self.folder} cannot be used ({error.strerror})") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise WorkspaceError(
                f"another run is working in {self.folder}; wait for it, or name another workspace or output"
            ) from None
        try:
            yield
        except OSError as error:  # full, or removed while we worked in it
            place = Path(error.filename2 or error.filename or "")
            if place.is_relative_to(self.folder):
                raise unwritable(place, error) from error
            raise
        finally:
            self._tidy()
            os.close(handle)

    def _tidy(self) -> None:
        """Leave nothing behind where nothing was done: no empty steps, no workspace without steps."""
        with suppress(OSError):
            for step in self.folder.iterdir():
                with suppress(OSError):  # it holds something, or is the lock
                    step.rmdir()
            if [path.name for path in self.folder.iterdir()] == ["lock"]:
                (self.folder / "lock").unlink()
                self.folder.rmdir()
