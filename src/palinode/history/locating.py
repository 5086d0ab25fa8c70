"""Where a forget set stands in a training: first and all exposures, and the last clean checkpoint.

Log and order say at which steps a row was in a batch; behaviour says from which checkpoint on it is
known. A checkpoint is clean when it has been through no step with a forget row or a near-copy of one. Where
behaviour sees the rows known earlier than log and order do, the earlier checkpoint is taken and the
disagreement is said: a paraphrase leaves no trace in a log.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from palinode.data.examples import Example
from palinode.errors import DataError
from palinode.history.duplicates import (
    Duplicate,
    find_duplicates,
    fingerprint_rows,
    fingerprint_tokenizer,
    hashes,
)
from palinode.history.exposures import read_header, salt_check
from palinode.history.judgement import Judgement, Location, RowHistory, RowsSeen
from palinode.history.onset import OnsetSettings, check_control, find_onset
from palinode.history.orders import Order, first_step, read_order, steps_of
from palinode.history.reader import ExposureReader
from palinode.history.series import CheckpointSeries
from palinode.history.stages import open_palinode
from palinode.progress import Listener, NullListener

Corpus = Sequence[Example]
"""The rows that were trained on, in the order in which the data set numbers them."""

Steps = Mapping[int, set[tuple[int, Duplicate | None]]]
"""By position of a forget row: the steps it was in, each with the copy where that was a similar text."""

SAMPLED = 5
"""Steps whose whole batches are compared between log and order."""


def open_order(path: Path) -> tuple[Order, Corpus | None]:
    """Return the order that a file describes, and the data that it numbers where the file names them.

    A TOML file is one of `orders.read_order`; a JSON file is of Palinode's own loop.
    """
    return open_palinode(path) if path.suffix == ".json" else (read_order(path), None)


def open_log(
    folder: Path, *, corpus: Corpus | None = None, series: CheckpointSeries | None = None, salt: bytes = b""
) -> ExposureReader:
    """Return the log in a folder; raise DataError where it was kept while training on other data than these,
    or with another tokenizer than that of the series' checkpoints.

    A log that names its data or tokenizer in words instead of by fingerprint cannot be compared, and
    neither can checkpoints that have no tokenizer of their own here.
    """
    header = read_header(folder)
    data = tokenizer = None
    if corpus and _is_fingerprint(header.data) and header.salt_check == salt_check(salt):
        data = fingerprint_rows(hashes(corpus, salt=salt))
    if series and _is_fingerprint(header.tokenizer):
        tokenizer = _tokenizer_of(series)
    return ExposureReader.open(folder, data=data, tokenizer=tokenizer)


def _is_fingerprint(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def _tokenizer_of(series: CheckpointSeries) -> str | None:
    """Return the fingerprint of the tokenizer beside the first checkpoint here that has one."""
    from palinode.models.loading import load_tokenizer

    for found in series.checkpoints:
        if (Path(found.location).expanduser() / "tokenizer.json").is_file():
            return fingerprint_tokenizer(load_tokenizer(found.checkpoint))
    return None


def locate(
    forget: Sequence[Example],
    series: CheckpointSeries,
    *,
    log: ExposureReader | None = None,
    salt: bytes = b"",
    order: Order | None = None,
    corpus: Corpus | None = None,
    control: Sequence[Example] | None = None,
    target_step: int | None = None,
    similarity: float = 0.7,
    settings: OnsetSettings | None = None,
    listener: Listener | None = None,
) -> Location:
    """Return when the forget rows were seen and which checkpoint to take, on the evidence given.

    `corpus` are the rows that were trained on: the order's numbers point into it, and copies of forget
    rows are looked for in it, equal ones and those at least so similar (`duplicates`).
    Behaviour is looked at, as `settings` say, when `control` rows are given. Raises DataError without any
    evidence, for control rows that are forget rows, and for an order that disagrees with the log.
    """
    listener = listener or NullListener()
    if log is None and order is None and not control:
        raise DataError(
            "there is nothing to locate the rows by; name an exposure log (--log), a data order (--order) "
            "with its data (--corpus), or control rows (--control)"
        )
    if order is not None and corpus is None:
        raise DataError("an order gives row numbers; name the data that they point into (--corpus)")
    if control:
        check_control(forget, control)
    copies: list[list[Duplicate]] = [[] for _ in forget]
    for copy in find_duplicates(forget, corpus, threshold=similarity, listener=listener) if corpus else ():
        copies[copy.row].append(copy)
    found: dict[str, Steps] = {}
    if log is not None:
        found["log"] = _steps_in_log(log, forget, copies, corpus or (), salt)
    if order is not None:
        found["order"] = _steps_in_order(order, copies, listener)
    if log is not None and order is not None and corpus:
        _check_agreement(log, order, corpus, found, forget, salt)
    warnings = list(series.notes)
    if log is not None:
        if not len(log.steps):
            reason = " ".join(log.notes) or "it is empty"
            raise DataError(f"no step of the log in {log.folder} can be read: {reason}")
        told = log.tokens_at(series.checkpoints[0].step) is not None
        warnings = [*log.notes, *(() if told else series.notes)]
    onset = None
    if control:
        onset = find_onset(forget, control, series, settings=settings, listener=listener)
        warnings += onset.notes
        trained = len({entry.row for entry in log.find(control, salt=salt)}) if log is not None else 0
        if trained:
            warnings.append(
                f"{trained} of {len(control)} control rows were trained on, by the log: the evidence from "
                "behaviour is weaker than it looks."
            )
    rows = tuple(_history(number, example, copies[number], found) for number, example in enumerate(forget))
    return Judgement(series, rows, onset, log, order, target_step, warnings).location()


def _steps_in_log(
    log: ExposureReader,
    forget: Sequence[Example],
    copies: Sequence[Sequence[Duplicate]],
    corpus: Corpus,
    salt: bytes,
) -> Steps:
    """Return the steps at which the log has each forget row, or a similar text of the corpus."""
    asked: list[tuple[int, Duplicate | None]] = []
    for number, own in enumerate(copies):
        asked += [(number, None), *((number, copy) for copy in own if not copy.exact)]
    texts = [corpus[copy.number] if copy else forget[number] for number, copy in asked]
    found = defaultdict(set)
    for entry in log.find(texts, salt=salt):
        number, copy = asked[entry.row]
        found[number].add((entry.step, copy))
    return found


def _steps_in_order(order: Order, copies: Sequence[Sequence[Duplicate]], listener: Listener) -> Steps:
    """Return the steps at which the order has each forget row, or a similar text, going through all steps."""
    wanted = {copy.number for own in copies for copy in own}
    steps = steps_of(order, wanted, first=first_step(order), listener=listener)
    return {
        number: {(step, None if copy.exact else copy) for copy in own for step in steps[copy.number]}
        for number, own in enumerate(copies)
    }


def _check_agreement(
    log: ExposureReader,
    order: Order,
    corpus: Corpus,
    found: Mapping[str, Steps],
    forget: Sequence[Example],
    salt: bytes,
) -> None:
    """Raise DataError where log and order disagree, in a step that both have.

    The steps of every forget row are compared (`found`, by name), and the whole batches of a few.
    """
    both = [int(step) for step in log.steps.step if first_step(order) <= step <= order.steps]
    if not both:
        raise DataError(
            f"log and order have no step in common (the order has the steps 1 to {order.steps:,}); are they "
            "of one training?"
        )

    def refuse(what: str, step: int) -> None:
        raise DataError(
            f"log and order disagree on {what} at step {step:,}; are both of this training, and are the "
            "order's data the rows that were trained on?"
        )

    covered = set(both)
    for number, example in enumerate(forget):
        ours, theirs = (
            {(step, copy.place if copy else "") for step, copy in steps.get(number, ()) if step in covered}
            for steps in (found["log"], found["order"])
        )
        if ours != theirs:
            refuse(example.place, min(step for step, _ in ours ^ theirs))
    for step in sorted({both[len(both) * part // SAMPLED] for part in range(SAMPLED)}):
        rebuilt = hashes([corpus[row] for row in order.rows(step)], salt=salt)
        if {entry.tobytes() for entry in rebuilt} != {entry.tobytes() for entry in log.at(step)}:
            refuse("the batch", step)


def _history(
    number: int, example: Example, copies: Sequence[Duplicate], found: Mapping[str, Steps]
) -> RowHistory:
    """Put what log and order know of one row together."""
    seen: dict[tuple[int, str], RowsSeen] = {}
    for name, steps in found.items():
        for step, copy in steps.get(number, ()):
            key = (step, copy.place if copy else "")
            before = seen[key].evidence if key in seen else ()
            place, like = (copy.place, copy.similarity) if copy else (None, None)
            seen[key] = RowsSeen(step, (*before, name), place, like)
    return RowHistory(number, example.place, tuple(seen[key] for key in sorted(seen)), tuple(copies))
