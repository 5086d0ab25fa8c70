"""Log, order and corpus as `locate` asks them: in which steps was this row, and where are copies of it?

Where a forget set stands in a training: first and all exposures, and the last clean checkpoint.

Log and order say at which steps a row was in a batch; behaviour says from which checkpoint on it is
known. A checkpoint is clean when it has been through no step with a forget row or a near-copy of one. Where
behaviour sees the rows known earlier than log and order do, the earlier checkpoint is taken and the
disagreement is said: a paraphrase leaves no trace in a log.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from palinode.data.examples import Example
from palinode.data.tokenize import PromptStyle
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
from palinode.history.onset import check_control, find_onset
from palinode.history.orders import Order, first_step, open_palinode, read_order, steps_of
from palinode.history.reader import ExposureReader
from palinode.history.series import CheckpointSeries
from palinode.progress import Listener, NullListener

Corpus = Sequence[Example]
"""The rows that were trained on, in the order in which the data set numbers them."""


Steps = Mapping[int, Sequence[tuple[int, Duplicate | None]]]
"""By position of a forget row: the steps it was in, each with the copy where that was a similar text."""


def open_order(path: Path) -> tuple[Order, Corpus | None]:
    """Return the order that a file describes, and the data that it numbers where the file names them.

    A TOML file is one of `orders.reading`; a JSON file is of Palinode's own loop.
    """
    if path.suffix != ".json":
        return read_order(path), None

    return open_palinode(path)


def open_log(
    folder: Path, *, corpus: Corpus | None = None, ladder: CheckpointSeries | None = None, salt: bytes = b""
) -> ExposureReader:
    """Return the log in a folder; raise DataError where it was kept while training on other data than these,
    or with another tokenizer than that of the ladder's checkpoints.

    A log that names its data or tokenizer in words instead of by fingerprint cannot be compared, and
    neither can checkpoints that have no tokenizer of their own here.
    """
    header = read_header(folder)
    data = tokenizer = None
    if corpus and _is_fingerprint(header.data) and header.salt_check == salt_check(salt):
        data = fingerprint_rows(hashes(corpus, salt=salt))
    if ladder and _is_fingerprint(header.tokenizer):
        tokenizer = _tokenizer_of(ladder)
    return ExposureReader.open(folder, data=data, tokenizer=tokenizer)


def _is_fingerprint(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def _tokenizer_of(ladder: CheckpointSeries) -> str | None:
    """Return the fingerprint of the tokenizer beside the first checkpoint here that has one."""
    from palinode.models.loading import load_tokenizer

    for rung in ladder.rungs:
        if (Path(rung.location).expanduser() / "tokenizer.json").is_file():
            return fingerprint_tokenizer(load_tokenizer(rung.checkpoint))
    return None


def copies_of(
    forget: Sequence[Example], corpus: Corpus | None, similarity: float, *, listener: Listener | None = None
) -> list[list[Duplicate]]:
    """Return the copies of each forget row in the corpus, in the corpus's order."""
    copies: list[list[Duplicate]] = [[] for _ in forget]
    if not corpus:
        return copies
    for found in find_duplicates(forget, corpus, threshold=similarity, listener=listener):
        copies[found.row].append(found)
    return copies


def steps_in_log(
    log: ExposureReader,
    forget: Sequence[Example],
    copies: Sequence[Sequence[Duplicate]],
    corpus: Corpus | None,
    *,
    salt: bytes = b"",
) -> Steps:
    """Return the steps at which the log has each forget row, or a similar text of the corpus."""
    asked: list[tuple[int, Duplicate | None]] = []
    texts: list[Example] = []
    for number, example in enumerate(forget):
        near = [copy for copy in copies[number] if not copy.exact] if corpus else []
        asked += [(number, None), *((number, copy) for copy in near)]
        texts += [example, *(corpus[copy.number] for copy in near if corpus)]
    found = log.find(texts, salt=salt)
    return _collect((asked[entry.row][0], entry.step, asked[entry.row][1]) for entry in found)


def steps_in_order(
    order: Order, copies: Sequence[Sequence[Duplicate]], *, listener: Listener | None = None
) -> Steps:
    """Return the steps at which the order has each forget row, or a similar text, going through all steps."""
    wanted = {copy.number for found in copies for copy in found}
    steps = steps_of(order, wanted, first=first_step(order), listener=listener)
    return _collect(
        (number, step, None if copy.exact else copy)
        for number, found in enumerate(copies)
        for copy in found
        for step in steps[copy.number]
    )


SAMPLED = 5
"""Steps whose whole batches are compared between log and order."""


