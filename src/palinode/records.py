"""What a run leaves on disk: outcomes, scores and strict JSON. No torch here.

An *outcome* is what a model did on one example; a *score* is a metric over outcomes, with its
number of examples and an interval; a *record* is what a run writes so that others can check it.
What holds rows, or weights made from them, is written under `private`, for its owner's eyes alone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
import threading
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

Value = TypeVar("Value")

LONGEST = 255
"""Bytes of a file's name, on nearly every file system."""

RECORD_VERSION = 1
"""Version of the layout of `record.json`, described in docs/record.md."""

MAX_BYTES, MAX_JSON, MAX_TOML = 1 << 33, 1 << 30, 1 << 22
"""Of a file that is read whole: rows or a log; a record or an index; a recipe, a policy or the like."""

COMMAND: ContextVar[str] = ContextVar("COMMAND")
"""What the records that a run writes name as the way to repeat it."""

STARTING = re.compile(r"PATH|LANG|LC_\w+|TMPDIR|TEMP|TMP|SYSTEMROOT|(LD|DYLD)_\w+", re.IGNORECASE)
"""Environment variables that a child process may need."""


@contextmanager
def holding(variable: ContextVar[Value], value: Value) -> Iterator[None]:
    """Have a variable hold this value within the block, as COMMAND does the way to repeat a run."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a model finds one given answer after the prompt."""

    text: str
    logprobs: tuple[float, ...]
    """Natural-log probability of each of its tokens, the end token included."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model did on one example.

    `logprobs` and `hits` run over the scored tokens: the answer's tokens, then the end token. For a
    document every token but the first is scored. What was not asked for is empty or None.
    """

    row: int
    """Row of the example in its source, counted from 0."""
    prompt: str
    """The text the model was given, as written in the source."""
    expected: str
    """The answer in the data."""
    generated: str | None
    """The model's greedy answer; None where nothing was generated (documents)."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each scored token, given everything before it."""
    hits: tuple[bool, ...]
    """Whether the most likely token at that position was the scored one."""
    standardised: tuple[float, ...] = ()
    """(log p − μ)/σ of each scored token, μ and σ of log p over the vocabulary there (Min-K++)."""
    alternatives: Mapping[str, tuple[Likelihood, ...]] = field(default_factory=dict)
    """Other answers to the same prompt by kind: "paraphrased", "perturbed", "corrupted", …"""
    accepted: tuple[str, ...] = ()
    """Answers that count as right, where the data lists several (RESTOR)."""
    samples: tuple[str, ...] = ()
    """Answers drawn at random, in the order of their seeds."""
    gradient_norm: float | None = None
    """Mean over parameter tensors of the norm of the loss's gradient (GradNorm attack)."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said about one answer: which of the candidates it is closest to in fact."""

    row: int
    judge: str
    """The judge's name, with its model: "overlap", "http://…/v1 gpt-4o"."""
    offered: tuple[tuple[str, tuple[str, ...]], ...]
    """Candidates in the order shown: text, and the roles it plays ("truth", "ideal", "perturbed", "none",
    "accepted"). Equal texts are one candidate with several roles."""
    picked: tuple[int, ...] | None
    """Positions in `offered`, possibly several; None when the judge gave no readable reply."""
    reason: str | None = None
    """Why there is no pick."""
    decision: str | None = field(default=None, compare=False)
    """Key of the decision in the judge's cache, if it is kept there."""

    def roles(self) -> frozenset[str] | None:
        """Return every role that a picked candidate plays; None when nothing could be picked."""
        if self.picked is None:
            return None
        return frozenset(role for place in self.picked for role in self.offered[place][1])


@dataclass(frozen=True, slots=True)
class Score:
    """A metric over n examples with a 95 % interval; `value` is None when it could not be computed."""

    value: float | None
    n: int
    low: float | None
    high: float | None
    reason: str | None = None
    """Why something is missing, how many examples were left out, or a caveat; None when all is well."""


OTHERS = stat.S_IRWXG | stat.S_IRWXO
"""The rights of everybody but the owner."""


@dataclass(slots=True)
class _Mask:
    """The umask of this process, which all its threads share, and how many keep it narrow."""

    usual: int = 0
    depth: int = 0
    turn: threading.Lock = field(default_factory=threading.Lock)


_MASK = _Mask()


@contextmanager
def private() -> Iterator[None]:
    """Give what is made meanwhile to its owner alone (0700, 0600), whichever library or child makes it."""
    with _MASK.turn:
        if not _MASK.depth:
            _MASK.usual = os.umask(OTHERS)
        _MASK.depth += 1
    try:
        yield
    finally:
        with _MASK.turn:
            _MASK.depth -= 1
            if not _MASK.depth:
                os.umask(_MASK.usual)


@contextmanager
def shared() -> Iterator[None]:
    """Within `private`: write, for a moment, what is made to be shown, with the user's own umask."""
    before = os.umask(_MASK.usual) if _MASK.depth else None
    try:
        yield
    finally:
        if before is not None:
            os.umask(before)


def share(folder: Path) -> None:
    """Give a folder that was written under `private` the modes that the umask gives now."""
    usual = os.umask(OTHERS)
    os.umask(usual)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~usual)


