"""Apply the formula to models that exist already: no tokenizer, no data, no model class.

Nothing heavy is imported here, torch included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from palinode.errors import RecipeError
from palinode.methods.method import Vectors
from palinode.settings import ApplySettings
from palinode.weights import Checkpoint, Direction, Saved, WeightedSum, save
from palinode.weights.vectors import is_direction, open_direction

Model = Checkpoint | str | Path


def apply(
    target: Model,
    base: Model | None,
    forget_model: Model | Direction,
    output: Path | str,
    *,
    retain_model: Model | Direction | None = None,
    forget_scale: float = 1.0,
    retain_scale: float = 0.0,
    settings: ApplySettings | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Saved:
    """Write θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0) from models that exist already.

    `forget_model` is θ_1, `retain_model` θ_2, `forget_scale` α, `retain_scale` β. In the place of either
    model may stand its whole direction: a LoRA adapter or a stored vector (folder, or opened); without
    models there, no `base` is needed. Needs no tokenizer, no data and no model class; with β = 0 the
    retain model is never opened. The dose of the result gives the effective scales under "forget" and
    "retain".
    """
    settings = settings or ApplySettings()
    scales = (forget_scale, retain_scale)
    point, along = formula_of(target, base, forget_model, retain_model, scales, settings.allow_pickle)
    how = settings.model_dump(exclude={"allow_pickle"})
    return save(point, Path(output), **how, along=along, divided=True, on_progress=on_progress)


def formula_of(
    target: Model,
    base: Model | None,
    forget_model: Model | Direction,
    retain_model: Model | Direction | None,
    scales: tuple[float, float],
    allow_pickle: bool,
) -> tuple[WeightedSum, Mapping[str, Direction]]:
    """Return the unlearned point, and the directions that its dose is measured along.

    `scales` are α and β. Raises RecipeError for scales that cannot be, or models that are missing.
    """
    forget_scale, retain_scale = scales
    if min(forget_scale, retain_scale) < 0:
        raise RecipeError(
            f"the scales are {forget_scale:g} and {retain_scale:g}, but must not be negative: the formula "
            "takes the forget vector off and adds the retain vector already"
        )
    if retain_scale and retain_model is None:
        raise RecipeError(f"a retain scale of {retain_scale:g} needs a retain model; name it, or use 0")
    start = None if base is None else _open(base, allow_pickle)
    forget = _direction(forget_model, start, allow_pickle)
    retain = _direction(retain_model, start, allow_pickle) if retain_model and retain_scale else None
    vectors = Vectors(forget, retain)
    point = vectors.taken_off(_open(target, allow_pickle), forget_scale, retain_scale)
    return point, vectors.along(retain_scale)


def _open(model: Model, allow_pickle: bool) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else Checkpoint.open(model, allow_pickle=allow_pickle)


def _direction(model: Model | Direction, start: Checkpoint | None, allow_pickle: bool) -> Direction:
    if isinstance(model, Direction):
        return model
    if not isinstance(model, Checkpoint) and is_direction(model):
        return open_direction(model, base=start, allow_pickle=allow_pickle)
    if start is None:
        raise RecipeError(
            f"{model} is a model, and a vector to it starts from the base checkpoint; name that, or give a "
            "stored vector or an adapter"
        )
    return _open(model, allow_pickle) - start
