"""The pages of the documentation as tests see them: fenced blocks, the commands in them, links, anchors.

A comment before a block of commands says what is special about it:

    <!-- not run: REASON -->   it needs a network, a GPU or hours; its options are checked all the same
    <!-- exit: 0 or 1 -->      exit codes that the commands of the block may have; else 0
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(
    r"^(?P<note>(?:<!--[^\n]*-->\n\s*)?)^(?P<ticks>`{3,})(?P<language>\w*)\n(?P<code>.*?)^(?P=ticks)$",
    flags=re.MULTILINE | re.DOTALL,
)
SHELL = ("sh", "bash")
ELLIPSES = ("…", "...")


@dataclass(frozen=True, slots=True)
class Block:
    """One block of commands."""

    page: Path
    line: int
    """Of the fence, counted from 1."""
    code: str
    note: str
    """What the comment before it says."""

    @property
    def runs(self) -> bool:
        return not self.note.startswith("not run: ")

    @property
    def codes(self) -> set[int]:
        found = re.fullmatch(r"exit: (\d)(?: or (\d))?", self.note)
        return {int(code) for code in found.groups() if code} if found else {0}

    @property
    def commands(self) -> list[str]:
        """Its commands, each with its continuations and what is fed to it with <<."""
        lines, found = iter(self.code.splitlines()), []
        for line in lines:
            command = line
            while command.endswith("\\"):
                command = command[:-1] + next(lines).lstrip()
            if end := re.search(r"<<'(\w+)'$", command):
                command = "\n".join([command, *_until(end[1], lines)])
            if command.strip() and not command.lstrip().startswith("#"):
                found.append(command)
        return found

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def _until(end: str, lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield line
        if line == end:
            return


def blocks(page: Path) -> list[Block]:
    """The blocks of commands of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("ticks")) + 1,
            found["code"],
            found["note"].strip().removeprefix("<!--").removesuffix("-->").strip(),
        )
        for found in FENCE.finditer(text)
        if found["language"] in SHELL
    ]


def palinode_words(command: str) -> tuple[str, list[str]] | None:
    """What is piped into palinode, and palinode's own words; None for a command without it."""
    before, _, last = command.rpartition(" | ")
    if not last.startswith("palinode "):
        return None
    words = shlex.split(last, comments=True)[1:]
    return before, words[: words.index(">")] if ">" in words else words


def without_code(text: str) -> str:
    """A page's text without its code, in which nothing is a link or a heading."""
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", FENCE.sub("", text), flags=re.DOTALL)


def links(page: Path) -> list[str]:
    """What the page's links lead to."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))


def github_anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(
            next(
                name for number in range(99) if (name := f"{slug}-{number}" if number else slug) not in found
            )
        )
    return found
