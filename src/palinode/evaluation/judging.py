"""A judge says which candidate answer a model's answer is closest to in fact (spec: msa.md §5).

The candidates of a question are the ground truth, the retrained model's own answer, the perturbed answers
and "none of these"; where the data lists accepted answers (RESTOR), these and "none of these". Equal texts
are one candidate with several roles. Their accuracies are in metrics/matching.py. Decisions are kept
by content: whoever asks the same again gets the same answer, and pays nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palinode.errors import DataError, OutputError, told_as
from palinode.progress import Listener, NullListener
from palinode.records import Outcome, Verdict, cache_folder, keep_whole, make_private, read_json


def decision_file(key: str) -> Path | None:
    """Return the file of a decision in the user's cache; None where there is none."""
    path = cache_folder("judge") / key[:2] / f"{key}.json"
    return path if re.fullmatch("[0-9a-f]{64}", key) and path.exists() else None


class DecisionCache:
    """A folder of decisions, safe to share between threads and runs: a file is whole or not there.

    A file is named by the SHA-256 of everything that the decision depends on (model, endpoint, instructions,
    question, answer, candidates), and holds which candidates were picked, no text of the question.
    """

    def __init__(self, folder: Path):
        """Open the folder and make it if need be; OutputError when that is not possible."""
        self.folder = folder
        with told_as(
            OutputError, f"judge decisions cannot be kept in {folder}", "choose another cache folder"
        ):
            make_private(folder)

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
        with suppress(OSError):
            keep_whole(self._file(key), {"picked": list(picked), "judge": judge})

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


NONE_TEXT = "none of these"
"""Text of the candidate to be picked when no other has the answer's facts."""

TRUTH, IDEAL, PERTURBED, ACCEPTED, NONE = "truth", "ideal", "perturbed", "accepted", "none"
"""The roles that a candidate may play."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text that may be picked, and the roles it plays; a judge must not look at the roles' order."""

    text: str
    roles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pick:
    """What a judge decided about one answer."""

    picked: tuple[int, ...] | None
    """Positions of the picked candidates; None when there is no decision."""
    reason: str | None = None
    """Why there is none."""
    decision: str | None = field(default=None, compare=False)
    """Key under which an endpoint's decision is kept."""


class Judge(ABC):
    """Whoever compares one answer with candidates. `pick` may be called from several threads."""

    name: str
    """What the judge is called in every verdict, its model included."""
    at_once = 1
    """How many answers it may be asked about at the same time."""

    @abstractmethod
    def pick(self, question: str, answer: str, candidates: Sequence[Candidate]) -> Pick:
        """Return the candidates whose facts are closest to the answer's."""

    def stop(self) -> None:  # noqa: B027 - only judges that somebody waits for have something to stop
        """Give up what is being asked in other threads; nothing more will be asked."""


def candidates_of(outcome: Outcome, ideal: Outcome | None, *, seed: int) -> tuple[Candidate, ...]:
    """Return the candidates for one answer in the order in which they are shown.

    They are the expected answer, the answer that `ideal` generated, its "perturbed" alternatives, and
    "none of these". The order depends on the seed, the question and the candidate's text alone.
    """
    offered = [(outcome.expected, TRUTH)]
    if ideal is not None and ideal.generated is not None:
        offered.append((ideal.generated, IDEAL))
    offered += [(entry.text, PERTURBED) for entry in outcome.alternatives.get(PERTURBED, ())]
    return _in_order(offered, outcome.prompt, seed)


def accepted_candidates_of(outcome: Outcome, *, seed: int) -> tuple[Candidate, ...]:
    """Return the accepted answers and "none of these": whoever picks another than none accepts the answer."""
    return _in_order([(text, ACCEPTED) for text in outcome.accepted], outcome.prompt, seed)


