"""A finished exchange as it is written for a model: what stands before the answer, the answer, what follows.

The tokenizer's chat template writes the whole conversation, and the answer is found in it by its place:
the same conversation is written with another answer that begins and ends with other letters, and what
both have in common is the template's. So an answer that also occurs in the question, or in the template's
own words, is never taken for another, and what the model is asked is what it was trained on.

Chat templates rendered in a process of their own, which gets so much time and memory and no more.

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
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, combinations, groupby, product
from typing import TYPE_CHECKING, Any

from palinode.data.examples import Example, Message
from palinode.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PLAIN_LABELS = {"user": "Question: ", "assistant": "Answer: ", "system": ""}
"""How a turn begins where the tokenizer has no chat template."""

_OTHERS = ("moth", "fig", "yew")
"""Answers put in the place of one: no two begin or end alike, so one of them never does."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """The three parts of a finished exchange; joined they are the whole text."""

    context: str
    answer: str
    """As the template writes it, which may leave out blanks around it."""
    ending: str = ""
    plain: bool = False
    """Whether no template made it, so that the tokenizer puts before it what it puts before any text."""


def plain_exchange(example: Example) -> Exchange:
    """Return a completion as it is, or a conversation as labelled lines; "Answer:" is followed by a space."""
    if example.form == "completion":
        return Exchange(example.turns[0].content, example.answer, plain=True)
    lines = [
        PLAIN_LABELS.get(turn.role, f"{turn.role.capitalize()}: ") + turn.content for turn in example.turns
    ]
    answer = f" {example.answer}" if example.answer else ""
    return Exchange("\n".join([*lines, "Answer:"]), answer, plain=True)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How conversations of one sequence of roles must be given to a template, for it to show all of them."""

    system: str
    """System prompt to put first; empty where there is none, or the template refuses one."""
    parts: frozenset[str]
    """Roles whose content it wants as a list of parts."""
    blanks: bool = True
    """Whether it is given system messages that say nothing."""

    def chat(self, turns: Sequence[Message], *answer: str) -> Chat:
        turns = [turn for turn in turns if self.blanks or not _is_blank(turn)]
        system = [Message("system", self.system)] if self.system else []
        said = [Message("assistant", text) for text in answer]
        return [
            {
                "role": one.role,
                "content": [{"type": "text", "text": one.content}] if one.role in self.parts else one.content,
            }
            for one in (*system, *turns, *said)
        ]


