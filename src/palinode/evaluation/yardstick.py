"""The yardstick from history: how would the target behave on the forget set, had it never seen it?

The base checkpoint did not see the forget set, but it is another model than the target. On rows that neither
has seen, both can be asked, and what the one does there foretells what the other does:

    target = mean_target + slope · (base − mean_base) + rest      over the unseen rows, by least squares
    estimate of forget row i = mean_target + slope · (base_i − mean_base)

The values are mean log-probabilities of answers. The estimate of a row is its middle; rows lie around theirs
as far as the rests of the unseen rows say, so the estimate of the set is a distribution: each row's
middle with each rest. Forgetting is two-sided: the aim is this distribution, not zero. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palinode.errors import DataError
from palinode.records import Score, packaged_table

Floats = NDArray[np.float64]
Places = NDArray[np.intp]

FEWEST_ROWS = 8
"""Unseen rows below which nothing is said of the drift."""
DRAWS = 500
"""Draws behind the interval and the tolerance."""
BASE_ALONE = "base"
"""Name of the source where there are no unseen rows."""
UNFILTERED = "unfiltered"
"""Name of the source where a change is filtered and no base is there: the model before that."""

ASSUMES: Mapping[str, str] = packaged_table("evaluation/assumes.toml")
"""What an estimate from each source takes for granted."""


@dataclass(frozen=True, slots=True)
class Unseen:
    """What base and target make of rows that neither has seen, row by row."""

    source: str
    """A key of ASSUMES."""
    base: Sequence[float]
    """Mean log-probability of each answer."""
    target: Sequence[float]
    groups: Sequence[int] = ()
    """Rows with one number say one thing, and chance treats them as one; empty: each by itself."""


@dataclass(frozen=True, slots=True)
class Yardstick:
    """How a model that never saw the forget set would behave on it, by estimate."""

    source: str
    """Where the drift was measured: a key of ASSUMES."""
    unseen_rows: int
    middles: tuple[float, ...]
    """The middle of each forget row's mean log-probability."""
    rests: tuple[float, ...]
    """How far single rows lie from their middles."""
    slope: float
    probability: Score
    """Mean answer probability over the forget set; the interval is where a retrained one would lie."""
    tolerance: float
    """What `distance` would be for a model that truly follows this yardstick, in 19 cases of 20 at most."""

    @property
    def assumes(self) -> str:
        """What the estimate takes for granted."""
        return ASSUMES[self.source]

    def quantiles(self, rows: Sequence[int] | None = None) -> Floats:
        """Return the answer probabilities [N] of N forget rows, sorted: the distribution at (k − ½)/N."""
        middles = np.array(self.middles)
        return _quantiles(middles if rows is None else middles[list(rows)], np.array(self.rests))

    def distance(
        self, logprobs: Sequence[float], rows: Sequence[int] | None = None, *, share: float = 1.0
    ) -> float:
        """Return the Wasserstein distance from a model's answer probabilities to the yardstick's.

        W1 = mean_k |p_(k) − q_k| over the sorted probabilities p = exp(mean log-probability) and quantiles
        q: how far an answer's probability is off on average, 0 to 1. `rows` says which forget rows they are;
        with `share` it is the distance to so much of each quantile.
        """
        wanted = share * self.quantiles(rows)
        if len(wanted) != len(logprobs):
            raise DataError(f"{len(logprobs)} rows were measured, and the yardstick is of {len(wanted)}")
        return _distance(np.exp(np.array(logprobs)), wanted)

    def as_record(self) -> dict[str, Any]:
        """Return what the record holds: figures and words, nothing row by row."""
        return {
            "source": self.source,
            "assumes": self.assumes,
            "unseen_rows": self.unseen_rows,
            "slope": self.slope,
            "tolerance": self.tolerance,
            "answer_probability": asdict(self.probability),
            "quantiles": [float(value) for value in np.quantile(self.quantiles(), np.linspace(0, 1, 21))],
        }


