"""Comparisons along an axis as words, tables and an SVG picture; everything comes from axis.json.

The picture has two panels, what is left of the forget set and what is kept of the others, against the
values of the axis. Contestants are lines with their 95 % intervals; target, base and retrained model are
dashed lines to compare with. A figure that could not be computed is a dash, or a gap in its line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from palinode.report.svg import COLOURS, FAINT, GREY, INK, dot, line, path, svg, text
from palinode.report.words import escaped, model_label, number, scale, table_lines, words

WIDTH, PANEL, LEFT, TOP, BETWEEN, BOTTOM, KEY = 960, 230, 64, 76, 44, 56, 236
FIXED = {"target": (INK, "7 4"), "base": (GREY, "2 4"), "retrained": ("#b8860b", "10 3 2 3")}
"""Colour and dashes of the models that contestants are compared with."""
SIDES = ("forget", "retain")

Figures = Mapping[str, Any]


# Words and tables


def axis_sentences(content: Figures) -> list[str]:
    """Return what a reader must know before looking at the figures."""
    rows = " / ".join(
        dict.fromkeys(
            f"{entry['rows']['forget']} and {entry['rows']['retain']}" for entry in content["values"]
        )
    )
    lines = [
        f"{words(content['metric'])} on forget and retain rows that nothing was chosen on ({rows} rows); "
        "intervals: 95 %, over rows."
    ]
    if len(content["seeds"]) == 1:
        lines.append("One seed: how much another seed would change is not known.")
    for entry in content["values"]:
        if broken := [one["name"] for one in entry["contestants"] if not one["kept_rule"]]:
            lines.append(f"At {entry['value']} no point of {'; '.join(broken)} kept the rule.")
    if not content["complete"]:
        lines.append("Not all values are through; the same command goes on with them.")
    return lines


def axis_table(content: Figures) -> Table:
    """Return forget and retain figures at every value as a table for the terminal."""
    found = Table(title=Text(content["title"]), title_justify="left")
    for place, title in enumerate(_head(content)):
        found.add_column(Text(title), justify="right" if place else "left")
    for row in _rows(content):
        found.add_row(*map(Text, row))
    return found


def axis_markdown(content: Figures) -> str:
    """Return the report; what comes from the user is escaped."""
    rows = [tuple(map(escaped, row)) for row in _rows(content)]
    links = [
        f"- {escaped(entry['value'])}: [table]({entry['folder']}/report.md)" for entry in content["values"]
    ]
    chosen = [
        (escaped(entry["value"]), escaped(one["name"]), escaped(_settings(one)), _score(one["gap"]))
        for entry in content["values"]
        for one in entry["contestants"]
    ]
    lines = [
        f"# {escaped(content['title'])}",
        "",
        *(f"- {escaped(sentence)}" for sentence in axis_sentences(content)),
        "",
        f"Forget / retain at each value of `{content['key']}`:",
        "",
        *table_lines(tuple(map(escaped, _head(content))), rows),
        f"![{escaped(content['title'])}](axis.svg)",
        "",
        "## What was chosen",
        "",
        *table_lines(("value", "method", "point", "gap to the ideal"), chosen, text_columns=3),
        "## Each comparison",
        "",
        *links,
        "",
        f"`{content['command']}`",
    ]
    return "\n".join(lines) + "\n"


def _head(content: Figures) -> tuple[str, ...]:
    return ("model", *(str(entry["value"]) for entry in content["values"]))


def _rows(content: Figures) -> Iterator[tuple[str, ...]]:
    """Yield a row a model: its name, and forget / retain at every value."""
    for name in (*_fixed(content), *_names(content)):
        yield (model_label(name), *(_pair(entry, name) for entry in content["values"]))


def _pair(entry: Figures, name: str) -> str:
    found = _of(entry, name)
    return " / ".join(number(found[side]["value"]) if found else number(None) for side in SIDES)


def _settings(one: Figures) -> str:
    parts = [
        f"{key.rpartition('.')[2]} {value}" for key, value in one["settings"].items() if "scales." not in key
    ]
    if one["scales"]:
        parts += [f"{name} {scale(value)}" for name, value in zip("αβ", one["scales"], strict=True)]
    return ", ".join(parts) or "defaults"


def _score(score: Figures) -> str:
    if score["low"] is None:
        return number(score["value"])
    return f"{number(score['value'])} [{number(score['low'])}, {number(score['high'])}]"


def _names(content: Figures) -> list[str]:
    return list(dict.fromkeys(one["name"] for entry in content["values"] for one in entry["contestants"]))


def _fixed(content: Figures) -> list[str]:
    return [name for name in FIXED if any(name in entry["models"] for entry in content["values"])]


def _of(entry: Figures, name: str) -> Figures | None:
    """Return what a value has of a model or a contestant."""
    found: Figures | None = next((one for one in entry["contestants"] if one["name"] == name), None)
    return found or entry["models"].get(name)


# The picture


def axis_picture(content: Figures) -> str:
    """Return the picture of an axis.json."""
    height = TOP + 2 * PANEL + BETWEEN + BOTTOM
    parts = [text(LEFT, 26, content["title"], size=15)]
    told = f"{words(content['metric'])} on measured rows; bars are 95 % intervals; values are equally spaced"
    parts.append(text(LEFT, 46, told, size=11, colour=GREY))
    for side, top in zip(SIDES, (TOP, TOP + PANEL + BETWEEN), strict=True):
        parts += _panel(content, side, _Panel(top, len(content["values"]), _highest(content, side)))
    parts.append(text((LEFT + WIDTH - KEY) / 2, height - 14, content["key"], middle=True))
    return svg(WIDTH, height, [*parts, *_legend(content)])


class _Panel:
    """Figures to places in one panel."""

    def __init__(self, top: float, values: int, most: float) -> None:
        self.top = top
        self.most = most
        self.slot = (WIDTH - KEY - LEFT) / max(1, values)

    def x(self, place: int, shift: float = 0.0) -> float:
        """Return where a value stands; `shift` from -1 to 1 keeps intervals apart."""
        return LEFT + self.slot * (place + 0.5) + shift * min(24.0, 0.3 * self.slot)

    def y(self, figure: float) -> float:
        """Return the height of a figure."""
        return self.top + PANEL * (1 - figure / self.most)


def _panel(content: Figures, side: str, panel: _Panel) -> list[str]:
    names, values = _names(content), content["values"]
    title = {
        "forget": "forget set: lower is more forgotten; the retrained model is the aim",
        "retain": "retain set: higher is more kept",
    }
    parts = [text(LEFT, panel.top - 8, title[side], size=12)]
    for step in range(6):
        level = panel.most * step / 5
        parts.append(line(LEFT, panel.y(level), WIDTH - KEY, panel.y(level), FAINT))
        parts.append(text(LEFT - 34, panel.y(level) + 4, f"{level:.2f}", size=10, colour=GREY))
    for place, entry in enumerate(values):
        parts.append(text(panel.x(place), panel.top + PANEL + 17, str(entry["value"]), size=12, middle=True))
    for name in _fixed(content):
        colour, dashes = FIXED[name]
        parts += _curve(values, name, side, panel, colour, dashes=dashes)
    for number_, name in enumerate(names):
        shift = (2 * number_ - len(names) + 1) / max(1, len(names) - 1)
        parts += _curve(values, name, side, panel, COLOURS[number_ % len(COLOURS)], shift=shift)
    return parts


def _curve(
    values: Sequence[Figures],
    name: str,
    side: str,
    panel: _Panel,
    colour: str,
    *,
    dashes: str = "",
    shift: float = 0.0,
) -> list[str]:
    """Return one model's line, with dots and intervals where it is a contestant's."""
    found = [(place, entry, _of(entry, name)) for place, entry in enumerate(values)]
    known = [
        (place, entry, one[side]) for place, entry, one in found if one and one[side]["value"] is not None
    ]
    points = [(panel.x(place, shift), panel.y(score["value"])) for place, _, score in known]
    if dashes:  # from edge to edge, so that one value is a line too
        half = panel.slot / 2
        edges = [(x + by, y) for (x, y), by in zip(points[:1] + points[-1:], (-half, half), strict=False)]
        return [path([*edges[:1], *points, *edges[1:]], colour, dashes=dashes)]
    parts = [path(points, colour)]
    for place, entry, score in known:
        x = panel.x(place, shift)
        if score["low"] is not None:
            parts.append(line(x, panel.y(score["low"]), x, panel.y(score["high"]), colour))
        told = f"{name} at {entry['value']}: {_score(score)}"
        kept = all(one["kept_rule"] for one in entry["contestants"] if one["name"] == name)
        parts.append(dot(x, panel.y(score["value"]), 4, colour, filled=kept, told=told))
    return parts


def _legend(content: Figures) -> list[str]:
    x, parts = WIDTH - KEY + 20, []
    fixed = [(name, *FIXED[name]) for name in _fixed(content)]
    own = [(name, COLOURS[place % len(COLOURS)], "") for place, name in enumerate(_names(content))]
    for place, (name, colour, dashes) in enumerate((*fixed, *own)):
        y = TOP + 8 + 22 * place
        parts.append(path([(x, y), (x + 30, y)], colour, dashes=dashes))
        if not dashes:
            parts.append(dot(x + 15, y, 4, colour, filled=True, told=name))
        parts.append(text(x + 38, y + 4, model_label(name)))
    if any(not one["kept_rule"] for entry in content["values"] for one in entry["contestants"]):
        parts.append(
            text(
                x,
                TOP + 8 + 22 * (len(fixed) + len(own)) + 4,
                "hollow: no point kept the rule",
                size=11,
                colour=GREY,
            )
        )
    return parts


def _highest(content: Figures, side: str) -> float:
    """Return the end of a panel's scale: the next tenth above everything drawn, at most 1."""
    scores = [
        one[side] for entry in content["values"] for one in (*entry["models"].values(), *entry["contestants"])
    ]
    most = max(
        (score[end] for score in scores for end in ("value", "high") if score[end] is not None), default=1.0
    )
    return min(1.0, (int(10 * most) + 1) / 10)