def compare(
    log: ExposureReader,
    order: Order,
    corpus: Corpus,
    found: tuple[Steps, Steps],
    places: Sequence[str],
    *,
    salt: bytes = b"",
) -> None:
    """Raise DataError where log and order disagree, in a step that both have.

    The steps of every forget row are compared (`found`: by log and by order), and the whole batches of a few.
    """
    both = [int(step) for step in log.steps.step if first_step(order) <= step <= order.steps]
    if not both:
        raise DataError(
            f"log and order have no step in common (the order has the steps 1 to {order.steps:,}); are they "
            "of one training?"
        )
    covered = set(both)
    for number, place in enumerate(places):
        ours, theirs = (
            {(step, copy.place if copy else "") for step, copy in steps.get(number, ()) if step in covered}
            for steps in found
        )
        if ours != theirs:
            step = min(step for step, _ in ours ^ theirs)
            raise DataError(_disagreement(place, step))
    for step in sorted({both[len(both) * part // SAMPLED] for part in range(SAMPLED)}):
        rebuilt = {entry.tobytes() for entry in hashes([corpus[row] for row in order.rows(step)], salt=salt)}
        if rebuilt != {entry.tobytes() for entry in log.at(step)}:
            raise DataError(_disagreement("the batch", step))


def _disagreement(what: str, step: int) -> str:
    return (
        f"log and order disagree on {what} at step {step:,}; are both of this training, and are the order's "
        "data the rows that were trained on?"
    )


def _collect(entries: Iterable[tuple[int, int, Duplicate | None]]) -> Steps:
    found: dict[int, set[tuple[int, Duplicate | None]]] = defaultdict(set)
    for number, step, copy in entries:
        found[number].add((step, copy))
    return {
        number: sorted(steps, key=lambda entry: (entry[0], entry[1].place if entry[1] else ""))
        for number, steps in found.items()
    }


def locate(
    forget: Sequence[Example],
    ladder: CheckpointSeries,
    *,
    log: ExposureReader | None = None,
    salt: bytes = b"",
    order: Order | None = None,
    corpus: Corpus | None = None,
    control: Sequence[Example] | None = None,
    target_step: int | None = None,
    similarity: float = 0.7,
    measure: str = "mean_logprob",
    max_length: int = 512,
    style: PromptStyle | None = None,
    device: str = "auto",
    seed: int = 0,
    every: bool = False,
    listener: Listener | None = None,
) -> Location:
    """Return when the forget rows were seen and which checkpoint to take, on the evidence given.

    `corpus` are the rows that were trained on: the order's numbers point into it, and copies of forget
    rows are looked for in it, equal ones and those at least so similar (`duplicates`).
    Behaviour is looked at when `control` rows are given. Raises DataError without any evidence, for control
    rows that are forget rows, and for an order that disagrees with the log.
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
    copies = copies_of(forget, corpus, similarity, listener=listener)
    logged = steps_in_log(log, forget, copies, corpus, salt=salt) if log is not None else None
    ordered = steps_in_order(order, copies, listener=listener) if order is not None else None
    if logged is not None and ordered is not None and log is not None and order is not None and corpus:
        places = [example.place for example in forget]
        compare(log, order, corpus, (logged, ordered), places, salt=salt)
    if log is not None and not len(log.steps.step):
        raise DataError(
            f"no step of the log in {log.folder} can be read: {' '.join(log.notes) or 'it is empty'}"
        )
    warnings = list(log.notes if log is not None else ())
    if log is None or log.tokens_at(ladder.rungs[0].step) is None:
        warnings += ladder.notes
    onset = None
    if control:
        onset = find_onset(
            forget,
            control,
            ladder,
            measure=measure,
            max_length=max_length,
            style=style,
            device=device,
            seed=seed,
            every=every,
            listener=listener,
        )
        warnings += onset.notes
        warnings += _control_seen(log, control, salt)
    rows = _rows(forget, copies, logged, ordered)
    return Judgement(ladder, rows, onset, log, order, target_step, warnings).location()


def _rows(
    forget: Sequence[Example],
    copies: Sequence[Sequence[Duplicate]],
    logged: Steps | None,
    ordered: Steps | None,
) -> tuple[RowHistory, ...]:
    """Put the steps of log and order together, row by row."""
    rows = []
    for number, example in enumerate(forget):
        found: dict[tuple[int, str | None], tuple[float | None, list[str]]] = {}
        for name, steps in (("log", logged), ("order", ordered)):
            for step, copy in (steps or {}).get(number, ()):
                key = (step, copy.place if copy else None)
                found.setdefault(key, (copy.similarity if copy else None, []))[1].append(name)
        seen = [
            RowsSeen(step, tuple(evidence), place, like)
            for (step, place), (like, evidence) in sorted(
                found.items(), key=lambda item: (item[0][0], item[0][1] or "")
            )
        ]
        rows.append(RowHistory(number, example.place, tuple(seen), tuple(copies[number])))
    return tuple(rows)


def _control_seen(log: ExposureReader | None, control: Sequence[Example], salt: bytes) -> list[str]:
    if log is None:
        return []
    count = len({entry.row for entry in log.find(control, salt=salt)})
    if not count:
        return []
    return [
        f"{count} of {len(control)} control rows were trained on, by the log: the evidence from behaviour is "
        "weaker than it looks."
    ]
