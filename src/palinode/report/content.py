"""What a report says, as plain values: sections of paragraphs, lists, tables and pictures.

Builders (run_report, audit_report, …) make these from records; `markdown` and `show` here and `html_report`
on its page write them out. Texts are plain: whoever writes them out escapes them. None among the blocks of
a section stands for what the record has nothing to say of, and a section without blocks is not written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from palinode.report.pictures import Figure
from palinode.report.words import DASH, escaped, fenced, interval_text, model_label, number

Tone = Literal["good", "unsure", "bad", "chosen"]
STYLES = {"good": "green", "unsure": "yellow", "bad": "bold red", "chosen": "bold"}
"""Of a toned cell in the terminal."""
MOST_NAME = 24
"""Letters of a name that a terminal's table does not break."""
MOST_CASES, MOST_LETTERS = 10, 400
"""Cases of a set, and letters of an answer, that the Markdown shows; the page has all."""


@dataclass(frozen=True, slots=True)
class GridCell:
    """A text of a grid, and perhaps a smaller one under it (an interval, a reason)."""

    text: str
    below: str | None = None
    tone: Tone | None = None


Row = Sequence[GridCell | str]


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows of cells under a head; the columns after the first `text_columns` hold numbers."""

    title: str
    """Stands above it in the terminal, is read to those who do not see it, and clicked where it is folded."""
    head: Sequence[str]
    rows: Sequence[Row]
    text_columns: int = 1
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Sentences."""

    text: str
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """A line that leads to another file."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Items:
    """Lines of a list; a pair is a label that stands out and its text."""

    lines: Sequence[str | tuple[str, str] | Link]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Short facts by name."""

    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Code:
    """A command to copy."""

    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture: drawn on the page from its figure, and a file beside the Markdown where there is one."""

    name: str
    label: str
    """What it shows, for those who do not see it."""
    figure: Figure | None
    titled: bool = False
    """Whether what it shows stands above it."""
    caption: str | None = None
    file: str | None = None
    picks: bool = False
    """Whether a click on a mark shows its figures below."""


@dataclass(frozen=True, slots=True)
class Lights:
    """Claims with their traffic lights, as `Claim.as_json` gives them."""

    claims: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Cases:
    """Answers of the models side by side, the worst first, a part a set."""

    parts: Sequence[Mapping[str, Any]]
    """Each with `name`, `label`, `against`, `of` and `rows`."""


Block = Grid | Heading | Paragraph | Items | Pairs | Code | Picture | Lights | Cases


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report under its heading."""

    title: str
    blocks: Sequence[Block]
    bar: str = ""
    """Its name in the bar of the page; empty for those that stand before the bar or need no entry."""
    intro: str = ""

    @property
    def anchor(self) -> str:
        """What links on the page lead to."""
        return re.sub(r"\W+", "-", self.title.lower())


def section(title: str, *blocks: Block | None, bar: str = "", intro: str = "") -> list[Section]:
    """Return a section of the blocks that there are, or nothing."""
    there = [block for block in blocks if block is not None and not _is_empty(block)]
    return [Section(title, there, bar, intro)] if there else []


def _is_empty(block: Block) -> bool:
    content = {Grid: "rows", Items: "lines", Pairs: "values", Lights: "claims", Cases: "parts"}
    if isinstance(block, Picture):
        return block.figure is None and block.file is None
    return type(block) in content and not getattr(block, content[type(block)])


def score_cell(score: Mapping[str, Any] | None) -> GridCell:
    """Return a score with its interval under it; a missing one is a dash."""
    score = score or {}
    return GridCell(number(score.get("value")), interval_text(score))


# Markdown


def markdown(title: str, sections: Iterable[Section]) -> str:
    """Return a page of Markdown; text that comes from the user is escaped."""
    lines = [f"# {escaped(title)}", ""]
    for part in sections:
        body = [line for block in part.blocks for line in _lines(block)]
        if body:
            lines += [f"## {escaped(part.title)}", ""] if part.title else []
            lines += [escaped(part.intro), ""] if part.intro else []
            lines += body
    return "\n".join(lines).strip() + "\n"


