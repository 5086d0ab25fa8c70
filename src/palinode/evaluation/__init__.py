"""What a model does on examples, and the scores that follow from it."""

from palinode.evaluation.ask import ask
from palinode.evaluation.asking import Asking
from palinode.evaluation.evaluate import evaluate, observe
from palinode.evaluation.settings import EvaluationSettings

__all__ = ["Asking", "EvaluationSettings", "ask", "evaluate", "observe"]
