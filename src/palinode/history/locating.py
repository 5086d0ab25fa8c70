"""Where a forget set stands in a training: first and all exposures, and the last clean checkpoint.

Log and order say at which steps a row was in a batch; behaviour says from which checkpoint on it is
known. A checkpoint is clean when it has been through no step with a forget row or a near-copy of one. Where
behaviour sees the rows known earlier than log and order do, the earlier checkpoint is taken and the
disagreement is said: a paraphrase leaves no trace in a log.
"""

from __future__ import annotations

from collections.abc import Sequence

from palinode.data.examples import Example
from palinode.data.tokenize import PromptStyle
from palinode.errors import DataError
from palinode.history.duplicates import Duplicate
from palinode.history.exposures import ExposureReader
from palinode.history.judgement import Judgement, Location, RowHistory, RowsSeen
from palinode.history.onset import check_control, find_onset
from palinode.history.orders.order import Order
from palinode.history.series import CheckpointSeries
from palinode.history.sources import (
    Corpus,
    Steps,
    compare,
    copies_of,
    steps_in_log,
    steps_in_order,
)
from palinode.progress import Listener, NullListener


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
