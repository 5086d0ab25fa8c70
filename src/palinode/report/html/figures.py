"""The pictures of a page as plotly figures in plain values, by the name of their place on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from palinode.report.html.attacks import attack_figure, relearning_figure
from palinode.report.html.comparison import comparison_figure
from palinode.report.html.marks import Figure
from palinode.report.html.measured import likelihood_figure, score_figure
from palinode.report.html.tradeoff import tradeoff_figure
from palinode.report.html.weights import cosine_figure, dose_figure, norm_figure, training_figure
from palinode.report.words import SETS


def figures(content: Mapping[str, Any]) -> dict[str, Figure]:
    """Return every picture that the content has figures for, by the name of its place on the page."""
    found: dict[str, Figure | None] = {f"scores-{name}": score_figure(content, name) for name in SETS}
    found["comparison"] = comparison_figure(content["table"]) if content.get("table") else None
    found["tradeoff"] = tradeoff_figure(content)
    found |= {f"likelihood-{name}": likelihood_figure(content, name) for name in SETS}
    found |= {"norms": norm_figure(content), "cosines": cosine_figure(content), "doses": dose_figure(content)}
    found["training"] = training_figure(content)
    found["attacks"] = attack_figure(content.get("audit"))
    found["relearning"] = relearning_figure(content.get("audit"))
    return {name: figure for name, figure in found.items() if figure is not None}
