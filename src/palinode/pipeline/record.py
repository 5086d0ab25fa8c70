"""Put `record.json` together: strict JSON, version 1, described in docs/record.md.

It holds no text of the rows: a model that has forgotten something must not carry it beside its weights. The
outcomes, with texts, stay in the workspace. Every other record begins and ends like it (`heading`,
`environment`).
"""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from palinode.data.examples import Example, fingerprint_examples
from palinode.metrics import score_outcomes
from palinode.metrics.matching import nearest
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.scales import ChosenScales
from palinode.records import COMMAND, RECORD_VERSION, Outcome
from palinode.version import __version__
from palinode.weights import Checkpoint, Direction, Saved, profile

LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
    "rouge-score",
)
"""What results may depend on."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
"""An id on the hub, with an optional revision; a local path of two parts looks the same."""
FEWEST_NEAR = 20
"""Retain rows without which none are told apart as the nearest to the forget rows."""
CURVE_POINTS = 120
"""Points of a training curve that the record keeps."""


def heading(layout: int, *, started: datetime, verb: str) -> dict[str, Any]:
    """Return the versions of a record's layout and of Palinode, start and end (now), and the command.

    The verb alone stands for a command where nobody says how the run is repeated.
    """
    return {
        "version": layout,
        "palinode": __version__,
        "created": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": COMMAND.get(f"palinode {verb}"),
    }


def environment(device: object) -> dict[str, Any]:
    """Return the Python, machine, device and versions of libraries."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(device),
        **{name: version(name) for name in LIBRARIES},
    }


def build_record(
    inputs: Inputs,
    *,
    models: Mapping[str, Checkpoint],
    outcomes: Mapping[str, Mapping[str, Sequence[Outcome]]],
    chosen: ChosenScales | None,
    weights: Mapping[str, Any],
    training: Mapping[str, Any],
    seen: Sequence[Example],
    steps: Mapping[str, str],
    started: datetime,
    run: str,
    device: str,
) -> dict[str, Any]:
    """Return the content of record.json; `seen` are the retain rows that the run was trained on."""
    recipe = inputs.recipe
    given = {**recipe.models.model_dump(), "unlearned": recipe.output.folder}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB, macOS in bytes
    return {
        **heading(RECORD_VERSION, started=started, verb="run"),
        "run": run,
        "seed": recipe.seed,
        "recipe": recipe.model_dump(mode="json"),
        "models": {name: model_facts(given[name], it, card=name == "target") for name, it in models.items()},
        "data": {
            "forget": row_facts(recipe.data.forget, inputs.rows.forget),
            "retain": row_facts(recipe.data.retain, inputs.rows.retain) if recipe.data.retain else None,
            **(
                {"holdout": row_facts(recipe.data.holdout, inputs.rows.unseen)} if recipe.data.holdout else {}
            ),
        },
        "method": {
            "name": recipe.method,
            "kind": inputs.method.kind,
            "formula": inputs.method.formula,
            "source": inputs.method.source,
            "settings": inputs.settings.model_dump(mode="json"),
        },
        "scales": asdict(chosen) if chosen else None,
        "vectors": weights.get("vectors"),
        "dose": weights.get("dose"),
        "training": training,
        "steps": dict(steps),
        "scores": {
            name: {
                label: {
                    metric: asdict(score) for metric, score in score_outcomes(found, seed=recipe.seed).items()
                }
                for label, found in sets.items()
            }
            for name, sets in with_unseen(outcomes, seen).items()
        },
        "environment": {
            **environment(device),
            "cores": os.cpu_count(),
            "peak_memory_bytes": peak if sys.platform == "darwin" else 1024 * peak,
        },
        "notes": [*inputs.notes, *_vector_notes(inputs), *_notes(chosen, training)],
    }


