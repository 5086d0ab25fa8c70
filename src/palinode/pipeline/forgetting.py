"""What a run left behind that holds its rows, found and destroyed: vectors, θ_1, outcomes, cache entries.

Only what Palinode wrote itself is touched: the steps of a workspace, the outcomes of `evaluate --output`,
interrupted parts beside an output, and what the caches remember of all these. Links are never followed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError, InputError, OutputError
from palinode.evaluation.judging import decision_file
from palinode.pipeline.workspace import Workspace, folder_size
from palinode.records import LONGEST, beside, read_outcomes, workspace_beside
from palinode.report.words import at
from palinode.weights.atomic import is_claimed
from palinode.weights.fingerprints import remembered
from palinode.weights.tensors import read_json

VECTORS = "fine-tuned models and adapters: with the base, the vectors"
OUTCOMES = "outcomes: what models answered on the rows"
REPORTS = "reports with questions and answers"
KINDS: Mapping[str, str] = {
    "finetune": VECTORS,
    "transform": VECTORS,
    "moments": "sums over what the layers read on the rows",
    "evaluate": OUTCOMES,
    "apply": "models made of them",
    "merge": "models made of them",
    "world": "the demo's world: models and rows",
    "report": REPORTS,
}
"""What the folders and files of a workspace are, by the beginning of their names."""
OTHER = "results of other steps, row by row"
BESIDE = "parts of an interrupted run"


@dataclass(frozen=True, slots=True)
class Part:
    """A file or folder that is to go."""

    path: Path
    what: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What a run left behind that is as secret as its rows."""

    place: Path
    parts: tuple[Part, ...]
    losses: tuple[str, ...]
    """What will no longer be possible without them."""
    stays: tuple[str, ...]
    """What holds the rows, or something of them, and stays."""

    def destroy(self) -> None:
        """Remove all parts, whatever happens with one of them; raises OutputError for those that stay.

        Of a step its mark goes first, so that no part looks whole.
        """
        failed = []
        for path in (part.path for part in self.parts):
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    (path / "step.json").unlink(missing_ok=True)
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            if path.is_symlink() or path.exists():
                failed.append(path)
        if failed:
            raise OutputError(
                f"{len(failed)} of {len(self.parts)} parts could not be removed (first: {failed[0]}); look "
                "at its permissions and its owner, and repeat the call"
            )


@contextmanager
def leftovers(place: Path) -> Iterator[Leftovers]:
    """Give what lies in the workspace of `place`, or in `place`, and keep runs out of it meanwhile.

    `place` is what a run wrote or was to write, or a workspace. Raises InputError where there is nothing of
    Palinode's, or a link, and WorkspaceError or OutputError while another run works there.
    """
    _refuse_link(place)
    place = Path(os.path.abspath(place))  # noqa: PTH100 - `resolve` would follow links
    if not place.name:
        raise InputError(_nothing(place))
    found_records = (_content(folder / "record.json") for folder in _homes(place))
    record = next((one for one in found_records if "recipe" in one), {})
    workspaces = list(_workspaces(place, record))
    with ExitStack() as stack:
        for folder in workspaces:
            stack.enter_context(Workspace(folder).locked())
        steps = [path for folder in workspaces for path in Workspace(folder).own() if path.name != "lock"]
        found = [(path, KINDS.get(_stem(path), OTHER)) for path in steps]
        found += [(path, what) for path, what in _written(place) if path not in steps]
        found += [(path, BESIDE) for path in _beside(place)]
        if not found:
            raise InputError(_nothing(place))
        what = "cache entries: digests of these weights, a judge's decisions"
        found += [(path, what) for path in _cached([path for path, _ in found])]
        parts = tuple(Part(path, what, folder_size(path)) for path, what in found)
        yield Leftovers(place, parts, tuple(_losses(place, parts)), tuple(_stays(place, record, workspaces)))


