"""What a benchmark is: the tables it reads, the questions it asks, the scores that follow.

    Table        one published table of rows: name, number of rows, columns   → `read_table`
    QuestionSet  questions put to the model in one way                        → `load_sets`
    Cell         a metric of one set, or of several: {set: outcomes}          → `score_cell` → Score

What is missing (a holdout set, a retrained model, a judge) leaves a score without a value and with the
reason, never with a default. No torch here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from palinode.data.examples import Example, Message, Question
from palinode.data.sources import Row, json_type, parse_hub_name, read_rows
from palinode.data.tokenize import PromptStyle
from palinode.errors import DataError, RecipeError, meant
from palinode.metrics.aggregate import forget_quality
from palinode.metrics.likelihood import Form
from palinode.metrics.matching import forget_accuracy, recover_accuracy, retain_accuracy
from palinode.metrics.membership import auc, min_k_values, privleak, true_positive_rate
from palinode.metrics.table import ATTACKS, COMPARISONS, METRICS, Metric, score_outcomes
from palinode.records import Outcome, Score, Verdict, packaged_table, read_bytes
from palinode.settings import Asking

MEMORIZATION = ("exact_memorization", "extraction_strength", "extraction_strength_strict")
"""Metrics of what a model knows by heart."""

GENERATION, STANDARDISED, GRADIENTS = "generated", "standardised", "gradient_norm"
"""What metrics may need of a model beside the likelihood of answers."""


def metric_cells(name: str, *metrics: str) -> tuple[Cell, ...]:
    """Return a cell for each of these metrics of METRICS on a set."""

    def cell(key: str) -> Cell:
        def score(measured: Measured) -> Score:
            return score_outcomes(measured.of(name), names=[key], seed=measured.seed)[key]

        return Cell(name, key, METRICS[key].description, score, needs=METRICS[key].needs)

    return tuple(map(cell, metrics))


def quality_cell(name: str) -> Cell:
    """Return the cell of forget quality, the comparison with the retrained model (metrics.md §6)."""

    def score(measured: Measured) -> Score:
        theirs = measured.of_reference(name) or ()
        return forget_quality(measured.of(name), theirs, form=truth_ratio_form(measured))

    return Cell(name, "forget_quality", COMPARISONS["forget_quality"], score, reference=True)


def truth_ratio_form(measured: Measured) -> Form:
    """Return how wrong answers are averaged, an option of some benchmarks."""
    return cast(Form, measured.exam.options.get("truth_ratio", "geometric"))


def attack_cells(members: str, others: str) -> tuple[Cell, ...]:
    """Return AUC and true-positive rate of every membership attack, and PrivLeak against the retrained model.

    `members` is the set that was trained on once, `others` one that no model saw.
    """

    def cell(attack: Metric, metric: str, what: str, rate: Callable[..., Score]) -> Cell:
        related = "reference" in attack.needs

        def score(measured: Measured) -> Score:
            values = (
                attack.per_example(measured.of(name), *([measured.of_reference(name)] if related else []))
                for name in (members, others)
            )
            return rate(*values, seed=measured.seed)

        return Cell(
            members,
            f"{metric}_{attack.name}",
            f"{what} of the attack {attack.description}",
            score,
            also=(others,),
            needs=attack.needs,
            reference=related,
            on_request="gradient_norm" in attack.needs,
        )

    def leak(measured: Measured) -> Score:
        ours = min_k_auc(measured.of(members), measured.of(others), seed=measured.seed)
        theirs = measured.of_reference(members), measured.of_reference(others)
        if theirs[0] and theirs[1]:
            return privleak(ours, min_k_auc(theirs[0], theirs[1], seed=measured.seed))
        return privleak(ours, measured.reference.min_k_auc if measured.reference else None)

    rates = (
        ("auc", "area under the ROC curve", auc),
        ("tpr", "true-positive rate at 1 % false positives", true_positive_rate),
    )
    cells = [cell(attack, *rate) for attack in ATTACKS.values() for rate in rates]
    words = COMPARISONS["privleak"]
    return (*cells, Cell(members, "privleak", words, leak, also=(others,), reference=True))


def judge_cells(forget: str, retain: str) -> tuple[Cell, ...]:
    """Return the three accuracies of a judge (spec: msa.md §5)."""

    def cell(name: str, key: str, accuracy: Callable[..., Score], *, reference: bool = False) -> Cell:
        def score(measured: Measured) -> Score:
            return accuracy(measured.verdicts[name], seed=measured.seed)

        words, needs = COMPARISONS[key], frozenset({GENERATION})
        return Cell(name, key, words, score, needs=needs, reference=reference, judge=True)

    return (
        cell(forget, "judge_forget_accuracy", forget_accuracy),
        cell(forget, "judge_recover_accuracy", recover_accuracy, reference=True),
        cell(retain, "judge_retain_accuracy", retain_accuracy),
    )


def min_k_auc(members: Sequence[Outcome], others: Sequence[Outcome], *, seed: int) -> Score:
    """Return the AUC of the Min-K attack, from which PrivLeak follows."""
    return auc(min_k_values(members), min_k_values(others), seed=seed)


SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
"""What a table's file may be called; what is in it is told by content."""


