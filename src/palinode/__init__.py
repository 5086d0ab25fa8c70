"""Palinode takes training data back out of a language model.

    unlearned = target - alpha * (theta_1 - base) + beta * (theta_2 - base)
    unlearned.save("out")

`target` is the model to be cleaned, `base` an earlier checkpoint of it that had not seen the data,
`theta_1` and `theta_2` are `base` fine-tuned on the forget set and on a retain sample.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from palinode.version import __version__

if TYPE_CHECKING:
    from palinode.data import Example, PromptStyle, Question, read_examples
    from palinode.errors import PalinodeError
    from palinode.evaluation import Asking, EvaluationSettings, ask, evaluate
    from palinode.history import (
        ExposureCallback,
        ExposureLog,
        ExposureReader,
        LoggedLoader,
        ThinningCallback,
        locate,
        open_series,
    )
    from palinode.methods import METHODS, apply
    from palinode.metrics import METRICS
    from palinode.pipeline import (
        DemoResult,
        Plan,
        Recipe,
        Unlearned,
        build_recipe,
        demo,
        load_recipe,
        plan,
        unlearn,
    )
    from palinode.records import Outcome, Score
    from palinode.training import Finetuned, TrainingSettings, finetune
    from palinode.weights import (
        Checkpoint,
        Crew,
        Direction,
        Dose,
        LoraAdapter,
        Point,
        Profile,
        Saved,
        StoredVector,
        WeightedSum,
        open_direction,
        profile,
        save,
        save_vector,
    )

# Where each public name lives; it is imported when it is first asked for, so that
# `import palinode` and `palinode --help` do not wait for torch.
_HOMES = {
    "Asking": "evaluation",
    "ask": "evaluation",
    "ExposureCallback": "history",
    "ExposureLog": "history",
    "ExposureReader": "history",
    "LoggedLoader": "history",
    "ThinningCallback": "history",
    "locate": "history",
    "open_series": "history",
    "Question": "data",
    "Checkpoint": "weights",
    "Crew": "weights",
    "Direction": "weights",
    "Dose": "weights",
    "Example": "data",
    "METHODS": "methods",
    "METRICS": "metrics",
    "DemoResult": "pipeline",
    "EvaluationSettings": "evaluation",
    "Finetuned": "training",
    "Outcome": "records",
    "LoraAdapter": "weights",
    "PalinodeError": "errors",
    "Plan": "pipeline",
    "Point": "weights",
    "Profile": "weights",
    "PromptStyle": "data",
    "Recipe": "pipeline",
    "Saved": "weights",
    "Score": "records",
    "StoredVector": "weights",
    "TrainingSettings": "training",
    "Unlearned": "pipeline",
    "WeightedSum": "weights",
    "apply": "methods",
    "build_recipe": "pipeline",
    "demo": "pipeline",
    "evaluate": "evaluation",
    "finetune": "training",
    "load_recipe": "pipeline",
    "open_direction": "weights",
    "plan": "pipeline",
    "profile": "weights",
    "read_examples": "data",
    "save": "weights",
    "save_vector": "weights",
    "unlearn": "pipeline",
}

__all__ = [
    "METHODS",
    "METRICS",
    "Asking",
    "Checkpoint",
    "Crew",
    "DemoResult",
    "Direction",
    "Dose",
    "EvaluationSettings",
    "Example",
    "ExposureCallback",
    "ExposureLog",
    "ExposureReader",
    "Finetuned",
    "LoggedLoader",
    "LoraAdapter",
    "Outcome",
    "PalinodeError",
    "Plan",
    "Point",
    "Profile",
    "PromptStyle",
    "Question",
    "Recipe",
    "Saved",
    "Score",
    "StoredVector",
    "ThinningCallback",
    "TrainingSettings",
    "Unlearned",
    "WeightedSum",
    "__version__",
    "apply",
    "ask",
    "build_recipe",
    "demo",
    "evaluate",
    "finetune",
    "load_recipe",
    "locate",
    "open_direction",
    "open_series",
    "plan",
    "profile",
    "read_examples",
    "save",
    "save_vector",
    "unlearn",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'palinode' has no attribute {name!r}")
    return getattr(import_module(f"palinode.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
