"""Fine-tuning: loss functions, one plain loop, and the function that turns a checkpoint into another."""

from palinode.training.finetune import Finetuned, finetune
from palinode.training.loop import CurvePoint, train
from palinode.training.losses import ANSWER_LOSS, Loss
from palinode.training.settings import TrainingSettings

__all__ = ["ANSWER_LOSS", "CurvePoint", "Finetuned", "Loss", "TrainingSettings", "finetune", "train"]
