"""A fair comparison of methods: the same rows, budget and search, one rule, measured once."""

from palinode.compare.axis import axis_recipes, compare_along, plan_axis
from palinode.compare.comparing import Compared, compare, plan_comparison
from palinode.compare.comparison_recipe import CompareRecipe, build_comparison, load_comparison

__all__ = [
    "CompareRecipe",
    "Compared",
    "axis_recipes",
    "build_comparison",
    "compare",
    "compare_along",
    "load_comparison",
    "plan_axis",
    "plan_comparison",
]
