"""A folder that is whole or not there: filled beside its place, and named when it is finished.

It is written as a hidden neighbour, `.NAME.partial`, which a lock keeps for one run alone, and takes its
final name in one step, last. Whatever kills the writer, a reader never finds half of it under that name.

Several processes may fill one folder: under torchrun, or one on each host of a cluster. They need a common
file system and nothing else. Process 0 lays the files out and says so in a small file beside them; the
others find it, put their share in place, and report; process 0 checks, and gives the folder its name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError, InputError, OutputError, unwritable
from palinode.records import beside, read_json, write_text


def check_output(output: Path, inputs: Sequence[Path], *, needs: int = 0) -> None:
    """Raise OutputError unless `output` is free, apart from all inputs, and has room for `needs` bytes."""
    try:
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError as error:
        raise OutputError(f"{output} cannot be used ({error.strerror}); choose another output") from None
    if taken:
        raise OutputError(f"{output} exists and is not empty; choose another output folder, or remove it")
    place = output.resolve()
    for path in (entry.resolve() for entry in inputs):
        if place == path or path in place.parents or place in path.parents:
            raise OutputError(
                f"the output {output} and the input {path} lie inside one another; choose another output"
            )
    home = next(parent for parent in place.parents if parent.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise OutputError(f"{home} cannot be written to; choose another output folder")
    check_room(home, needs, "make room")


def check_room(place: Path, needs: int, advice: str) -> None:
    """Raise OutputError unless there are `needs` bytes where a folder is, or will be."""
    home = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(home).free
    if free < needs:
        raise OutputError(
            f"{home} has {free / 1e9:.2f} GB free where {needs / 1e9:.2f} GB are needed; {advice}"
        )


@contextmanager
def claimed(output: Path) -> Iterator[Path]:
    """Make an empty neighbour folder that is ours alone; it goes away again when there is an error.

    What a killed run has left there is thrown away. The lock goes with the process, however that ends.
    """
    partial = beside(output)
    with ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, handle)
            _lock(handle)
            if not os.path.samestat(os.fstat(handle), partial.stat()):
                raise BlockingIOError  # the other run has just finished
            for entry in partial.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        except BlockingIOError:
            raise OutputError(f"another run is writing {output}; wait for it, or name another") from None
        except OSError as error:
            raise OutputError(f"{partial} cannot be made ({error.strerror}); name another output") from None
        try:
            yield partial
        except BaseException as error:
            ours = partial.exists() and os.path.samestat(os.fstat(handle), partial.stat())
            if ours:
                shutil.rmtree(partial, ignore_errors=True)
            elif isinstance(error, Exception) and not output.exists():
                raise unwritable(partial, FileNotFoundError(errno.ENOENT, "")) from error
            if isinstance(error, OSError):
                raise _explained(error, partial) from error
            raise


def _explained(error: OSError, partial: Path) -> InputError:
    """Return in one sentence what the system said of a file: of one written to the folder, or read for it."""
    if isinstance(error, shutil.Error):  # of copytree: a list of what it could not copy
        _source, place, reason = error.args[0][0]
        return unwritable(place, OSError(None, str(reason)))
    place = Path(error.filename2 or error.filename or partial)
    if place.is_relative_to(partial):
        return unwritable(place, error)
    return CheckpointError(f"{place} cannot be read ({error.strerror}); fetch the model again")


def is_claimed(partial: Path) -> bool:
    """Tell whether a run that is alive holds such a neighbour folder; True where there are no locks."""
    try:
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held by somebody, or a network file system without locks
        return True
    finally:
        os.close(handle)
    return False


def publish(partial: Path, output: Path) -> None:
    """Give the finished folder its final name in one step; an empty folder of that name gives way."""
    for path in [*partial.rglob("*"), partial]:  # all of it is on disk before the name is
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    try:
        partial.replace(output)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise
        raise OutputError(
            f"{output} was taken while it was written ({error.strerror}); repeat the call"
        ) from None


def _lock(handle: int) -> None:
    """Lock an open file or folder, or raise BlockingIOError."""
    for attempt in reversed(range(5)):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not attempt:
                raise
            time.sleep(0.05)  # somebody may only have asked whether it is locked
        except OSError:  # some network file systems have no locks
            return


FOLDER = ".crew"
PATIENCE = 600.0
"""Seconds without a sign of life after which a process is given up."""

GLANCE = 0.05
"""Seconds between two looks at what the others have done."""


@dataclass(frozen=True, slots=True)
class Crew:
    """Which one of how many processes this is, and how many threads it has."""

    rank: int = 0
    count: int = 1
    workers: int | None = None
    """Threads of this process; by default one for each core, up to 16."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise InputError(
                f"there is no process {self.rank} of {self.count}; number them from 0 (RANK, WORLD_SIZE)"
            )

    @classmethod
    def from_environment(cls) -> Crew:
        """Return what RANK and WORLD_SIZE say, as torchrun sets them; one process without them."""
        try:
            return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        except ValueError:
            raise InputError("RANK and WORLD_SIZE are set, but are not numbers; unset or mend them") from None


