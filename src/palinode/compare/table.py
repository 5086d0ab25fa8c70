"""Put table.json together: strict JSON with every point tried, every score, and the ranking.

It holds no text of the rows; outcomes with texts stay in the workspace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from statistics import fmean
from typing import Any

from palinode.compare.choosing import Tried
from palinode.compare.ranking import Values, rank, values_of
from palinode.compare.recipe import Contestant
from palinode.compare.search import Ground
from palinode.data.examples import fingerprint_examples
from palinode.methods import METHODS
from palinode.models.loading import pick_device
from palinode.pipeline.heading import environment, heading
from palinode.pipeline.search import Probe, Rule

TABLE_VERSION = 1
"""Version of the layout of table.json, described in docs/compare.md."""


@dataclass(frozen=True, slots=True)
class TableEntry:
    """One contestant when it is through."""

    contestant: Contestant
    tried: Sequence[Tried]
    chosen: Tried
    kept_rule: bool
    """False when no point satisfied the rule and the nearest one was taken."""
    measured: Mapping[int, Mapping[str, Any]]
    """By seed: scores, values on rows, and costs."""


def build_table(
    ground: Ground,
    *,
    fixed: Mapping[str, Mapping[str, Any]],
    probes: Mapping[str, Probe],
    rule: Rule,
    entries: Sequence[TableEntry],
    started: datetime,
    command: str | None,
) -> dict[str, Any]:
    """Return the content of table.json for the contestants that are through."""
    comparison = ground.recipe.comparison
    return {
        **heading(TABLE_VERSION, started=started, command=command or "palinode compare"),
        "complete": len(entries) == len(comparison.contestants),
        "seed": comparison.seed,
        "seeds": list(comparison.seeds),
        "shared": ground.recipe.shared.model_dump(
            mode="json", exclude={"method", "method_settings", "scales"}
        ),
        "comparison": comparison.model_dump(mode="json", exclude={"contestants", "axis"}),
        "rule": str(rule),
        "rows": {
            name: {"rows": len(rows), "fingerprint": fingerprint_examples(rows)}
            for name, rows in row_parts(ground).items()
        },
        "models": {
            name: {
                "probes": asdict(probes[name]),
                "summary": _summary([found["scores"]]),
                "values": found["values"],
            }
            for name, found in fixed.items()
        },
        "contestants": [_contestant(entry, rule) for entry in entries],
        "ranking": _ranking(ground, fixed, entries),
        "environment": environment(pick_device(ground.recipe.shared.device)),
        "notes": list(ground.inputs.notes),
    }


def row_parts(ground: Ground) -> dict[str, Sequence[Any]]:
    """Return the parts of the rows by name."""
    shares = ground.shares
    return {
        "forget": shares.forget,
        "forget_probe": shares.forget_probe,
        "forget_test": shares.forget_test,
        "retain_train": shares.retain_train,
        "retain_probe": shares.retain_probe,
        "retain_test": shares.retain_test,
    }


def _contestant(entry: TableEntry, rule: Rule) -> dict[str, Any]:
    method, chosen = METHODS[entry.contestant.method], entry.chosen
    costs = [found["cost"] for found in entry.measured.values()]
    return {
        "name": entry.contestant.name,
        "method": method.name,
        "formula": method.formula,
        "source": method.source,
        "set": dict(entry.contestant.set),
        "search": {key: list(values) for key, values in entry.contestant.search.items()},
        "points": [_point(tried, rule, chosen) for tried in entry.tried],
        "chosen": {"number": chosen.point.number, **_settings(chosen), "kept_rule": entry.kept_rule},
        "cost": {
            "epochs": chosen.facts["epochs"],
            **{name: _mean(cost.get(name) for cost in costs) for name in ("steps", "tokens", "seconds")},
            "peak_bytes": max((cost.get("peak_bytes") or 0 for cost in costs), default=0) or None,
            "search_steps": _searched(entry.tried, "steps"),
            "search_seconds": _searched(entry.tried, "seconds"),
        },
        "summary": _summary([found["scores"] for found in entry.measured.values()]),
        "seeds": {
            str(seed): {name: found[name] for name in ("scores", "values", "cost")}
            for seed, found in entry.measured.items()
        },
    }


def _point(tried: Tried, rule: Rule, chosen: Tried) -> dict[str, Any]:
    return {
        "number": tried.point.number,
        **_settings(tried),
        "forget_probability": tried.probe.forget,
        "retain_probability": tried.probe.retain,
        "allowed": rule.allows(tried.probe),
        "chosen": tried.point.number == chosen.point.number,
        **{name: tried.facts[name] for name in ("epochs", "steps", "tokens", "seconds", "peak_bytes")},
    }


def _settings(tried: Tried) -> dict[str, Any]:
    return {
        "settings": dict(tried.point.settings),
        "scales": list(tried.point.scales) if tried.point.scales else None,
    }


def _searched(tried: Sequence[Tried], name: str) -> float:
    """Return what the whole search took; points that share their training count it once."""
    parts = {one.point.training: float(one.facts[name]) for one in tried}
    return round(sum(parts.values()), 1)


def _summary(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return each score over the seeds: mean, mean ends of the intervals, and every seed's value."""
    found: dict[str, Any] = {}
    for group, sets in seeds[0].items():
        for name, metrics in sets.items():
            for metric in metrics:
                own = [seed[group][name][metric] for seed in seeds]
                found.setdefault(group, {}).setdefault(name, {})[metric] = _over_seeds(own)
    return found


def _over_seeds(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    missing = next((score["reason"] for score in scores if score["value"] is None), None)
    if missing is not None or any(score["value"] is None for score in scores):
        return {"value": None, "n": 0, "low": None, "high": None, "reason": missing, "seeds": []}
    values = [float(score["value"]) for score in scores]
    return {
        "value": fmean(values),
        "n": scores[0]["n"],
        "low": _mean(score["low"] for score in scores),
        "high": _mean(score["high"] for score in scores),
        "reason": scores[0]["reason"],
        "seeds": values,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else None


def _ranking(
    ground: Ground, fixed: Mapping[str, Mapping[str, Any]], entries: Sequence[TableEntry]
) -> dict[str, Any]:
    """Return the contestants by their gap to the ideal, or why there is no order."""
    metric, retrained = ground.recipe.comparison.measure.rank_by, fixed.get("retrained")
    forget, retain = (retrained, retrained) if retrained else (fixed["base"], fixed["target"])
    ideal = values_of([{"forget": forget["values"]["forget"], "retain": retain["values"]["retain"]}])
    values: dict[str, Values] = {}
    left_out = {}
    for entry in entries:
        own = values_of([found["values"] for found in entry.measured.values()])
        if own is None:
            left_out[entry.contestant.name] = f"no row has a value of {metric}"
        else:
            values[entry.contestant.name] = own
    return {
        "metric": metric,
        "ideal": "retrained" if retrained else "base and target",
        "order": rank(values, ideal, seed=ground.recipe.comparison.seed) if ideal else [],
        "left_out": left_out,
    }
