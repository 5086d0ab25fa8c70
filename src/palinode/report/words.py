"""Words and numbers that all reports share: what things are called, and how figures are written.

A missing figure is a dash, never a 0; text from outside is escaped for Markdown by `escaped`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from palinode.progress import plain
from palinode.records import packaged_table

LABELS: Mapping[str, Mapping[str, str]] = packaged_table("report/assets/labels.toml")
SETS, TRAININGS, MODELS, METRICS = (LABELS[name] for name in ("sets", "trainings", "models", "metrics"))
"""What each is called, in the order in which they are shown."""
DASH = "—"


def at(tree: Mapping[str, Any], *keys: str) -> Any:
    """Return what lies at this path of a record, None where the path breaks off."""
    branch: Any = tree
    for key in keys:
        branch = branch.get(key) if isinstance(branch, Mapping) else None
    return branch


def scores_on(record: Mapping[str, Any], data_set: str) -> dict[str, Mapping[str, Any]]:
    """Return the scores of each model on one set, the models we know by name first."""
    models = known_first(at(record, "scores") or {}, MODELS)
    return {model: scores for model in models if (scores := at(record, "scores", model, data_set))}


def metrics_on(record: Mapping[str, Any], data_sets: Iterable[str]) -> list[str]:
    """Return the metrics found on these sets, the ones we know by name first."""
    tables = [scores for data_set in data_sets for scores in scores_on(record, data_set).values()]
    return known_first(dict.fromkeys(metric for scores in tables for metric in scores), METRICS)


def known_first(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the names in the order of those we know, then the others."""
    names = list(names)
    return [name for name in known if name in names] + [name for name in names if name not in known]


def model_label(model: str) -> str:
    """Return what a model is called in the reports."""
    return MODELS.get(model, words(model))


def metric_label(metric: str) -> str:
    """Return what a metric is called in the reports."""
    return METRICS.get(metric, words(metric))


def words(key: str) -> str:
    """Return a key of a record as words."""
    return key.replace("_", " ")


def number(value: float | None) -> str:
    """Return a score with three decimals; one that would round to 0 keeps its first digits."""
    if value is None:
        return DASH
    return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"


def _written(form: str, times: int = 1) -> Callable[[float | None], str]:
    """Return a function that writes a figure in this form, and a dash for a missing one."""
    return lambda value: DASH if value is None else form.format(times * value)


scale = _written("{:g}")
"""α or β as short as it can be written."""
percent = _written("{:.1f} %", 100)
"""A share in per cent."""
integer = _written("{:,.0f}")
"""A count with commas."""
decimal = _written("{:,.1f}")
"""Seconds, and the like, with one decimal."""
signed = _written("{:+.3f}")
"""A difference with its sign."""


def interval_text(score: Mapping[str, Any]) -> str | None:
    """Return the interval of a score in words, None where it has none."""
    low, high = score.get("low"), score.get("high")
    return None if low is None or high is None else f"{number(low)} – {number(high)}"


def bracketed(score: Mapping[str, Any]) -> str:
    """Return the interval of a score as it stands in a sentence; empty where it has none."""
    low, high = score.get("low"), score.get("high")
    return "" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def told_by_reason(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Return a sentence for each reason, which begins with all that it holds for.

    >>> told_by_reason([("sampling", "it was not asked for"), ("decoys", "it was not asked for")])
    ['sampling and decoys, because they were not asked for.']
    """
    return [
        f"{listed(those)}, because {reason.replace('it was', 'they were') if those[1:] else reason}."
        for reason, those in by_reason(reasons).items()
    ]


def by_reason(reasons: Iterable[tuple[str, Any]]) -> dict[Any, list[str]]:
    """Return each reason once, with all that it holds for."""
    names: dict[Any, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    return names


def listed(words: Sequence[str]) -> str:
    """Return words as they are counted up in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def escaped(value: object) -> str:
    """Return text from outside as one line that Markdown, and HTML within it, shows as it stands."""
    one_line = plain(" ".join(str(value).split()))
    safe = re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", html.escape(one_line, quote=False))
    return re.sub(r"(?i)\b(https?|ftp|mailto|xmpp|www)([:.])", r"\1\\\2", safe)  # links without brackets


def in_picture(text: str) -> str:
    """Return text from outside as an SVG may hold it."""
    return html.escape(plain(text))


def fenced(code: str) -> str:
    """Return a code block whose fence is longer than any run of backticks in the code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}\n{plain(code)}\n{fence}"
