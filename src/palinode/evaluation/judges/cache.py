"""Decisions of a judge, kept by content: whoever asks the same again gets the same answer, and pays nothing.

A decision's file is named by the SHA-256 of everything it depends on (model, endpoint, instructions,
question, answer, candidates). It holds which candidates were picked, and no text of the question.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from palinode.errors import OutputError
from palinode.records import make_private, read_json


def judge_cache_folder() -> Path:
    """Return the folder of a user's judge decisions: in $PALINODE_CACHE, or in the user's cache folder."""
    if chosen := os.environ.get("PALINODE_CACHE"):
        return Path(chosen).expanduser() / "judge"
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "palinode" / "judge"


def decision_file(key: str) -> Path | None:
    """Return the file of a decision in the user's cache; None where there is none."""
    path = judge_cache_folder() / key[:2] / f"{key}.json"
    return path if re.fullmatch("[0-9a-f]{64}", key) and path.exists() else None


class DecisionCache:
    """A folder of decisions, safe to share between threads and runs: a file is whole or not there."""

    def __init__(self, folder: Path):
        """Open the folder and make it if need be; OutputError when that is not possible."""
        self.folder = folder
        try:
            make_private(folder)
        except OSError as error:
            raise OutputError(
                f"judge decisions cannot be kept in {folder} ({error.strerror}); choose another cache folder"
            ) from None

    def key(self, content: Mapping[str, Any]) -> str:
        """Return the name under which a decision about this content is kept."""
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def get(self, key: str) -> list[Any] | None:
        """Return the picks kept under a key, unchecked; None when there are none or the file is damaged."""
        try:
            kept = read_json(self._file(key))
        except (OSError, ValueError):
            return None
        picked = kept.get("picked") if isinstance(kept, dict) else None
        return picked if isinstance(picked, list) else None

    def put(self, key: str, picked: tuple[int, ...], *, judge: str) -> None:
        """Keep a decision. A disk that takes no more loses the cache entry, not the decision."""
        file = self._file(key)
        with suppress(OSError):
            make_private(file.parent)
            handle, partial = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".partial")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as stream:
                    json.dump({"picked": list(picked), "judge": judge}, stream)
                Path(partial).replace(file)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
