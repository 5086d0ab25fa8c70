"""A workspace: every step of a run keeps its result under the fingerprint of what went into it.

A step is finished when its `step.json` exists, which is written last and in one rename. So a killed run
leaves finished steps and at most one unfinished one; the same command finds the finished ones by their
inputs, goes on with the other, and never mistakes a part for a whole. Changed inputs have another
fingerprint, hence another folder. It holds rows and what was learned from them, so nobody but its owner
can read it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3

from palinode.errors import OutputError, WorkspaceError, told_as, unwritable
from palinode.progress import Listener, NullListener
from palinode.records import OTHERS, close_to_others, fitting, private, read_json, write_json

STEP_VERSION = 2
"""Raised when a step's meaning changes, so that results of older versions are not reused."""

OWN = re.compile(r"lock|tracking|report(-.+)?\.(html|md|json)|\..+\.partial|[a-z][a-z0-9_~-]*-[0-9a-f]{12}")
"""Names of what may lie in a workspace."""


def fingerprint(**inputs: Any) -> str:
    """Return a hash of JSON-like inputs, 32 hex digits; the order of keys does not matter."""
    text = json.dumps({"version": STEP_VERSION, **inputs}, sort_keys=True, allow_nan=False)
    return blake3.blake3(text.encode()).hexdigest()[:32]


def folder_size(place: Path) -> int:
    """Return the bytes of a file, or of a folder with all in it, which another run may be working in."""
    total = 0
    for path in (place, *place.rglob("*")):
        with suppress(OSError):
            total += path.lstat().st_size
    return total


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
        with told_as(WorkspaceError, f"{path} cannot be read", f"remove {self.folder} to redo the step"):
            content = read_json(path)
            if content["key"] != self.key:
                raise ValueError("it belongs to another step")
            facts: dict[str, Any] = content["facts"]
        return facts

    def begin(self) -> None:
        """Make the step's folder; what an interrupted try left in it stays."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Record the step as finished."""
        write_json(self.folder / "step.json", {"name": self.name, "key": self.key, "facts": dict(facts)})

    def once(self, act: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return what the step recorded; done by `act`, and recorded, unless it was before."""
        facts: Mapping[str, Any] | None = self.facts
        if facts is None:
            self.begin()
            self.finish(facts := act())
        return facts

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
        return self.step_of(name, fingerprint(step=name, **inputs))

    def step_of(self, name: str, key: str) -> Step:
        """Return the step of that name and key, as a record has them."""
        return Step(name, key, self.folder / fitting(name, f"-{key[:12]}"))

    def is_one(self) -> bool:
        """Tell whether the folder is a workspace, and no other folder that somebody named."""
        return (self.folder / "lock").is_file() and any(path.name != "lock" for path in self.own())

    def own(self) -> list[Path]:
        """Return what a run has put into the folder."""
        return [path for path in sorted(self.folder.iterdir()) if OWN.fullmatch(path.name)]

    def strange(self) -> list[Path]:
        """Return what somebody else has put there."""
        return [path for path in sorted(self.folder.iterdir()) if not OWN.fullmatch(path.name)]

    @contextmanager
    def locked(self, listener: Listener | None = None) -> Iterator[None]:
        """Keep other runs out while this one works, and other users for good.

        The lock goes with the process, however it ends. What is made meanwhile is private.
        """
        with told_as(OutputError, f"the workspace {self.folder} cannot be used"):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with private():
                self.folder.mkdir(exist_ok=True)
                # all that lies in a workspace can be destroyed with it, so it is no folder of somebody's own
                if not (self.folder / "lock").exists() and (strange := self.strange()):
                    raise OutputError(
                        f"the workspace {self.folder} holds {strange[0].name}, which no run has put there; "
                        "name an empty folder, or one that does not exist yet"
                    )
                handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise WorkspaceError(
                f"another run is working in {self.folder}; wait for it, or name another workspace or output"
            ) from None
        try:
            with private():
                if note := self._close():
                    (listener or NullListener()).say(note)
                yield
        except OSError as error:  # full, or removed while we worked in it
            place = Path(error.filename2 or error.filename or "")
            if place.is_relative_to(self.folder):
                raise unwritable(place, error) from error
            raise
        finally:
            self._tidy()
            self._close()
            os.close(handle)

    def _close(self) -> str | None:
        """Close the folder to other users; return what its owner has to know of that."""
        if not self.folder.exists() or not close_to_others(self.folder, *self.own()):
            return None
        status = self.folder.stat()
        if not status.st_mode & OTHERS:
            return f"{self.folder} was open to other users of this machine; it is closed to them now."
        if status.st_uid != os.geteuid():
            return f"{self.folder} belongs to another user and stays as open as it is: the rows lie in it."
        return (
            f"{self.folder} stays open to other users, because its file system keeps no permissions: the "
            "rows lie in it; a --workspace elsewhere would be closed."
        )

    def _tidy(self) -> None:
        """Leave nothing behind where nothing was done: no empty steps, no workspace without steps."""
        with suppress(OSError):
            for step in self.own():
                with suppress(OSError):  # it holds something, or is the lock
                    step.rmdir()
            if [path.name for path in self.folder.iterdir()] == ["lock"]:
                (self.folder / "lock").unlink()
                self.folder.rmdir()
