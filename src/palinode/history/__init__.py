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
    from palinode.history.judgement import Location
    from palinode.history.locating import locate
    from palinode.history.onset import Onset, find_onset
    from palinode.history.plan import Schedule, plan_checkpoints
    from palinode.history.reader import ExposureReader, compact
    from palinode.history.series import CheckpointSeries, SeriesCheckpoint, open_series

# Imported when first asked for: a plan needs no torch.
_HOMES = {
    "ExposureCallback": "callback",
    "ExposureLog": "exposures",
    "ExposureReader": "reader",
    "CheckpointSeries": "series",
    "Location": "judgement",
    "LoggedLoader": "callback",
    "Onset": "onset",
    "SeriesCheckpoint": "series",
    "Schedule": "plan",
    "ThinningCallback": "callback",
    "compact": "reader",
    "find_duplicates": "duplicates",
    "find_onset": "onset",
    "locate": "locating",
    "open_series": "series",
    "plan_checkpoints": "plan",
}

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


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'palinode.history' has no attribute {name!r}")
    return getattr(import_module(f"palinode.history.{_HOMES[name]}"), name)
