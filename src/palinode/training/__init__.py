"""Fine-tuning: loss functions, one plain loop, and the function that turns a checkpoint into another."""

from palinode.training.finetune import Finetuned, finetune
from palinode.training.loop import train
from palinode.training.losses import ANSWER_LOSS, Loss
from palinode.training.objectives import CurvePoint, Objective, Term
from palinode.training.roles import Joined, Material
from palinode.training.settings import LoraSettings, TrainingSettings

__all__ = [
    "ANSWER_LOSS",
    "CurvePoint",
    "Finetuned",
    "Joined",
    "LoraSettings",
    "Loss",
    "Material",
    "Objective",
    "Term",
    "TrainingSettings",
    "finetune",
    "train",
]
