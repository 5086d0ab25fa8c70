"""What a model does on examples, and the scores that follow from it."""

from palinode.evaluation.evaluate import evaluate, observe
from palinode.evaluation.settings import EvaluationSettings

__all__ = ["EvaluationSettings", "evaluate", "observe"]
