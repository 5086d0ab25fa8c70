"""Pictures of an audit: what each test found, and how fast the models learn again."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from palinode.report.html.marks import NAMES, Figure, errors, wrapped
from palinode.report.words import (
    at,
    number,
)

VERDICTS = {
    "within": ("--green", "circle"),
    "unclear": ("--amber", "diamond"),
    "knows more": ("--red", "triangle-right"),
    "knows less": ("--red", "triangle-left"),
}
"""Colour and symbol of what a test found."""


@dataclass(frozen=True, slots=True)
class Test:
    """One test of an audit, its place on the axis, and the margin that its difference is measured in."""

    place: int
    title: str
    finding: Mapping[str, Any]
    margin: float

    @property
    def difference(self) -> dict[str, float]:
        """The difference and its interval, in margins."""
        found = self.finding["difference"]
        return {
            side: found[side] / self.margin
            for side in ("value", "low", "high")
            if found.get(side) is not None
        }

    @property
    def figures(self) -> str:
        """The two scores and their difference, in the test's own units."""
        model, yardstick, difference = (
            number(self.finding[name]["value"]) for name in ("score", "yardstick", "difference")
        )
        return f"model {model}, yardstick {yardstick}<br>difference {difference}, margin {self.margin:g}"


def attack_figure(audit: Mapping[str, Any] | None) -> Figure | None:
    """Return by how many margins the model differs from the yardstick in each test of an audit."""
    tests = _tests(audit or {})
    if not tests:
        return None
    traces = []
    for verdict, (colour, symbol) in VERDICTS.items():
        members = [test for test in tests if test.finding["verdict"] == verdict]
        if not members:
            continue
        found = [test.difference for test in members]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": verdict,
                "x": [score["value"] for score in found],
                "y": [test.place for test in members],
                "marker": {"color": colour, "symbol": symbol, "size": 12},
                "error_x": errors(found, colour),
                "customdata": [test.figures for test in members],
                "hovertemplate": f"<b>{verdict}</b><br>%{{customdata}}<extra></extra>",
            }
        )
    ticks = {"tickvals": [test.place for test in tests], "ticktext": [wrapped(test.title) for test in tests]}
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "--other", "dash": "dot"}}
    return {
        "data": traces,
        "layout": {
            "height": 150 + 44 * len(tests),
            "xaxis": {"title": {"text": "difference, in margins"}, "zeroline": True},
            "yaxis": {**ticks, **NAMES},
            "shapes": [{**line, "x0": place, "x1": place} for place in (-1, 1)],
        },
    }


def _tests(audit: Mapping[str, Any]) -> list[Test]:
    """Return the tests that gave a difference, in the audit's order."""
    margins = at(audit, "policy", "margins") or {}
    given = [
        (f"{name}.{test}", html.escape(f"{attack['title']}: {entry['title']}", quote=False), entry)
        for name, attack in (audit.get("attacks") or {}).items()
        for test, entry in (attack.get("tests") or {}).items()
        if at(entry, "findings", "audited", "difference", "value") is not None
    ]
    return [
        Test(place, title, entry["findings"]["audited"], _margin(margins.get(key)))
        for place, (key, title, entry) in enumerate(given)
    ]


def _margin(margins: Mapping[str, Any] | None) -> float:
    """Return the margin for knowing more, else the one for knowing less; 1 where there is none."""
    sides = [at(margins or {}, side) for side in ("more", "less")]
    return float(next((side for side in sides if side), 1.0))


def relearning_figure(audit: Mapping[str, Any] | None) -> Figure | None:
    """Return how fast each model learns the forget set again, a panel's worth of lines an attack."""
    roles = {"audited": ("--unlearned", "circle"), "yardstick": ("--retrained", "diamond")}
    roles["target"] = ("--target", "square")
    dashes = ("solid", "dash", "dot")
    traces = []
    attacks = [attack for attack in (at(audit or {}, "attacks") or {}).values() if attack.get("details")]
    curves = [attack for attack in attacks if any(d.get("curve") for d in attack["details"].values())]
    for place, attack in enumerate(curves):
        for model, details in attack["details"].items():
            colour, symbol = roles.get(model, ("--other", "x"))
            label = html.escape(f"{model}, {attack['title']}", quote=False)
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": label,
                    "x": details["steps"],
                    "y": details["curve"],
                    "line": {"color": colour, "dash": dashes[place % 3]},
                    "marker": {"color": colour, "symbol": symbol, "size": 8},
                    "hovertemplate": f"<b>{label}</b><br>step %{{x}}: %{{y:.3f}}<extra></extra>",
                }
            )
    if not traces:
        return None
    axes = {
        "xaxis": {"title": {"text": "step of relearning"}},
        "yaxis": {"title": {"text": "mean answer probability"}, "rangemode": "tozero"},
    }
    return {"data": traces, "layout": {"height": 400, **axes}}
