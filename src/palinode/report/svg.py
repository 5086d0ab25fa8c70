"""SVG written by hand: the few shapes and colours that pictures of a comparison are made of."""

from __future__ import annotations

from collections.abc import Iterable

from palinode.report.words import in_picture

INK, FAINT, GREY = "#1c2733", "#c9d1d9", "#8a949e"
COLOURS = (
    "#2a7f62",
    "#3b6ea8",
    "#b23a48",
    "#d08c2f",
    "#7a4f9a",
    "#3f9bb0",
    "#8c6d46",
    "#c2598f",
    "#6a8f2f",
    "#555b8f",
    "#a0522d",
    "#2f4f4f",
)


def svg(width: float, height: float, parts: Iterable[str]) -> str:
    """Return a whole picture of these parts, on white."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def text(x: float, y: float, words: str, *, size: int = 12, colour: str = INK, middle: bool = False) -> str:
    """Return words that begin at x, or have it in their middle."""
    anchor = ' text-anchor="middle"' if middle else ""
    safe = in_picture(words)
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}"{anchor}>{safe}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """Return a thin straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def path(points: Iterable[tuple[float, float]], colour: str, *, dashes: str = "") -> str:
    """Return a line through these points."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.8"{dashed}/>'


def dot(x: float, y: float, radius: float, colour: str, *, filled: bool, told: str) -> str:
    """Return a dot that says `told` when it is pointed at."""
    inside = colour if filled else "white"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{inside}" stroke="{colour}" '
        f'stroke-width="1.5">'
        f"<title>{in_picture(told)}</title></circle>"
    )