def _lines(block: Block) -> list[str]:
    match block:
        case Grid():
            above = [f"{escaped(block.title)}:", ""] if block.folded else []
            return [*above, *_grid_lines(block)]
        case Heading():
            return [f"### {escaped(block.text)}", ""]
        case Paragraph():
            return [f"**{escaped(block.text)}**" if block.strong else escaped(block.text), ""]
        case Items():
            return [*map(_item_line, block.lines), ""]
        case Pairs():
            return [*(f"- {escaped(name)}: {escaped(value)}" for name, value in block.values.items()), ""]
        case Code():
            return fenced(block.text)
        case Picture():
            return [f"![{escaped(block.label)}]({block.file})", ""] if block.file else []
        case Lights():
            return _lines(
                Items(
                    [
                        (one["question"], f"{one['symbol']} {one['word']}. {one['sentence']}")
                        for one in block.claims
                    ]
                )
            )
        case Cases():
            return [line for part in block.parts for line in _case_lines(part)]


def _item_line(line: str | tuple[str, str] | Link) -> str:
    if isinstance(line, Link):
        return f"- {escaped(line.name)}: [{escaped(line.address)}]({line.address})"
    return f"- **{escaped(line[0])}** {escaped(line[1])}" if isinstance(line, tuple) else f"- {escaped(line)}"


def _grid_lines(grid: Grid) -> list[str]:
    rule = ["---" if column < grid.text_columns else "---:" for column in range(len(grid.head))]
    head = [escaped(title) for title in grid.head]
    rows = [[_cell_text(cell) for cell in row] for row in grid.rows]
    return [*(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)), ""]


def _cell_text(cell: GridCell | str) -> str:
    if isinstance(cell, str):
        return escaped(cell)
    strong = "**" if cell.tone in ("bad", "chosen") and cell.text else ""
    below = f" ({escaped(cell.below)})" if cell.below else ""
    return f"{strong}{escaped(cell.text)}{strong}{below}"


def _case_lines(part: Mapping[str, Any]) -> list[str]:
    """Return the worst cases of a set."""
    lines = [f"### On the {escaped(part['label'])}, the worst first", ""]
    for case in part["rows"][:MOST_CASES]:
        lines += [f"- Row {case['row']}: **{_cut(case['prompt'])}**"]
        lines += [f"  - in the data: {_cut(case['expected'])}"]
        lines += [
            f"  - {escaped(model_label(model))} ({number(case['probabilities'][model])}): {_cut(answer)}"
            for model, answer in case["answers"].items()
        ]
    return [*lines, ""]


def _cut(answer: str | None) -> str:
    if answer is None:
        return DASH
    return escaped(answer if len(answer) <= MOST_LETTERS else f"{answer[:MOST_LETTERS]} …")


# The terminal


def show(blocks: Iterable[Block], console: Console) -> None:
    """Print grids, paragraphs and lists on the terminal."""
    for block in blocks:
        match block:
            case Grid():
                console.print(_table(block))
            case Paragraph():
                console.print(block.text, soft_wrap=True)
            case Items():
                for line in block.lines:
                    console.print(str(line), soft_wrap=True)
            case _:
                raise TypeError(f"a {type(block).__name__} is not for the terminal")


def _table(grid: Grid) -> Table:
    """Return a grid as rich's table, intervals on the line below; a row of one cell begins a part."""
    table = Table(title=Text(grid.title), title_justify="left")
    longest = max(
        (len(word) for row in grid.rows for word in _terminal_cell(row[0]).plain.split()), default=0
    )
    for place, title in enumerate(grid.head):
        justify: JustifyMethod = "left" if place < grid.text_columns else "right"
        least = None if place else min(longest, MOST_NAME)  # names are not broken while there is room
        table.add_column(Text(title), justify=justify, overflow="fold", min_width=least)
    for row in grid.rows:
        if len(row) == 1:
            table.add_section()
        table.add_row(*map(_terminal_cell, row))
    return table


def _terminal_cell(cell: GridCell | str) -> Text:
    if isinstance(cell, str):
        return Text(cell)
    text = Text(cell.text, style=STYLES[cell.tone] if cell.tone else "")
    return text.append(f"\n{cell.below.replace(' – ', '–')}", style="dim") if cell.below else text
