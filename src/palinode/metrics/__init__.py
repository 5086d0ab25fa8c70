"""Metrics: outcomes in, scores out. Pure functions; no files, no torch.

Each `…_values`, `…_ratios` and the like gives every outcome a number, in order, and None where it cannot be
computed; `mean_score` and its relatives make one score of them, with n, an interval and a reason for what is
missing. The tables METRICS, ATTACKS and COMPARISONS name everything there is.
"""

from __future__ import annotations

from palinode.metrics.aggregate import KS, forget_quality, harmonic_score, ks_test, mean_score
from palinode.metrics.judged import accept_accuracy, forget_accuracy, recover_accuracy, retain_accuracy
from palinode.metrics.leakage import (
    exact_memorizations,
    extraction_strengths,
    leak_at_k,
    leak_values,
    overlap_leak,
)
from palinode.metrics.likelihood import (
    alternative_logprobs,
    alternative_probabilities,
    answer_probabilities,
    forget_truth_ratios,
    log_truth_ratios,
    normalised_probabilities,
    retain_truth_ratios,
    right_shares,
    truth_ratios,
)
from palinode.metrics.matching import (
    accepted_sample_values,
    accepted_values,
    exact_matches,
    is_accepted,
    normalise,
    rouge,
    rouge_l_recalls,
    rouge_values,
)
from palinode.metrics.membership import (
    ATTACKS,
    MUSE_RETRAINED,
    MembershipAttack,
    auc,
    gradient_norm_values,
    loss_values,
    min_k_plus_values,
    min_k_values,
    privleak,
    reference_values,
    true_positive_rate,
    zlib_values,
)
from palinode.metrics.table import (
    COMPARISONS,
    DEFAULT_METRICS,
    METRICS,
    Comparison,
    Metric,
    score_outcomes,
)

__all__ = [
    "ATTACKS",
    "COMPARISONS",
    "DEFAULT_METRICS",
    "KS",
    "METRICS",
    "MUSE_RETRAINED",
    "Comparison",
    "MembershipAttack",
    "Metric",
    "accept_accuracy",
    "accepted_sample_values",
    "accepted_values",
    "alternative_logprobs",
    "alternative_probabilities",
    "answer_probabilities",
    "auc",
    "exact_matches",
    "exact_memorizations",
    "extraction_strengths",
    "forget_accuracy",
    "forget_quality",
    "forget_truth_ratios",
    "gradient_norm_values",
    "harmonic_score",
    "is_accepted",
    "ks_test",
    "leak_at_k",
    "leak_values",
    "log_truth_ratios",
    "loss_values",
    "mean_score",
    "min_k_plus_values",
    "min_k_values",
    "normalise",
    "normalised_probabilities",
    "overlap_leak",
    "privleak",
    "recover_accuracy",
    "reference_values",
    "retain_accuracy",
    "retain_truth_ratios",
    "right_shares",
    "rouge",
    "rouge_l_recalls",
    "rouge_values",
    "score_outcomes",
    "true_positive_rate",
    "truth_ratios",
    "zlib_values",
]