def with_unseen(
    outcomes: Mapping[str, Mapping[str, Sequence[Outcome]]], sample: Sequence[Example]
) -> dict[str, dict[str, Sequence[Outcome]]]:
    """Return the outcomes with two sets added: the retain rows that nothing was trained on, and the nearest.

    Rows that training saw are held up by it, so the whole retain set flatters the unlearned model; no
    "retain_unseen" is added where that set would be empty or the whole. "retain_near" is the quarter of these
    rows that is nearest to the forget rows by words (`nearest`), of twenty rows or more.
    """
    seen = {example.row for example in sample}
    added: dict[str, dict[str, Sequence[Outcome]]] = {}
    for name, sets in outcomes.items():
        retain = sets.get("retain", ())
        unseen = [outcome for outcome in retain if outcome.row not in seen]
        apart = {"retain_unseen": unseen} if 0 < len(unseen) < len(retain) else {}
        fair, forget = [*(unseen or retain)], sets.get("forget", ())
        own, theirs = ([f"{one.prompt} {one.expected}" for one in some] for some in (fair, forget))
        if len(fair) >= FEWEST_NEAR and forget:
            apart["retain_near"] = [fair[place] for place in nearest(own, theirs, len(fair) // 4)]
        added[name] = {**sets, **apart}
    return added


def model_facts(location: str | None, checkpoint: Checkpoint, *, card: bool = False) -> dict[str, Any]:
    """Return what a record tells of a model; with `card`, of the target's card too."""
    return {
        "location": location or "made by [prepare]",
        "fingerprint": checkpoint.fingerprint(),
        "parameters": checkpoint.parameters,
        **(card_facts(location) if card else {}),
    }


def card_facts(location: str | None) -> dict[str, Any]:
    """Return a model's id on the hub, if any, and whether a card lies beside it: as of here and now."""
    named, local = location or "", Path(location or "").expanduser()
    hub = named.partition("@")[0] if HUB_ID.fullmatch(named) and not local.exists() else None
    return {"hub": hub, "card": bool(named) and (local / "README.md").exists()}


def row_facts(location: str | None, examples: Sequence[Example]) -> dict[str, Any]:
    """Return what a record tells of rows."""
    return {"location": location, "rows": len(examples), "fingerprint": fingerprint_examples(examples)}


def _vector_notes(inputs: Inputs) -> Iterator[str]:
    """Yield what the vector is where the method has none of its own."""
    if inputs.recipe.has_scales and not inputs.method.has_scales:
        yield (
            f"The forget vector is what training by {inputs.method.name} changed, taken off the target: with "
            "α = 1 and no transform it is the trained model."
        )


def _notes(chosen: ChosenScales | None, training: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a reader should know of the choice of scales, and of runs that ended early."""
    if chosen and not chosen.kept_rule and chosen.yardstick is not None:
        yield f"{chosen.yardstick['warning']} Look at the table of points before using this model."
    for run in training.values():
        if run["steps"] < run.get("planned_steps", 0):
            yield (
                f"Training ended after {run['steps']} of {run['planned_steps']} steps: the forget loss had "
                "reached its limit, beyond which nothing is left to forget."
            )


def dose_facts(saved: Saved, asked: Mapping[str, float]) -> dict[str, Any]:
    """Return what arrived in the stored weights of the scales asked for, as the record has it."""
    effective = {name: saved.dose.effective.get(name) for name in asked}
    return {
        **{name: scale / asked[name] if scale and asked[name] else None for name, scale in effective.items()},
        "effective": effective,
        "relative_error": saved.dose.relative_error,
        "moved_share": saved.dose.moved_share,
        "unreached_share": saved.dose.unreached_share,
        "rounding": saved.rounding,
        "parts": {
            name: {"effective": dict(part.effective), "moved_share": part.moved_share}
            for name, part in saved.dose.parts.items()
        },
        "notes": list(saved.notes),
    }


def thinned_curve(losses: Sequence[float]) -> dict[str, Any]:
    """Return a training curve with at most CURVE_POINTS points, each the mean of as many steps."""
    every = max(1, -(-len(losses) // CURVE_POINTS))
    chunks = [losses[start : start + every] for start in range(0, len(losses), every)]
    return {
        "every": every,
        "steps": list(range(0, len(losses), every)),
        "losses": [float(f"{fmean(chunk):.5g}") for chunk in chunks],
    }


def geometry_facts(
    forget: Direction, retain: Direction | None, *, on_progress: Callable[[int], None] | None = None
) -> Mapping[str, Any]:
    """Return norms and cosine of the vectors, over all weights and by part of the model."""
    named = {"forget": forget} | ({"retain": retain} if retain is not None else {})
    measured = profile(named, on_progress=on_progress)

    def entry(part: str | None) -> dict[str, Any]:
        norms = measured.norms(part)
        cosine = measured.cosine("forget", "retain", part) if len(norms) == 2 else None
        retain = {"norm": norms["retain"]} if "retain" in norms else None
        return {"forget": {"norm": norms["forget"]}, "retain": retain, "cosine": cosine}

    return {**entry(None), "parts": {part: entry(part) for part in measured.gram}}