# Tables


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a benchmark as its authors publish it."""

    config: str
    """Its name on the hub, and the name of its file without the suffix."""
    rows: int | None
    """How many rows it has; None where that is not known."""
    columns: Mapping[str, int | None]
    """Columns that are needed: None for one text, a number for a list of so many texts."""
    split: str = "train"
    also: tuple[str, ...] = ()
    """Other paths, without suffix, under which its file is found."""
    hint: str = ""
    """What a file of this name and another size usually is."""
    may_lack: bool = False
    """Whether the data set on the hub may not have it."""

    @property
    def name(self) -> str:
        """The table's name in messages: the config, with its split where it has several."""
        return self.config if self.split == "train" else f"{self.config}/{self.split}"


@dataclass(frozen=True, slots=True)
class TableFacts:
    """Where the rows of one table came from, for the record."""

    location: str
    config: str
    split: str
    rows: int
    sha256: str | None
    """Hash of the file's bytes; None for a hub data set."""


@dataclass(frozen=True, slots=True)
class TableRows:
    """The checked rows of a table, and where they came from."""

    rows: tuple[Row, ...]
    facts: TableFacts


def find_table(table: Table, location: str) -> Path | str | None:
    """Return the table's file in a local folder, or its hub name; None when the folder does not have it.

    Raises DataError when `location` is neither a folder nor the name of a hub data set.
    """
    folder = Path(location).expanduser()
    if folder.is_dir():
        names = [table.config]
        if table.split != "train":
            names = [f"{table.config}/{table.split}", f"{table.config}_{table.split}"]
            names += [f"{table.config}/{table.split}-00000-of-00001"]  # as a clone of the hub has it
        paths = (folder / f"{name}{suffix}" for name in (*names, *table.also) for suffix in SUFFIXES)
        return next((path for path in paths if path.is_file()), None)
    hub_name = parse_hub_name(location)
    if folder.exists() or hub_name is None or hub_name.config is not None:
        raise DataError(
            f"{location} is not a folder with the files of a benchmark ({table.name}.jsonl or the like), nor "
            "the name of a hub data set such as org/name"
        )
    return f"{location}:{table.config}#{table.split}"


def read_table(table: Table, location: str) -> TableRows | None:
    """Return the rows of a table, checked; None when the local folder does not have it.

    Raises DataError when the number of rows, a column, a text or the length of a list is not as published.
    """
    place = find_table(table, location)
    if place is None:
        return None
    header = [name for name, count in table.columns.items() if count is None]
    try:
        rows = read_rows(place, is_header=set(header).issubset, plain_text=False)
        check_rows(table, rows, str(place))
    except DataError:
        if table.may_lack and isinstance(place, str):
            return None
        raise
    sha256 = hashlib.sha256(read_bytes(place)).hexdigest() if isinstance(place, Path) else None
    return TableRows(tuple(rows), TableFacts(str(place), table.config, table.split, len(rows), sha256))


