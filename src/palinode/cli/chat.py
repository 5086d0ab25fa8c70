"""`palinode chat`: ask the unlearned model and the one it came from the same questions, at any α and β."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from palinode.cli.console import given, listener, out
from palinode.cli.options import KEYS, takes
from palinode.errors import PalinodeError, RecipeError
from palinode.progress import plain
from palinode.settings import Questioning

if TYPE_CHECKING:
    from palinode.pipeline.chatting import Chat


@takes(of=Questioning, only=["allow_pickle", "device"])
def chat(
    settings: Questioning,
    folder: Path,
    against: str | None = None,
    base: str | None = None,
    alone: bool = False,
    max_new_tokens: int = 200,
) -> None:
    """Ask an unlearned model and its target the same.

    α and β can be changed while talking.

    Questions and commands (/help lists them) are read from standard input, a line each.
    """
    from palinode.pipeline.chatting import open_chat

    if alone and against:
        raise RecipeError("--alone compares with no model, so --against has no use; leave one of them out")
    talk = open_chat(
        folder,
        against=against,
        base=base,
        alone=alone,
        allow_pickle=settings.allow_pickle,
        device=settings.device,
        listener=listener(),
    )
    talk.length = max_new_tokens
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # Ctrl-C alone ends an answer
    try:
        _Terminal(talk).talk()
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminal:
    """What is read and shown during a talk."""

    def __init__(self, talk: Chat) -> None:
        self.chat = talk
        self.as_json = given("as_json")
        self.console = out()
        self.typed = sys.stdin.isatty()
        self.commands: dict[str, Callable[[str], None]] = {
            "/scales": self._set_both,
            "/alpha": lambda text: self._set(forget=text),
            "/beta": lambda text: self._set(retain=text),
            "/reset": self._reset,
            "/system": self._system,
            "/new": self._new,
            "/length": self._length,
            "/help": lambda _text: self._note(KEYS["chat"]["help"]),
        }

    def talk(self) -> None:
        """Read lines until they end, and act on each."""
        self._greet()
        for line in self._lines():
            command, _, rest = line.partition(" ")
            if command in ("/quit", "/exit"):
                return
            try:
                if command in self.commands:
                    self.commands[command](rest.strip())
                elif line.startswith("/"):
                    self._note(f"there is no command {command}; /help lists them")
                else:
                    self._ask(line)
            except PalinodeError as error:
                self._note(str(error))
            except KeyboardInterrupt:  # while weights were changing: half a sum is no model
                if not self.typed:
                    raise
                self._reset("")

    def _lines(self) -> Iterator[str]:
        """Yield what is typed or piped in, without empty lines."""
        if self.typed:
            with suppress(ImportError):
                import readline  # noqa: F401 - gives `input` a history and the arrow keys
        while True:
            try:
                line = input("\n> " if self.typed and not self.as_json else "").strip()
            except EOFError:
                if self.typed:
                    self._note("")
                return
            except KeyboardInterrupt:
                if not self.typed:
                    raise
                self._note("\n/quit or Ctrl-D ends the talk")
                continue
            if line:
                yield line

    def _greet(self) -> None:
        if given("quiet"):
            return
        names = " and ".join(speaker.name for speaker in self.chat.speakers)
        fixed = f"The scales are fixed: {self.chat.fixed}." if self.chat.fixed else "α and β can be changed."
        form = "text that it shall go on with" if self.chat.form == "completion" else "question"
        self._note(f"Talking with {names} ({self.chat.folder.folder.name}{self._at()}). {fixed}")
        self._note(f"Type a {form}; /help lists the commands.")

    def _ask(self, question: str) -> None:
        """Put a question to every model, one after the other."""
        if self.as_json:
            answers = {
                speaker.name: self.chat.ask(question, speaker, lambda _text: None)
                for speaker in self.chat.speakers
            }
            forget, retain = self.chat.scales or (None, None)
            entry = {"question": question, "forget_scale": forget, "retain_scale": retain, "answers": answers}
            print(json.dumps(entry, allow_nan=False), flush=True)
            return
        if not self.typed:
            self.console.print(f"\n> {question}", soft_wrap=True)
        for speaker in self.chat.speakers:
            own = self._at() if speaker is self.chat.speakers[0] else ""
            self.console.print(f"{speaker.name}{own}", style="bold")
            self.console.file.write("  ")
            self.chat.ask(question, speaker, self._say)
            self.console.file.write("\n")
            self.console.file.flush()

    def _say(self, text: str) -> None:
        """Show a part of an answer; what could steer the terminal is left out."""
        shown = "".join(letter for letter in text if letter.isprintable() or letter == "\n")
        self.console.file.write(shown.replace("\n", "\n  "))
        self.console.file.flush()

    def _note(self, text: str) -> None:
        """Say something that is no answer."""
        if self.as_json:
            print(plain(text), file=sys.stderr)
        else:
            self.console.print(text, soft_wrap=True)

    def _at(self) -> str:
        if self.chat.scales is None:
            return ""
        forget, retain = self.chat.scales
        return f", α {forget:g}, β {retain:g}"

    # Commands

    def _set_both(self, text: str) -> None:
        if len(text.split()) != 2:
            raise RecipeError("/scales needs two numbers, α and β, as in /scales 0.8 0.5")
        forget, retain = text.split()
        self._set(forget=forget, retain=retain)

    def _set(self, *, forget: str | None = None, retain: str | None = None) -> None:
        from palinode.pipeline.chatting import parse_scale

        alpha, beta = self.chat.scales or (0.0, 0.0)
        alpha = alpha if forget is None else parse_scale(forget)
        beta = beta if retain is None else parse_scale(retain)
        started = time.monotonic()
        self.chat.set_scales(alpha, beta)
        self._note(f"α {alpha:g}, β {beta:g} ({time.monotonic() - started:.1f} s), a new conversation")

    def _reset(self, _text: str) -> None:
        self.chat.reset()
        self._note(f"as it was saved{self._at()}, a new conversation")

    def _system(self, text: str) -> None:
        self.chat.system = text or None
        self.chat.begin_anew()
        self._note("a new conversation, with that system prompt" if text else "a new conversation")

    def _new(self, _text: str) -> None:
        self.chat.begin_anew()
        self._note("a new conversation")

    def _length(self, text: str) -> None:
        if not text.isdecimal() or not int(text):
            raise RecipeError("/length needs a number of tokens, as in /length 100")
        self.chat.length = int(text)
        self._note(f"answers of up to {int(text)} tokens")
