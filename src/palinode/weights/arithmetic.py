"""Evaluate a weighted sum of checkpoints on a slice, with one final rounding.

The working dtype is float32, or float64 where it is asked for or an input or the output is float64. Then
each value is rounded once to the output dtype, to nearest or stochastically (spec: msa.md, P3): stochastic
rounding keeps on average the small steps that rounding to nearest would lose. What is summed is in
`formulas`, what is read in `operands`, the loops themselves in `kernels`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from palinode.errors import InputError
from palinode.weights import kernels
from palinode.weights.checkpoint import TensorInfo
from palinode.weights.dose import EVERY, SAMPLED_FROM, DoseMeter
from palinode.weights.files import Files
from palinode.weights.formulas import Formula, formula
from palinode.weights.names import is_embedding, is_head
from palinode.weights.operands import STORED, Loaded, Operands
from palinode.weights.preflight import complain_of_nonfinite
from palinode.weights.slices import SLICE, Slice

SAMPLE = 1 << 14
"""Elements of each tensor that decide between the two roundings."""

TOLERANCE = 0.01
"""Share of the dose that rounding to nearest may lose (or add) before `auto` takes the stochastic one."""

GLANCE = 64
"""Elements by which rows that differ are told apart at once."""

ZERO = 1e-12
"""Coefficients below this are what rounding left of a sum that is zero."""

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NAMES = {code: name for name, code in CODES.items()}

Rounding = Literal["auto", "nearest", "stochastic"]
"""`auto` is to nearest, and stochastic for a 16-bit output where nearest would lose part of the dose."""

Precision = Literal["float32", "float64"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a sum is computed and rounded."""

    code: str | None = None
    """Output dtype as safetensors code; None keeps each tensor's own."""
    rounding: Rounding = "auto"
    seed: int = 0
    """Of stochastic rounding."""
    precision: Precision = "float32"
    """In which sums are formed."""
    allow_nonfinite: bool = False
    """Let NaN and infinity through."""


def settings(
    *,
    dtype: str | None = None,
    rounding: str = "auto",
    seed: int = 0,
    precision: str = "float32",
    allow_nonfinite: bool = False,
) -> Settings:
    """Return checked settings; raises InputError for a dtype, rounding or precision that there is not."""
    for word, value, known in (
        ("dtype", dtype, (None, *CODES)),
        ("rounding", rounding, get_args(Rounding)),
        ("precision", precision, get_args(Precision)),
    ):
        if value not in known:
            raise InputError(
                f"there is no {word} {value!r} for weights; choose one of {', '.join(k for k in known if k)}"
            )
    code = CODES[dtype] if dtype else None
    return Settings(code, rounding, seed, precision, allow_nonfinite)  # type: ignore[arg-type]


# One slice


def every_of(info: TensorInfo) -> int:
    """Return which blocks of a tensor are measured for the dose: one in how many."""
    return EVERY if info.size >= SAMPLED_FROM else 1


