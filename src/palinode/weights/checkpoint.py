"""The algebra of weight space: checkpoints, which are points in it, and directions.

    point − point = direction        direction ± direction = direction      number · direction = direction
    point ± direction = point        point + point and number · point have no meaning and say so

A sum is kept as coefficients over its terms, which lie on disk: checkpoints, and displacements (directions
of their own, such as a LoRA adapter). `θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0)` has the coefficients
(1, −α, +β, α−β) over (θ_D, θ_1, θ_2, θ_0). Over checkpoints a point's add up to 1 and a direction's to 0;
over displacements they are free. A term whose coefficient is zero is never opened. Nothing is read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, overload

from palinode.errors import AlgebraError, InputError, MismatchError
from palinode.records import packaged
from palinode.weights.arithmetic import NAMES, Rounding, Settings, combined, formula
from palinode.weights.displacement import Displacement, Term
from palinode.weights.folders import ModelFolder
from palinode.weights.geometry import Dose
from palinode.weights.preflight import Rows, check_fit
from palinode.weights.store import plan, write
from palinode.weights.tensors import is_head

LARGEST = 3.4e38
"""Largest coefficient: about the largest float32, in which sums are computed."""


class _Summed:
    """What is a sum over terms: a point or a direction."""

    __slots__ = ()

    @property
    def terms(self) -> Mapping[Term, float]:
        """Coefficient of each term; those of checkpoints add up to 1 in a point, to 0 in a direction."""
        raise AttributeError("terms")


class Point(_Summed):
    """A place in weight space: a `Checkpoint` on disk, or a `WeightedSum` of several."""

    __slots__ = ()

    @property
    def anchor(self) -> Checkpoint:
        """The checkpoint that lends its layout, config and tokenizer: the leftmost one of the sum."""
        raise AttributeError("anchor")

    def __add__(self, other: object) -> WeightedSum:
        if isinstance(other, Direction):
            return WeightedSum(self.anchor, _sum(self.terms, 1.0, other.terms))
        if isinstance(other, Point):
            raise AlgebraError(
                "two points were added; add a direction to a point instead, "
                "as in target + beta * (theta_2 - base)"
            )
        return NotImplemented

    @overload
    def __sub__(self, other: Point) -> Direction: ...
    @overload
    def __sub__(self, other: Direction) -> WeightedSum: ...
    def __sub__(self, other: object) -> Direction | WeightedSum:
        if isinstance(other, Point):
            return Combination(_sum(self.terms, -1.0, other.terms))
        if isinstance(other, Direction):
            return WeightedSum(self.anchor, _sum(self.terms, -1.0, other.terms))
        return NotImplemented

    def __mul__(self, other: object) -> NoReturn:
        raise AlgebraError(
            "a point was multiplied by a number; scale a direction instead, as in alpha * (theta_1 - base)"
        )

    __rmul__ = __truediv__ = __mul__

    def __neg__(self) -> NoReturn:
        self.__mul__(-1.0)


class Checkpoint(ModelFolder, Point):
    """A model folder on disk: a point in weight space. Two openings of one folder are equal."""

    __slots__ = ()

    @property
    def terms(self) -> Mapping[Term, float]:
        """A checkpoint is the sum of itself alone."""
        return {self: 1.0}

    @property
    def anchor(self) -> Checkpoint:
        """The checkpoint itself."""
        return self


@dataclass(frozen=True, slots=True)
class WeightedSum(Point):
    """A point that is a formula, not yet written: `target - alpha * forget_vector`."""

    anchor: Checkpoint
    terms: Mapping[Term, float]

    def save(
        self,
        output: Path | str,
        *,
        dtype: str | None = None,
        rounding: Rounding = "auto",
        seed: int = 0,
        along: Mapping[str, Direction] | None = None,
    ) -> Saved:
        """Write the sum as a model folder; see `save`."""
        return save(self, Path(output), dtype=dtype, rounding=rounding, seed=seed, along=along or {})


class Direction(_Summed):
    """A way to go in weight space: `theta_1 - base`, a `Displacement` on disk, or any sum of such.

    It is scaled by a number, added to other directions, and added to a point.
    """

    __slots__ = ()

    def __add__(self, other: object) -> Direction:
        if isinstance(other, Direction):
            return Combination(_sum(self.terms, 1.0, other.terms))
        if isinstance(other, Point):
            raise AlgebraError("a point was added to a direction; write the point first: target + direction")
        return NotImplemented

    def __sub__(self, other: object) -> Direction:
        if isinstance(other, Direction):
            return Combination(_sum(self.terms, -1.0, other.terms))
        if isinstance(other, Point):
            raise AlgebraError(
                "a point was subtracted from a direction; write the point first: target - direction"
            )
        return NotImplemented

    def __mul__(self, factor: float) -> Direction:
        if not isinstance(factor, int | float):
            return NotImplemented
        return Combination(_sum({}, _finite(factor), self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> Direction:
        return -1.0 * self

    def __radd__(self, other: object) -> Direction:
        if other == 0:  # so that sum([v1, v2]) works
            return self
        return NotImplemented


@dataclass(frozen=True, slots=True)
class Combination(Direction):
    """A direction that is a formula: a difference of points, or a sum of several directions."""

    terms: Mapping[Term, float]


class StoredDirection(Displacement, Direction):
    """A direction that lies on disk by itself. Two openings of one folder are equal."""

    __slots__ = ()

    @property
    def terms(self) -> Mapping[Term, float]:
        """It is the sum of itself alone."""
        return {self: 1.0}


def _sum(first: Mapping[Term, float], factor: float, second: Mapping[Term, float]) -> dict[Term, float]:
    """Return first + factor · second, without the terms that cancel."""
    total = combined(first, factor, second)
    if not all(abs(coefficient) <= LARGEST for coefficient in total.values()):
        raise AlgebraError("a sum got a coefficient beyond the range of float32; are the scales right?")
    return total


def _finite(number: float) -> float:
    try:
        value = float(number)
    except OverflowError:  # an integer too long for a float
        value = math.inf
    if not abs(value) <= LARGEST:  # neither is NaN
        raise AlgebraError(
            f"a direction was scaled by {value}; the scale must be a finite number in the range of float32"
        )
    return value


# Writing


@dataclass(frozen=True, slots=True)
class Saved:
    """A model folder that was written, and how much of the change asked for arrived in it."""

    checkpoint: Checkpoint
    dose: Dose
    rounding: str
    """The one that was used: "nearest" or "stochastic"."""
    notes: tuple[str, ...] = ()
    """What the user should know: how it was rounded and why, what of the dose did not arrive, …"""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time of reading, summing and writing ("sum"); of reading back, and hashing inputs that were never
    hashed before ("check"); of naming ("publish")."""