def make_private(folder: Path) -> None:
    """Make a folder of our own, and those missing above it, for its owner alone; close it if it is there."""
    if not folder.parent.exists():
        make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_mode & OTHERS and folder.stat().st_uid == os.geteuid():
        with suppress(OSError):  # a file system without modes
            folder.chmod(0o700)


def close_to_others(*places: Path) -> bool:
    """Take everybody else's rights from files and folders and all in them; tell whether there were some."""
    found = False
    for place in places:
        for path in (place, *place.rglob("*")):
            with suppress(OSError):  # gone meanwhile, another user's, or a file system without modes
                mode = path.lstat().st_mode
                if mode & OTHERS and not stat.S_ISLNK(mode):
                    found = True
                    path.chmod(stat.S_IMODE(mode) & ~OTHERS)
    return found


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON (no NaN) so that a reader sees the old file or the new one, never a part."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: to a neighbour first, then renamed over the final name.

    A file that is there already lends the new one its mode, less what the umask takes away. Raises OSError
    with the name of the file when there is no room, or no such folder any more.
    """
    partial = beside(path)
    try:
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666
        partial.unlink(missing_ok=True)  # an old one would keep its own mode
        with open(partial, "w", encoding="utf-8", opener=lambda name, how: os.open(name, how, mode)) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def cache_folder(kind: str) -> Path:
    """Return the folder of one kind of remembered facts: in $PALINODE_CACHE, or in the user's cache folder.

    Raises RuntimeError when there is no home folder.
    """
    if chosen := os.environ.get("PALINODE_CACHE"):
        return Path(chosen).expanduser() / kind
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "palinode" / kind


def keep_whole(path: Path, content: Any) -> None:
    """Write JSON into a private cache, where several may write one file at once, each a whole one."""
    make_private(path.parent)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def beside(path: Path, ending: str = ".partial") -> Path:
    """Return the hidden neighbour `.NAME.partial` of a path, or one with another ending."""
    return path.parent / fitting(f".{path.name}", ending)  # the root has no name


def workspace_beside(output: Path) -> Path:
    """Return where the workspace of an output lies, unless it was put elsewhere."""
    return output.parent / fitting(output.name, ".workspace")


def fitting(name: str, ending: str = "") -> str:
    """Return a name with an ending as file systems take it, in 255 bytes: or the start and a hash.

    >>> fitting("out", ".workspace"), len(fitting("o" * 250, ".workspace"))
    ('out.workspace', 255)
    """
    raw, room = os.fsencode(name), LONGEST - len(os.fsencode(ending))
    if len(raw) > room:
        mark = hashlib.blake2b(raw, digest_size=4).hexdigest()
        name = f"{raw[: room - 9].decode(errors='ignore')}~{mark}"
    return name + ending


class NotReadError(OSError):
    """A file that is not read: it is a pipe, a device or a folder, or has too many bytes."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EINVAL, reason)

    def __str__(self) -> str:
        return self.strerror or ""


def read_bytes(path: Path, *, limit: int = MAX_BYTES) -> bytes:
    """Return all bytes of an ordinary file; raises OSError where there is none, or it has more than that."""
    # opening a pipe would wait for its writer
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise NotReadError("it is no ordinary file")
        if status.st_size > limit:
            raise NotReadError(f"it has {status.st_size} bytes where {limit} would be many")
        return file.read(status.st_size)


def bare_environment() -> dict[str, str]:
    """Return what a child process needs of the environment to start, and no keys and tokens."""
    return {name: value for name, value in os.environ.items() if STARTING.fullmatch(name)}


def ordinary(path: Path) -> Path:
    """Return the path of a file that a library opens; raises OSError for a pipe or a device."""
    if path.exists() and not path.is_file():
        raise NotReadError("it is no ordinary file")
    return path


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises OSError as `read_bytes` does, or ValueError."""
    try:
        return json.loads(read_bytes(path, limit=MAX_JSON).decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raises ValueError when it names a key twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it names {twice!a:.200} twice")
    return entries


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file; raises OSError as `read_bytes` does, or ValueError."""
    try:
        content: dict[str, Any] = tomllib.loads(read_bytes(path, limit=MAX_TOML).decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return content


def packaged(name: str) -> str:
    """Return the text of a file that comes with the package, named from its folder on."""
    return files("palinode").joinpath(*name.split("/")).read_text(encoding="utf-8")


def packaged_table(name: str) -> dict[str, Any]:
    """Return the content of a TOML file that comes with the package."""
    return tomllib.loads(packaged(name))


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested mappings under its dotted key; the mappings themselves come first."""
    for key, value in tree.items():
        yield prefix + key, value
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")


def plain_scores(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, dict[str, Any]]:
    """Return scores by set and metric as records hold them."""
    return {name: {metric: asdict(score) for metric, score in own.items()} for name, own in scores.items()}


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write outcomes as JSON lines, one a line, in the order given."""
    lines = (json.dumps(asdict(outcome), ensure_ascii=False, allow_nan=False) for outcome in outcomes)
    write_text(path, "".join(f"{line}\n" for line in lines))


OUTCOME = TypeAdapter(Outcome)
"""What makes an outcome of its fields."""


def read_outcomes(path: Path) -> Iterator[Outcome]:
    """Read the outcomes that `write_outcomes` wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield OUTCOME.validate_python(json.loads(line))
