"""How likely the model finds the answer in the data.

    P = exp(−l),   l = negative log-likelihood of the answer / number of scored tokens

The answer's tokens and the end token are scored (TOFU, open-unlearning). The length normalisation makes
long and short answers comparable: P is the geometric mean of the token probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from palinode.records import Outcome


def answer_probabilities(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the length-normalised probability of each answer, None where no token was scored."""
    return [math.exp(fmean(outcome.logprobs)) if outcome.logprobs else None for outcome in outcomes]
