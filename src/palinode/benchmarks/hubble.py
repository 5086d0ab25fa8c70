"""Hubble: texts put into pre-training a known number of times (arXiv 2510.19811, its data sets on the hub).

A perturbed model read each inserted text 1 to 256 times, its standard twin read none of them and stands for
the retrained model. Sets: `forget`, inserted texts with the chosen numbers of insertions; `retain`, the other
inserted texts; `holdout`, texts of the same kind that were never inserted; `secret`, biographies up to
the identifier that no one can guess. The timing models, read between two shares of training, are where
`palinode locate` and MSA belong (docs/benchmarks.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from palinode.data.examples import Example, Question
from palinode.data.sources import Row
from palinode.errors import DataError
from palinode.evaluation.benchmark import (
    GENERATION,
    MEMORIZATION,
    Benchmark,
    LoadedBenchmark,
    Measured,
    Option,
    Places,
    QuestionSet,
    Table,
    attack_cells,
    completion,
    documents,
    mean_cell,
    metric_cells,
    need_table,
)
from palinode.settings import Asking

SIZES = {"biographies_yago": (2500, 2500), "passages_wikipedia": (2125, 759)}
"""Inserted texts, and texts never inserted, of each data set."""
ASKING = Asking(max_new_tokens=48, max_length=2048, stop_texts=("\n",))


def load(places: Places, split: str, options: Mapping[str, str]) -> LoadedBenchmark:
    """Return the inserted texts by their number of insertions, and those never inserted.

    Raises DataError for an unknown number of insertions, or where no text has it.
    """
    location = f"allegrolab/{split}" if places.data == HUBBLE.hub else places.data  # a hub data set each
    inserted, others = (
        need_table(Table("default", rows, {"text": None, "meta": None}, name, (name,)), location)
        for name, rows in zip(("train", "test"), SIZES[split], strict=True)
    )
    wanted = {level.strip() for level in options["duplicates"].split(",")}
    counts = [str(row.get("duplicates")) for row in inserted.rows]
    if strange := sorted(wanted - set(counts)):
        raise DataError(
            f"no text of {inserted.facts.location} was inserted {strange[0]} times; duplicates takes numbers "
            "that its column duplicates has (1, 4, 16, 64 and 256), separated by commas"
        )
    texts, parts = documents(inserted), dict[str, list[Example]]()
    for text, count in zip(texts, counts, strict=True):
        parts.setdefault("forget" if count in wanted else "retain", []).append(text)
    parts["holdout"] = documents(others)
    missing = {} if "retain" in parts else {"retain": "every inserted text is to be forgotten"}
    if split == "biographies_yago":
        parts["secret"] = [_secret(text, inserted.rows[text.row]) for text in parts["forget"]]
    else:
        missing["secret"] = "only biographies hold an identifier that no one can guess"
    sets = [
        QuestionSet(name, tuple(map(Question, examples)), replace(ASKING, generate=name == "secret"))
        for name, examples in parts.items()
    ]
    return LoadedBenchmark(tuple(sets), missing, (inserted.facts, others.facts))


def _secret(text: Example, row: Row) -> Example:
    """Return a biography up to its identifier; the answer is a blank and the identifier."""
    secret = f" {json.loads(str(row['meta'])).get('uuid')}"
    before, found, _ = text.answer.partition(secret)
    if not found:
        raise DataError(f"{text.place} does not hold the uuid of its meta; is it the published one?")
    return completion(text.row, text.source, before, secret)


def _secrets_told(measured: Measured) -> list[float | None]:
    return [
        None if one.generated is None else float(one.generated.strip().startswith(one.expected.strip()))
        for one in measured.of("secret")
    ]


HUBBLE = Benchmark(
    name="hubble",
    description="texts inserted into pre-training 1 to 256 times; the standard twin never read them",
    source="allegrolab on the hub (arXiv 2510.19811), Apache 2.0",
    splits={
        "biographies_yago": "biographies with an identifier each",
        "passages_wikipedia": "passages of Wikipedia",
    },
    load=load,
    cells=(
        *metric_cells("forget", "answer_probability", *MEMORIZATION),
        *attack_cells("forget", "holdout"),
        *metric_cells("retain", "answer_probability", *MEMORIZATION),
        mean_cell(
            ("secret",),
            "secret_share",
            "share of biographies whose identifier the model goes on with",
            _secrets_told,
            needs=frozenset({GENERATION}),
        ),
    ),
    options=(
        Option("duplicates", "numbers of insertions that are to be forgotten, separated by commas", "256"),
    ),
    hub="allegrolab",
)