def judge_answers(
    judge: Judge,
    outcomes: Sequence[Outcome],
    ideals: Sequence[Outcome] | None = None,
    *,
    seed: int = 0,
    listener: Listener | None = None,
) -> list[Verdict]:
    """Return the judge's verdict on each generated answer, in the order given.

    `ideals` are the retrained model's outcomes on the same questions in the same order. Without them, a
    question with accepted answers is judged against those, and any other one without an ideal answer.
    An answer that could not be judged has a verdict with a reason; the others stand.
    """
    tables = _tables(outcomes, ideals, seed)
    picks: list[Pick] = [Pick(None, "no answer was generated")] * len(outcomes)
    asked = [place for place, outcome in enumerate(outcomes) if outcome.generated is not None]
    with (listener or NullListener()).task(f"judging: {judge.name}", len(asked), "answers") as advance:
        for place, pick in _decided(judge, outcomes, tables, asked):
            picks[place] = pick
            advance(1)
    return [
        Verdict(
            row=outcome.row,
            judge=judge.name,
            offered=tuple((candidate.text, candidate.roles) for candidate in candidates),
            picked=pick.picked,
            reason=pick.reason,
            decision=pick.decision,
        )
        for outcome, candidates, pick in zip(outcomes, tables, picks, strict=True)
    ]


def plain_text(text: str) -> str:
    """Return a text as equality sees it: no case, no width, no outer quotes or stops, single spaces."""
    flat = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return re.sub(r"^[\s\"'“”‘’«»]+|[\s\"'“”‘’«».,;:!?]+$", "", flat)


def _in_order(offered: Sequence[tuple[str, str]], question: str, seed: int) -> tuple[Candidate, ...]:
    """Return one candidate per distinct text with its roles, and "none of these".

    They are sorted by a digest of seed, question, text and role: no state, the same on every machine.
    """
    texts: dict[str, str] = {}
    roles: dict[str, list[str]] = {}
    for text, role in offered:
        key = plain_text(text)
        texts.setdefault(key, text)
        if role not in roles.setdefault(key, []):
            roles[key].append(role)

    def rank(candidate: Candidate) -> bytes:
        parts = (str(seed), question, plain_text(candidate.text), str(candidate.roles == (NONE,)))
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()

    merged = [Candidate(texts[key], tuple(roles[key])) for key in texts]
    return tuple(sorted([*merged, Candidate(NONE_TEXT, (NONE,))], key=rank))


def _tables(
    outcomes: Sequence[Outcome], ideals: Sequence[Outcome] | None, seed: int
) -> list[tuple[Candidate, ...]]:
    others = [None] * len(outcomes) if ideals is None else ideals
    if len(outcomes) != len(others):
        raise DataError(
            f"there are {len(outcomes)} answers to judge and {len(others)} of the retrained model; "
            "both models must be asked the same questions"
        )
    tables = []
    for place, (outcome, ideal) in enumerate(zip(outcomes, others, strict=True)):
        if ideal is not None and outcome.prompt != ideal.prompt:
            raise DataError(
                f"question {place} of the evaluated model is {outcome.prompt[:60]!r}, that of the retrained "
                f"model {ideal.prompt[:60]!r}; both must be asked the same questions in the same order"
            )
        if ideals is None and outcome.accepted:
            tables.append(accepted_candidates_of(outcome, seed=seed))
        else:
            tables.append(candidates_of(outcome, ideal, seed=seed))
    return tables


def _decided(
    judge: Judge, outcomes: Sequence[Outcome], tables: Sequence[Sequence[Candidate]], asked: Sequence[int]
) -> Iterator[tuple[int, Pick]]:
    """Yield place and pick as they come; an error of the judge cancels what has not been asked yet."""
    pool = ThreadPoolExecutor(max_workers=max(1, judge.at_once), thread_name_prefix="judge")
    try:
        waiting = {
            pool.submit(
                judge.pick, outcomes[place].prompt, outcomes[place].generated or "", tables[place]
            ): place
            for place in asked
        }
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BaseException:  # Ctrl-C too: do not wait for answers that nobody will read
        judge.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
