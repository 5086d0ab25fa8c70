"""Which rows of a comparison serve for what.

    forget set    all of it is unlearned; one part is what points are chosen on, the rest is measured
    retain set    methods train on one part, points are chosen on another, the rest is measured

So nothing is measured on rows that a choice was made on, nor on retain rows that a method rehearsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from palinode.compare.recipe import Split
from palinode.data.examples import Example, sample_examples
from palinode.errors import DataError
from palinode.methods import METHODS
from palinode.pipeline.inputs import InputRows
from palinode.pipeline.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Shares:
    """The rows of a comparison by what they serve for."""

    forget: Sequence[Example]
    forget_probe: Sequence[Example]
    forget_test: Sequence[Example]
    retain_train: Sequence[Example]
    retain_probe: Sequence[Example]
    retain_test: Sequence[Example]


def divide_rows(
    forget: Sequence[Example], retain: Sequence[Example], split: Split, *, most: int, seed: int
) -> Shares:
    """Return the rows divided; at most `most` of each set are measured.

    Raises DataError where a part is empty.
    """
    probe, test = _parts(forget, [split.forget_probe], seed=seed + 1)
    train, other, rest = _parts(retain, [split.retain_train, split.retain_probe], seed=seed + 2)
    found = {
        "forget rows to choose on": probe,
        "forget rows to measure": test,
        "retain rows to train on": train,
        "retain rows to choose on": other,
        "retain rows to measure": rest,
    }
    if empty := [name for name, rows in found.items() if not rows]:
        raise DataError(
            f"there are no {empty[0]} ({len(forget)} forget and {len(retain)} retain rows); "
            "give more rows, or other shares in [split]"
        )
    return Shares(
        forget=forget,
        forget_probe=_at_most(probe, split.probe_rows, seed),
        forget_test=_at_most(test, most, seed),
        retain_train=train,
        retain_probe=_at_most(other, split.probe_rows, seed),
        retain_test=_at_most(rest, most, seed),
    )


def rows_for(recipe: Recipe, shares: Shares, *, sized_for: int | None = None) -> InputRows:
    """Return the rows of one contestant's run; the seed draws the sample that vectors are trained on.

    The sample is as large as for `sized_for` forget rows; None: as for those that there are.
    """
    settings = METHODS[recipe.method].check_settings(recipe.method_settings)
    wanted = settings.sample_size(sized_for or len(shares.forget))
    return InputRows(
        forget=shares.forget,
        retain=shares.retain_train,
        forget_train=shares.forget,
        retain_sample=_at_most(shares.retain_train, wanted, recipe.seed) if wanted else [],
        forget_probe=shares.forget_probe,
        retain_probe=shares.retain_probe,
        forget_test=shares.forget_test,
        retain_test=shares.retain_test,
    )


def _parts(examples: Sequence[Example], shares: Sequence[float], *, seed: int) -> list[list[Example]]:
    """Return the examples in parts of these shares, and what is left; answers of one row stay together."""
    rows = sorted({example.row for example in examples})
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    ends = np.cumsum([round(share * len(rows)) for share in shares]).tolist()
    part_of = {}
    for place, position in enumerate(order):
        part_of[rows[position]] = sum(place >= end for end in ends)
    return [
        [example for example in examples if part_of[example.row] == part] for part in range(len(shares) + 1)
    ]


def _at_most(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    return sample_examples(examples, min(count, len(examples)), seed=seed)
