"""Several processes that write one model: on one machine under torchrun, or one on each host of a cluster.

They need a common file system and nothing else. Process 0 lays the files out and says so in a small file
beside them; the others find it, put their share of the slices in place, and report; process 0 checks,
and gives the folder its name. Every slice has the same bytes whoever computes it.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palinode.errors import InputError, OutputError
from palinode.records import read_json
from palinode.weights.atomic import is_claimed
from palinode.weights.slices import Slice

FOLDER = ".crew"
PATIENCE = 600.0
"""Seconds without a sign of life after which a process is given up."""

GLANCE = 0.05
"""Seconds between two looks at what the others have done."""


@dataclass(frozen=True, slots=True)
class Crew:
    """Which one of how many processes this is."""

    rank: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise InputError(f"process {self.rank} of {self.count}: number them from 0 to {self.count - 1}")

    @classmethod
    def from_environment(cls) -> Crew:
        """Return what RANK and WORLD_SIZE say, as torchrun sets them; one process without them."""
        try:
            return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        except ValueError:
            raise InputError("RANK and WORLD_SIZE are set, but are not numbers; unset or mend them") from None

    def share(self, parts: Sequence[Slice]) -> list[Slice]:
        """Return this process's part of the slices: contiguous, and of about as many bytes as the others'."""
        total, before, mine = sum(_weight(part) for part in parts), 0, []
        for part in parts:
            if before * self.count // max(total, 1) == self.rank:
                mine.append(part)
            before += _weight(part)
        return mine


def _weight(part: Slice) -> int:
    return part.count * part.info.itemsize


# Process 0


class Lead:
    """Process 0's side: announce the layout, then wait for what the others report."""

    def __init__(self, crew: Crew, partial: Path, job: str) -> None:
        self._crew = crew
        self._place = partial / FOLDER
        self._nonce = secrets.token_hex(8)
        self._place.mkdir()
        _write(self._place / "ready.json", {"nonce": self._nonce, "job": job, "count": crew.count})

    def reports(self) -> Iterator[Mapping[str, Any]]:
        """Yield what each of the others reports; raises OutputError for one that failed or fell silent."""
        for rank in range(1, self._crew.count):
            watch = _Watch(self._place / f"alive-{rank}", f"process {rank} of {self._crew.count}")
            while True:
                report = _read(self._place / f"report-{rank}-{self._nonce}.json")
                if report is not None:
                    break
                watch.look()
            if "error" in report:
                raise OutputError(f"process {rank} of {self._crew.count} failed: {report['error']}")
            yield report

    def dismiss(self) -> None:
        """Remove the notes, before the folder gets its name."""
        for path in self._place.iterdir():
            path.unlink()
        self._place.rmdir()


# The others


class Hand:
    """Another process's side: find the layout, work, report, and see how it ends."""

    def __init__(self, crew: Crew, partial: Path, output: Path, job: str) -> None:
        self._crew = crew
        self._partial = partial
        self._output = output
        self._job = job
        self._beaten = 0.0

    def work(self, fill: Callable[[], Mapping[str, Any]]) -> None:
        """Do this process's share (`fill` returns the report) as often as process 0 starts; then return.

        Raises OutputError when process 0 does something else, never starts, or fails.
        """
        while True:
            nonce = self._wait_for_start()
            try:
                self.beat()
                _write(self._place / f"report-{self._crew.rank}-{nonce}.json", fill())
            except FileNotFoundError:
                continue  # what we found was left by a killed run, and process 0 has just cleared it away
            except Exception as error:
                with suppress(OSError):
                    report = {"error": str(error)}
                    _write(self._place / f"report-{self._crew.rank}-{nonce}.json", report)
                raise
            if self._wait_for_end(nonce):
                return

    def beat(self) -> None:
        """Leave a sign of life, at most once a second."""
        if time.monotonic() - self._beaten > 1:
            self._beaten = time.monotonic()
            with suppress(OSError):
                (self._place / f"alive-{self._crew.rank}").write_text(str(time.time()))

    @property
    def _place(self) -> Path:
        return self._partial / FOLDER

    def _wait_for_start(self) -> str:
        watch = _Watch(self._place / "ready.json", "process 0")
        while True:
            ready = _read(self._place / "ready.json")
            if ready is None or not is_claimed(self._partial):  # not there yet, or left by a killed run
                watch.look()
                continue
            if (ready["job"], ready["count"]) != (self._job, self._crew.count):
                raise OutputError(
                    f"process 0 writes another sum to {self._output}; give every process the same command"
                )
            return str(ready["nonce"])

    def _wait_for_end(self, nonce: str) -> bool:
        """Return True when the folder has its name, False when process 0 has begun anew."""
        while True:
            ready = _read(self._place / "ready.json")
            if ready is not None and ready["nonce"] != nonce:
                return False
            if not self._partial.exists():
                if self._output.exists():
                    return True
                raise OutputError(f"process 0 did not finish {self._output}; see what it says")
            if self._partial.exists() and not is_claimed(self._partial) and not self._output.exists():
                raise OutputError(f"process 0 ended before {self._output} was whole; repeat the call")
            time.sleep(GLANCE)


# Notes


class _Watch:
    """Waits a moment at a time, and gives up on a process whose file does not change for long."""

    def __init__(self, file: Path, who: str) -> None:
        self._file = file
        self._who = who
        self._seen: float | None = None
        self._since = time.monotonic()

    def look(self) -> None:
        time.sleep(GLANCE)
        try:
            seen = self._file.stat().st_mtime
        except OSError:
            seen = None
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        elif time.monotonic() - self._since > PATIENCE:
            raise OutputError(f"nothing was heard of {self._who} for {PATIENCE:.0f} s; is it running?")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a note in one step, so that nobody reads half of it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = read_json(path)
    except (OSError, ValueError):
        return None
    return found
