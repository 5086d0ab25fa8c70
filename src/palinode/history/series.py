"""A checkpoint series: the checkpoints that one training left, in the order of their steps.

A checkpoint of step c has been through the optimiser steps 1 to c, so it has seen a row whose first
step is s exactly when s ≤ c. Local checkpoints are opened when the series is (headers only); those on a
hub are fetched when they are first needed, so that a search fetches only what it looks at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from palinode.errors import CheckpointError, MismatchError, RecipeError, told_as
from palinode.records import read_json
from palinode.weights.checkpoint import Checkpoint
from palinode.weights.folders import INDEX, SINGLE
from palinode.weights.preflight import check_fit

STEP = r"(?:^|[^a-z])(?:checkpoint|global[_-]?step|steps?|iter(?:ation)?)[-_=]?(\d+)(?![\d.]*[bmk])"
"""Where a step stands in a name: checkpoint-500, step1000, global_step3000, stage1-step140000-tokens294B."""
TOKENS = r"tokens?[-_=]?(\d+(?:\.\d+)?)([kmbt]?)"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True, slots=True)
class SeriesCheckpoint:
    """One checkpoint of a training, and how far the training was."""

    step: int
    """Optimiser steps taken; the checkpoint has seen every row of steps 1 to this one."""
    location: str
    """A folder, or a hub id[@revision]."""
    tokens: int | None = None
    """Tokens trained on until then, where they are known."""
    allow_pickle: bool = False

    @property
    def checkpoint(self) -> Checkpoint:
        """The opened checkpoint; one on a hub is fetched now."""
        return _open(self.location, self.allow_pickle)


@dataclass(frozen=True, slots=True)
class CheckpointSeries:
    """The checkpoints of one training, earliest first."""

    checkpoints: tuple[SeriesCheckpoint, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the reader should know of how the series was put together."""

    def __len__(self) -> int:
        return len(self.checkpoints)

    def open(self, place: int) -> Checkpoint:
        """Open a checkpoint; raise MismatchError unless it is of the same model as the first."""
        found = self.checkpoints[place].checkpoint
        if not _is_local(self.checkpoints[place].location):
            _check_one_model(self.checkpoints[0].checkpoint, found)
        return found

    def last_before(self, step: int) -> int | None:
        """Return the place of the last checkpoint that has not been through this step, None without one."""
        before = [place for place, found in enumerate(self.checkpoints) if found.step < step]
        return before[-1] if before else None

    def tokens_at(self, step: int) -> int | None:
        """Return the tokens trained on after so many steps, interpolated between those that are known.

        None where fewer than two points are known; the start of the training (0, 0) is one.
        """
        told = ((found.step, found.tokens) for found in self.checkpoints if found.tokens is not None)
        known = sorted({(0, 0), *told})
        if len(known) < 2:
            return None
        after = next((place for place, (at, _) in enumerate(known) if at >= step and place), len(known) - 1)
        (first, low), (second, high) = known[after - 1], known[after]
        return round(low + (high - low) * (step - first) / (second - first))


def open_series(
    location: str | Path | Sequence[str | Path],
    *,
    steps: Sequence[int] | None = None,
    pattern: str | None = None,
    tokens_per_step: int | None = None,
    allow_pickle: bool = False,
) -> CheckpointSeries:
    """Return the series in a folder of checkpoints, in a list of locations, or under a hub id.

    `pattern` picks folders, or revisions of the hub id (`step*`); `steps` gives the steps where neither
    names nor `trainer_state.json` tell them, in the order of a list, or of the names sorted with numbers
    as numbers. Raises CheckpointError where there is none, MismatchError for checkpoints of
    different models, and RecipeError for steps that are unknown, equal or out of order.
    """
    listed = _split(location)
    places = listed if len(listed) > 1 else _expand(listed[0], pattern)
    if steps is not None and len(steps) != len(places):
        raise RecipeError(
            f"{len(steps)} steps were given for {len(places)} checkpoints "
            f"({', '.join(map(_short, places[:3]))}, …); give one for each"
        )
    found = []
    for number, place in enumerate(places):
        state = _trainer_state(place)
        step = steps[number] if steps is not None else _step_of(place, state)
        counted = state.get("num_input_tokens_seen")
        tokens = counted if isinstance(counted, int) and counted > 0 else read_tokens(_short(place))
        if tokens is None and tokens_per_step is not None:
            tokens = step * tokens_per_step
        found.append(SeriesCheckpoint(step, place, tokens, allow_pickle))
    if steps is None and len(listed) == 1:
        found.sort(key=lambda checkpoint: checkpoint.step)
    _check_order(found)
    local = [checkpoint for checkpoint in found if _is_local(checkpoint.location)]
    for checkpoint in local[1:]:
        _check_one_model(local[0].checkpoint, checkpoint.checkpoint)
    untold = sum(checkpoint.tokens is None for checkpoint in found)
    note = (
        f"{untold} checkpoints do not tell how many tokens they were trained on; distances are in steps only "
        "unless tokens per step are given."
    )
    return CheckpointSeries(tuple(found), (note,) if untold else ())


