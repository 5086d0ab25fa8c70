"""Apply the formula to models that exist already: no tokenizer, no data, no model class.

Nothing heavier than torch is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from palinode.errors import RecipeError
from palinode.methods.msa import unlearned_point
from palinode.weights import Checkpoint, Rounding, Saved, save


def apply(
    target: Checkpoint | str | Path,
    base: Checkpoint | str | Path,
    forget_model: Checkpoint | str | Path,
    output: Path | str,
    *,
    retain_model: Checkpoint | str | Path | None = None,
    forget_scale: float = 1.0,
    retain_scale: float = 0.0,
    dtype: str | None = None,
    rounding: Rounding = "auto",
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Saved:
    """Write θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0) from models that exist already.

    `forget_model` is θ_1, `retain_model` θ_2, `forget_scale` α, `retain_scale` β. Needs no tokenizer, no
    data and no model class; with β = 0 the retain model is never opened. The dose of the result gives
    the effective scales under "forget" and "retain".
    """
    if min(forget_scale, retain_scale) < 0:
        raise RecipeError(
            f"the scales are {forget_scale:g} and {retain_scale:g}, but must not be negative: the formula "
            "takes the forget vector off and adds the retain vector already"
        )
    start = _open(base)
    forget = _open(forget_model) - start
    retain = None
    if retain_scale != 0.0:
        if retain_model is None:
            raise RecipeError(f"a retain scale of {retain_scale} needs a retain model; name it, or use 0")
        retain = _open(retain_model) - start
    point = unlearned_point(
        _open(target), forget, retain, forget_scale=forget_scale, retain_scale=retain_scale
    )
    along = {"forget": -1.0 * forget} | ({} if retain is None else {"retain": retain})
    return save(
        point, Path(output), dtype=dtype, rounding=rounding, seed=seed, along=along, on_progress=on_progress
    )


def _open(model: Checkpoint | str | Path) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else Checkpoint.open(model)
