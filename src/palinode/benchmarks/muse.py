"""MUSE: forgetting news articles or books, judged from six sides (spec: data.md §3, metrics.md §10).

    VerbMem      the model continues a text of the forget set; ROUGE-L F against how it goes on
    KnowMem      ten-shot questions about the forget set (f) and about what stays (r); ROUGE-L F
    PrivLeak     Min-K AUC of forget against holdout texts, related to the retrained model's
    scalability      forget sets of growing size, each unlearned from the target
    sustainability   folds unlearned one after another, each from the model that the one before left

The last two are ways to unlearn, not questions: `folds` gives their forget sets, and the questions above
measure each of the models that come out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from palinode.data.examples import Example, Question
from palinode.data.sources import Row
from palinode.errors import DataError
from palinode.evaluation.benchmark import (
    GENERATION,
    MEMORIZATION,
    Benchmark,
    Cell,
    LoadedBenchmark,
    Measured,
    Places,
    QuestionSet,
    Table,
    TableRows,
    attack_cells,
    completion,
    documents,
    load_sets,
    metric_cells,
    min_k_auc,
    need_table,
)
from palinode.metrics.aggregate import mean_score
from palinode.metrics.matching import rouge_values
from palinode.metrics.membership import MUSE_RETRAINED, privleak
from palinode.metrics.table import METRICS
from palinode.records import Score
from palinode.settings import Asking

Kind = Literal["scal", "sust"]

HUBS = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}

TEXT: dict[str, int | None] = {"text": None}
QA: dict[str, int | None] = {"question": None, "answer": None}

FOLDS: dict[Kind, tuple[int, ...]] = {"scal": (889, 1778, 2667, 3554), "sust": (889, 889, 889, 887)}
"""Documents of forget_1 to forget_4: cumulative, and one fold after another. News only."""

STOPS = ("\n\n", "\nQuestion", "Question:")
DOCUMENT_LENGTH = 2048


def load(places: Places, split: str, options: Mapping[str, str]) -> LoadedBenchmark:  # noqa: ARG001
    """Return the question sets of a corpus; those whose files are not there are told missing."""
    location = HUBS[split] if places.data == MUSE.hub else places.data  # a hub data set each
    tables = {
        "verbmem": (Table("verbmem", 100, {"prompt": None, "gt": None}, "forget"),),
        **{
            f"knowmem_{kind[0]}": (
                Table("knowmem", 100, QA, f"{kind}_qa"),
                Table("knowmem", 10, QA, f"{kind}_qa_icl"),
            )
            for kind in ("forget", "retain")
        },
        "privleak_forget": (Table("privleak", 100, TEXT, "forget"),),
        "privleak_holdout": (Table("privleak", 100, TEXT, "holdout"),),
    }
    loaded = load_sets(tables, location, _questions)
    if not loaded.sets:
        raise DataError(loaded.missing["verbmem"])
    return loaded


# Folds


def folds(location: str, kind: Kind) -> list[tuple[Example, ...]]:
    """Return the four forget sets of the News corpus: "scal" are cumulative, each to be unlearned from the
    target; "sust" come one by one, each to be unlearned from the model that the one before left."""
    return [
        tuple(documents(need_table(Table(kind, rows, TEXT, f"forget_{number}"), location)))
        for number, rows in enumerate(FOLDS[kind], start=1)
    ]


# Questions


def ten_shot(question: str, examples: Sequence[Row]) -> str:
    """Return the prompt of KnowMem: examples with their answers, then the question with an open answer."""
    shots = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples]
    return "".join([*shots, f"Question: {question}\nAnswer: "])


def _questions(name: str, tables: Sequence[TableRows]) -> QuestionSet:
    """Return a set: texts to be continued, ten-shot questions, or texts whose likelihood is measured."""
    if name.startswith("privleak"):
        texts = tuple(map(Question, documents(tables[0])))
        return QuestionSet(name, texts, Asking(generate=False, max_length=DOCUMENT_LENGTH))
    rows, source = tables[0].rows, tables[0].facts.location
    if name == "verbmem":
        asked = [(str(row["prompt"]), str(row["gt"])) for row in rows]
    else:
        asked = [(ten_shot(str(row["question"]), tables[1].rows), str(row["answer"])) for row in rows]
    questions = tuple(
        Question(completion(number, source, prompt, answer)) for number, (prompt, answer) in enumerate(asked)
    )
    asking = Asking(max_new_tokens=128, max_length=DOCUMENT_LENGTH, batch_rows=16)
    if name == "verbmem":
        return QuestionSet(name, questions, asking, answer_tokens=128)
    asking = replace(asking, max_new_tokens=32, stop_texts=STOPS)
    return QuestionSet(name, questions, asking, shown=tuple(str(row["question"]) for row in rows))


# Scores


def _overlap_cell(name: str, description: str) -> Cell:
    def score(measured: Measured) -> Score:
        stemmer = measured.exam.options.get("stemmer") == "on"
        values = rouge_values(measured.of(name), "rougeL", "f", stemmer=stemmer)
        return mean_score(values, seed=measured.seed, missing=METRICS["rouge_l_f"].missing)

    return Cell(name, "rouge_l_f", description, score, needs=frozenset({GENERATION}))


CELLS: tuple[Cell, ...] = (
    _overlap_cell("verbmem", "ROUGE-L F of the continuation of forget texts, 128 tokens"),
    *metric_cells("verbmem", *MEMORIZATION),
    _overlap_cell("knowmem_f", "ROUGE-L F of answers about the forget set, ten-shot"),
    _overlap_cell("knowmem_r", "ROUGE-L F of answers about what stays, ten-shot"),
    *attack_cells("privleak_forget", "privleak_holdout"),
    Cell(
        "privleak_forget",
        "privleak_published",
        "PrivLeak against the AUC that MUSE states for its own retrained model; 0 is ideal",
        lambda measured: privleak(
            min_k_auc(measured.of("privleak_forget"), measured.of("privleak_holdout"), seed=measured.seed),
            1 - MUSE_RETRAINED[measured.exam.split]["min_k"],
        ),
        also=("privleak_holdout",),
    ),
)

MUSE = Benchmark.declared("muse", load, CELLS)
