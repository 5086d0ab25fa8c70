"""When was a row seen, and which checkpoint is the last that had not seen it.

Three kinds of evidence: a log kept while training (`exposures`), the order of the data rebuilt
(`orders`), and what checkpoints know (`onset`). `locate` puts them together; `plan` says which
checkpoints a training should keep.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from palinode.history.callback import ExposureCallback, LoggedLoader, ThinningCallback
    from palinode.history.duplicates import find_duplicates
    from palinode.history.exposures import ExposureLog
    from palinode.history.locating import Location, locate
    from palinode.history.onset import Onset, find_onset
    from palinode.history.plan import Schedule, plan_checkpoints
    from palinode.history.reader import ExposureReader, compact
    from palinode.history.series import CheckpointSeries, SeriesCheckpoint, open_series

__all__ = [
    "CheckpointSeries",
    "ExposureCallback",
    "ExposureLog",
    "ExposureReader",
    "Location",
    "LoggedLoader",
    "Onset",
    "Schedule",
    "SeriesCheckpoint",
    "ThinningCallback",
    "compact",
    "find_duplicates",
    "find_onset",
    "locate",
    "open_series",
    "plan_checkpoints",
]

# Imported when first asked for: a plan needs no torch.
_ROOMS = {
    "callback": ("ExposureCallback", "LoggedLoader", "ThinningCallback"),
    "duplicates": ("find_duplicates",),
    "exposures": ("ExposureLog",),
    "locating": ("Location", "locate"),
    "onset": ("Onset", "find_onset"),
    "plan": ("Schedule", "plan_checkpoints"),
    "reader": ("ExposureReader", "compact"),
    "series": ("CheckpointSeries", "SeriesCheckpoint", "open_series"),
}


def __getattr__(name: str) -> object:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"palinode.history.{room}"), name)
    raise AttributeError(f"module 'palinode.history' has no attribute {name!r}")