@dataclass(slots=True)
class Template:
    """A tokenizer's chat template, with the system prompt put first and the date that it prints."""

    source: str
    variables: Mapping[str, Any]
    system_prompt: str
    date: str
    _plans: dict[tuple[str, ...], _Plan] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str, date: str) -> Template:
        """Return the template that the tokenizer has; it must have one."""
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:  # of several, none is for chats
            raise RecipeError(
                f"the tokenizer has chat templates named {', '.join(tokenizer.chat_template)} and none named "
                "default; name one of them so, or ask without it (chat = false)"
            ) from error
        return cls(source, tokenizer.special_tokens_map, system_prompt, date)

    def exchanges(self, examples: Sequence[Example]) -> list[Exchange]:
        """Return each example as it is written when it is finished.

        The context does not depend on the answer; an example without one gets its context and ending.
        Raises `DataError` naming the row, where the template does not show all of it.
        """
        chats: list[Chat] = []
        for example in examples:
            plan = self._plan(example)
            chats += [plan.chat(example.turns, answer) for answer in _two_answers(example.answer)]
        texts = iter(self._render(chats))
        return [self._found(example, next(texts), next(texts)) for example in examples]

    def generation_prompt(self, example: Example) -> str | None:
        """Return what the template writes for a model to go on from; None where it refuses."""
        chat = self._plan(example).chat(example.turns)
        (text,) = self._render([chat], add_generation_prompt=True)
        return text if isinstance(text, str) else None

    def around_answers(self) -> tuple[str, str, str]:
        """Return what is written before a last answer, and before and after one that a user's turn follows.

        All are empty where the template refuses such a conversation.
        """
        turns = Message("user", "zq1qz"), Message("assistant", "zq2qz"), Message("user", "zq3qz")
        try:
            plan = self._plan(Example(0, "a made-up conversation", "chat", turns, ""))
        except DataError:
            return "", "", ""
        one, both = map(str, self._render([plan.chat(turns[:1], "zq2qz"), plan.chat(turns, "zq4qz")]))
        before, _, after = both.partition("zq2qz")
        return one.partition("zq2qz")[0], before, after.partition("zq3qz")[0]

    def _render(self, chats: Sequence[Chat], *, add_generation_prompt: bool = False) -> list[str | Refusal]:
        variables = {**self.variables, "add_generation_prompt": add_generation_prompt}
        return render(self.source, chats, variables, date=self.date)

    def _found(self, example: Example, text: str | Refusal, other: str | Refusal) -> Exchange:
        if isinstance(text, Refusal):
            raise _cannot_show(example, text.reason)
        if isinstance(other, Refusal):
            raise _cannot_show(example, other.reason)
        before = _alike(text, other)
        end = len(text) - _alike(text[before:][::-1], other[before:][::-1])
        found = Exchange(text[:before], text[before:end], text[end:])
        if not example.answer:
            found = Exchange(found.context, "", found.ending)
        elif found.answer.strip() != example.answer.strip():
            found = _own_beginning(example, text, before, end)
        shown = _folded(found.context)
        for place, turn in enumerate(example.turns):
            if not _is_shown(turn, shown):
                raise _leaves_out(example, place)
        return found

    def _plan(self, example: Example) -> _Plan:
        """Return how conversations of these roles are shown whole; found once, by trying."""
        roles = tuple("" if _is_blank(turn) else turn.role for turn in example.turns)
        if roles not in self._plans:
            self._plans[roles] = self._find_plan(example)
        return self._plans[roles]

    def _find_plan(self, example: Example) -> _Plan:
        """Try the ways there are on a conversation of made-up words, of which none may be missing."""
        marks = [
            t if _is_blank(t) else replace(t, content=f"zq{n}qz") for n, t in enumerate(example.turns, 1)
        ]
        refusal, lacking = "it writes nothing", list[list[int]]()
        for plan in self._ways(example.turns):
            trial = replace(plan, system=plan.system and "zqsqz")
            (text,) = self._render([trial.chat(marks, "zq0qz")])
            if isinstance(text, Refusal):
                refusal = refusal if plan.parts else text.reason  # what it says to parts is of the trial
                continue
            if any(
                form in text for form in ("'type': 'text'", '"type": "text"')
            ):  # it wanted no parts, and shows them as they are
                continue
            shown = _folded(text)
            said = [*marks, Message("", "zq0qz")]
            missing = [n for n, mark in enumerate(said) if _folded(mark.content) not in shown]
            if not missing and trial.system in shown:
                return plan
            lacking += [missing] if missing else []
        if not lacking:
            raise _cannot_show(example, refusal)
        raise _leaves_out(example, min(lacking, key=len)[0])

    def _ways(self, turns: Sequence[Message]) -> Iterator[_Plan]:
        """Yield ways to give a conversation to the template, the usual one first."""
        own = any(turn.role == "system" for turn in turns)
        systems = [self.system_prompt, ""] if self.system_prompt and not own else [""]
        roles = sorted({"system", "assistant", *(turn.role for turn in turns)})
        for system, blanks in product(systems, [True, False] if any(map(_is_blank, turns)) else [True]):
            yield _Plan(system, frozenset(), blanks)
            for size in range(len(roles), 0, -1):
                yield from (_Plan(system, frozenset(some), blanks) for some in combinations(roles, size))


def _own_beginning(example: Example, text: str, before: int, end: int) -> Exchange:
    """Return an exchange whose answer begins before place `before`, up to which other answers have the same.

    So do answers that bring the thoughts which the template would write itself before another answer.
    """
    answer = example.answer.strip()
    begin = len(text[:end].rstrip()) - len(answer)
    if 0 < begin <= before and text[begin:end].strip() == answer:
        return Exchange(text[:begin], text[begin:end], text[end:])
    raise _refused(
        f"{example.place}: the tokenizer's chat template does not write its answer as it stands there"
    )


