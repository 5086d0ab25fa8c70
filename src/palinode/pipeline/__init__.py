"""Whole runs: recipes, workspaces, the main job and its single steps, and the demo.

A name is imported when it is first asked for: a recipe is read, and --help printed, without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from palinode.pipeline.costs import Plan
    from palinode.pipeline.demo_run import DemoResult, demo
    from palinode.pipeline.recipe import Recipe, build_recipe, load_recipe
    from palinode.pipeline.run import Unlearned, dry_run, unlearn

_ROOMS = {
    "costs": ("Plan",),
    "demo_run": ("DemoResult", "demo"),
    "recipe": ("Recipe", "build_recipe", "load_recipe"),
    "run": ("Unlearned", "dry_run", "unlearn"),
}

__all__ = [
    "DemoResult",
    "Plan",
    "Recipe",
    "Unlearned",
    "build_recipe",
    "demo",
    "dry_run",
    "load_recipe",
    "unlearn",
]


def __getattr__(name: str) -> object:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"palinode.pipeline.{room}"), name)
    raise AttributeError(f"module 'palinode.pipeline' has no attribute {name!r}")
