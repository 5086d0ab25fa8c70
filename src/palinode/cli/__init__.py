"""The command line: one verb a public function. It parses, calls, and shows.

Exit codes: 0 done; 1 the verdict is red, `audit` failed a model, `verify` found a change, or `reproduce`
other bytes; 2 something the user can mend, or an interruption, said in one sentence; 3 nothing was
subtracted, or there was nothing to forget; anything else is a bug of ours and comes with a traceback.
"""

from __future__ import annotations

import _thread
import atexit
import errno
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

RESUMED = (
    "unlearn", "filter", "run", "finetune", "influence", "demo", "compare", "audit", "requests", "reproduce",
)  # fmt: skip
"""Verbs that keep what they have finished, and go on from there."""


def main() -> None:
    """Run the `palinode` command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.unraisablehook = _raise_again
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # what libraries start imports nothing from this folder
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:  # it is closed, and would lend its number to the next file
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdin, sys.stdout):  # a terminal without Greek letters is no reason to fail
        with suppress(AttributeError, io.UnsupportedOperation):  # it is no file, or was read from already
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = _call()
    except KeyboardInterrupt:  # before the parser was there to take it
        code = _interrupted()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # torch's threads may abort while Python takes itself apart
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _call() -> int:
    """Parse the command line, run its verb, and return the exit code."""
    from palinode.cli.app import app
    from palinode.errors import REMEDIES, PalinodeError, broke_down, unwritable
    from palinode.records import COMMAND, holding

    if empty := _empty(sys.argv[1:]):
        return _refuse(
            f"{empty} is empty (a shell variable that is not set?); give it a value, or leave it out"
        )
    try:
        with holding(COMMAND, shlex.join(["palinode", *sys.argv[1:]])):
            code = _run(app)
        sys.stdout.flush()
    except PalinodeError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if _is_lost(error):
            return _refuse("the current folder was removed or replaced; go to one that is there, and repeat")
        if error.errno == errno.ENOENT and isinstance(error.__cause__, OSError):  # of records.write_text
            return _refuse(str(unwritable(error.filename, error)))
        if error.errno not in REMEDIES:
            raise
        place = error.filename or "a file"
        return _refuse(f"{place} cannot be used ({error.strerror}); {REMEDIES[error.errno]}")
    except RuntimeError as error:  # what Path.resolve says of links in a circle, before Python 3.13
        if not str(error).startswith("Symlink loop"):
            raise
        return _refuse(f"{str(error).partition(' from ')[2]} cannot be used; {REMEDIES[errno.ELOOP]}")
    except Exception as error:
        if not hasattr(error, "format_message"):  # only the parser's errors have one
            raise
        return _misused(error)
    except BaseException as error:
        if not broke_down(error):
            raise
        return _refuse(f"a tokenizer breaks down on these texts ({error}); is its tokenizer.json whole?")
    if code == 130:  # what the parser makes of Ctrl-C
        return _interrupted()
    return code if isinstance(code, int) else 0


def _empty(words: Sequence[str]) -> str | None:
    """Return the option, or the argument, that was given an empty text: as a path, that is this folder."""
    for before, word in pairwise(("", *words)):
        if not word:
            return before if before.startswith("-") else "an argument"
        if word.startswith("--") and word.find("=") == len(word) - 1:
            return word[:-1]
    return None


def _is_lost(error: OSError) -> bool:
    """Tell whether the current folder is not there any more."""
    try:
        os.getcwd()  # noqa: PTH109 - quick help needs no pathlib
    except FileNotFoundError:
        return error.errno == errno.ENOENT
    return False


def _run(app: Any) -> Any:
    """Run the verb; of several processes one does, helped by the others."""
    if "WORLD_SIZE" not in os.environ:
        return app(standalone_mode=False)
    from palinode.processes import together

    return together(lambda: app(standalone_mode=False))


def _interrupted() -> int:
    """Say so; the exit code is ours even where the signal came inside exec, which `python -m` remembers."""
    exec("")  # makes it forget; the making of a dataclass is such a place
    if sys.argv[1:2] and sys.argv[1] in RESUMED:
        return _refuse(
            "interrupted; what was finished is kept, and the same command goes on where this one stopped "
            "(secret like the rows; palinode forget-workspace OUTPUT destroys it)"
        )
    return _refuse("interrupted; the same command begins anew")


def _misused(error: Any) -> int:
    """Say what is wrong with the command line, or show the help where there is nothing on it."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    command = error.ctx.command_path if error.ctx else "palinode"
    return _refuse(f"{error.format_message().rstrip('.')}; see {command} --help")


def _refuse(sentence: str) -> int:
    rank = os.environ.get("RANK", "0")
    if rank.isdecimal() and rank != "0":
        return 0  # process 0 speaks for all
    line = "".join(letter if letter.isprintable() else " " for letter in sentence)
    print(f"palinode: {line}", file=sys.stderr)
    return 2


def _raise_again(found: Any) -> None:
    """Interrupt again, a little later, where it came while something was destroyed and Python dropped it."""
    if found.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, _thread.interrupt_main, [signal.SIGTERM]).start()
    else:
        sys.__unraisablehook__(found)


# Tokenizers warn about forks that never happen here.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
