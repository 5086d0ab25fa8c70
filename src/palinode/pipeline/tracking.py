"""Curves of a run in TensorBoard, Weights & Biases, MLflow and the like, through accelerate's trackers.

Training and search only hand the points of their curves to their listener (`progress.record`). `tracked`
wraps a listener in one that passes them on to the trackers that were named.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palinode.errors import RecipeError, first_line, meant, told_as
from palinode.progress import Figures, Listener, Relay
from palinode.records import dotted, packaged_table

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

TRACKERS = packaged_table("pipeline/trackers.toml")
"""The trackers of accelerate: the libraries of which each needs one, and what it wants to know."""

PROJECT = "palinode"


def check_trackers(names: str | None) -> tuple[str, ...]:
    """Return the trackers in a list with commas; raise RecipeError for one that cannot be used here."""
    wanted = tuple(dict.fromkeys(name.strip() for name in (names or "").split(",") if name.strip()))
    for name in wanted:
        if name not in known_trackers():
            there = f"there is no tracker {name!r}; there are {', '.join(known_trackers())}"
            raise RecipeError(f"{there}{meant(name, known_trackers())}")
        if not is_installed(name):
            library = TRACKERS[name]["libraries"][0]
            raise RecipeError(
                f"the tracker {name} needs a library that is not installed; pip install {library}, or leave "
                "it out"
            )
    return wanted


def known_trackers() -> tuple[str, ...]:
    """Return the names of all trackers: accelerate's own, and those that were registered with it."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return tuple(dict.fromkeys((*TRACKERS, *LOGGER_TYPE_TO_CLASS)))


def is_installed(name: str) -> bool:
    """Tell whether a tracker has the library it needs; a registered one brings its own."""
    libraries = TRACKERS.get(name, {}).get("libraries", ())
    return not libraries or any(importlib.util.find_spec(library) is not None for library in libraries)


@contextmanager
def tracked(
    listener: Listener, names: str | None, *, folder: Path, run: str, settings: Mapping[str, Any], cpu: bool
) -> Iterator[Listener]:
    """Give a listener that also keeps curves with the named trackers; the listener itself if there are none.

    `folder` takes the files of trackers that write any; `run` names the run, and `settings` (plain nested
    values) are shown with it; `cpu` is whether the run trains on the processor. Where several processes
    work, the first one tracks. Raises RecipeError when a tracker cannot be started.
    """
    from accelerate.state import PartialState  # it keeps its state, so it has to know the device

    wanted = check_trackers(names)
    if not wanted or not PartialState(cpu=cpu).is_main_process:
        yield listener
        return
    trackers: list[GeneralTracker] = []
    tracking = Tracking(listener, trackers)
    try:
        for name in wanted:
            trackers.append(_start(name, folder, run, _flat(settings)))
        yield tracking
    finally:
        tracking.finish()


class Tracking(Relay):
    """A listener that hands everything on to another, and points of curves to trackers as well."""

    def __init__(self, listener: Listener, trackers: list[GeneralTracker]) -> None:
        super().__init__(listener)
        self.trackers = trackers

    def record(self, series: str, step: int, figures: Figures) -> None:
        """Hand a point to every tracker; one that fails is left out from then on, and the run goes on."""
        super().record(series, step, figures)
        curve = series.replace(" ", "-")
        values = {f"{curve}/{name}": value for name, value in figures.items() if math.isfinite(value)}

        def log(tracker: GeneralTracker) -> None:
            if TRACKERS.get(tracker.name, {}).get("one_clock"):
                tracker.log({**values, f"{curve}/step": step}, step=None)
            else:
                tracker.log(values, step=step)

        self._have_each(log)

    def finish(self) -> None:
        """Have every tracker write what it still holds."""
        self._have_each(lambda tracker: tracker.finish())

    def _have_each(self, act: Callable[[GeneralTracker], None]) -> None:
        for tracker in [*self.trackers]:
            try:
                act(tracker)
            except Exception as error:  # each library has its own; none is worth a training run
                self.trackers.remove(tracker)
                self.listener.say(f"Nothing more is tracked with {tracker.name}: {first_line(error)}")


def _start(name: str, folder: Path, run: str, settings: Mapping[str, Any]) -> GeneralTracker:
    """Return a tracker that is ready for points."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    folder.mkdir(parents=True, exist_ok=True)
    own = PROJECT if name in TRACKERS else run  # what a tracker takes first: its run or project
    place = (run, str(folder)) if kind.requires_logging_directory else (own,)
    what, advice = f"the tracker {name} cannot be started", "set it up as its own pages say, or leave it out"
    with told_as(RecipeError, what, advice, Exception):  # not logged in, no server, a version that fits not
        tracker = kind(*place, **_options(name, folder, run))
        tracker.start()
        tracker.store_init_configuration(dict(settings))
    return tracker


def _options(name: str, folder: Path, run: str) -> dict[str, Any]:
    """Return what else a tracker wants to know; its files go to `folder`, if it was not told otherwise."""
    if name == "mlflow":
        mlflow = importlib.import_module("mlflow")

        if not mlflow.is_tracking_uri_set():
            mlflow.set_tracking_uri(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
        return {"run_name": run, "logging_dir": (folder / "mlflow").resolve().as_uri()}
    options = TRACKERS.get(name, {}).get("options", {})
    return {key: text.format(run=run, folder=folder) for key, text in options.items()}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with dotted names, as texts and numbers."""
    flat: dict[str, Any] = {}
    for name, value in dotted(values):
        if isinstance(value, (bool, int, float, str)):
            flat[name] = value
        elif not isinstance(value, Mapping):
            flat[name] = ", ".join(map(str, value)) if isinstance(value, Sequence) else str(value or "")
    return flat
