"""TOFU: forgetting one, five or ten percent of 200 invented authors (spec: data.md §1, metrics.md §1-9).

Four question sets: `forget` (the authors to be forgotten), `retain` (other invented authors),
`real_authors` and `world_facts`; `holdout`, questions of the same kind that no model saw, where the
data has it. Model utility is the harmonic mean of nine numbers over the last three sets; forget quality
compares truth ratios with those of the retrained model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from palinode.data.examples import Example, Message, Question
from palinode.data.sources import Row
from palinode.data.tokenize import PromptStyle
from palinode.errors import DataError
from palinode.evaluation.benchmark import (
    ALL,
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
    find_table,
    judge_cells,
    load_sets,
    metric_cells,
    quality_cell,
    truth_ratio_form,
)
from palinode.metrics.aggregate import harmonic_score, mean_score
from palinode.metrics.likelihood import (
    Form,
    answer_probabilities,
    forget_truth_ratios,
    normalised_probabilities,
    retain_truth_ratios,
    right_shares,
)
from palinode.metrics.matching import rouge_l_recalls
from palinode.metrics.table import COMPARISONS, METRICS
from palinode.records import Outcome, Score
from palinode.settings import Asking

QA: dict[str, int | None] = {"question": None, "answer": None}
PERTURBED = {**QA, "paraphrased_answer": None, "perturbed_answer": 5, "paraphrased_question": None}
WRONG_ONLY = {**QA, "perturbed_answer": 3}

SIZES = {"forget01": 40, "forget05": 200, "forget10": 400}

REQUESTS = (
    "Files of that name with a task_id column hold ten unlearning requests one after another and are not "
    "TOFU's; take the official one from locuslab/TOFU"
)

ORIGINAL_ROWS = 300
"""Rows of each set in the original protocol."""


def load(places: Places, split: str, options: Mapping[str, str]) -> LoadedBenchmark:
    """Return the question sets of a split; the forget set must be there, the others are told missing."""
    perturbed = Table(f"{split}_perturbed", SIZES[split], PERTURBED, hint=REQUESTS)
    plain = Table(split, SIZES[split], QA, hint=REQUESTS)
    forget = perturbed if find_table(perturbed, places.data) else plain
    holdout = split.replace("forget", "holdout")  # its size is stated nowhere
    tables = {
        "forget": [forget],
        "retain": [Table("retain_perturbed", 400, PERTURBED)],
        "real_authors": [Table("real_authors_perturbed", 100, WRONG_ONLY)],
        "world_facts": [Table("world_facts_perturbed", 117, WRONG_ONLY)],
        "holdout": [Table(holdout, None, QA, hint=REQUESTS, may_lack=True)],
    }
    loaded = load_sets(tables, places.data, lambda name, found: _questions(name, found[0], options))
    if "forget" in loaded.missing:
        raise DataError(loaded.missing["forget"])
    return loaded


def _questions(name: str, table: TableRows, options: Mapping[str, str]) -> QuestionSet:
    """Return a set in the prompt format, wording and size that the options ask for."""
    original = options["protocol"] == "original"
    rows = table.rows[:ORIGINAL_ROWS] if original else table.rows
    chat = {"chat": True, "plain": False}.get(options["prompt"])
    return QuestionSet(
        name=name,
        questions=tuple(_question(row, number, table, options) for number, row in enumerate(rows)),
        asking=Asking(generate=name != "holdout", max_length=200 if original else 512),
        style=PromptStyle(chat=chat),
    )


def _question(row: Row, number: int, table: TableRows, options: Mapping[str, str]) -> Question:
    column = options["question"] if options["question"] in row else "question"
    alternatives: dict[str, tuple[str, ...]] = {}
    if "paraphrased_answer" in row:
        alternatives["paraphrased"] = (str(row["paraphrased_answer"]),)
    if "perturbed_answer" in row:
        alternatives["perturbed"] = tuple(cast("list[str]", row["perturbed_answer"]))
    asked, answer, source = str(row[column]), str(row["answer"]), table.facts.location
    example = Example(number, source, "question", (Message("user", asked),), answer)
    if options["prompt"] == "llama2":  # as in the original runs; the answer follows without a space
        example = completion(number, source, f"[INST] {asked} [/INST]", answer)
    return Question(example, alternatives)


# Scores


def utility_parts(
    sets: Mapping[str, Sequence[Outcome]], *, form: Form = "geometric"
) -> dict[str, list[float | None]]:
    """Return the values behind the nine numbers of model utility, by their names (metrics.md §5)."""
    parts: dict[str, list[float | None]] = {}
    for name in ("retain", "real_authors", "world_facts"):
        own = name == "retain"
        outcomes = sets[name]
        parts[f"{name} probability"] = (
            answer_probabilities(outcomes) if own else normalised_probabilities(outcomes)
        )
        parts[f"{name} rouge"] = rouge_l_recalls(outcomes)
        parts[f"{name} truth ratio"] = retain_truth_ratios(
            outcomes, right="paraphrased" if own else "expected", form=form
        )
    return parts


def _ratio_cell(
    name: str, key: str, per_example: Callable[..., list[float | None]], right: str = "paraphrased"
) -> Cell:
    """Return the cell of a truth ratio, whose form is an option."""
    metric = METRICS[key]

    def score(measured: Measured) -> Score:
        values = per_example(measured.of(name), right=right, form=truth_ratio_form(measured))
        return mean_score(values, seed=measured.seed, missing=metric.missing)

    return Cell(name, key, metric.description, score)


CELLS: tuple[Cell, ...] = (
    *metric_cells("forget", "answer_probability", "paraphrased_probability", "rouge_l_recall"),
    _ratio_cell("forget", "forget_truth_ratio", forget_truth_ratios),
    _ratio_cell("forget", "right_share", right_shares),
    quality_cell("forget"),
    *metric_cells("forget", *MEMORIZATION),
    *attack_cells("forget", "holdout"),
    *judge_cells("forget", "retain"),
    *metric_cells("retain", "answer_probability", "rouge_l_recall"),
    _ratio_cell("retain", "retain_truth_ratio", retain_truth_ratios),
    *(
        cell
        for name in ("real_authors", "world_facts")
        for cell in (
            *metric_cells(name, "normalised_probability", "rouge_l_recall"),
            _ratio_cell(name, "answer_truth_ratio", retain_truth_ratios, "expected"),
        )
    ),
    Cell(
        ALL,
        "model_utility",
        COMPARISONS["model_utility"],
        lambda measured: harmonic_score(
            utility_parts(measured.outcomes, form=truth_ratio_form(measured)), seed=measured.seed
        ),
        also=("retain", "real_authors", "world_facts"),
        needs=frozenset({GENERATION}),
    ),
)

TOFU = Benchmark.declared("tofu", load, CELLS)