def need_table(table: Table, location: str) -> TableRows:
    """Return the rows of a table that a benchmark cannot do without."""
    found = read_table(table, location)
    if found is None:
        raise DataError(not_there(table, location))
    return found


def load_sets(
    tables: Mapping[str, Sequence[Table]],
    location: str,
    make: Callable[[str, Sequence[TableRows]], QuestionSet],
) -> LoadedBenchmark:
    """Return the sets whose tables are there, each made of their rows; the others are told missing."""
    sets, missing, facts = [], {}, []
    for name, needed in tables.items():
        read = [read_table(table, location) for table in needed]
        found = [rows for rows in read if rows is not None]
        if len(found) == len(needed):
            sets.append(make(name, found))
            facts += [rows.facts for rows in found]
        else:
            missing[name] = not_there(needed[read.index(None)], location)
    return LoadedBenchmark(tuple(sets), missing, tuple(facts))


def completion(number: int, source: str, prompt: str, answer: str) -> Example:
    """Return a row that is raw text and its raw continuation."""
    return Example(number, source, "completion", (Message("prompt", prompt),), answer)


def documents(table: TableRows) -> list[Example]:
    """Return the texts of a table as documents."""
    place = table.facts.location
    return [Example(number, place, "document", (), str(row["text"])) for number, row in enumerate(table.rows)]


def not_there(table: Table, location: str) -> str:
    """Say that a folder does not have a table, and which file is looked for."""
    return f"{location} holds no {table.name} ({table.name}.jsonl, .json, .parquet or .csv)"


def check_rows(table: Table, rows: Sequence[Row], place: str) -> None:
    """Raise DataError unless rows are as published: their number, their columns, no empty text."""
    requests = any("task_id" in row for row in rows)
    if requests or (table.rows is not None and len(rows) != table.rows):
        wanted = f"{table.rows:,} rows" if table.rows is not None else "no task_id column"
        what = " and a task_id column" if requests else ""
        raise DataError(
            f"{place} has {len(rows):,} rows{what}, but the published {table.name} has {wanted}. "
            f"{table.hint or 'Is it cut short, or another file of the same name?'}"
        )
    for number, row in enumerate(rows, start=1):
        for column, count in table.columns.items():
            where = f"row {number} of {place}"
            if column not in row:
                raise DataError(f"{where} has no {column!r} (it has: {', '.join(row) or 'nothing'})")
            texts = [row[column]] if count is None else row[column]
            if not isinstance(texts, list) or len(texts) != (count or 1):
                found = f"{len(texts)} texts" if isinstance(texts, list) else json_type(texts)
                raise DataError(f"{where}: {column!r} is {found}; it must be a list of {count} texts")
            for text in texts:
                if not isinstance(text, str):
                    raise DataError(f"{where}: {column!r} holds {json_type(text)} where a text should be")
                if not text.strip():
                    raise DataError(
                        f"{where}: {column!r} holds an empty text; is the file the published one?"
                    )


# What is asked


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Questions that are put to a model in one way."""

    name: str
    questions: tuple[Question, ...]
    asking: Asking
    """At most this is asked; what no chosen metric needs is left out."""
    style: PromptStyle | None = None
    groups: tuple[str, ...] = ()
    """For each question what it is about, where a benchmark weighs by that (RESTOR: the entity)."""
    shown: tuple[str, ...] = ()
    """For each question what a judge should read, where the prompt is longer than the question."""
    answer_tokens: int | None = None
    """Right answers are cut to so many tokens, BOS counted (MUSE VerbMem); None leaves them whole."""

    @property
    def examples(self) -> list[Example]:
        """The prompts with their right answers."""
        return [question.example for question in self.questions]

    def only(self, places: Sequence[int]) -> QuestionSet:
        """Return the set with the questions at these places only."""
        return replace(
            self,
            questions=tuple(self.questions[place] for place in places),
            groups=tuple(self.groups[place] for place in places) if self.groups else (),
            shown=tuple(self.shown[place] for place in places) if self.shown else (),
        )


@dataclass(frozen=True, slots=True)
class Option:
    """A choice that a benchmark leaves to its user."""

    name: str
    description: str
    default: str
    choices: Sequence[str] = ()
    """What it may be; empty means any text."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where a benchmark's rows are."""

    data: str
    """A local folder, or a hub name; for a user's own data the forget file."""
    retain: str | None = None
    """A user's own retain rows."""
    holdout: str | None = None
    """Rows of the kind of the forget set that no model has seen, of a user's own."""
    columns: Mapping[str, str] | None = None
    """Column names of a user's own rows."""


