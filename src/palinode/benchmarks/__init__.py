"""Benchmarks in a plain table: what is asked, what is forgotten, what is known of the truth.

The demo is no entry of the table: it makes its models itself (`palinode demo`). Nor is it imported here,
because it needs torch, and naming benchmarks does not. `own` is here: it reads files of one's own, and what
is missing of them leaves the metrics that need it without a value, and says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from palinode.benchmarks.lume_pistol import LUME, PISTOL
from palinode.benchmarks.muse import MUSE
from palinode.benchmarks.pretraining import HUBBLE, RWKU
from palinode.benchmarks.restor import RESTOR
from palinode.benchmarks.tofu import TOFU
from palinode.data.examples import check_no_forget_rows, read_questions
from palinode.evaluation.benchmark import (
    MEMORIZATION,
    Benchmark,
    LoadedBenchmark,
    Places,
    QuestionSet,
    TableFacts,
    attack_cells,
    judge_cells,
    metric_cells,
    quality_cell,
)
from palinode.records import read_bytes
from palinode.settings import Asking

NOT_GIVEN = {
    "retain": "there are no retain rows; give them with --retain",
    "holdout": "there are no holdout rows, which no model has seen; give them with --holdout",
}


def load_own(places: Places, split: str, options: Mapping[str, str]) -> LoadedBenchmark:  # noqa: ARG001
    """Return the sets that were given: forget, and retain and holdout where there are files for them.

    Raises DataError for rows that cannot be read, and for forget rows among the retain or holdout rows.
    """
    given = {"forget": places.data, "retain": places.retain, "holdout": places.holdout}
    sets, facts = [], []
    for name, location in given.items():
        if location is None:
            continue
        questions = read_questions(location, columns=places.columns, beside=name != "forget")
        sets.append(QuestionSet(name, tuple(questions), Asking(generate=name != "holdout")))
        path = Path(location).expanduser()
        sha256 = hashlib.sha256(read_bytes(path)).hexdigest() if path.is_file() else None
        facts.append(TableFacts(location, name, "", len(questions), sha256))
    examples = {one.name: [question.example for question in one.questions] for one in sets}
    check_no_forget_rows(examples.pop(sets[0].name), examples)
    missing = {name: NOT_GIVEN[name] for name in NOT_GIVEN if given[name] is None}
    return LoadedBenchmark(tuple(sets), missing, tuple(facts))


OWN = Benchmark.declared(
    "own",
    load_own,
    (
        *metric_cells("forget", "answer_probability", "rouge_l_recall", "forget_truth_ratio"),
        quality_cell("forget"),
        *metric_cells("forget", *MEMORIZATION),
        *attack_cells("forget", "holdout"),
        *judge_cells("forget", "retain"),
        *metric_cells("retain", "answer_probability", "rouge_l_recall", "retain_truth_ratio", *MEMORIZATION),
    ),
)

BENCHMARKS: dict[str, Benchmark] = {
    one.name: one for one in (TOFU, RESTOR, MUSE, RWKU, LUME, PISTOL, HUBBLE, OWN)
}

__all__ = ["BENCHMARKS", "OWN"]