class Evaluator:
    """Evaluates slices of a formula. It has buffers of its own, so every thread needs its own."""

    def __init__(self, formula: Formula, settings: Settings, files: Files, *, measure: bool = False) -> None:
        self._formula = formula
        self._settings = settings
        self._measure = measure
        self._operands = Operands(formula.checkpoints, formula.displacements, files)
        self._anchor = Operands((formula.point.anchor,), (), files)
        self._lines = np.vstack([formula.change, formula.along])
        self._half = np.empty(0, np.uint16)
        self._wide: dict[np.dtype, np.ndarray] = {}

    def evaluate(self, part: Slice) -> tuple[np.ndarray, np.ndarray]:
        """Return a slice rounded to the output dtype, and the totals of its dose.

        The values are one-dimensional, bfloat16 as uint16, and stay valid until the next call. Raises
        CheckpointError for inputs that are not finite, InputError when the sum is too large for its dtype.
        """
        code = self._settings.code or part.info.dtype
        operands = self._anchor if part.alone else self._operands
        wide = np.dtype(np.float64 if code == "F64" or self._settings.precision == "float64" else np.float32)
        loaded = operands.load(part, wide)
        still = part.alone or self._stays(loaded, part.count)
        if still and self._formula.target:  # the kernels give row 0 back
            loaded = self._anchor.load(part, wide)
        values, totals, finite = self._combine(part, loaded, code, still=still)
        if not (finite or self._settings.allow_nonfinite):
            if not loaded.finite(part.count):
                complain_of_nonfinite(operands.checkpoints)
            raise InputError(
                f"the sum has values in {part.info.name} that {NAMES[code]} cannot hold; use smaller scales "
                "or a wider dtype"
            )
        return values, totals

    def _stays(self, loaded: Loaded, count: int) -> bool:
        """Tell whether the anchor stays as it is, and no measured direction moves it either.

        So it is where terms that cancel are alike, bit for bit, as in a tower that nobody trained. The sum of
        their differences might still be off by a last bit.
        """
        rows = (loaded.halves if loaded.packed else loaded.wides)[:, :count]
        heads = [row[:GLANCE].tobytes() for row in rows]
        left, checkpoints = self._lines.copy(), len(rows)
        for later in range(checkpoints - 1, 0, -1):
            for earlier in range(later) if heads[later] in heads[:later] else ():
                if np.array_equal(rows[earlier], rows[later]):
                    left[:, earlier] += left[:, later]
                    left[:, later] = 0
                    break
        if np.abs(left[:, :checkpoints]).max() > ZERO:
            return False
        extras = (loaded.extras[place, :count] for place in np.flatnonzero(left[:, checkpoints:].any(axis=0)))
        return not any(extra[:GLANCE].any() or extra.any() for extra in extras)

    def _combine(
        self, part: Slice, loaded: Loaded, code: str, *, still: bool
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        form, dtype = self._formula, loaded.dtype
        if len(self._half) < part.count:
            self._half = np.empty(max(SLICE, part.count), np.uint16)
        if len(self._wide.get(dtype, ())) < part.count:
            self._wide[dtype] = np.empty(max(SLICE, part.count), dtype)
        totals = kernels.totals_of(len(form.names))
        measured = self._measure and not part.alone and not (still and form.target)
        finite = kernels.combine(
            loaded.packed,
            loaded.halves,
            loaded.wides,
            loaded.extras,
            part.count,
            form.order[:0] if still else form.order,
            form.ends[:0] if still else form.ends,
            form.weights.astype(dtype),
            {"BF16": kernels.BFLOAT16, "F16": kernels.FLOAT16}.get(code, kernels.AS_IS),
            self._settings.rounding == "stochastic",
            np.int64(name_key(self._settings.seed, part.info.name)),
            np.int64(part.start),
            every_of(part.info) if measured else 0,
            form.target,
            form.along.astype(dtype),
            self._half,
            self._wide[dtype],
            totals,
        )
        if code == "BF16":
            return self._half[: part.count], totals, finite
        with np.errstate(over="ignore"):  # too large a value is noticed below
            stored = self._wide[dtype][: part.count].astype(STORED[code], copy=False)
        return stored, totals, finite and (dtype == stored.dtype or bool(np.isfinite(stored).all()))


@lru_cache(maxsize=4096)
def name_key(seed: int, name: str) -> int:
    """Return 64 bits (signed) that stand for (seed, tensor name) in stochastic rounding.

    Output head and embedding share theirs: a tied pair rounds alike even where no config says it is one.
    """
    name = "embedding" if is_head(name) or is_embedding(name) else name
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# The choice of a rounding


def choose_rounding(form: Formula, asked: Settings, parts: Iterable[Slice]) -> tuple[Settings, float | None]:
    """Return the settings with `auto` settled, and the share of the dose that nearest would deliver.

    The share, ⟨stored − target, exact − target⟩ / |exact − target|², is measured on a few thousand weights
    in the middle of every tensor; it is None where nothing is rounded to 16 bits or the choice was given.
    """
    if asked.rounding != "auto":
        return asked, None
    extents = {part.info: part.start + part.count for part in parts if not part.alone}
    extents = {info: extent for info, extent in extents.items() if _is_16_bit(info, asked)}
    change = form.point - form.point.anchor
    if not extents or not change.terms:
        return replace(asked, rounding="nearest"), None
    nearest = replace(asked, rounding="nearest", allow_nonfinite=True)
    meter = DoseMeter(["all"])
    with Files() as files:
        evaluator = Evaluator(formula(form.point, {"all": change}), nearest, files, measure=True)
        for info, extent in extents.items():
            count = min(SAMPLE, extent)
            middle = (extent - count) // 2 // kernels.BLOCK * kernels.BLOCK
            _, totals = evaluator.evaluate(Slice(info, middle, count))
            meter.add("all", totals, count)
    found = meter.result()
    if not found.relative_error:  # nothing was asked for there, or nothing of it is lost, or it is not finite
        return replace(asked, rounding="nearest"), None
    share = found.effective["all"]
    keeps = abs(share - 1) <= TOLERANCE
    return replace(asked, rounding="nearest" if keeps else "stochastic"), share


def _is_16_bit(info: TensorInfo, asked: Settings) -> bool:
    return (asked.code or info.dtype) in ("F16", "BF16")
