"""Log, order and corpus as `locate` asks them: in which steps was this row, and where are copies of it?"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
from palinode.history.exposures import ExposureReader
from palinode.history.orders.order import Order, steps_of
from palinode.history.orders.reading import read_order
from palinode.history.series import CheckpointSeries
from palinode.history.sessions import read_header, salt_check
from palinode.progress import Listener

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
    from palinode.history.orders.palinode import open_palinode

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


def first_step(order: Order) -> int:
    """Return the first step that an order holds for: one that tells of a resumed run begins later."""
    return int(getattr(order, "resumed_from", 0)) + 1


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