def save(
    point: Point,
    output: Path,
    *,
    dtype: str | None = None,
    rounding: Rounding = "auto",
    seed: int = 0,
    along: Mapping[str, Direction] | None = None,
    precision: str = "float32",
    rows: Rows = "refuse",
    allow_nonfinite: bool = False,
    check: bool = True,
    workers: int | None = None,
    divided: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Saved:
    """Write a weighted sum as a model folder with the layout, config and tokenizer of its anchor.

    `dtype` is "float32", "bfloat16", "float16" or "float64" (default: as in the target, per tensor).
    `along` names the directions whose effective scale the dose reports. `precision` is that of the sums;
    `rows` "shared" sums only the rows that every embedding has; `allow_nonfinite` lets NaN and infinity
    through; `check` reads the result back, compares it, and writes `weights.json` for `palinode verify`.
    `divided` shares the work among the processes of `processes.together`, whose files it may be. Memory stays
    at a few slices for each of the `workers`, threads of a process (default: one for each core, up to 16).
    `on_progress` hears the number of weights done.

    Raises MismatchError when the checkpoints do not fit together, CheckpointError when an input cannot be
    read or is not finite, OutputError when the output place cannot be used or did not keep what was written.
    """
    if not isinstance(point, Point):
        raise AlgebraError("a direction is not a model; save a point, as in target - alpha * forget_vector")
    asked = Settings(dtype, rounding, seed, precision, allow_nonfinite)
    place = output.expanduser().resolve()
    lines = {name: line.terms for name, line in (along or {}).items()}
    job = plan(formula(point.anchor, point.terms, lines), place, asked, rows, workers)
    written = write(job, check=check, divided=divided, on_progress=on_progress)
    return Saved(Checkpoint.open(place), *written)


# The same weighted sum as a recipe for mergekit, so that anyone can check a result with another tool. The
# coefficients of a point add up to 1, so that  Σ c_i P_i = P_0 + Σ c_i (P_i − P_0)  for any P_0: the task
# arithmetic of mergekit with P_0, the sum's anchor, as its base model and c_i as the weight of each other.

MERGEKIT_READS = (".safetensors", ".bin")
"""The weight files that mergekit reads."""


def mergekit_recipe(point: Point, *, dtype: str | None = None) -> str:
    """Return the YAML with which `mergekit-yaml` computes this point.

    `dtype` is that of the output, as in `save` (default: the target's; where its tensors have several,
    the widest, as mergekit knows only one). Raises MismatchError when the models do not fit together,
    InputError for a term that is no model in a format that mergekit reads, such as a LoRA adapter.
    """
    from jinja2 import Environment

    Settings(dtype)  # which knows the dtypes
    models = {_readable(term): weight for term, weight in point.terms.items() if term != point.anchor}
    anchor = _readable(point.anchor)
    own, alone = _widest(anchor)
    stored = dtype or own
    check_fit(anchor, list(models))
    for model in models:
        _check_names(anchor, model)
    exact = "float64" if "float64" in (stored, _widest(anchor, *models)[0]) else "float32"
    named = dtype or ("" if alone else stored)
    entries = [(_reference(model), _number(weight)) for model, weight in models.items()]
    text = Environment(keep_trailing_newline=True, trim_blocks=True)
    facts = {"exact": exact, "named": named, "stored": stored, "base": _reference(anchor), "models": entries}
    return text.from_string(packaged("weights/mergekit.yaml.jinja")).render(facts)


def _readable(term: Term) -> Checkpoint:
    """Return a term of the sum, if mergekit can read it."""
    if not isinstance(term, Checkpoint):
        raise InputError(
            f"mergekit adds whole models, and {term.folder} is a direction of its own (a LoRA adapter or a "
            "stored vector); save base + direction as a model, and name that instead"
        )
    foreign = sorted({info.file for info in term.tensors.values() if info.file.suffix not in MERGEKIT_READS})
    if foreign:
        raise InputError(
            f"mergekit reads safetensors and .bin files, and {term.folder} keeps its weights in "
            f"{foreign[0].name}; write it as safetensors first, with palinode.save"
        )
    return term


def _check_names(anchor: Checkpoint, model: Checkpoint) -> None:
    """Raise MismatchError where a model has the tensors under other names, by which mergekit goes."""
    for name, info in anchor.tensors.items():
        found = model.find(name)
        if info.is_float and found and not is_head(name) and name not in model.tensors:
            raise MismatchError(
                f"mergekit adds tensors of one name, and {model.folder} has {found.name} for {name}; load it "
                "in transformers and save_pretrained, or apply the sum with Palinode, which finds them"
            )


def _widest(*checkpoints: Checkpoint) -> tuple[str, bool]:
    """Return the name of the narrowest dtype that holds all their values, and whether it is the only one."""
    codes = {info.dtype for one in checkpoints for info in one.tensors.values() if info.is_float}
    if len(codes) == 1:
        return NAMES[codes.pop()], True
    return ("float64" if "F64" in codes else "float32"), False


def _reference(checkpoint: Checkpoint) -> str:
    """Return how mergekit names a model: the id and revision it has on the hub, or else its folder.

    It takes "@" and "+" in a plain name as marks of a revision and of an adapter; a mapping has no marks.
    """
    folder = str(checkpoint.folder)
    hub = re.search(r"/models--([^/]+)/snapshots/([^/]+)$", folder)  # as the hub's cache lays it out
    if hub:
        return _quoted(f"{hub[1].replace('--', '/')}@{hub[2]}")
    if "@" in folder or "+" in folder:
        return f"{{model: {{path: {_quoted(folder)}}}}}"
    return _quoted(folder)


def _quoted(text: str) -> str:
    """Return a YAML string in double quotes, everything unusual escaped."""
    plain = (c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08X}" for c in text)
    return f'"{"".join(plain)}"'


def _number(value: float) -> str:
    """Return a number that every YAML reader takes for one: 1e-05 is text to some, 1.0e-05 to none."""
    mantissa, mark, exponent = repr(float(value)).partition("e")
    return f"{mantissa}{'' if '.' in mantissa else '.0'}{mark}{exponent}"
