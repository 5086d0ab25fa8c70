"""What a run leaves on disk: outcomes, scores and strict JSON. No torch here.

An *outcome* is what a model did on one example; a *score* is a metric over outcomes, with its
number of examples and an interval; a *record* is what a run writes so that others can check it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RECORD_VERSION = 1
"""Version of the layout of `record.json`, described in docs/record.md."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model did on one example.

    `logprobs` and `hits` run over the scored tokens: the answer's tokens, then the end token. For a
    document every token but the first is scored.
    """

    row: int
    """Row of the example in its source, counted from 0."""
    prompt: str
    """The text the model was given, as written in the source."""
    expected: str
    """The answer in the data."""
    generated: str | None
    """The model's greedy answer; None where nothing was generated (documents)."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each scored token, given everything before it."""
    hits: tuple[bool, ...]
    """Whether the most likely token at that position was the scored one."""


@dataclass(frozen=True, slots=True)
class Score:
    """A metric over n examples with a 95 % interval; `value` is None when it could not be computed."""

    value: float | None
    n: int
    low: float | None
    high: float | None
    reason: str | None = None
    """Why something is missing, how many examples were left out, or a caveat; None when all is well."""


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON (no NaN) so that a reader sees the old file or the new one, never a part."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: to a neighbour first, then renamed over the final name."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write outcomes as JSON lines, one a line, in the order given."""
    lines = (json.dumps(asdict(outcome), ensure_ascii=False, allow_nan=False) for outcome in outcomes)
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_outcomes(path: Path) -> Iterator[Outcome]:
    """Read the outcomes that `write_outcomes` wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            fields = json.loads(line)
            yield Outcome(**{**fields, "logprobs": tuple(fields["logprobs"]), "hits": tuple(fields["hits"])})