def estimate_yardstick(
    base_forget: Sequence[float], unseen: Unseen | None = None, *, groups: Sequence[int] = (), seed: int = 0
) -> Yardstick:
    """Return the yardstick from the base's mean log-probabilities on the forget rows and what drift shows.

    Without unseen rows, or with fewer than FEWEST_ROWS, the yardstick is the base's own behaviour. The
    interval and the tolerance draw the unseen rows anew, fit again, and give each forget row a drawn rest, a
    group of rows at a time (`groups` are those of the forget rows).
    """
    if not len(base_forget):
        raise DataError(
            "the yardstick needs what the base checkpoint makes of the forget rows; there are none"
        )
    given = {"forget": base_forget}
    if unseen is not None:
        if len(unseen.base) != len(unseen.target):
            raise DataError(
                f"base and target were asked {len(unseen.base)} and {len(unseen.target)} unseen rows, "
                "but must be asked the same ones"
            )
        given |= {f"{unseen.source} (base)": unseen.base, f"{unseen.source} (target)": unseen.target}
    for name, values in given.items():
        if not all(map(math.isfinite, values)):
            raise DataError(f"a log-probability of the {name} rows is not a finite number")
    forget, generator = np.array(base_forget), np.random.default_rng(seed)
    own = _Groups.of(groups, len(forget))
    if unseen is None or len(unseen.base) < FEWEST_ROWS:
        middles, rests, slope, source, count = forget, np.zeros(1), 1.0, BASE_ALONE, 0
        drawn = [np.exp(np.resize(forget[own.drawn(generator)], len(forget))) for _ in range(DRAWS)]
    else:
        base, target = np.array(unseen.base), np.array(unseen.target)
        middles, rests, slope = _fit(forget, base, target)
        source, count = unseen.source, len(base)
        others = _Groups.of(unseen.groups, count)

        def world() -> Floats:
            """Return the forget rows' probabilities in a world drawn from the unseen rows, by groups."""
            rows = others.drawn(generator)
            middles, _, slope = _fit(forget, base[rows], target[rows])
            rests = target - slope * base
            lent = others.rows(others.pick(len(own.sizes), generator), own.sizes)
            values = middles[own.order] + rests[lent] - rests[rows].mean()
            return np.asarray(np.exp(np.minimum(0.0, values)))

        drawn = [world() for _ in range(DRAWS)]
    wanted = _quantiles(middles, rests)
    low, high = np.quantile([draw.mean() for draw in drawn], [0.025, 0.975])
    return Yardstick(
        source=source,
        unseen_rows=count,
        middles=tuple(middles.tolist()),
        rests=tuple(rests.tolist()),
        slope=slope,
        probability=Score(float(wanted.mean()), len(forget), float(low), float(high), None),
        tolerance=float(np.quantile([_distance(draw, wanted) for draw in drawn], 0.95)),
    )


def _fit(forget: Floats, base: Floats, target: Floats) -> tuple[Floats, Floats, float]:
    """Return middles of the forget rows, rests of the unseen rows, and the slope, which is never below 0."""
    spread = float(((base - base.mean()) ** 2).sum())
    slope = float(((base - base.mean()) * (target - target.mean())).sum()) / spread if spread > 1e-12 else 0.0
    slope = max(0.0, slope)
    return (
        target.mean() + slope * (forget - base.mean()),
        target - target.mean() - slope * (base - base.mean()),
        slope,
    )


@dataclass(frozen=True, slots=True)
class _Groups:
    """Rows in groups: `order` holds the places of the rows, group by group."""

    order: Places
    starts: Places
    sizes: Places

    @classmethod
    def of(cls, numbers: Sequence[int], count: int) -> _Groups:
        """Return the groups of so many rows; every row is one of its own where no numbers are given."""
        given = np.array(numbers if len(numbers) else range(count))
        sizes = np.unique(given, return_counts=True)[1]
        return cls(np.argsort(given, kind="stable"), np.cumsum(sizes) - sizes, sizes)

    def pick(self, count: int, generator: np.random.Generator) -> Places:
        """Return so many groups, drawn with replacement."""
        return generator.integers(0, len(self.sizes), count)

    def rows(self, groups: Places, sizes: Places | None = None) -> Places:
        """Return the places of the rows of groups, one after the other, each repeated or cut to a size."""
        wanted = self.sizes[groups] if sizes is None else sizes
        within = np.arange(wanted.sum()) - np.repeat(np.cumsum(wanted) - wanted, wanted)
        chosen = np.repeat(groups, wanted)
        places: Places = self.order[self.starts[chosen] + within % self.sizes[chosen]]
        return places

    def drawn(self, generator: np.random.Generator) -> Places:
        """Return the places of the rows of as many groups as there are, drawn with replacement."""
        return self.rows(self.pick(len(self.sizes), generator))


def _quantiles(middles: Floats, rests: Floats) -> Floats:
    """Return N quantiles of exp(min(0, middle + rest)) over all pairs: no log-probability is above 0."""
    pooled = np.sort(np.exp(np.minimum(0.0, np.add.outer(middles, rests))), axis=None)
    places = (np.arange(len(middles)) + 0.5) / len(middles) * len(pooled)
    found: Floats = pooled[places.astype(int)]
    return found


def _distance(probabilities: Floats, quantiles: Floats) -> float:
    return float(np.abs(np.sort(probabilities) - quantiles).mean())