def announce(crew: Crew, partial: Path, job: str) -> Iterator[Mapping[str, Any]]:
    """Tell the others, as process 0, that the layout is there; return an iterator over their reports.

    After the last of them the notes are removed. It raises OutputError for one that failed or fell silent.
    """
    place, nonce = partial / FOLDER, secrets.token_hex(8)
    place.mkdir()
    write_text(place / "ready.json", json.dumps({"nonce": nonce, "job": job, "count": crew.count}))

    def report_of(rank: int) -> Mapping[str, Any]:
        who, file = f"process {rank} of {crew.count}", place / f"report-{rank}-{nonce}.json"
        report = _awaited(lambda: _read(file), place / f"alive-{rank}", who)
        if "error" in report:
            raise OutputError(f"{who} failed: {report['error']}")
        return report

    def reports() -> Iterator[Mapping[str, Any]]:
        yield from map(report_of, range(1, crew.count))
        shutil.rmtree(place)  # before the folder gets its name

    return reports()


class RankSide:
    """What any other process does: find the layout, work, report, and see how it ends."""

    def __init__(self, crew: Crew, partial: Path, output: Path, job: str) -> None:
        self._crew, self._partial, self._output, self._job = crew, partial, output, job
        self._place = partial / FOLDER
        self._beaten = 0.0

    def work(self, fill: Callable[[], Mapping[str, Any]]) -> None:
        """Do this process's share (`fill` returns the report) as often as process 0 starts; then return.

        Raises OutputError when process 0 does something else, never starts, or fails.
        """
        while True:
            ready = _awaited(self._begun, self._place / "ready.json", "process 0")
            if (ready["job"], ready["count"]) != (self._job, self._crew.count):
                raise OutputError(
                    f"process 0 writes another sum to {self._output}; give every process the same command"
                )
            report = self._place / f"report-{self._crew.rank}-{ready['nonce']}.json"
            try:
                self.beat()
                write_text(report, json.dumps(fill()))
            except FileNotFoundError:
                continue  # what we found was left by a killed run, and process 0 has just cleared it away
            except Exception as error:
                with suppress(OSError):
                    write_text(report, json.dumps({"error": str(error)}))
                raise
            if self._wait_for_end(ready["nonce"]):
                return

    def beat(self) -> None:
        """Leave a sign of life, at most once a second."""
        if time.monotonic() - self._beaten > 1:
            self._beaten = time.monotonic()
            with suppress(OSError):
                (self._place / f"alive-{self._crew.rank}").write_text(str(time.time()))

    def _begun(self) -> dict[str, Any] | None:
        """Return what process 0 has announced; None where it has not yet, or a killed run had."""
        ready = _read(self._place / "ready.json")
        return ready if ready and is_claimed(self._partial) else None

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
            if not is_claimed(self._partial) and not self._output.exists():
                raise OutputError(f"process 0 ended before {self._output} was whole; repeat the call")
            time.sleep(GLANCE)


def _awaited(look: Callable[[], dict[str, Any] | None], file: Path, who: str) -> dict[str, Any]:
    """Return what is seen at last; give up on a process whose file does not change for long."""
    seen, since = None, time.monotonic()
    while (found := look()) is None:
        time.sleep(GLANCE)
        with suppress(OSError):
            if (now := file.stat().st_mtime) != seen:
                seen, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise OutputError(f"nothing was heard of {who} for {PATIENCE:.0f} s; is it running?")
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = read_json(path)
    except (OSError, ValueError):
        return None
    return found
