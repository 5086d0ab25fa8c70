"""Run the recipe of a record again, in a place of its own, and tell which bytes and which figures agree.

Every run is a function of models, rows, recipe and seed. On the same processor and libraries it makes the
same bytes; on others sums are formed in another order, and the figures should agree all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from palinode.data.examples import fingerprint_examples
from palinode.errors import CheckpointError, InputError, MismatchError, OutputError, RecipeError
from palinode.pipeline.inputs import Inputs, open_inputs, workspace_folder
from palinode.pipeline.recipe import Recipe, build_recipe, known_keys, laid_over
from palinode.pipeline.reporting import find_workspace, read_record
from palinode.pipeline.run import hash_models, run_key, unlearn
from palinode.progress import Listener, NullListener
from palinode.records import dotted, fitting
from palinode.report.words import at
from palinode.version import __version__
from palinode.weights import Checkpoint
from palinode.weights.fingerprints import companion_digests, tensor_digests

ALIKE = 0.001
"""Two figures that differ by no more agree: reports show three decimals."""
SHOWN = ("scales.forget", "scales.retain", "verdict.code")
"""What is compared of a record besides its scores."""


@dataclass(frozen=True, slots=True)
class Reproduced:
    """How a second run of a record's recipe compares with the first."""

    output: Path
    tensors: int
    differing: Mapping[str, tuple[int, float] | None]
    """By tensor, how many of its numbers differ and by how much at most; None for one of another shape."""
    files: tuple[str, ...]
    """Config and tokenizer files that differ."""
    figures: int
    off: Mapping[str, tuple[Any, Any]]
    """Figures of the record and of the second run that do not agree."""
    environment: Mapping[str, tuple[Any, Any]]
    """What was different then and now: versions, machine, device."""

    @property
    def same_bytes(self) -> bool:
        """Whether the model is the same bit for bit."""
        return not (self.differing or self.files)

    @property
    def sentence(self) -> str:
        """What was found, in one sentence."""
        off = f"{len(self.off)} of {self.figures} figures" if self.off else f"all {self.figures} figures"
        if self.same_bytes:
            rest = f"but {off} do not agree" if self.off else f"and {off} agree"
            return f"Reproduced: all {self.tensors} tensors are equal bit for bit, {rest}."
        found = [entry for entry in self.differing.values() if entry is not None]
        most = f" (by {max(most for _, most in found):.2g} at most)" if found else ""
        bytes_ = f"{len(self.differing)} of {self.tensors} tensors{most}, {len(self.files)} other files"
        if self.off:
            return f"Not reproduced: {off} do not agree; {bytes_} differ."
        return (
            f"The figures agree, the bytes do not: {off} are alike, and {bytes_} differ. So it is on another "
            "processor or device, or with other libraries."
        )


def reproduce(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
) -> Reproduced:
    """Run the recipe of the record in an unlearned model's folder again, and compare the two.

    `settings` say where its models and rows lie now, as in {"data.forget": "rows.jsonl"}; the rest is the
    record's. The folder is only read; `output` is a new one beside it. The same call after an interruption
    goes on where it was. Raises InputError for models or rows that are not those of the record.
    """
    folder, listener = Path(folder), listener or NullListener()
    record, home = read_record(folder), folder.resolve()
    first = Checkpoint.open(folder)
    if first.fingerprint() != at(record, "models", "unlearned", "fingerprint"):
        raise CheckpointError(
            f"{folder} is not the model that its record tells of; palinode verify says more"
        )
    place = Path(output) if output else home.with_name(fitting(home.name, ".reproduced"))
    own = {"output": {"folder": str(place), "workspace": None, "keep_unchanged": True}, "tracker": None}
    content, unknown = _known(record["recipe"])
    try:
        recipe = build_recipe(laid_over(laid_over(content, settings or {}), own))
    except RecipeError as error:
        told = f"the record was written by Palinode {record.get('palinode')}, this is {__version__}"
        raise RecipeError(f"{error} ({told})") from None
    before, workspace = find_workspace(folder, record), workspace_folder(recipe).resolve()
    if home in (place.resolve(), *place.resolve().parents) or (before and before.resolve() == workspace):
        raise OutputError(f"{recipe.output.folder} is a place of the run itself; name another --output")
    inputs = _opened(recipe, record, listener)
    again = unlearn(recipe, listener=listener, located=record.get("located")).record
    second = Checkpoint.open(place)
    figures, now = _figures(record), {**again, "run": run_key(inputs)}
    return Reproduced(
        output=place,
        tensors=len(first.tensors),
        differing=_differing(first, second),
        files=tuple(_unequal(companion_digests(first), companion_digests(second))),
        figures=len(figures),
        off=_unequal(figures, _figures(again)),
        environment=unknown | _unequal(_surroundings(record), _surroundings(now)),
    )