@dataclass(frozen=True, slots=True)
class LoadedBenchmark:
    """One split of a benchmark, read and checked."""

    sets: tuple[QuestionSet, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    """Sets that the benchmark has and this data has not, with the reason."""
    tables: tuple[TableFacts, ...] = ()


# What follows


@dataclass(frozen=True, slots=True)
class Reference:
    """The retrained model, for metrics that compare with it: its outcomes, or a published log of them."""

    name: str
    outcomes: Mapping[str, Sequence[Outcome]] = field(default_factory=dict)
    """By set; empty when all there is is a log."""
    min_k_auc: float | None = None
    """From a log: AUC of the Min-K attack."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Metrics that cannot be computed with it, and why."""


WITHOUT = {
    "retrained": "there is no retrained model to compare with; give one with --against",
    "judge": "there is no judge; name one with --judge",
}
"""What to say where there is nothing to compare with, or nobody to judge."""


@dataclass(frozen=True, slots=True)
class Exam:
    """What every model is asked, and the scores that follow."""

    name: str
    """The benchmark's."""
    sets: Mapping[str, QuestionSet]
    cells: Sequence[Cell] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    """Sets that the benchmark has and this data has not, with the reason."""
    tables: Sequence[TableFacts] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Questions of each set before some were drawn."""
    split: str = "rows"
    options: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    without: Mapping[str, str] = field(default_factory=lambda: WITHOUT)
    """Why there is no score where there is no "retrained" model, or no "judge"."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that the metrics of a benchmark may look at."""

    exam: Exam
    outcomes: Mapping[str, Sequence[Outcome]]
    """By set, in the order of its questions."""
    reference: Reference | None = None
    verdicts: Mapping[str, Sequence[Verdict]] = field(default_factory=dict)
    """By set; one for each answer that was judged."""

    @property
    def seed(self) -> int:
        """The seed of intervals."""
        return self.exam.seed

    def of(self, name: str) -> Sequence[Outcome]:
        """Return the outcomes of a set."""
        return self.outcomes[name]

    def of_reference(self, name: str) -> Sequence[Outcome] | None:
        """Return the retrained model's outcomes of a set, None when there are none."""
        return self.reference.outcomes.get(name) if self.reference else None


@dataclass(frozen=True, slots=True)
class Cell:
    """A metric in its place in a benchmark."""

    set: str
    """The set under which it is shown."""
    metric: str
    description: str
    """One line for readers."""
    score: Callable[[Measured], Score]
    also: tuple[str, ...] = ()
    """Further sets whose outcomes it needs."""
    needs: frozenset[str] = frozenset()
    """What must be asked of the model, such as GENERATION; other needs of its metric may stand here too."""
    reference: bool = False
    """Whether it compares with the retrained model."""
    judge: bool = False
    """Whether it needs a judge's verdicts on its set."""
    on_request: bool = False
    """Whether it costs so much that it is computed only when it is named."""

    @property
    def sets(self) -> tuple[str, ...]:
        """Every set whose outcomes it needs."""
        return tuple(dict.fromkeys((self.set, *self.also))) if self.set != ALL else self.also


ALL = "all"
"""The place in the table of metrics that span several sets."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark: where its rows come from, what it asks, and its metrics."""

    name: str
    description: str
    """One line for readers."""
    source: str
    """Who published it, and under which licence."""
    splits: Mapping[str, str]
    """What it can be run on, with a line each; the first is the default."""
    load: Callable[[Places, str, Mapping[str, str]], LoadedBenchmark]
    """(places, split, options) → questions; raises DataError."""
    cells: tuple[Cell, ...]
    options: tuple[Option, ...] = ()
    hub: str | None = None
    """The hub data set that is read when no folder is given."""

    @classmethod
    def declared(
        cls,
        name: str,
        load: Callable[[Places, str, Mapping[str, str]], LoadedBenchmark],
        cells: Sequence[Cell],
    ) -> Benchmark:
        """Return the benchmark of this name with what benchmarks.toml says of it."""
        told = packaged_table("benchmarks/benchmarks.toml")[name]
        options = [Option(**one) for one in told.pop("options", ())]
        return cls(name=name, load=load, cells=tuple(cells), options=tuple(options), **told)

    def check_split(self, split: str | None) -> str:
        """Return the split, or the default one; raises RecipeError when there is no such split."""
        if split is None:
            return next(iter(self.splits))
        if split not in self.splits:
            raise RecipeError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        return split

    def check_options(self, given: Mapping[str, str]) -> dict[str, str]:
        """Return every option with the given value or the default; raises RecipeError for unknown ones."""
        known = {option.name: option for option in self.options}
        for name, value in given.items():
            if name not in known:
                raise RecipeError(
                    f"{self.name} has no option {name!r}; it has {', '.join(known) or 'no options'}"
                )
            choices = known[name].choices
            if choices and value not in choices:
                raise RecipeError(f"option {name} is {value!r}; it must be one of {', '.join(choices)}")
        return {name: given.get(name, option.default) for name, option in known.items()}

    def check_metrics(self, names: Sequence[str]) -> tuple[Cell, ...]:
        """Return the cells whose metric is named, or all but the expensive ones when none is.

        "every" names all of them. Raises RecipeError for an unknown name.
        """
        if not names:
            return tuple(cell for cell in self.cells if not cell.on_request)
        known = list(dict.fromkeys(cell.metric for cell in self.cells))
        for name in names:
            if name not in known and name != "every":
                has = f"{self.name} has no metric {name!r}; it has {', '.join(known)}"
                raise RecipeError(f"{has}{meant(name, known)}")
        return tuple(cell for cell in self.cells if "every" in names or cell.metric in names)


def trim_asking(questions: QuestionSet, cells: Sequence[Cell]) -> Asking:
    """Return what has to be asked of a model on a set so that these cells can be computed."""
    needs = frozenset[str]().union(*(cell.needs for cell in cells if questions.name in cell.sets))
    asking = questions.asking
    return replace(
        asking,
        generate=asking.generate and GENERATION in needs,
        samples=asking.samples if GENERATION in needs else 0,
        standardise=STANDARDISED in needs,
        gradient_norms=GRADIENTS in needs,
    )


def score_cells(measured: Measured) -> dict[str, dict[str, Score]]:
    """Return the score of each cell of the exam by set and metric."""
    scores: dict[str, dict[str, Score]] = {}
    for cell in measured.exam.cells:
        scores.setdefault(cell.set, {})[cell.metric] = score_cell(cell, measured)
    return scores


def score_cell(cell: Cell, measured: Measured) -> Score:
    """Return a cell's score, or why it has none."""
    exam, reference = measured.exam, measured.reference
    for name in cell.sets:
        if name not in measured.outcomes:
            return not_computed(exam.missing.get(name, f"the {name} set was not asked"))
    if cell.reference and reference is None:
        return not_computed(exam.without["retrained"])
    if cell.reference and reference and cell.metric in reference.missing:
        return not_computed(reference.missing[cell.metric])
    if cell.judge and cell.set not in measured.verdicts:
        return not_computed(exam.without["judge"])
    score = cell.score(measured)
    return not_computed(score.reason or "no reason is known") if score.value is None else score


def not_computed(why: str) -> Score:
    """Return a score without a value that says why."""
    return Score(value=None, n=0, low=None, high=None, reason=f"not computed, because {why}")


def runs_of(outcome: Outcome) -> list[Outcome]:
    """Return an outcome once for each drawn answer, as the answer that was given."""
    return [replace(outcome, generated=sample, samples=()) for sample in outcome.samples]
