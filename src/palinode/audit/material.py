"""The rows of an audit: what is to be forgotten, and the sets that some attacks need besides.

Columns are TOFU's (spec: data.md §1): paraphrased_question, paraphrased_answer, perturbed_answer. What is
not there leaves the attacks that need it "not tested"; nothing is made up in its place, but for questions
that name a forget row's subject otherwise (`ask_otherwise`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from palinode.data.examples import (
    OTHER_ANSWERS,
    Example,
    at_most,
    fingerprint_examples,
    other_answers,
    read_examples,
    read_set,
)
from palinode.data.sources import Row
from palinode.errors import DataError
from palinode.metrics.matching import nearest
from palinode.settings import AuditSettings


@dataclass(frozen=True, slots=True)
class AuditRows:
    """The rows that attacks are made of, each set cut to the budget."""

    forget: Sequence[Example]
    learned: Sequence[Example]
    """The part of the forget set that relearning is given."""
    held_out: Sequence[Example]
    """The rest of it, on which relearning is measured."""
    retain: Sequence[Example] = ()
    holdout: Sequence[Example] = ()
    """Rows like the forget set that no model has seen."""
    near: Sequence[Example] = ()
    """Of all retain rows those nearest to the forget rows by words, a quarter as many as `retain`."""
    paraphrased: Sequence[Example] = ()
    """Forget rows under another question, with the row numbers of the forget set."""
    lookalikes: Sequence[Example] = ()
    """Rows in the manner of the forget set, without the facts that are measured."""
    lookalikes_column: str | None = None
    """The column of the `learned` rows that they were made of; None where they are from a file."""
    indirect: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    """Questions that name no subject by its full name: `alias`, `two_hop`, and `given` ones."""
    kinds: Sequence[str] = ()
    """What each given one is: a language, say."""

    def sets(self) -> dict[str, Sequence[Example]]:
        """Return the sets by name, the empty ones left out."""
        names = ("forget", "retain", "near", "holdout", "paraphrased", "lookalikes")
        named = {name: getattr(self, name) for name in names} | dict(self.indirect)
        return {name: examples for name, examples in named.items() if examples}

    def fingerprint(self) -> dict[str, str]:
        """Return a hash of each set, exact texts and order; and of how the forget set was divided."""
        parts = {**self.sets(), "learned": self.learned, "held_out": self.held_out}
        return {name: fingerprint_examples(examples) for name, examples in parts.items()} | {
            "kinds": "\n".join(self.kinds)
        }


def read_material(
    forget: str | Path,
    *,
    retain: str | Path | None = None,
    holdout: str | Path | None = None,
    settings: AuditSettings | None = None,
    max_rows: int = 200,
) -> AuditRows:
    """Return the rows of an audit, read from files or hub data sets, at most `max_rows` of each set.

    Raises DataError, also where fewer than two forget rows are there.
    """
    settings = settings or AuditSettings()
    columns, seed, indirect = settings.columns, settings.seed, settings.indirect
    every, rows = read_set(forget, columns=columns)
    if len(every) < 2:
        raise DataError(
            f"{forget} has one row; an audit needs two at least, to relearn one and ask the other"
        )
    chosen = at_most(every, max_rows, seed=seed)
    learned, held_out = divide(chosen, seed=seed)

    left_out = read_examples(settings.leave_out, columns=columns) if settings.leave_out else ()
    gone = {example.key for example in left_out}

    def read(location: str | Path | None, *, but: Set[str] = frozenset()) -> list[Example]:
        examples = read_examples(location, columns=columns, beside=True) if location is not None else []
        return [one for one in examples if one.key not in but]

    drawn = partial(at_most, most=max_rows, seed=seed)
    alike, column = drawn(read(settings.lookalikes)), None
    if settings.lookalikes is None:  # made of the rows' own other answers, the wrong ones first
        answers = [(example, other_answers(rows[example.row], example.place)) for example in learned]
        for name, kind in OTHER_ANSWERS.items():
            if made := [replace(one, answer=found[kind][0]) for one, found in answers if kind in found]:
                alike, column = made, name
    kept, own_keys = read(retain, but=gone), {example.key for example in every}
    others = [example for example in kept if example.key not in own_keys]
    near = nearest([*map(_text, others)], [*map(_text, every)], min(max_rows, len(kept)) // 4)
    own, cells = ([], []) if indirect is None else read_set(indirect, columns=columns, beside=True)
    given = drawn(own)
    return AuditRows(
        forget=chosen,
        learned=learned,
        held_out=held_out,
        retain=drawn(kept),
        near=[others[place] for place in near],
        holdout=drawn(read(holdout)),
        paraphrased=_paraphrased(settings.paraphrases, rows, every, chosen, columns),
        lookalikes=alike,
        lookalikes_column=column,
        indirect={**ask_otherwise(chosen, every), "given": given},
        kinds=[str(cells[one.row].get("kind", "")) for one in given],
    )


def ask_otherwise(chosen: Sequence[Example], every: Sequence[Example]) -> dict[str, list[Example]]:
    """Return questions again, each subject by another name (`alias`) and by another row of it (`two_hop`).

    A question's subject is the name in it, two neighbouring words with capitals or more, that stands in most
    rows, and in two at least. Aliases are its first and its last word. The other hop is the first other row
    with the name that does not hold the answer: its question and answer, then this question, with "this
    person" for the name.
    """
    counts = Counter(name for one in every for name in set(_names(_text(one))))
    made: dict[str, list[Example]] = {"alias": [], "two_hop": []}
    for one in chosen:
        _, _, name = max(((counts[it], len(it), it) for it in _names(one.prompt)), default=(0, 0, ""))
        if counts[name] < 2:
            continue
        for alias in (name.split()[0], name.split()[-1]):
            made["alias"].append(_asked(one, one.prompt.replace(name, alias)))
        others = (it for it in every if it.row != one.row and name in _text(it))
        if other := next((it for it in others if one.answer.lower() not in _text(it).lower()), None):
            hops = f"This is known of somebody: {other.prompt} {other.answer} {one.prompt}"
            made["two_hop"].append(_asked(one, hops.replace(name, "this person")))
    return made


def _names(text: str) -> Iterator[str]:
    """Yield each two or more neighbouring words of a text that have capitals."""
    for words in re.findall(r"[\w'’-]+(?: [\w'’-]+)+", re.sub(r"['’]s\b", ",", text)):
        for capital, run in groupby(words.split(), key=lambda word: word[0].isupper()):
            parts = [*run] if capital else []
            for begin in range(len(parts)):
                yield from (" ".join(parts[begin:end]) for end in range(begin + 2, len(parts) + 1))


def _asked(example: Example, text: str) -> Example:
    """Return an example under another question."""
    return replace(example, turns=(*example.turns[:-1], replace(example.turns[-1], content=text)))


def _text(example: Example) -> str:
    return " ".join(example.texts)


def divide(examples: Sequence[Example], *, seed: int) -> tuple[list[Example], list[Example]]:
    """Return half of the rows, drawn at random, and the other half; answers of one row stay together."""
    rows = sorted({example.row for example in examples})
    drawn = np.random.default_rng([seed, 1]).permutation(len(rows))[: len(rows) // 2]
    half = {rows[place] for place in drawn.tolist()}
    first = [example for example in examples if example.row in half]
    second = [example for example in examples if example.row not in half]
    if not first:  # one row of several answers
        middle = len(second) // 2
        first, second = second[:middle], second[middle:]
    return first, second


def _paraphrased(
    source: str | None,
    rows: Sequence[Row],
    every: Sequence[Example],
    chosen: Sequence[Example],
    columns: Mapping[str, str] | None,
) -> Sequence[Example]:
    """Return the chosen forget rows under other questions; none where the rows have none."""
    if source is None or any(source in row for row in rows):
        column = source or "paraphrased_question"
        asked = [(example, rows[example.row].get(column)) for example in chosen if example.turns]
        return [_asked(one, text) for one, text in asked if isinstance(text, str) and text.strip()]
    others = read_examples(source, columns=columns, beside=True)
    if len(others) != len(every):
        raise DataError(
            f"{source} has {len(others)} rows and the forget set {len(every)}; paraphrases need one row for "
            "each forget row, in the same order, or the name of a column of the forget rows"
        )
    places = {id(example): place for place, example in enumerate(every)}
    return [replace(others[places[id(example)]], row=example.row) for example in chosen]
