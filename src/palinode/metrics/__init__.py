"""Metrics: outcomes in, scores out. Pure functions; no torch.

Each `…_values`, `…_ratios` and the like gives every outcome a number, in order, and None where it cannot be
computed; `mean_score` and its relatives make one score of them, with n, an interval and a reason for what is
missing. The tables METRICS, ATTACKS and COMPARISONS name everything there is.
"""