def read_step(name: str) -> int | None:
    """Return the step that a folder's or revision's name tells, None where it tells none.

    >>> [read_step(name) for name in ("checkpoint-500", "stage1-step140000-tokens294B", "final")]
    [500, 140000, None]
    """
    found = re.findall(STEP, name.lower())
    bare = re.fullmatch(r"\d+", name)
    return int(found[-1]) if found else int(name) if bare else None


def read_tokens(name: str) -> int | None:
    """Return the tokens that a name tells, None where it tells none.

    >>> [read_tokens(name) for name in ("step1000-tokens4B", "step7")]
    [4000000000, None]
    """
    found = re.findall(TOKENS, name.lower())
    return round(float(found[-1][0]) * UNITS[found[-1][1]]) if found else None


def step_of(location: str, series: CheckpointSeries) -> int | None:
    """Return a model's step by the series, its trainer state or its name; None where none tells it."""
    own = Path(location).expanduser().resolve() if _is_local(location) else location
    for found in series.checkpoints:
        place = Path(found.location).expanduser().resolve() if _is_local(found.location) else found.location
        if place == own:
            return found.step
    state = _trainer_state(location)
    return _step_of(location, state) if state or read_step(_short(location)) is not None else None


def learning_rates(series: CheckpointSeries) -> dict[int, float]:
    """Return the learning rates that the last checkpoint's trainer_state.json logged, by step."""
    history = _trainer_state(series.checkpoints[-1].location).get("log_history")
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    told = [one for one in entries if {"step", "learning_rate"} <= set(one)]
    return {int(one["step"]): float(one["learning_rate"]) for one in told}


@lru_cache(maxsize=256)
def _open(location: str, allow_pickle: bool) -> Checkpoint:
    return Checkpoint.open(location, allow_pickle=allow_pickle)


def _split(location: str | Path | Sequence[str | Path]) -> list[str]:
    """Return locations as a list of names; commas part them in a text that is no folder itself."""
    if isinstance(location, Path):
        return [str(location)]
    if isinstance(location, str):
        whole = Path(location).expanduser().exists() or "," not in location
        return [location] if whole else [part.strip() for part in location.split(",") if part.strip()]
    if not location:
        raise CheckpointError("the series is empty; name a folder of checkpoints, or a list of them")
    return [str(part) for part in location]


