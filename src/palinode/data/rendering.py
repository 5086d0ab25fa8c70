"""Chat templates rendered in a process of their own, which gets so much time and memory and no more.

A template is a program out of a model's folder. jinja2's sandbox keeps it from files, but not from loops
without end or texts of gigabytes; so one small child process renders them all, and is ended when a
render goes beyond `SECONDS` or `MEMORY`. It knows what transformers lets a template know, but its clock
stands at the date it is given and its dice always fall alike. This file is also the child's program.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SECONDS = 2
"""Computing time that a render may take."""
MEMORY = 2**30
"""Bytes of address space that the child may take; systems without such a limit have the time alone."""
CHARACTERS = 10**7
"""Length that a rendered conversation may have."""

Chat = list[dict[str, Any]]

_CHUNK = 2**20  # characters of conversations sent at a time: the child reads them all before it answers
_DATES = ("%d %b %Y", "%d %B %Y", "%Y-%m-%d", "%B %d, %Y", "%b %d, %Y", "%d/%m/%Y")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a template did not render a conversation."""

    reason: str


def render(
    template: str, chats: Sequence[Chat], variables: Mapping[str, Any], *, date: str
) -> list[str | Refusal]:
    """Return each conversation as the template writes it, or why it does not.

    `variables` are what the template can name besides `messages`; `date` is today, as `date_string` and
    as `strftime_now` give it. After a render that was stopped, the rest are not tried.
    """
    known = {"tools": None, "documents": None, **variables, "date_string": date}
    head = {"template": template, "variables": known, "date": date}
    with _LOCK:
        found: list[str | Refusal] = []
        for chunk in _chunks(chats):
            found += _worker().render(head, chunk)
            if not _WORKERS[-1].alive:
                break
        return found + found[-1:] * (len(chats) - len(found))


def _chunks(chats: Sequence[Chat]) -> Iterator[list[Chat]]:
    chunk: list[Chat] = []
    size = 0
    for chat in chats:
        chunk.append(chat)
        size += 64 + sum(len(str(message.get("content"))) for message in chat)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Worker:
    """The child, from the side of the one that asks it."""

    def __init__(self) -> None:
        start = "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); "
        start += "runpy.run_path(sys.argv[2], run_name='__main__')"
        from palinode.records import bare_environment  # which the child, this file too, has no use for

        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", start, json.dumps(sys.path), __file__],  # -I: not the current folder
            env=bare_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def render(self, head: Mapping[str, Any], chats: Sequence[Chat]) -> list[str | Refusal]:
        """Return the answers as far as they come; the last one says why no more did."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        found: list[str | Refusal] = []
        try:
            request = json.dumps({**head, "chats": chats}, default=str).encode()
            self.process.stdin.write(request + b"\n")
            self.process.stdin.flush()
            for _ in chats:
                reply = json.loads(self.process.stdout.readline() or b"null")
                if reply is None:
                    break
                found.append(Refusal(reply["error"]) if "error" in reply else reply["text"])
        except BrokenPipeError:
            pass
        except BaseException:  # Ctrl-C between question and answer: what still comes belongs to nobody
            self.process.kill()
            raise
        if len(found) < len(chats):
            self.end()
            found.append(Refusal(_why(self.process.returncode)))
        return found

    def end(self) -> None:
        """End the child, and wait until it has ended."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.process.wait()


_LOCK = threading.Lock()
_WORKERS: list[_Worker] = []


def _worker() -> _Worker:
    """Return this process's child; a new one where there is none, or none any more."""
    if not _WORKERS or not _WORKERS[-1].alive:
        _WORKERS[:] = [_Worker()]
    return _WORKERS[-1]


@atexit.register
def _end() -> None:
    if _WORKERS and _WORKERS[-1].owner == os.getpid():
        _WORKERS[-1].end()


def _why(code: int) -> str:
    import signal

    if code == -getattr(signal, "SIGPROF", 0):
        return f"it was stopped after {SECONDS} seconds of computing"
    return f"the process that rendered it ended with code {code}"


# What follows runs in the child


def _serve() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks decides when it ends
    _limit_memory()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        for chat in request.pop("chats"):
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
            reply = json.dumps(_answer(chat, **request))
            sys.stdout.buffer.write(reply.encode() + b"\n")
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.flush()


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # Windows and macOS
        pass


def _answer(chat: Chat, template: str, variables: Mapping[str, Any], date: str) -> dict[str, str]:
    import random

    random.seed(0)
    try:
        text = _compiled(template, date).render(messages=chat, **variables)
    except MemoryError:
        return {"error": f"it needs more than {MEMORY:,} bytes of memory"}
    except Exception as error:  # a template says no as it likes
        return {"error": " ".join(str(error).split())[:200] or type(error).__name__}
    if len(text) > CHARACTERS:
        return {"error": f"it writes more than {CHARACTERS:,} characters"}
    return {"text": text}


_TEMPLATES: dict[tuple[str, str], Any] = {}


def _compiled(template: str, date: str) -> Any:
    """Return a template in the surroundings that transformers gives one."""
    if (template, date) not in _TEMPLATES:
        _TEMPLATES.clear()
        _TEMPLATES[template, date] = _surroundings(date).from_string(template)
    return _TEMPLATES[template, date]


def _surroundings(date: str) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what a model says; nothing is made of it here."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 wants a set

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _clock(date)}
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _clock(date: str) -> Any:
    """Return what tells a template the time: the pinned day's midnight, or `date` if it is no date."""
    from datetime import datetime

    for form in _DATES:
        try:
            return datetime.strptime(date.strip(), form).strftime
        except ValueError:
            continue
    return lambda _form: date


if __name__ == "__main__":
    _serve()
