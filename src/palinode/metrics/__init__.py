"""Metrics: outcomes in, scores out. Pure functions; no files, no torch.

Each `…_values`, `…_ratios` and the like gives every outcome a number, in order, and None where it cannot be
computed; `mean_score` and its relatives make one score of them, with n, an interval and a reason for what is
missing. The tables METRICS, ATTACKS and COMPARISONS name everything there is.
"""

from palinode.metrics.aggregate import mean_score
from palinode.metrics.likelihood import answer_probabilities
from palinode.metrics.matching import rouge_l_recalls
from palinode.metrics.table import ATTACKS, COMPARISONS, DEFAULT_METRICS, METRICS, score_outcomes

__all__ = [
    "ATTACKS",
    "COMPARISONS",
    "DEFAULT_METRICS",
    "METRICS",
    "answer_probabilities",
    "mean_score",
    "rouge_l_recalls",
    "score_outcomes",
]
