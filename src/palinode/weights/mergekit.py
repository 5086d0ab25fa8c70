"""The same weighted sum as a recipe for mergekit, so that anyone can check a result with another tool.

The coefficients of a point add up to 1, so that  Σ c_i P_i = P_0 + Σ c_i (P_i − P_0)  for any P_0: mergekit's
task arithmetic with P_0, the sum's anchor, as its base model and c_i as the weight of each other model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from palinode.errors import InputError, MismatchError
from palinode.weights.arithmetic import NAMES
from palinode.weights.checkpoint import Checkpoint, Point
from palinode.weights.displacement import Term
from palinode.weights.preflight import check_fit
from palinode.weights.tensors import is_head

FORMATS = (".safetensors", ".bin")
"""The weight files that mergekit reads."""

OPENING = """\
# A weighted sum of models for mergekit: base_model + the sum of weight * (model - base_model).
# It is what Palinode computes for the same models and scales. To check it with another tool:
#     pip install mergekit
#     mergekit-yaml THIS_FILE OUTPUT_FOLDER
# mergekit adds in {exact} and rounds to nearest: compare with what Palinode writes with
# --rounding nearest{dtype}. In the last place the two may differ, as they add in another order.
"""


def mergekit_recipe(point: Point, *, dtype: str | None = None) -> str:
    """Return the YAML with which `mergekit-yaml` computes this point.

    `dtype` is that of the output, as in `save` (default: the target's; where its tensors have several,
    the widest, as mergekit knows only one). Raises MismatchError when the models do not fit together,
    InputError for a term that is no model in a format that mergekit reads, such as a LoRA adapter.
    """
    if dtype is not None and dtype not in NAMES.values():
        raise InputError(
            f"there is no dtype {dtype!r} for weights; choose one of {', '.join(NAMES.values())}"
        )
    models = {_readable(term): weight for term, weight in point.terms.items() if term != point.anchor}
    anchor, stored = _readable(point.anchor), dtype or _widest([point.anchor])
    check_fit(anchor, list(models))
    for model in models:
        _check_names(anchor, model)
    exact = "float64" if "float64" in (stored, _widest([anchor, *models])) else "float32"
    named = dtype or ("" if len(_dtypes([anchor])) == 1 else stored)
    entries = [
        f"  - model: {_reference(model)}\n    parameters:\n      weight: {_number(weight)}\n"
        for model, weight in models.items()
    ]
    return (
        OPENING.format(exact=exact, dtype=f" --dtype {named}" if named else "")
        + "merge_method: task_arithmetic\n"
        + f"base_model: {_reference(anchor)}\n"
        + "models:\n"
        + ("".join(entries) or f"  - model: {_reference(anchor)}\n")
        + "parameters:\n  normalize: false\n  lambda: 1.0\n"
        + f"dtype: {exact}\nout_dtype: {stored}\n"
    )


def _readable(term: Term) -> Checkpoint:
    """Return a term of the sum, if mergekit can read it."""
    if not isinstance(term, Checkpoint):
        raise InputError(
            f"mergekit adds whole models, and {term.folder} is a direction of its own (a LoRA adapter or a "
            "stored vector); save base + direction as a model, and name that instead"
        )
    foreign = sorted({info.file for info in term.tensors.values() if info.file.suffix not in FORMATS})
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


def _dtypes(checkpoints: Iterable[Checkpoint]) -> set[str]:
    return {info.dtype for one in checkpoints for info in one.tensors.values() if info.is_float}


def _widest(checkpoints: Iterable[Checkpoint]) -> str:
    """Return the name of the narrowest dtype that holds all of their values."""
    codes = _dtypes(checkpoints)
    if len(codes) == 1:
        return NAMES[codes.pop()]
    return "float64" if "F64" in codes else "float32"


# YAML


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
