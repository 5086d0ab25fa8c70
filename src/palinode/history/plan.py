"""Which checkpoints to keep, so that whatever has to be taken back later has a clean one close before it.

An exposure at step e is taken back from the last kept checkpoint before it, at distance e − s. With w(e) the
chance that a request concerns step e, a set of kept steps s_0 < s_1 < … < T costs

    expected distance = ∫ (e − s(e)) w(e) de,      worst distance = the longest stretch between two

w is uniform, or falls with age by half every half-life. Step 0, the untrained model, starts every training;
it is kept like any other where it counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from palinode.errors import RecipeError

GRID = 600
"""Most saves that the solver looks at, as its time grows with the square; more are taken at equal strides."""
HALF_LIVES = 10
"""Where no half-life is given for recent interest, the training is so many of them long."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a plan starts from."""

    steps: int
    """Length of the training."""
    every: int
    """Steps between two checkpoints that could be saved."""
    checkpoint_bytes: int
    budget_bytes: int
    interest: Literal["uniform", "recent"] = "uniform"
    """What requests are expected to concern: all steps alike, or recent ones more."""
    half_life: float | None = None
    """Steps after which interest has halved; None: a tenth of the training."""

    def __post_init__(self) -> None:
        for name in ("steps", "every", "checkpoint_bytes", "budget_bytes"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it must be at least 1")
        if self.interest not in ("uniform", "recent"):
            raise RecipeError(f"there is no interest {self.interest!r}; say uniform or recent")
        if self.half_life is not None and not self.half_life > 0:
            raise RecipeError(f"the half-life is {self.half_life:g}; it must be above 0")
        if self.every >= self.steps:
            raise RecipeError(
                f"a save every {self.every:,} steps is none before the end of {self.steps:,}; save more often"
            )
        if self.room < 1:
            raise RecipeError(
                f"a checkpoint has {self.checkpoint_bytes / 1e9:.3g} GB and the budget is "
                f"{self.budget_bytes / 1e9:.3g} GB: there is no room for one; raise the budget"
            )

    @property
    def room(self) -> int:
        """Return how many checkpoints fit into the budget."""
        return self.budget_bytes // self.checkpoint_bytes

    @property
    def saves(self) -> list[int]:
        """Return the steps at which a checkpoint could be saved, the end left out: it is the target."""
        return list(range(self.every, self.steps, self.every))

    @property
    def rate(self) -> float:
        """Return the rate λ at which recent interest falls with age, e^(−λ·age), per step."""
        return math.log(2) / (self.half_life or self.steps / HALF_LIVES)

    def weight(self, now: float | None = None) -> Callable[[npt.ArrayLike], npt.NDArray[np.float64]]:
        """Return W(e), the share of requests on steps up to e when the training stands at `now`."""
        end = float(self.steps if now is None else now)
        if self.interest == "uniform":
            return lambda at: np.asarray(at, dtype=float) / end
        rate = self.rate
        whole = -math.expm1(-rate * end)
        return lambda at: (
            (np.exp(-rate * (end - np.asarray(at, dtype=float))) - math.exp(-rate * end)) / whole
        )


@dataclass(frozen=True, slots=True)
class Schedule:
    """Checkpoints to keep, and how far exposures are from them."""

    name: str
    kept: tuple[int, ...]
    """Steps of the checkpoints that are left at the end of the training."""
    expected: float
    """Expected distance in steps from an exposure to the last clean checkpoint before it."""
    worst: int
    """The longest such distance in steps."""
    bytes: int
    """Storage of them; while training, the newest checkpoint comes on top."""
    without: float
    """Share of requests on steps before the first kept checkpoint, for which only the start is clean."""


def plan(wish: Wish) -> list[Schedule]:
    """Return the schedules that fit the budget, the least expected distance first."""
    count, thinned = min(wish.room, len(wish.saves)), list[int]()
    for step in wish.saves:  # every save beyond the budget throws one out
        thinned = thin([*thinned, step], count, wish, now=step)
    made = {"uniform": uniform_steps(wish, count), "thinning": thinned, "solved": solved_steps(wish, count)}
    schedules = []
    for name, kept in made.items():
        expected = expected_distance(wish, kept)
        worst = max(after - before for before, after in pairwise([0, *kept, wish.steps]))
        size, without = len(kept) * wish.checkpoint_bytes, float(wish.weight()(kept[0]))
        schedules.append(Schedule(name, tuple(kept), expected, worst, size, without))
    return sorted(schedules, key=lambda schedule: (schedule.expected, schedule.worst))


def uniform_steps(wish: Wish, count: int) -> list[int]:
    """Return steps at equal distances, each the nearest one that could be saved, each once."""
    free = wish.saves
    for place in range(count):
        wanted = wish.steps * (place + 1) / (count + 1)
        free.remove(min(free, key=lambda save: abs(save - wanted)))
    return sorted(set(wish.saves).difference(free))


def thin(saved: Sequence[int], count: int, wish: Wish, *, now: int) -> list[int]:
    """Return the saved steps without those that cost least, until `count` are left; the newest stays.

    Leaving out the step s between its neighbours a < s < b moves the exposures in (s, b] from s to a, so it
    costs (s − a)·(W(b) − W(s)) in expected distance, with the interest as it is now.
    """
    if count < 1:
        raise RecipeError("thinning must leave at least one checkpoint; raise the budget")
    kept = sorted(saved)
    weight = wish.weight(max(now, 1))
    while len(kept) > count and len(kept) > 1:
        bounds = np.array([0, *kept], dtype=float)
        mass = weight(bounds)
        costs = (bounds[1:-1] - bounds[:-2]) * (mass[2:] - mass[1:-1])
        kept.pop(int(np.argmin(costs)))
    return kept


def solved_steps(wish: Wish, count: int) -> list[int]:
    """Return the steps with the least expected distance, by dynamic programming over possible saves.

    best[k, j]: least cost of exposures up to save j when k checkpoints are kept and j is the last of them.
    """
    saves = wish.saves
    grid = (
        saves if len(saves) <= GRID else [saves[i] for i in np.linspace(0, len(saves) - 1, GRID).astype(int)]
    )
    count = min(count, len(grid))
    points = np.array([0, *grid, wish.steps], dtype=float)
    mass, moment = _moments(wish, points)
    # stretch[i, j]: ∫ (e − s_i) w(e) de from s_i to s_j
    stretch = (moment[None, :] - moment[:, None]) - points[:, None] * (mass[None, :] - mass[:, None])
    size = len(points)
    stretch[np.tril_indices(size)] = np.inf
    best, choices = stretch[0], []
    for _ in range(count):
        through = best[:, None] + stretch
        choice = through.argmin(axis=0)
        choices.append(choice)
        best = through[choice, np.arange(size)]
    kept, last = [], size - 1
    for choice in reversed(choices):
        last = int(choice[last])
        kept.append(int(points[last]))
    return sorted(kept)


def expected_distance(wish: Wish, kept: Sequence[int]) -> float:
    """Return the expected distance in steps from an exposure to the last checkpoint before it."""
    points = np.array([0, *kept, wish.steps], dtype=float)
    mass, moment = _moments(wish, points)
    return float(((moment[1:] - moment[:-1]) - points[:-1] * (mass[1:] - mass[:-1])).sum())


def _moments(
    wish: Wish, points: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return W(e) and ∫ x w(x) dx up to e at these points, both exactly."""
    mass = wish.weight()(points)
    if wish.interest == "uniform":
        return mass, points**2 / (2 * wish.steps)
    rate = wish.rate
    whole = -math.expm1(-rate * wish.steps)
    scaled = np.exp(-rate * (wish.steps - points)) / whole  # w(e) = rate · scaled
    start = math.exp(-rate * wish.steps) / whole
    return mass, scaled * (points - 1 / rate) + start / rate


def plan_record(wish: Wish, schedules: Sequence[Schedule]) -> dict[str, Any]:
    """Return a plan as plain values for JSON."""
    return {
        "version": 2,
        "wish": asdict(wish),
        "room": wish.room,
        "recommended": schedules[0].name,
        "schedules": [asdict(schedule) for schedule in schedules],
    }
