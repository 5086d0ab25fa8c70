"""RWKU: forgetting famous people whom a model knows from its pre-training (arXiv 2406.10890 and its code).

    forget_level1, _level2   fill a blank in a sentence about a person; answer a question about one
    forget_level3            the same knowledge asked by nine adversarial kinds of prompts
    neighbour_level1, _2     blanks and questions about what is close to the person and stays
    mia_forget, mia_retain   texts about the people, and about others: the mean loss of each

Each answer is greedy, one line of at most 30 tokens, begun with "Answer:"; its score is ROUGE-L recall. Both
sets of texts were in pre-training: a model that forgot has a higher loss on the first and not on the second.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from palinode.data.examples import Question
from palinode.data.sources import Row
from palinode.data.tokenize import PromptStyle
from palinode.errors import DataError
from palinode.evaluation.benchmark import (
    Benchmark,
    Cell,
    LoadedBenchmark,
    Option,
    Places,
    QuestionSet,
    Table,
    TableRows,
    documents,
    load_sets,
    mean_cell,
    question,
)
from palinode.metrics.membership import loss_values
from palinode.metrics.table import METRICS
from palinode.settings import Asking

PROBES = {
    "forget_level1": ("forget_level1", 3268),
    "forget_level2": ("forget_level2", 2879),
    "forget_level3": ("forget_level3", 6984),
    "neighbour_level1": ("neighbor_level1", 5846),
    "neighbour_level2": ("neighbor_level2", 5533),
}
"""The table of each set, and how many rows it has (arXiv 2406.10890, table of statistics)."""
TEXTS = {"mia_forget": ("forget_mia", 6198), "mia_retain": ("retain_mia", 7487)}
"""The file of each set of texts, and its rows."""
LEVEL3 = ("forget_level3", "forget_level3_suffix")
"""Adversarial prompts; those that end with the beginning of an answer are not begun with another."""
SUFFIX, SHOTS = "affirmative suffix", "incontext learning"
"""Kinds of adversarial prompts that are put in another way."""

OPTIONS = (
    Option(
        "subject", "whose rows are asked: names as in the data, separated by commas; empty is everybody", ""
    ),
)


def load(places: Places, split: str, options: Mapping[str, str]) -> LoadedBenchmark:  # noqa: ARG001
    """Return the probes and texts, of everybody or of some people; those without a file are told missing.

    Raises DataError where there are no forget rows, or none about a person who is named.
    """
    names = {name.strip() for name in options["subject"].split(",") if name.strip()}
    probe: dict[str, int | None] = {"query": None, "answer": None, "subject": None}
    text: dict[str, int | None] = {"text": None, "subject": None}
    tables = {name: [_table(file, file, rows, probe)] for name, (file, rows) in PROBES.items()}
    tables |= {name: [_table(name, file, rows, text)] for name, (file, rows) in TEXTS.items()}
    level3 = _table(LEVEL3[0], LEVEL3[0], PROBES[LEVEL3[0]][1], {**probe, "type": None})
    tables |= {name: [level3] for name in LEVEL3}
    loaded = load_sets(tables, places.data, lambda name, found: _questions(name, found[0], names))
    if "forget_level1" in loaded.missing:
        raise DataError(loaded.missing["forget_level1"])
    return loaded


def _table(config: str, file: str, rows: int, columns: Mapping[str, int | None]) -> Table:
    return Table(
        config, rows, columns, "test", (f"All/{file}", file)
    )  # as a clone of the hub has it, or alone


def _questions(name: str, table: TableRows, names: Collection[str]) -> QuestionSet:
    """Return a set of probes or texts about the people who are named."""
    source, known = table.facts.location, {str(row["subject"]) for row in table.rows}
    if strange := sorted(set(names) - known):
        raise DataError(
            f"{source} has no rows about {strange[0]}; subject takes names as its column subject has them, "
            f"such as {min(known)}"
        )
    kept = [(place, row) for place, row in enumerate(table.rows) if row["subject"] in (names or known)]
    style = PromptStyle(system_prompt="")
    if name in TEXTS:
        texts = documents(table)
        asked = tuple(Question(texts[place]) for place, _ in kept)
        return QuestionSet(name, asked, Asking(generate=False), style)
    begun = name != LEVEL3[1]
    if name in LEVEL3:
        kept = [(place, row) for place, row in kept if (row["type"] != SUFFIX) == begun]
    asking = Asking(max_new_tokens=30, stop_texts=("\n",), answer_prefix="Answer:" if begun else "")
    questions = tuple(
        Question(question(place, source, prompt(name, row), str(row["answer"]))) for place, row in kept
    )
    return QuestionSet(name, questions, asking, style, shown=tuple(str(row["query"]) for _, row in kept))


def prompt(name: str, row: Row) -> str:
    """Return what the user says: an instruction and the row's query, as RWKU's evaluation joins them."""
    query, kind = row["query"], row["type"] if name in LEVEL3 else None
    asked = "complete the blank in" if name.endswith("level1") else "briefly answer"
    said = f"Please {asked} the following question.\n" + ("" if kind == SHOTS else "Question: ") + str(query)
    return said if kind == SUFFIX else f"{said}\n"


def _recall_cell(name: str) -> Cell:
    """Return the cell of ROUGE-L recall; that of level 3 is over all prompts, however answers are begun."""
    sets, metric = LEVEL3 if name in LEVEL3 else (name,), METRICS["rouge_l_recall"]
    return mean_cell(
        sets,
        metric.name,
        metric.description,
        lambda measured: [value for one in sets for value in metric.per_example(measured.of(one))],
        missing=metric.missing,
        needs=metric.needs,
    )


def _loss_cell(name: str) -> Cell:
    return mean_cell(
        (name,),
        "mean_loss",
        "mean loss of a token, which rises where texts are forgotten",
        lambda measured: loss_values(measured.of(name)),
        missing="no token was scored",
        shares=False,
    )


RWKU = Benchmark(
    name="rwku",
    description="200 famous people: blanks, questions and adversarial prompts about them, and what is close",
    source="jinzhuoran/RWKU (arXiv 2406.10890), CC BY 4.0",
    splits={"all": "all 200 people, or those of --option subject"},
    load=load,
    cells=(*map(_recall_cell, PROBES), *map(_loss_cell, TEXTS)),
    options=OPTIONS,
    hub="jinzhuoran/RWKU",
)
