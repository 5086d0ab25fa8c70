"""Whole runs: recipes, workspaces, the main job and its single steps, and the demo."""

from palinode.pipeline.costs import Plan
from palinode.pipeline.demo_run import DemoResult, demo
from palinode.pipeline.recipe import Recipe, build_recipe, load_recipe
from palinode.pipeline.run import Unlearned, dry_run, unlearn

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
