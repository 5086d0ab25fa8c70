"""What an exposure log is of, and the sessions in which it was written: its small JSON files.

`log.json` says what was trained on; a log of other data, another tokenizer, another run or another salt
is refused. `session-0002.json` says from which step a start of the training went on, in how many processes.
"""

from __future__ import annotations

import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from palinode.errors import DataError
from palinode.history.duplicates import row_hash
from palinode.history.segments import FORMAT_VERSION
from palinode.records import read_json, write_json

MAX_STEP = 2**31 - 1
"""Steps are stored in 32 bits."""

MAX_PROCESSES = 100_000

SALT_CHECK = "palinode"
"""Its hash is written into a salted log, so that a wrong salt is noticed."""


@dataclass(frozen=True, slots=True)
class LogHeader:
    """What a log is of; two logs with different headers are of different trainings."""

    run: str
    """Names the training; sessions of one training share it."""
    data: str
    """Fingerprint of the data set (`fingerprint_rows`)."""
    tokenizer: str
    """Fingerprint of the tokenizer (`fingerprint_tokenizer`)."""
    salted: bool = False
    """Whether hashes can only be made with a salt, which the log does not hold."""
    salt_check: str | None = None
    version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class Session:
    """One start of a training."""

    number: int
    """Counted from 1."""
    start: int
    """The step it went on from; its first step is the next one."""
    world_size: int
    """Processes that log."""


def salt_check(salt: bytes) -> str | None:
    """Return what a log writes down to know its salt by; None without one."""
    return row_hash(SALT_CHECK, salt=salt).hex() if salt else None


def rank_folder(folder: Path, session: int, rank: int) -> Path:
    """Return where one process of one session writes."""
    return folder / f"session-{session:04d}" / f"rank-{rank:05d}"


def read_header(folder: Path) -> LogHeader:
    """Return what a log is of; raise DataError where there is none."""
    try:
        found = read_json(folder / "log.json")
        if found["version"] > FORMAT_VERSION:
            raise DataError(
                f"{folder} has format {found['version']}, newer than {FORMAT_VERSION}; use a newer Palinode"
            )
        header = LogHeader(**found)
        texts = (header.run, header.data, header.tokenizer, header.salt_check or "")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("its fingerprints are no texts")
        return header
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no exposure log (log.json is missing); name the folder that ExposureLog wrote"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder / 'log.json'} cannot be read ({error})") from None


def read_sessions(folder: Path) -> list[Session]:
    """Return the sessions of a log in their order."""
    found = []
    for path in sorted(folder.glob("session-*.json")):
        try:
            session = Session(**read_json(path))
            if not _is_sound(session):
                raise ValueError("its numbers cannot be those of a training")
            found.append(session)
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}); restore it from a copy") from None
    return sorted(found, key=lambda session: session.number)


def _is_sound(session: Session) -> bool:
    bounds = (
        (session.number, 1, MAX_STEP),
        (session.start, 0, MAX_STEP),
        (session.world_size, 1, MAX_PROCESSES),
    )
    return all(type(value) is int and least <= value <= most for value, least, most in bounds)


def check_same(header: LogHeader, folder: Path, **wanted: str | None) -> None:
    """Raise DataError where a log is not of the data, tokenizer or run that is wanted; None asks nothing."""
    names = {"data": "another data set", "tokenizer": "another tokenizer", "run": "another run"}
    for name, expected in wanted.items():
        if expected and getattr(header, name) != expected:
            raise DataError(
                f"the log in {folder} is of {names[name]} (fingerprint {getattr(header, name):.12}, not "
                f"{expected:.12}); name the log of this training, or another folder"
            )


def agree(
    folder: Path, wanted: LogHeader, start: int, rank: int, world_size: int, session: int | None
) -> tuple[LogHeader, int]:
    """Let process 0 write what the log is and choose the session, and let all the others know."""
    if world_size == 1:
        return _begin_session(folder, wanted, start, world_size, session)
    if not _is_distributed():
        if session is None or not wanted.run:
            raise DataError(
                f"{world_size} processes must all name the same session (session=1, 2, …) and run, since "
                "torch.distributed is not there to agree on them"
            )
        if rank == 0:
            return _begin_session(folder, wanted, start, world_size, session)
        return wanted, session
    import torch.distributed

    told: list[Any] = [None]
    if rank == 0:
        try:
            told = [_begin_session(folder, wanted, start, world_size, session)]
        except DataError as error:  # the others must not wait for ever
            told = [error]
    torch.distributed.broadcast_object_list(told, src=0)
    if isinstance(told[0], DataError):
        raise told[0]
    header: LogHeader = told[0][0]
    return header, int(told[0][1])


def _is_distributed() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _begin_session(
    folder: Path, wanted: LogHeader, start: int, world_size: int, session: int | None
) -> tuple[LogHeader, int]:
    """Write log.json if there is none, and the session's file."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "log.json").exists():
        header = read_header(folder)
        check_same(header, folder, data=wanted.data, tokenizer=wanted.tokenizer, run=wanted.run)
        if header.salt_check != wanted.salt_check:
            raise DataError(
                f"the log in {folder} was written with {'another salt' if header.salted else 'no salt'}; "
                "go on with that one, or name another folder"
            )
    else:
        header = LogHeader(**{**asdict(wanted), "run": wanted.run or uuid.uuid4().hex})
        write_json(folder / "log.json", asdict(header))
    last = max((known.number for known in read_sessions(folder)), default=0)
    number = last + 1 if session is None else session
    if number <= last:
        raise DataError(f"{folder} has a session {number} already; the next one is {last + 1}")
    write_json(folder / f"session-{number:04d}.json", asdict(Session(number, start, world_size)))
    return header, number