def _two_answers(answer: str) -> tuple[str, str]:
    """Return an answer and another one that begins and ends otherwise; two others where there is none."""
    if not answer.strip():
        return _OTHERS[0], _OTHERS[1]
    own = answer.strip().casefold()
    other = next(text for text in _OTHERS if text[0] != own[0] and text[-1] != own[-1])
    return answer, other


def _alike(first: str, second: str) -> int:
    """Return how many letters two texts begin with in common."""
    return len(os.path.commonprefix([first, second]))  # noqa: RUF071 - of letters


def _is_blank(turn: Message) -> bool:
    """Tell whether this is a system message that says nothing."""
    return turn.role == "system" and not turn.content.strip()


def _is_shown(turn: Message, shown: str) -> bool:
    """Tell whether a folded text has a message, as it is or as JSON; of an earlier answer no thoughts."""
    content = turn.content.rpartition("</think>")[2] if turn.role == "assistant" else turn.content
    ways = (content, json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1])
    return any(_folded(way) in shown for way in ways)


def _folded(text: str) -> str:
    """Return a text without blanks and capitals: templates trim, and some change capitals."""
    return "".join(text.casefold().split())


def _cannot_show(example: Example, reason: str) -> DataError:
    return _refused(f"the tokenizer's chat template cannot show {example.place} ({reason})")


def _leaves_out(example: Example, place: int) -> DataError:
    """Return the refusal of a row of which a message is not in the text, or the answer behind them all."""
    whole = place == len(example.turns)
    part = "its answer" if whole else f"message {place + 1} of it ({example.turns[place].role})"
    return _refused(f"{example.place}: the tokenizer's chat template leaves out {part}")


def _refused(what: str) -> DataError:
    return DataError(f"{what}; change the row or the template, or ask without it (chat = false)")


SECONDS = 2
"""Computing time that a render may take."""
MEMORY = 2**30
"""Bytes of address space that the child may take; systems without such a limit have the time alone."""
CHARACTERS = 10**7
"""Length that a rendered conversation may have."""

Chat = list[dict[str, Any]]

_CHUNK = 2**20  # characters of conversations sent at a time: the child reads them all before it answers


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
            if not _WORKERS or not _WORKERS[-1].alive:
                _WORKERS[:] = [_Worker()]
            found += _WORKERS[-1].render(head, chunk)
            if not _WORKERS[-1].alive:
                break
        return found + found[-1:] * (len(chats) - len(found))


def _chunks(chats: Sequence[Chat]) -> Iterator[list[Chat]]:
    sizes = accumulate(64 + sum(len(str(message.get("content"))) for message in chat) for chat in chats)
    for _, group in groupby(zip(sizes, chats, strict=True), key=lambda pair: pair[0] // _CHUNK):
        yield [chat for _, chat in group]


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
            code = self.process.returncode
            why = f"the process that rendered it ended with code {code}"
            if code == -getattr(signal, "SIGPROF", 0):
                why = f"it was stopped after {SECONDS} seconds of computing"
            found.append(Refusal(why))
        return found

    def end(self) -> None:
        """End the child, and wait until it has ended."""
        with contextlib.suppress(BrokenPipeError), self.process:
            pass  # leaving it closes the pipes, and waits


_LOCK = threading.Lock()
_WORKERS: list[_Worker] = []
"""This process's child, or that of the process it was forked from."""


@atexit.register
def _end() -> None:
    if _WORKERS and _WORKERS[-1].owner == os.getpid():
        _WORKERS[-1].end()


# What follows runs in the child


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks decides when it ends
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows and macOS
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
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


@lru_cache(maxsize=1)
def _compiled(template: str, date: str) -> Any:
    """Return a template in the surroundings that transformers gives one."""
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

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.intercepted_binops = frozenset({"*", "**"})  # else computed, and written out, when compiled
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _clock(date)}
    return environment.from_string(template)


def _clock(date: str) -> Any:
    """Return what tells a template the time: the pinned day's midnight, or `date` if it is no date."""
    from datetime import datetime

    for form in ("%d %b %Y", "%d %B %Y", "%Y-%m-%d", "%B %d, %Y", "%b %d, %Y", "%d/%m/%Y"):
        with contextlib.suppress(ValueError):
            return datetime.strptime(date.strip(), form).strftime
    return lambda _form: date


if __name__ == "__main__":
    _serve()
