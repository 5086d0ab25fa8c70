"""Put requests.json together: strict JSON with every state of every contestant, without text of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from palinode.compare.recipe import Contestant
from palinode.compare.request_rows import Requested
from palinode.compare.search import Ground
from palinode.data.examples import fingerprint_examples
from palinode.methods import METHODS
from palinode.models.loading import pick_device
from palinode.pipeline.heading import environment, heading

REQUESTS_VERSION = 1
"""Version of the layout of requests.json, described in docs/requests.md."""


@dataclass(frozen=True, slots=True)
class RequestEntry:
    """One contestant when it is through."""

    contestant: Contestant
    scales: tuple[float, float] | None
    states: Sequence[Mapping[str, Any]]
    """Before any request, after each, and then after each that was undone."""
    joint: Mapping[str, Any]
    """The state of one training on the rows of all requests."""
    undo: Mapping[str, Any]
    costs: Sequence[Mapping[str, Any]]
    """Of each request's training."""
    joint_cost: Mapping[str, Any]


def build_requests_table(
    ground: Ground,
    asked: Requested,
    models: Mapping[str, Mapping[str, Any]],
    entries: Sequence[RequestEntry],
    *,
    started: datetime,
    command: str | None,
) -> dict[str, Any]:
    """Return the content of requests.json for the contestants that are through."""
    comparison = ground.recipe.comparison
    return {
        **heading(REQUESTS_VERSION, started=started, command=command or "palinode compare"),
        "complete": len(entries) == len(comparison.contestants),
        "seed": comparison.seed,
        "training_seed": comparison.seeds[0],
        "shared": ground.recipe.shared.model_dump(
            mode="json", exclude={"method", "method_settings", "scales"}
        ),
        "comparison": comparison.model_dump(
            mode="json", include={"world", "demo", "budget", "split", "requests"}
        ),
        "requests": [
            {
                "number": request.number,
                "rows": len(request.rows),
                "fingerprint": fingerprint_examples(request.rows),
            }
            for request in asked.requests
        ],
        "undo_order": list(asked.undo_order),
        "rows": {
            "others": len(asked.others),
            "retain_train": len(ground.shares.retain_train),
            "retain": len(ground.shares.retain_test),
        },
        "models": dict(models),
        "contestants": [_contestant(entry) for entry in entries],
        "environment": environment(pick_device(ground.recipe.shared.device)),
        "notes": list(ground.inputs.notes),
    }


def _contestant(entry: RequestEntry) -> dict[str, Any]:
    method = METHODS[entry.contestant.method]
    return {
        "name": entry.contestant.name,
        "method": method.name,
        "formula": method.formula,
        "source": method.source,
        "set": dict(entry.contestant.set),
        "scales": list(entry.scales) if entry.scales else None,
        "states": list(entry.states),
        "joint": dict(entry.joint),
        "undo": dict(entry.undo),
        "cost": {
            "requests": [_cost(cost) for cost in entry.costs],
            "joint": _cost(entry.joint_cost),
        },
    }


def _cost(cost: Mapping[str, Any]) -> dict[str, Any]:
    return {name: cost[name] for name in ("epochs", "steps", "tokens", "seconds")}