def _known(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Return a record's recipe without keys that this Palinode does not have, and their values."""
    content, known, lost = copy.deepcopy(dict(recipe)), known_keys(), dict[str, tuple[Any, Any]]()
    for key, value in dotted(recipe):
        *sections, name = key.split(".")
        ours = not sections or any(one.startswith(f"{'.'.join(sections)}.") for one in known)
        if ours and key not in known:
            at(content, *sections).pop(name)
            lost[key] = value, "unknown"
    return content, lost


def _opened(recipe: Recipe, record: Mapping[str, Any], listener: Listener) -> Inputs:
    """Return models and rows of a recipe; raises MismatchError unless they are those of the record."""
    try:
        inputs = open_inputs(recipe)
    except InputError as error:
        raise InputError(
            f"what the record names cannot be used: {error}; where something lies elsewhere now, say so with "
            "--target, --base, --forget, --retain"
        ) from error
    rows = {"forget": inputs.rows.forget, "retain": inputs.rows.retain}
    rows |= {"holdout": inputs.rows.unseen} if recipe.data.holdout else {}
    found = {
        ("data", label): (fingerprint_examples(those), f"{label} rows")
        for label, those in rows.items()
        if those
    }
    hash_models(inputs, listener)
    found |= {("models", role): (model.fingerprint(), role) for role, model in inputs.models.items()}
    for (section, name), (here, words) in found.items():
        facts = at(record, section, name) or {}
        if facts.get("fingerprint") != here:
            given = getattr(getattr(recipe, section), name)
            raise MismatchError(
                f"the {words} in {given} are not those of the record ({here[:12]}… instead of "
                f"{str(facts.get('fingerprint'))[:12]}…); name what it was made from with --{name}"
            )
    return inputs


def _differing(first: Checkpoint, second: Checkpoint) -> dict[str, tuple[int, float] | None]:
    """Return the tensors that differ between two models, with how many numbers do, and by how much."""
    found: dict[str, tuple[int, float] | None] = {}
    for name in _unequal(tensor_digests(first), tensor_digests(second)):
        found[name] = None
        infos = [one.tensors[name] for one in (first, second) if name in one.tensors]
        if len(infos) == 2 and infos[0].shape == infos[1].shape:
            with safe_open(infos[0].file, "pt") as ours, safe_open(infos[1].file, "pt") as theirs:
                apart = (ours.get_tensor(name).float() - theirs.get_tensor(name).float()).abs()
            found[name] = int((apart != 0).sum()), float(apart.max())
    return found


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of all models, the scales and the verdict's code, by dotted name."""
    told = dotted({name: record.get(name) for name in ("scores", "scales", "verdict")})
    return {name: value for name, value in told if name.endswith(".value") or name in SHOWN}


def _surroundings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result may depend on besides models, rows and recipe."""
    known = {name: at(record, "environment", name) for name in at(record, "environment") or ()}
    known.pop("peak_memory_bytes", None)
    return {**known, "palinode": record.get("palinode"), "run": record.get("run")}


def _unequal(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return both values of each name under which two mappings do not agree; numbers may differ by ALIKE."""

    def alike(one: Any, other: Any) -> bool:
        numbers = isinstance(one, float) and isinstance(other, float)
        return abs(one - other) <= ALIKE if numbers else bool(one == other)

    pairs = {name: (first.get(name), second.get(name)) for name in {**first, **second}}
    return {name: pair for name, pair in pairs.items() if not alike(*pair)}
