"""What a report says, as plain values: sections of paragraphs, lists, tables and pictures.

Builders (run_report, audit_report, …) make these from records; `markdown` and `show` here and `html_report`
on its page write them out. Texts are plain: whoever writes them out escapes them. None among the blocks of
a section stands for what the record has nothing to say of, and a section without blocks is not written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from palinode.records import packaged, packaged_table
from palinode.report.pictures import Figure
from palinode.report.words import DASH, escaped, fenced, interval_text, model_label, number

SAYS: Mapping[str, str] = packaged_table("report/assets/says.toml")
"""What reports say of their sections and pictures."""
Tone = Literal["good", "unsure", "bad", "chosen"]
STYLES = {"good": "green", "unsure": "yellow", "bad": "bold red", "chosen": "bold"}
"""Of a toned cell in the terminal."""
GAP = 2
"""Between two columns of a terminal's table."""
MOST_NAME = 24
"""Letters from which such a table may break a path after a slash."""
PIECE = re.compile("[^/]*/|[^/]+")
MOST_LETTERS = 400
"""Letters of an answer that the Markdown shows; the page has all."""


@dataclass(frozen=True, slots=True)
class GridCell:
    """A text of a grid, and perhaps a smaller one under it (an interval, a reason)."""

    text: str
    below: str | None = None
    tone: Tone | None = None
    link: str | None = None
    """Where it leads on a page."""


Row = Sequence[GridCell | str]


def as_cell(cell: GridCell | str) -> GridCell:
    """Return what stands in a row as a cell."""
    return GridCell(cell) if isinstance(cell, str) else cell


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
class Strong:
    """A paragraph that stands out."""

    text: str


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


Shown = Grid | Heading | Strong | Code | Picture | Lights | Cases
Block = str | Sequence[str | tuple[str, str]] | Mapping[str, str] | Shown
"""A text is a paragraph, several are a list, in which a pair is a label that stands out and its text, and a
mapping has short facts by name."""


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
    content = {Grid: "rows", Lights: "claims", Cases: "parts", Picture: "figure"}
    there = [
        block
        for block in blocks
        if block is not None and (getattr(block, content[type(block)]) if type(block) in content else block)
    ]
    return [Section(title, there, bar, intro)] if there else []


def score_cell(score: Mapping[str, Any] | None) -> GridCell:
    """Return a score with its interval under it; a missing one is a dash."""
    score = score or {}
    return GridCell(number(score.get("value")), interval_text(score))


# Markdown


def markdown(title: str, sections: Iterable[Section]) -> str:
    """Return a page of Markdown; text that comes from the user is escaped."""
    return str(_markdown_page().render(title=title, sections=sections)).strip() + "\n"


@cache
def _markdown_page() -> Any:
    from markupsafe import Markup

    def md(value: object) -> object:
        return value if isinstance(value, Markup) else Markup(escaped(value))

    def cell(one: GridCell | str) -> str:
        one = as_cell(one)
        strong = "**" if one.tone in ("bad", "chosen") and one.text else ""
        below = f" ({escaped(one.below)})" if one.below else ""
        return Markup(f"{strong}{escaped(one.text)}{strong}{below}")

    def cut(answer: str | None) -> str:
        answer = DASH if answer is None else answer
        return answer if len(answer) <= MOST_LETTERS else f"{answer[:MOST_LETTERS]} …"

    filters = {"md": md, "cell": cell, "cut": cut, "fenced": lambda code: Markup(fenced(code))}
    return template("page.md.jinja", md, filters | {"number": number})


