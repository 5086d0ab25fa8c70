"""Every error Palinode raises on purpose, as one tree.

    PalinodeError                  one sentence: what we got, what we need, what to do
    ├── InputError                 something the user gave cannot be used
    │   ├── CheckpointError        a model folder is missing, incomplete or of the wrong kind
    │   ├── MismatchError          two checkpoints do not fit together
    │   ├── AlgebraError           the sum asked for has no meaning (point + point)
    │   ├── DataError              a forget, retain or holdout set cannot be used
    │   ├── RecipeError            a recipe, or an option, says something we do not know
    │   └── OutputError            the place to write to is taken, unsafe or too small
    ├── DivergenceError            training produced a loss that is not a number
    ├── LedgerError                a ledger of requests is missing or was changed, or forbids what is asked
    ├── ProcessError               another process of the run failed, or is gone
    └── WorkspaceError             a workspace is in use by another run, or damaged

The command line prints any of them as one sentence and leaves with exit code 2; every other
exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "make room, or raise the limit on the size of files",
    errno.EACCES: "look at its permissions",
    errno.EPERM: "look at its permissions",
    errno.EROFS: "choose a place that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EEXIST: "remove what is in the way, or choose another name",
    errno.ELOOP: "it is a link in a circle; choose another name",
    errno.ENOTEMPTY: "somebody else wrote there meanwhile; choose another name",
}
"""What to do when the system says that a place is full, taken, closed to us, or has no such names."""


DAMAGED = (OSError, ValueError, LookupError, TypeError, RuntimeError)
"""What reading a file may raise: it is not there, is nested too deep, or does not hold what it should."""


class PalinodeError(Exception):
    """The root of every error that Palinode raises on purpose."""


class InputError(PalinodeError):
    """Something the user gave cannot be used as it is."""


class CheckpointError(InputError):
    """A model folder is missing, incomplete, unreadable or not a causal language model."""


class MismatchError(InputError):
    """Two checkpoints disagree in names, shapes, vocabulary or tying."""


class AlgebraError(InputError, TypeError):
    """A sum of points and directions that has no meaning, such as point + point."""


class DataError(InputError):
    """A data set is missing, empty, malformed, or overlaps one that it must not overlap."""


class RecipeError(InputError):
    """A recipe or an option holds an unknown key or an impossible value."""


class OutputError(InputError):
    """The output place is taken, lies inside an input, or has too little room."""


class DivergenceError(PalinodeError):
    """Training produced a loss or gradient that is not finite; the last good state is kept."""


class LedgerError(PalinodeError):
    """A ledger of erasure requests is missing or was changed, or forbids what is asked."""


class ProcessError(PalinodeError):
    """Another of the processes that share a run failed, or is gone."""


class WorkspaceError(PalinodeError):
    """A workspace is used by another run, or one of its records cannot be read."""


def meant(given: object, known: Iterable[str]) -> str:
    """Return the end of a sentence that names the nearest of these words; nothing where none is near."""
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, with the next where it ends in a colon; else its kind.

    Of what does not fit a model of pydantic, the first place that does not, and why.
    """
    if isinstance(error, ValidationError):
        amiss = error.errors(include_url=False)[0]
        parts = (".".join(map(str, amiss["loc"])), amiss["msg"].removeprefix("Value error, "))
        return ": ".join(filter(None, parts))
    first, *rest = map(str.strip, str(error).strip().splitlines() or [type(error).__name__])
    return f"{first} {rest[0]}" if rest and first.endswith(":") else first


@contextmanager
def told_as(
    kind: type[PalinodeError], what: str, advice: str = "", *errors: type[Exception]
) -> Iterator[None]:
    """Raise one of these errors, DAMAGED without any, as one of ours: what cannot be done (why); advice."""
    expected = errors or DAMAGED
    try:
        yield
    except expected as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise kind(f"{what} ({why:.200})" + (f"; {advice}" if advice else "")) from error


def broke_down(error: BaseException) -> bool:
    """Tell whether a library in Rust, such as tokenizers, gave up: no Exception, and no interruption."""
    return type(error).__name__ == "PanicException"


def unwritable(place: Path | str, error: Exception) -> OutputError:
    """Return the sentence for a place that could not be written to: full, closed to us, or gone meanwhile."""
    code, said = getattr(error, "errno", None), getattr(error, "strerror", None) or error
    if code == errno.ENOENT:
        gone = [path for path in (Path(place), *Path(place).parents) if not path.exists()]
        return OutputError(
            f"{place} cannot be written: {[Path(place), *gone][-1]} is not there, or was removed meanwhile; "
            "make it where it is missing, and repeat the call"
        )
    return OutputError(
        f"{place} cannot be written ({said}); {REMEDIES.get(code or 0, 'make room, or look at its disk')}"
    )


@contextmanager
def writing(place: Path | str, *errors: type[Exception]) -> Iterator[None]:
    """Raise the system's errors, and these, as the sentence for a place that could not be written to."""
    expected: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except expected as error:
        raise unwritable(place, error) from error
