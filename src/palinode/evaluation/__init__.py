"""What a model does on examples, and the scores that follow from it."""

from palinode.evaluation.ask import Asking, ask
from palinode.evaluation.evaluate import EvaluationSettings, evaluate

__all__ = ["Asking", "EvaluationSettings", "ask", "evaluate"]