def template(name: str, finalize: Callable[[Any], Any], filters: Mapping[str, Any]) -> Any:
    """Return the jinja2 template that writes out reports in one format; all that is no Markup is escaped."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=finalize)
    environment.filters |= {"kind": lambda block: type(block).__name__, "model": model_label, **filters}
    return environment.from_string(packaged(f"report/assets/{name}"))


# The terminal


def show(blocks: Iterable[Block], console: Console) -> None:
    """Print grids, paragraphs and lists on the terminal."""
    for block in blocks:
        match block:
            case Grid():
                if block.title:
                    console.print(Text(block.title, "bold"))
                for place, part in enumerate(_laid_out(block, console.width)):
                    if place and isinstance(part, Table):
                        console.print()
                    console.print(part)
            case str():
                console.print(block, soft_wrap=True)
            case list() | tuple():
                for line in block:
                    console.print(" ".join(line) if isinstance(line, tuple) else line, soft_wrap=True)
            case _:
                raise TypeError(f"a {type(block).__name__} is not for the terminal")


def _laid_out(grid: Grid, width: int) -> Iterator[Table | Text]:
    """Yield a grid as tables that fit: what has no room beside the names follows below, under them again.

    Words and figures stay whole; where even one column has no room, each row stands for itself, line by line.
    """
    rows = [[_terminal_cell(cell) for cell in row] for row in grid.rows]
    columns = list(zip_longest(map(Text, grid.head), *rows, fillvalue=Text()))
    least = [max(map(_least_width, column)) for column in columns]
    wide = sum(least) + GAP * (len(least) - 1) > width
    names = grid.text_columns if grid.text_columns < len(least) or not wide else 0
    room = width - sum(least[:names]) - GAP * names
    if wide and (not names or max(least[names:]) > room):
        for first, *rest in grid.rows:  # its name and, below it, what every column has of it
            yield _terminal_cell(first, width, "bold")
            for head, cell in zip(grid.head[1:], rest, strict=False):
                if said := " ".join(_terminal_cell(cell).plain.split()):
                    yield Text(_seamed(f"  {head}: {said}" if head else f"  {said}", width))
        return
    parts: list[list[int]] = [[]]
    for place in range(names, len(least)):
        if sum(least[one] + GAP for one in (*parts[-1], place)) - GAP > room and parts[-1]:
            parts.append([])
        parts[-1].append(place)
    for part in parts:
        yield _table(grid, [*range(names), *part], columns, least, width)


def _table(
    grid: Grid, places: Sequence[int], columns: Sequence[Sequence[Text]], least: Sequence[int], width: int
) -> Table:
    """Return some columns of a grid as rich's table, texts widest; a row of one cell begins a part."""
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), show_header=any(grid.head)
    )
    widths = {place: least[place] for place in places}
    wish = {place: max(cell.cell_len for text in columns[place] for cell in text.split()) for place in places}
    for _ in range(width - sum(widths.values()) - GAP * (len(places) - 1)):
        growing = [place for place in places if widths[place] < wish[place]]
        if growing:
            widths[min(growing, key=lambda place: (place >= grid.text_columns, widths[place]))] += 1
    for place in places:
        justify: JustifyMethod = "left" if place < grid.text_columns else "right"
        head = Text(_seamed(grid.head[place], widths[place]))
        table.add_column(head, justify=justify, width=widths[place], overflow="fold")
    for row in grid.rows:
        if len(row) == 1:
            table.add_section()
        table.add_row(*(_terminal_cell(row[place], widths[place]) for place in places if place < len(row)))
    return table


def _least_width(text: Text) -> int:
    """Return the width at which neither a word nor a line of figures is broken, but for long paths."""
    pieces = [
        piece
        for line in text.plain.split("\n")
        for word in (re.findall(r"^\s*\S+|\S+", line) if re.search(r"[^\W\d_]", line) else [line])
        for piece in (PIECE.findall(word) if len(word) > MOST_NAME else [word])
    ]
    return max(map(cell_len, pieces), default=0)


def _terminal_cell(cell: GridCell | str, width: int = 10_000, style: str = "") -> Text:
    cell = as_cell(cell)
    said, below = (_seamed(part.replace(" – ", "–"), width) for part in (cell.text, cell.below or ""))
    text = Text(said, STYLES[cell.tone] if cell.tone else style)
    return text.append(f"\n{below}", style="dim") if below else text


def _seamed(said: str, width: int) -> str:
    """Return a text with line breaks after the slashes of what is wider than this."""

    def broken(found: re.Match[str]) -> str:
        lines = [""]
        for piece in PIECE.findall(found[0]):
            if lines[-1] and cell_len(lines[-1] + piece) > width:
                lines.append("")
            lines[-1] += piece
        return "\n".join(lines)

    return re.sub(r"\S+", broken, said)
