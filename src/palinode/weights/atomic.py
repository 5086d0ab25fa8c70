"""A folder that is whole or not there: filled beside its place, and named when it is finished.

It is written as a hidden neighbour, `.NAME.partial`, which a lock keeps for one run alone, and takes its
final name in one step, last. Whatever kills the writer, a reader never finds half of it under that name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from palinode.errors import CheckpointError, InputError, OutputError, told_as, unwritable
from palinode.progress import size_text
from palinode.records import beside


def check_output(output: Path, inputs: Sequence[Path], *, needs: int = 0) -> None:
    """Raise OutputError unless `output` is free, apart from all inputs, and has room for `needs` bytes."""
    if str(output) == output.anchor:
        raise OutputError(f"nothing can be written as {output}; name a folder in it")
    if lost := next((place for place in output.parents if place.name == ".." and not place.exists()), None):
        raise OutputError(
            f"{output} goes up out of {lost.parent}, which does not exist; name it without that"
        )
    with told_as(OutputError, f"{output} cannot be used", "choose another output"):
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
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


def check_apart(output: Path, models: Iterable[Path]) -> None:
    """Raise OutputError for a folder inside one of these models' folders."""
    place = output.resolve()
    for model in models:
        if model in (place, *place.parents):
            raise OutputError(f"{output} lies inside the model {model}; name another folder")


def check_room(place: Path, needs: int, advice: str) -> None:
    """Raise OutputError unless there are `needs` bytes where a folder is, or will be."""
    home = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(home).free
    if free < needs:
        raise OutputError(f"{home} has {size_text(free)} free where {size_text(needs)} are needed; {advice}")


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
