"""LUME and PISTOL: invented stories, people and contracts, told apart by a column of one table.

LUME (SemEval-2025 task 4, arXiv 2502.15097 and the task's evaluation script): three tasks, each with texts to
complete ("sc": ROUGE-L recall) and questions ("qa": the exact answer), to be forgotten or kept. Of the twelve
means, task aggregate = harmonic mean of {1 − forget} and {retain}; membership = 1 − 2 |AUC of the loss − ½|.
PISTOL (arXiv 2406.16810 and its code): questions about contracts, each an edge between two parties. Edges
share parties, so that what is forgotten hangs together with what stays; some contracts share none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from palinode.data.examples import Example, Message, Question
from palinode.data.tokenize import PromptStyle
from palinode.errors import DataError
from palinode.evaluation.benchmark import (
    ALL,
    GENERATION,
    Benchmark,
    Cell,
    LoadedBenchmark,
    Measured,
    Places,
    QuestionSet,
    Table,
    TableRows,
    completion,
    load_sets,
    metric_cells,
    need_table,
)
from palinode.metrics.aggregate import harmonic_score, mean_score
from palinode.metrics.matching import rouge_l_recalls
from palinode.metrics.membership import auc, loss_values
from palinode.records import Score
from palinode.settings import Asking

# LUME

SIDES, TASKS, KINDS = ("forget", "retain"), ("Task1", "Task2", "Task3"), ("sc", "qa")
SETS = [f"{side}_{task.lower()}_{kind}" for side, task, kind in product(SIDES, TASKS, KINDS)]
SIZES = {"forget": 2732, "retain": 2734}
"""Rows of LUME as amazon-science publishes it; how many SemEval's own folds have is stated nowhere public."""
MEMBERS = ("member", "nonmember")
TOLD = frozenset({GENERATION})
COMPLETED = Asking(max_new_tokens=256, max_length=2048)


def load_lume(places: Places, split: str, options: Mapping[str, str]) -> LoadedBenchmark:  # noqa: ARG001
    """Return the twelve sets of a fold, and the texts of the membership attack where they are there."""
    rows: dict[str, list[Question]] = {}
    facts = []
    columns = dict.fromkeys(("id", "input", "output", "task"))
    for side in SIDES:
        name = f"{side}_{split}"
        table = Table("default", None, columns, name, (f"data/{name}-00000-of-00001", name))
        if split == "lume":
            table = Table(side, SIZES[side], columns, also=(f"data/{side}",))
        found = need_table(table, places.data)
        facts.append(found.facts)
        for number in range(len(found.rows)):
            name, example = _task_row(side, found, number)
            rows.setdefault(name, []).append(Question(example))
    sets = [QuestionSet(name, tuple(some), COMPLETED) for name, some in rows.items()]
    missing = {name: f"{places.data} has no such rows" for name in SETS if name not in rows}
    tables = {
        name: [Table("mia", None, {"document": None}, name, (f"mia_data/{name}", name), may_lack=True)]
        for name in MEMBERS
    }

    def attacked(name: str, found: Sequence[TableRows]) -> QuestionSet:
        source = found[0].facts.location
        texts = enumerate(str(row["document"]) for row in found[0].rows)
        asked = [Question(Example(number, source, "document", (), text)) for number, text in texts]
        return QuestionSet(name, tuple(asked), replace(COMPLETED, generate=False))

    texts = load_sets(tables, places.data, attacked)
    return LoadedBenchmark((*sets, *texts.sets), {**missing, **texts.missing}, (*facts, *texts.tables))


def _task_row(side: str, table: TableRows, number: int) -> tuple[str, Example]:
    """Return the set of a row and the row: its id ends with its kind and a digit."""
    row, source = table.rows[number], table.facts.location
    kind = re.search(r"(sc|qa)\d$", str(row["id"]))
    if row["task"] not in TASKS or kind is None:
        raise DataError(
            f"row {number + 1} of {source} has the task {row['task']!r} and the id {row['id']!r}; it needs "
            "Task1, Task2 or Task3, and an id that ends with sc or qa and a digit"
        )
    example = completion(number, source, str(row["input"]), str(row["output"]))
    return f"{side}_{str(row['task']).lower()}_{kind[1]}", example


def _task_values(measured: Measured, name: str) -> list[float | None]:
    """Return ROUGE-L recall, or for questions 1 where the answer is right but for case and outer blanks."""
    outcomes = measured.of(name)
    if name.endswith("sc"):
        return rouge_l_recalls(outcomes)
    told = [((one.generated or "").strip().lower(), one.expected.strip().lower()) for one in outcomes]
    return [float(said == right) for said, right in told]


