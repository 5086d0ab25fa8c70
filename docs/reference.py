"""Write docs/cli.md from the commands' own help, or check that it is current.

python docs/reference.py [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import typer
from typer.testing import CliRunner

from palinode.cli.app import app

PAGE = Path("docs/cli.md")
OPENING = """# The command line

Written by `make docs` from the commands' own help; `make check` fails when it is out of date.

Exit codes: 0 done; 1 the verdict on a model is red, `audit` failed it, `verify` found a change, or
`reproduce` other bytes; 2 something you can mend, or an interruption, said in one sentence; 3 nothing was
subtracted, or there was nothing to forget. Progress goes to standard error, results to standard output. An
interrupted `unlearn`, `filter`, `run`, `finetune`, `demo`, `compare`, `audit` or `reproduce` goes on where it
was when the same command is given again.
"""


def render() -> str:
    """Return the page."""
    commands: list[tuple[str, ...]] = [(name,) for name in _names(app)]
    for group in app.registered_groups:
        if group.name and group.typer_instance:
            commands += [(group.name,), *((group.name, name) for name in _names(group.typer_instance))]
    return "\n".join([OPENING, *map(_section, commands)])


def _names(commands: typer.Typer) -> list[str]:
    return [
        command.name or command.callback.__name__
        for command in commands.registered_commands
        if command.callback
    ]


def _section(words: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="palinode", terminal_width=100)
    text = re.sub(r"[ \t]+$", "", result.output, flags=re.MULTILINE).strip()
    return f"## palinode {' '.join(words)}\n\n```text\n{text}\n```\n"


def main() -> None:
    """Write the page, or with --check fail when it differs."""
    text = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE} is out of date; run `make docs`")


if __name__ == "__main__":
    main()
