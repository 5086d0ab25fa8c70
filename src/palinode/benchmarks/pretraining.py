"""RWKU and Hubble: forgetting what a model learned in pre-training itself.

RWKU (arXiv 2406.10890 and its code): 200 famous people.

    forget_level1, _level2   fill a blank in a sentence about a person; answer a question about one
    forget_level3            the same knowledge asked by nine adversarial kinds of prompts
    neighbour_level1, _2     blanks and questions about what is close to the person and stays
    mia_forget, mia_retain   texts about the people, and about others: the mean loss of each

Each answer is greedy, one line of at most 30 tokens, begun with "Answer:"; its score is ROUGE-L recall. Both
sets of texts were in pre-training: a model that forgot has a higher loss on the first and not on the second.

Hubble (arXiv 2510.19811): a perturbed model read texts 1 to 256 times; its standard twin read none of them and
stands for the retrained model. Sets: `forget`, texts with the chosen numbers of insertions; `retain`, the
other inserted ones; `holdout`, texts that were never inserted; `secret`, biographies up to the identifier that
no one can guess. The timing models are where `palinode locate` and MSA belong (docs/benchmarks.md).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace

from palinode.data.examples import Example, Question
from palinode.data.sources import Row
from palinode.data.tokenize import PromptStyle
from palinode.errors import DataError
from palinode.evaluation.benchmark import (
    GENERATION,
    MEMORIZATION,
    Benchmark,
    Cell,
    LoadedBenchmark,
    Measured,
    Option,
    Places,
    QuestionSet,
    Table,
    TableRows,
    attack_cells,
    completion,
    documents,
    load_sets,
    mean_cell,
    metric_cells,
    need_table,
    question,
)
from palinode.metrics.membership import loss_values
from palinode.metrics.table import METRICS
from palinode.settings import Asking

# RWKU

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


def load_rwku(places: Places, split: str, options: Mapping[str, str]) -> LoadedBenchmark:  # noqa: ARG001
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
    also = (f"All/{file}", file)  # as a clone of the hub has it, or alone
    return Table(config, rows, columns, "test", also)


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
    load=load_rwku,
    cells=(*map(_recall_cell, PROBES), *map(_loss_cell, TEXTS)),
    options=(
        Option(
            "subject", "names of people whose rows are asked, with commas between them; all by default", ""
        ),
    ),
    hub="jinzhuoran/RWKU",
)

# Hubble

SIZES = {"biographies_yago": (2500, 2500), "passages_wikipedia": (2125, 759)}
"""Inserted texts, and texts never inserted, of each data set."""
ASKING = Asking(max_new_tokens=48, max_length=2048, stop_texts=("\n",))


def load_hubble(places: Places, split: str, options: Mapping[str, str]) -> LoadedBenchmark:
    """Return the inserted texts by their number of insertions, and those never inserted.

    Raises DataError for a number of insertions that no text has.
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
    load=load_hubble,
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
    options=(Option("duplicates", "numbers of insertions to be forgotten, with commas between them", "256"),),
    hub="allegrolab",
)
