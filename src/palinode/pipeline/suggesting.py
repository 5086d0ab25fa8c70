"""How optuna is used: a quiet, seeded study in memory that suggests scales and hears how good they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from palinode.pipeline.goal import TriedScales

if TYPE_CHECKING:
    import optuna

Range = tuple[float, float]


def range_around(values: Sequence[float], grid: Sequence[float]) -> Range:
    """Return the range from the neighbour below the least value to the one above the largest."""
    if len(grid) == 1:
        return grid[0], grid[0]
    below = max((other for other in grid if other < min(values)), default=0.0)
    above = min((other for other in grid if other > max(values)), default=max(values))
    return below, above


def suggested(trial: optuna.Trial, name: str, limits: Range) -> float:
    """Return a scale with two decimals between the limits; more exact than that it need not be."""
    low, high = limits
    return low if low == high else round(trial.suggest_float(name, low, high), 2)


@contextmanager
def quiet_study(seed: int, *, starts: int) -> Iterator[optuna.Study]:
    """Give a study in memory, seeded and quiet."""
    import optuna

    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # exact objectives are new
            sampler = optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=starts, deterministic_objective=True
            )
        yield optuna.create_study(direction="minimize", sampler=sampler)
    finally:
        optuna.logging.set_verbosity(loud)


def tell(study: optuna.Study, trial: optuna.Trial, point: TriedScales) -> None:
    """Report what a suggested point was worth, and which floors it misses."""
    for name, shortfall in point.goal.shortfalls(point.behaviour).items():
        trial.set_constraint(name, shortfall)
    study.tell(trial, point.goal.objective(point.behaviour))
