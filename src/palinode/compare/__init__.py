"""A fair comparison of methods: the same rows, budget and search, one rule, measured once."""

from palinode.compare.comparing import Compared, compare, plan_comparison
from palinode.compare.comparison_recipe import CompareRecipe, build_comparison, load_comparison

__all__ = [
    "CompareRecipe",
    "Compared",
    "build_comparison",
    "compare",
    "load_comparison",
    "plan_comparison",
]