def describe_leftovers(found: Leftovers) -> list[str]:
    """Return in words what will go, what will not be possible then, and what stays."""
    lines = ["To be destroyed:"]
    for what in dict.fromkeys(part.what for part in found.parts):
        members = [part for part in found.parts if part.what == what]
        homes = ", ".join(dict.fromkeys(str(part.path.parent) for part in members))
        lines.append(f"  {what} ({len(members)} in {homes}, {sum(m.nbytes for m in members) / 1e6:.3g} MB)")
    lines += ["Not possible any more:", *(f"  {loss}" for loss in found.losses)]
    return [*lines, "Out of reach, and it stays:", *(f"  {rest}" for rest in found.stays)]


def leftovers_content(found: Leftovers) -> dict[str, Any]:
    """Return the same as plain values."""
    parts = [{"path": str(part.path), "what": part.what, "bytes": part.nbytes} for part in found.parts]
    return {"destroyed": parts, "not_possible": list(found.losses), "stays": list(found.stays)}


# Finding


def _refuse_link(place: Path) -> None:
    if place.is_symlink():
        raise InputError(f"{place} is a link, and links are not followed; name {place.readlink()} itself")


def _workspaces(place: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the workspace that `place` is, or those that belong to it.

    One that the record names counts if it holds what the record says of it.
    """
    if Workspace(place).is_one():
        yield place
        return
    for folder in (workspace_beside(place), place / "workspace", place / "results"):
        if Workspace(folder).is_one():
            _refuse_link(folder)
            yield folder
    original = Path(str(at(record, "recipe", "output", "folder")))
    if original.exists() and not any(original.samefile(one) for one in _homes(place) if one.exists()):
        return  # `place` is a copy, and the workspace that its record names is the original's
    named, steps = at(record, "recipe", "output", "workspace"), at(record, "outcomes")
    if not isinstance(named, str) or not isinstance(steps, Mapping) or not steps:
        return
    folder = Path(named).absolute()
    known = all((folder / str(step) / "step.json").is_file() for step in steps.values())
    if known and Workspace(folder).is_one() and folder != place / "workspace":
        _refuse_link(folder)
        yield folder


def _stem(path: Path) -> str:
    """Return the kind of step that a name begins with."""
    return re.split(r"[-.]", path.name)[0]


def _written(place: Path) -> Iterator[tuple[Path, str]]:
    """Yield what `evaluate --output` and `demo` wrote with texts in it."""
    if place.is_file() and _holds_outcomes(place):
        yield place, OUTCOMES
    if not place.is_dir():
        return
    names = re.compile(r"\.?((outcomes|against)-.+\.jsonl|verdicts\.json)(\.partial)?")
    written = [path for path in sorted(place.iterdir()) if names.fullmatch(path.name)]
    if any(path.suffix == ".jsonl" and _holds_outcomes(path) for path in written):
        yield from ((path, OUTCOMES) for path in written)
    if at(_content(place / "demo.json"), "palinode"):
        own = (place / f"report.{suffix}" for suffix in ("html", "md", "json"))
        yield from ((path, REPORTS) for path in own if path.is_file())


def _holds_outcomes(path: Path) -> bool:
    """Tell whether a file is one that `write_outcomes` wrote."""
    try:
        return path.is_file() and not path.is_symlink() and next(read_outcomes(path), None) is not None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _beside(place: Path) -> list[Path]:
    """Return what an interrupted run left beside its output; raises OutputError while one is alive."""
    home = _output(place)
    if not home.parent.is_dir():
        return []
    state = re.escape(beside(home, f".state-{'0' * 12}").name.removesuffix("0" * 12))
    ours = re.compile(rf"{state}[0-9a-f]{{12}}|\.{state}[0-9a-f]{{12}}.*\.(partial|old)")
    partial = beside(home).name
    names = sorted(home.parent.iterdir())
    found = [path for path in names if path.name == partial or ours.fullmatch(path.name)]
    for path in found:
        if path.is_dir() and is_claimed(path):
            raise OutputError(f"another run is writing {place}; wait for it, or stop it")
    return found


def _cached(paths: Iterable[Path]) -> list[Path]:
    """Return the cache entries about these weights and answers."""
    everything = [file for path in paths for file in (path, *path.rglob("*"))]
    files = [file for file in everything if file.is_file() and not file.is_symlink()]
    found = remembered(files)
    for file in files:
        if file.name == "verdicts.json":
            with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
                verdicts = json.loads(file.read_text(encoding="utf-8"))
                keys = [one["decision"] for given in verdicts.values() for one in given if one["decision"]]
                found += [path for key in dict.fromkeys(keys) if (path := decision_file(key)) is not None]
    return found


# What to say


def _losses(place: Path, parts: Iterable[Part]) -> Iterator[str]:
    names = {_stem(part.path) for part in parts}
    kinds = {part.what for part in parts}
    made = [part.path.name.split("-")[1] for part in parts if part.path.name.startswith("finetune-")]
    if VECTORS in kinds:
        yield "turning α and β in palinode chat"
        yield "going on with this run, or with another in its workspace: all is trained anew"
    if lost := [name for name in ("target", "retrained") if name in made]:
        yield f"any use of the {' and the '.join(lost)} model that the run itself made"
    if "evaluate" in names or REPORTS in kinds:
        yield "the report with questions and answers"
    if {"outcomes", "verdicts"} & names or place.is_file():
        yield "other scores from the same answers; a judge is asked, and paid, again"
    if OTHER in kinds:
        yield "measuring by another rule or policy without asking the models again"
    if BESIDE in kinds:
        yield "going on where an interrupted run stopped"
    if VECTORS in kinds and not _output(place).exists():
        yield f"the result: {_output(place)} is not there, and the run begins anew"


def _stays(place: Path, record: Mapping[str, Any], workspaces: Iterable[Path]) -> Iterator[str]:
    for folder in workspaces:
        if strange := Workspace(folder).strange():
            yield f"{folder}: {', '.join(path.name for path in strange)}, which no run has put there"
    sets = (at(record, "recipe", "data", name) for name in ("forget", "retain", "holdout"))
    rows = ", ".join(str(name) for name in sets if name)
    target = at(record, "recipe", "models", "target")
    yield f"the rows themselves ({rows or 'wherever they lie'}), and their copies"
    if record:
        yield f"{_output(place)}: together with the old target it gives the vector away"
    yield f"the old target{f' ({target})' if target else ''}, and what was made of it"
    yield "vectors, models and reports that were written elsewhere; caches of the hub"
    yield "backups, snapshots, and the blocks of an SSD: removing a file wipes no disk"


def _nothing(place: Path) -> str:
    names = "what unlearn, run, compare, audit, evaluate --output or demo wrote, or the workspace itself"
    if not place.exists():
        return f"{place} does not exist, and no workspace lies beside it; name {names}"
    marks = {"vector.json": "a vector", "adapter_config.json": "an adapter", "config.json": "a model"}
    for what in (what for mark, what in marks.items() if (place / mark).exists()):
        return (
            f"{place} is {what}, and no workspace lies beside it; if it holds the rows, remove the "
            "folder itself"
        )
    return f"{place} is no Palinode workspace, and none lies beside it; name {names}"


def _homes(place: Path) -> tuple[Path, Path]:
    """Return where the record of the run of `place` lies: in its output, or in the demo's."""
    home = _output(place)
    return home, home / "unlearned"


def _content(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file; empty where there is none."""
    with suppress(CheckpointError):
        content = read_json(path)
        return content if isinstance(content, dict) else {}
    return {}


def _output(place: Path) -> Path:
    """Return the output that a workspace lies beside; any other place itself."""
    if len(os.fsencode(place.name)) < LONGEST:
        return place.with_name(place.name.removesuffix(".workspace") or place.name)
    with suppress(OSError):  # a name that was cut is its neighbour's whose workspace has that name
        return next(path for path in place.parent.iterdir() if workspace_beside(path).name == place.name)
    return place