def _task_cell(name: str) -> Cell:
    def score(measured: Measured) -> Score:
        return mean_score(_task_values(measured, name), seed=measured.seed)

    metric, words = ("knowledge", "share of exact answers")
    if name.endswith("sc"):
        metric, words = ("regurgitation", "ROUGE-L recall")
    return Cell(name, metric, words, score, needs=TOLD)


def _task_aggregate(measured: Measured) -> Score:
    parts = {name: _task_values(measured, name) for name in SETS}
    for name in SETS[: len(SETS) // 2]:
        parts[name] = [None if value is None else 1 - value for value in parts[name]]
    return harmonic_score(parts, seed=measured.seed)


def _membership(measured: Measured) -> Score:
    found = auc(*(loss_values(measured.of(name)) for name in MEMBERS), seed=measured.seed)
    if found.value is None or found.low is None or found.high is None:
        return found
    value, *ends = (1 - 2 * abs(area - 0.5) for area in (found.value, found.low, found.high))
    high = 1.0 if found.low <= 0.5 <= found.high else max(ends)
    return replace(found, value=value, low=min(ends), high=high)


LUME = Benchmark.declared(
    "lume",
    load_lume,
    (
        *map(_task_cell, SETS),
        Cell(
            ALL,
            "task_aggregate",
            "harmonic mean of the twelve scores, those of forget rows taken from 1",
            _task_aggregate,
            also=tuple(SETS),
            needs=TOLD,
        ),
        Cell(ALL, "membership", "1 − 2 |AUC of the loss − ½|: 1 is ideal", _membership, also=MEMBERS),
    ),
)

# PISTOL

SAMPLES = {"sample1": 400, "sample2": 1500}
APART = {
    "independent_sales": ("E1_F1", "E2_F2", "E3_F3"),
    "independent_employment": ("E1_q1", "E2_q2", "E3_q3"),
}
"""Contracts of sample 1 that share no party with others."""
QA: dict[str, int | None] = {"question": None, "answer": None}
MOST = 200
"""Rows of each set that are asked, the first ones."""


def load_pistol(places: Places, split: str, options: Mapping[str, str]) -> LoadedBenchmark:
    """Return the contracts to be forgotten, the others, those that share no party, and plain facts.

    Raises DataError where an edge that is named does not occur.
    """
    number = split[-1]
    also = (f"sample_data_{number}", f"data/sample_data_{number}")
    found = need_table(
        Table(f"pistol_data_{number}", SAMPLES[split], {**QA, "edge": None}, also=also), places.data
    )
    edges = list(dict.fromkeys(str(row["edge"]) for row in found.rows))
    forget = [edge.strip() for edge in options["forget"].split(",")]
    if strange := [edge for edge in forget if edge not in edges]:
        raise DataError(
            f"{found.facts.location} has no edge {strange[0]!r}; name edges that it has "
            f"({', '.join(edges[:4])}, …)"
        )
    parts = {"forget": forget, "retain": [edge for edge in edges if edge not in forget]}
    parts |= {name: [edge for edge in some if edge in parts["retain"]] for name, some in APART.items()}
    sets = [_asked(name, found, some) for name, some in parts.items() if some]
    missing = {name: f"{split} has no such contracts that stay" for name, some in parts.items() if not some}
    facts = Table("factual_data", 217, QA, also=("data/factual_data",), may_lack=True)
    plain = load_sets({"facts": [facts]}, places.data, lambda name, tables: _asked(name, tables[0]))
    return LoadedBenchmark((*sets, *plain.sets), {**missing, **plain.missing}, (found.facts, *plain.tables))


def _asked(name: str, table: TableRows, edges: Sequence[str] | None = None) -> QuestionSet:
    """Return questions of these edges, or all, put through the chat template without a system text."""
    source = table.facts.location
    questions = [
        Question(
            Example(place, source, "question", (Message("user", str(row["question"])),), str(row["answer"]))
        )
        for place, row in enumerate(table.rows)
        if edges is None or row["edge"] in edges
    ]
    return QuestionSet(name, tuple(questions[:MOST]), Asking(), PromptStyle(system_prompt=""))


PISTOL = Benchmark.declared(
    "pistol",
    load_pistol,
    [
        cell
        for name in ("forget", "retain", *APART, "facts")
        for cell in metric_cells(name, "answer_probability", "rouge_1_recall", "rouge_l_recall")
    ],
)
