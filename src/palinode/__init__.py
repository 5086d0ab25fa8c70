"""Palinode takes training data back out of a language model.

    unlearned = target - alpha * (theta_1 - base) + beta * (theta_2 - base)
    unlearned.save("out")

`target` is the model to be cleaned, `base` an earlier checkpoint of it that had not seen the data,
`theta_1` and `theta_2` are `base` fine-tuned on the forget set and on a retain sample.
"""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

_HOMES = {
    alias.asname: (line.module, alias.name)
    for line in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(line, ast.ImportFrom)
    for alias in line.names
}
"""Room and name there of each public name, as the stub has them. A room is imported when one of its names is
first asked for, so that `import palinode` and `palinode --help` do not wait for torch."""

__all__ = sorted(_HOMES, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'palinode' has no attribute {name!r}")
    room, inner = _HOMES[name]
    return getattr(import_module(room), inner)


def __dir__() -> list[str]:
    return __all__


class _Palinode(ModuleType):
    """This package: importing a room leaves its name to the function that is called like it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in ("audit", "compare", "influence") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Palinode