def _expand(location: str, pattern: str | None) -> list[str]:
    """Return the checkpoints of a folder, or of a hub id whose revisions fit the pattern."""
    folder = Path(location).expanduser()
    if folder.is_dir():
        if _is_model(folder):
            return [str(folder)]
        found = [path for path in folder.glob(pattern or "*") if path.is_dir() and _is_model(path)]
        found = [path for path in found if not path.name.startswith(".")]
        if not found:
            fitting = f" whose name fits {pattern!r}" if pattern else ""
            raise CheckpointError(
                f"{folder} holds no checkpoints (folders with a config.json and weights{fitting}); name the "
                "folder that they lie in"
            )
        return [str(path) for path in sorted(found, key=_by_number)]
    name, _, revisions = location.partition("@")
    wanted = pattern or (revisions if any(letter in revisions for letter in "*?[") else None)
    if wanted is None:
        if re.fullmatch(r"[\w.-]+/[\w.-]+@[\w./-]+", location):
            return [location]
        raise CheckpointError(
            f"there is no folder {location}; name a folder of checkpoints, a list with commas between them, "
            "or a hub id with a pattern of revisions, as in org/model@step*"
        )
    from fnmatch import fnmatch

    from huggingface_hub import list_repo_refs

    one_by_one = f"one by one with commas between them, as in {name}@step1000,{name}@step2000"
    what, advice = f"the revisions of {name} could not be listed", f"go online, or name them {one_by_one}"
    with told_as(CheckpointError, what, advice, Exception):  # of many kinds; each means that we have no list
        refs = list_repo_refs(name)
    names = [ref.name for ref in (*refs.branches, *refs.tags) if fnmatch(ref.name, wanted)]
    if not names:
        raise CheckpointError(f"no revision of {name} fits {wanted!r}; look at the model's page for them")
    return [f"{name}@{revision}" for revision in sorted(names, key=lambda one: _by_number(Path(one)))]


def _is_model(folder: Path) -> bool:
    """Tell whether a folder holds a model: a config, and weights of any format that we know."""
    if not (folder / "config.json").is_file():
        return False
    names = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return any((folder / name).exists() for name in names) or any(folder.glob("*.safetensors"))


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _step_of(place: str, state: dict[str, object]) -> int:
    """Return the step of a checkpoint from its trainer state or its name."""
    told, named = state.get("global_step"), read_step(_short(place))
    if isinstance(told, int) and not isinstance(told, bool):
        if named is not None and named != told:
            raise RecipeError(
                f"{place} is of step {named} by its name and of step {told} by its trainer_state.json; "
                "say which with --steps"
            )
        return told
    if named is None:
        raise RecipeError(
            f"the step of {place} is not known: its name does not tell it (as checkpoint-500 or step500 "
            "would) and it has no trainer_state.json; name it so, or give all steps with --steps of locate"
        )
    return named


def _trainer_state(place: str) -> dict[str, object]:
    """Return what trainer_state.json says, {} where there is none."""
    file = Path(place).expanduser() / "trainer_state.json"
    if not file.is_file():
        return {}
    with told_as(CheckpointError, f"{file} cannot be read", "remove it, and give --steps"):
        content = read_json(file)
    return content if isinstance(content, dict) else {}


def _short(place: str) -> str:
    """Return the part of a location that names the state: the revision, or the folder's name."""
    return Path(place).expanduser().absolute().name if _is_local(place) else place.partition("@")[2] or place


def _is_local(place: str) -> bool:
    return Path(place).expanduser().exists()


def _check_order(found: Sequence[SeriesCheckpoint]) -> None:
    """Raise RecipeError unless every step is later than the one before."""
    for first, second in pairwise(found):
        if first.step == second.step:
            raise RecipeError(
                f"{_short(first.location)} and {_short(second.location)} are both of step {first.step}; "
                "leave one of them out"
            )
        if first.step > second.step:
            raise RecipeError(
                f"the steps are out of order: {_short(second.location)} (step {second.step}) comes after "
                f"{_short(first.location)} (step {first.step}); list the checkpoints from the earliest on"
            )
        if first.tokens is not None and second.tokens is not None and first.tokens >= second.tokens:
            raise RecipeError(
                f"{_short(second.location)} is later than {_short(first.location)} by its step and not by "
                f"its tokens ({second.tokens:,} after {first.tokens:,}); look at their names"
            )


def _check_one_model(first: Checkpoint, other: Checkpoint) -> None:
    kinds = [checkpoint.config.get("model_type") for checkpoint in (first, other)]
    if kinds[0] != kinds[1]:
        raise MismatchError(
            f"{first.folder} is a {kinds[0]} model and {other.folder} a {kinds[1]} model; a series holds "
            "checkpoints of one training"
        )
    try:
        check_fit(first, [other])
    except MismatchError as error:
        raise MismatchError(
            f"{other.folder} is not a checkpoint of the same training as {first.folder}: {error}"
        ) from None
