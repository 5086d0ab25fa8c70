"""What a finished run has left behind: its target, its base, and the vectors it subtracted and added.

A record names models by their fingerprints, and says of each fine-tuning how it went; a step of the
workspace that says the same to the last digit is the one that the run used.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError, InputError, PalinodeError
from palinode.methods import METHODS
from palinode.methods.paired import PairedSettings
from palinode.records import read_json, workspace_beside
from palinode.weights import Checkpoint, Direction, LoraAdapter, StoredVector, WeightedSum


@dataclass(frozen=True, slots=True)
class KeptVectors:
    """The target of a run and the directions from it, so that any (α, β) can be tried again."""

    target: Checkpoint
    forget: Direction
    retain: Direction | None
    """None where β was fixed at 0."""


def read_record(folder: Path) -> Mapping[str, Any]:
    """Return the record beside an unlearned model; raises CheckpointError where there is none."""
    try:
        record = read_json(folder / "record.json")
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no record.json; name the output folder of palinode unlearn or run"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'record.json'} cannot be read ({error}); run it again") from None
    if not isinstance(record, dict) or "recipe" not in record or "models" not in record:
        raise CheckpointError(f"{folder / 'record.json'} is no record of palinode unlearn; name its output")
    return record


def workspace_of(folder: Path, record: Mapping[str, Any]) -> Path:
    """Return the workspace of a run: beside its output, or where its recipe put it."""
    beside = workspace_beside(folder)
    named = record["recipe"].get("output", {}).get("workspace")
    return Path(named) if named and not beside.is_dir() else beside


def find_model(
    record: Mapping[str, Any], role: str, workspace: Path, *, hint: str | None = None
) -> Checkpoint | None:
    """Return the target or base of a run, None where its very weights are not found any more.

    Looked at are `hint`, the place that the record names, and the workspace, where [prepare] makes a target.
    """
    entry = record["models"].get(role)
    if entry is None:
        return None
    allowed = bool(record["recipe"]["models"].get("allow_pickle"))
    made = sorted(workspace.glob(f"finetune-{role}-*/model")) + sorted(workspace.glob("merge-*/model"))
    for place in (hint, entry["location"], *made):
        if place is None or not Path(place).expanduser().exists():
            continue
        try:
            model = Checkpoint.open(place, allow_pickle=allowed)
        except PalinodeError:
            continue
        if model.fingerprint() == entry["fingerprint"]:
            return model
    return None


def find_vectors(
    record: Mapping[str, Any], workspace: Path, target: Checkpoint | None, base: Checkpoint | None
) -> KeptVectors:
    """Return the vectors of a run; raises InputError that says what is missing where they are gone."""
    name = record["recipe"].get("method", "msa")
    method = METHODS.get(name)
    if method is None or method.kind != "arithmetic":
        raise InputError(f"the method {name} trains the model itself and adds no vectors")
    if target is None:
        raise InputError("the run's target is not found any more, or has changed")
    settings = method.check_settings(record["recipe"].get("method_settings", {}))
    if base is None and "base" in method.needs:
        raise InputError("the run's base is not found any more, or has changed")
    if isinstance(settings, PairedSettings) and base is not None:
        start = settings.start_of(target, base)
    else:
        start = method.start(target, base)
    kept = {
        role: _end_of(workspace, facts, start)
        for role, facts in record["training"].items()
        if isinstance(facts, Mapping)
    }
    if "exposed" in kept:
        control = kept["control"]
        added = control - start if record["scales"]["retain"] else None
        return KeptVectors(target, _transformed(workspace, record) or kept["exposed"] - control, added)
    retain = kept.get("retain")
    forget = _transformed(workspace, record) or kept["forget"] - start
    return KeptVectors(target, forget, retain - start if retain is not None else None)


def _transformed(workspace: Path, record: Mapping[str, Any]) -> Direction | None:
    """Return the forget vector as the run's last change to it left it; None where there was none."""
    told = (record.get("vectors") or {}).get("transforms")
    if record["scales"].get("groups"):  # the last change of all: an α for each group of layers
        pattern, name, value = "apply-*/step.json", "dose", record["dose"]
    elif told:
        pattern, name, value = "transform-*/step.json", "norm", told[-1]["norm"]
    else:
        return None
    for step in sorted(workspace.glob(pattern)):
        if (_facts(step) or {}).get(name) == value:
            with suppress(CheckpointError):
                return StoredVector.open(step.parent / "vector")
    raise InputError(f"the run's vector as it was changed is not in {workspace} any more")


def _end_of(workspace: Path, facts: Mapping[str, Any], start: Checkpoint) -> Checkpoint | WeightedSum:
    """Return where the fine-tuning of which a record tells these facts ended."""
    for step in sorted(workspace.glob("finetune-*/step.json")):
        known = _facts(step)  # a record may say more
        if not known or any(facts.get(name) != value for name, value in known.items()):
            continue
        try:
            if (step.parent / "adapter").is_dir():
                return start + LoraAdapter.open(step.parent / "adapter", base=start)
            return Checkpoint.open(step.parent / "model")
        except CheckpointError:
            continue
    raise InputError(f"the run's vectors are not in {workspace} any more")


def _facts(step: Path) -> Mapping[str, Any] | None:
    """Return what a finished step says of itself."""
    try:
        facts = read_json(step)["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if isinstance(facts, dict) else None
