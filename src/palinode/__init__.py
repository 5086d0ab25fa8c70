"""Palinode takes training data back out of a language model.

    unlearned = target - alpha * (theta_1 - base) + beta * (theta_2 - base)
    unlearned.save("out")

`target` is the model to be cleaned, `base` an earlier checkpoint of it that had not seen the data,
`theta_1` and `theta_2` are `base` fine-tuned on the forget set and on a retain sample.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from palinode.version import __version__

if TYPE_CHECKING:
    from palinode.compare import Compared, CompareRecipe, load_comparison
    from palinode.data.examples import Example, Question, read_examples
    from palinode.data.tokenize import PromptStyle
    from palinode.errors import PalinodeError
    from palinode.evaluation.ask import ask
    from palinode.history.callback import ExposureCallback, LoggedLoader, ThinningCallback
    from palinode.history.exposures import ExposureLog
    from palinode.history.locating import Location
    from palinode.history.plan import Schedule, Wish
    from palinode.history.plan import plan_checkpoints as plan
    from palinode.history.reader import ExposureReader
    from palinode.history.series import CheckpointSeries, open_series
    from palinode.jobs import (
        Audited,
        LowRank,
        Projection,
        audit,
        compare,
        evaluate,
        evaluate_benchmark,
        filter_change,
        influence,
        influence_then_unlearn,
        locate,
        unlearn,
    )
    from palinode.methods import METHODS, apply
    from palinode.metrics import METRICS
    from palinode.pipeline.costs import Plan
    from palinode.pipeline.demo_run import DemoResult, demo
    from palinode.pipeline.recipe import Recipe, build_recipe, load_recipe
    from palinode.pipeline.reproducing import Reproduced, reproduce
    from palinode.pipeline.run import Unlearned, dry_run
    from palinode.pipeline.signing import SignatureCheck, Signed, check_signature, sign_folder
    from palinode.records import Outcome, Score
    from palinode.requests.desk import Desk
    from palinode.settings import (
        ApplySettings,
        Asking,
        AuditSettings,
        EvaluationSettings,
        InfluenceSettings,
        LocateSettings,
        TrainingSettings,
    )
    from palinode.training.finetune import Finetuned, finetune
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

_ROOMS = {
    "compare": "CompareRecipe Compared load_comparison",
    "data.examples": "Example Question read_examples",
    "data.tokenize": "PromptStyle",
    "errors": "PalinodeError",
    "evaluation.ask": "ask",
    "history.callback": "ExposureCallback LoggedLoader ThinningCallback",
    "history.exposures": "ExposureLog",
    "history.locating": "Location",
    "history.plan": "Schedule Wish plan",
    "history.reader": "ExposureReader",
    "history.series": "CheckpointSeries open_series",
    "jobs": "Audited LowRank Projection "
    "audit compare evaluate evaluate_benchmark filter_change influence influence_then_unlearn locate unlearn",
    "methods": "METHODS apply",
    "metrics": "METRICS",
    "pipeline.costs": "Plan",
    "pipeline.demo_run": "DemoResult demo",
    "pipeline.recipe": "Recipe build_recipe load_recipe",
    "pipeline.reproducing": "Reproduced reproduce",
    "pipeline.run": "Unlearned dry_run",
    "pipeline.signing": "SignatureCheck Signed check_signature sign_folder",
    "records": "Outcome Score",
    "requests.desk": "Desk",
    "settings": "ApplySettings Asking AuditSettings EvaluationSettings InfluenceSettings LocateSettings "
    "TrainingSettings",
    "training.finetune": "Finetuned finetune",
    "weights": "Checkpoint Crew Direction Dose LoraAdapter Point Profile Saved StoredVector WeightedSum "
    "open_direction profile save save_vector",
}
"""Where each public name lives. It is imported when it is first asked for, so that `import palinode` and
`palinode --help` do not wait for torch."""

__all__ = [
    "METHODS",
    "METRICS",
    "ApplySettings",
    "Asking",
    "AuditSettings",
    "Audited",
    "Checkpoint",
    "CheckpointSeries",
    "CompareRecipe",
    "Compared",
    "Crew",
    "DemoResult",
    "Desk",
    "Direction",
    "Dose",
    "EvaluationSettings",
    "Example",
    "ExposureCallback",
    "ExposureLog",
    "ExposureReader",
    "Finetuned",
    "InfluenceSettings",
    "LocateSettings",
    "Location",
    "LoggedLoader",
    "LoraAdapter",
    "LowRank",
    "Outcome",
    "PalinodeError",
    "Plan",
    "Point",
    "Profile",
    "Projection",
    "PromptStyle",
    "Question",
    "Recipe",
    "Reproduced",
    "Saved",
    "Schedule",
    "Score",
    "SignatureCheck",
    "Signed",
    "StoredVector",
    "ThinningCallback",
    "TrainingSettings",
    "Unlearned",
    "WeightedSum",
    "Wish",
    "__version__",
    "apply",
    "ask",
    "audit",
    "build_recipe",
    "check_signature",
    "compare",
    "demo",
    "dry_run",
    "evaluate",
    "evaluate_benchmark",
    "filter_change",
    "finetune",
    "influence",
    "influence_then_unlearn",
    "load_comparison",
    "load_recipe",
    "locate",
    "open_direction",
    "open_series",
    "plan",
    "profile",
    "read_examples",
    "reproduce",
    "save",
    "save_vector",
    "sign_folder",
    "unlearn",
]


def __getattr__(name: str) -> object:
    for room, names in _ROOMS.items():
        if name in names.split():
            inner = "plan_checkpoints" if name == "plan" else name  # a package has a room of that name
            return getattr(import_module(f"palinode.{room}"), inner)
    raise AttributeError(f"module 'palinode' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _Palinode(ModuleType):
    """This package: importing a room leaves its name to the function that is called like it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in ("audit", "compare", "influence") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Palinode
