"""Evaluate a model folder: ask every set, score every cell, and write what was found.

    rows or a benchmark → Exam → outcomes → verdicts of a judge → scores → scores.json

Rows of one's own, a benchmark, and every model of a comparison go this one way. The retrained model, where
one is given, is asked the same questions by the same code. Both are never in memory together.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palinode.data.examples import Example, Question, at_most, read_examples, reading_notes
from palinode.data.tokenize import PromptStyle, prompt_notes, tokenize
from palinode.errors import OutputError, RecipeError
from palinode.evaluation.ask import ask
from palinode.evaluation.benchmark import (
    Benchmark,
    Cell,
    Exam,
    LoadedBenchmark,
    Measured,
    Places,
    QuestionSet,
    Reference,
    metric_cells,
    runs_of,
    score_cells,
    trim_asking,
)
from palinode.evaluation.general import general_ability
from palinode.evaluation.judges import named_judge
from palinode.evaluation.judging import Judge, judge_answers
from palinode.evaluation.openunlearning import FORGET, LOG_SETS, log_scores, read_log, write_log
from palinode.evaluation.self_check import check_prompts
from palinode.metrics.table import DEFAULT_METRICS
from palinode.progress import Listener, NullListener
from palinode.records import (
    Outcome,
    Score,
    Verdict,
    close_to_others,
    plain_scores,
    private,
    read_bytes,
    write_json,
    write_outcomes,
)
from palinode.settings import EvaluationSettings
from palinode.version import __version__
from palinode.weights.atomic import check_apart
from palinode.weights.checkpoint import Checkpoint
from palinode.weights.fingerprints import unchanged

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCORES_VERSION = 1
"""Version of the layout of `scores.json`, described in docs/benchmarks.md."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What an evaluation of rows found."""

    scores: Mapping[str, Score]
    """By metric."""
    outcomes: Sequence[Outcome]
    """What the model did on each row."""


@dataclass(frozen=True, slots=True)
class BenchmarkEvaluated:
    """What a benchmark run found."""

    scores: Mapping[str, Mapping[str, Score]]
    """Set → metric → score, in the order of the benchmark's cells."""
    outcomes: Mapping[str, Sequence[Outcome]]
    """Set → what the model did on each question."""
    record: Mapping[str, Any]
    """The content of scores.json: the scores, and everything that decides them."""


def evaluate(
    model: Checkpoint | str | Path,
    rows: Sequence[Example] | str | Path,
    settings: EvaluationSettings | None = None,
    *,
    listener: Listener | None = None,
) -> Evaluated:
    """Ask a model these rows, and return its outcomes and the four basic scores.

    Of a file or data set at most `max_rows` are drawn; rows in memory are all asked. The outcomes are written
    to the file `output` of the settings; what is to be known of the prompts the listener hears. The seed
    serves the bootstrap intervals; the answers are greedy. Raises PalinodeError.
    """
    settings = settings or EvaluationSettings()
    if settings.output is not None:
        check_new_file(settings.output, "the outcomes")
    checkpoint = _opened(model, settings)
    if isinstance(rows, str | Path):
        every = read_examples(rows, columns=settings.columns)
        rows = at_most(every, settings.max_rows, seed=settings.seed + 1)
    questions = QuestionSet(FORGET, tuple(map(Question, rows)), settings.asking)
    cells = metric_cells(FORGET, *DEFAULT_METRICS)
    exam = make_exam("own", LoadedBenchmark((questions,)), cells, settings, most={FORGET: len(rows)})
    outcomes, _, _ = _ask_model(checkpoint, exam, settings, listener)
    scores = score_cells(Measured(exam, outcomes))
    if settings.output is not None:
        with private():
            write_outcomes(settings.output, outcomes[FORGET])
    return Evaluated(scores.get(FORGET, {}), outcomes[FORGET])


def evaluate_benchmark(
    model: Checkpoint | str,
    benchmark: Benchmark,
    places: Places,
    settings: EvaluationSettings | None = None,
    *,
    listener: Listener | None = None,
) -> BenchmarkEvaluated:
    """Run a benchmark on a model and return its scores; they are also written if `settings` says where.

    Everything that can be refused is refused before a model is loaded. Raises PalinodeError.
    """
    settings = settings or EvaluationSettings()
    started = datetime.now(UTC)
    _check_places(settings)
    judge = named_judge(settings.judge, settings.key_variable, settings.device)
    checkpoint = _opened(model, settings)
    if settings.output is not None and checkpoint.file is None:  # else it only lies beside others
        check_apart(settings.output, [checkpoint.folder])
    against = _open_reference(settings, benchmark)
    exam = open_benchmark(benchmark, places, settings)
    strange = sorted(set(exam.sets) - LOG_SETS)
    if settings.open_unlearning is not None and strange:
        raise RecipeError(
            f"a log in open-unlearning's form has no place for the set {strange[0]}; "
            "it is for tofu and own data"
        )
    reference = _reference(against, exam, settings, listener, judged=judge is not None)
    outcomes, general, notes = _ask_model(checkpoint, exam, settings, listener)
    measured = judged(judge, Measured(exam, outcomes, reference), listener)
    scores = score_cells(measured)
    if general:
        scores["general"] = general
    record = {
        "version": SCORES_VERSION,
        "palinode": __version__,
        "created": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "benchmark": exam.name,
        "split": exam.split,
        "options": dict(exam.options),
        "seed": exam.seed,
        "max_rows": settings.most_questions,
        "model": _model_facts(checkpoint),
        "against": _model_facts(against),
        "judge": judge.name if judge else None,
        **_exam_facts(exam),
        "scores": plain_scores(scores),
        "notes": notes,
    }
    found = BenchmarkEvaluated(scores, outcomes, record)
    _write(found, measured, settings)
    return found


# Before a model is loaded


def open_benchmark(
    benchmark: Benchmark, places: Places, settings: EvaluationSettings, most: Mapping[str, int] | None = None
) -> Exam:
    """Return what a benchmark asks of every model; `most` has other limits for single sets.

    Raises RecipeError for what the benchmark does not have, DataError for its data.
    """
    split, options = benchmark.check_split(settings.split), benchmark.check_options(settings.options)
    cells = benchmark.check_metrics(settings.metrics)
    if settings.style is not None and "prompt" in settings.options:
        raise RecipeError("the prompt is named twice; say it with --set or with --option prompt, not both")
    loaded = benchmark.load(places, split, options)
    exam = make_exam(benchmark.name, loaded, cells, settings, most=most)
    return replace(exam, split=split, options=options)


def make_exam(
    name: str,
    loaded: LoadedBenchmark,
    cells: Sequence[Cell],
    settings: EvaluationSettings,
    *,
    most: Mapping[str, int] | None = None,
) -> Exam:
    """Return the sets that some cell needs, each drawn with the seed and asked for no more than is needed.

    `most` limits the questions of single sets. Raises RecipeError where there is no such set.
    """
    names = [questions.name for questions in loaded.sets]
    if strange := sorted(set(most or {}) - set(names)):
        raise RecipeError(f"there is no set {strange[0]!r} to limit; the sets are {', '.join(names)}")
    needed = {name for cell in cells for name in cell.sets}
    sets = {}
    for questions in loaded.sets:
        if questions.name in needed:
            total = len(questions.questions)
            count = (most or {}).get(questions.name, settings.most_questions or total)
            drawn = questions.only(at_most(range(total), count, seed=settings.seed + 1))
            style = settings.style or questions.style or PromptStyle()
            if settings.open_unlearning_prompts:
                style = replace(style, whole_ending=True)
            asking = settings.over(trim_asking(questions, cells))
            sets[questions.name] = replace(drawn, asking=asking, style=style)
    sizes = {questions.name: len(questions.questions) for questions in loaded.sets}
    return Exam(name, sets, cells, loaded.missing, loaded.tables, sizes, seed=settings.seed)


def _check_places(settings: EvaluationSettings) -> None:
    """Refuse places to write to that cannot be used, and tasks that nobody runs."""
    if settings.general_include is not None and not settings.general:
        raise RecipeError(
            f"{settings.general_include} holds tasks for lm-eval and none is to be run; name some (--lm-eval)"
        )
    folder, log = settings.output, settings.open_unlearning
    if folder is not None and (folder / "scores.json").exists():
        raise OutputError(f"{folder} holds the scores of another run already; name another folder")
    if folder is not None and (not folder.parent.is_dir() or (folder.exists() and not folder.is_dir())):
        raise OutputError(f"{folder} is a file, or the folder above it is missing; name another folder")
    if log is not None:
        check_new_file(log, "the log")


def check_new_file(path: Path, what: str) -> None:
    """Refuse a file to write that is there already, or whose folder is not."""
    if path.exists() or not path.parent.is_dir():
        raise OutputError(f"{path} exists already, or its folder does not; name another file for {what}")


def _opened(model: Checkpoint | str | Path, settings: EvaluationSettings) -> Checkpoint:
    if isinstance(model, Checkpoint):
        return model
    return Checkpoint.open(model, allow_pickle=settings.allow_pickle)


# Asking


def ask_sets(
    checkpoint: Checkpoint,
    sets: Mapping[str, QuestionSet],
    *,
    device: str = "auto",
    label: str = "model",
    listener: Listener | None = None,
) -> dict[str, list[Outcome]]:
    """Load a model, ask it every set, and return its outcomes by set."""
    from palinode.models.loading import load_reader, load_tokenizer, pick_device

    model, tokenizer = load_reader(checkpoint, device=pick_device(device)), load_tokenizer(checkpoint)
    return _ask_live(model, tokenizer, sets, label, listener)


def _ask_model(
    checkpoint: Checkpoint, exam: Exam, settings: EvaluationSettings, listener: Listener | None
) -> tuple[dict[str, list[Outcome]], dict[str, Score], list[str]]:
    """Return the model's outcomes by set, its general ability if that was asked for, and notes."""
    from palinode.models.loading import load_reader, load_tokenizer, pick_device

    with unchanged([checkpoint]):
        device, tokenizer = pick_device(settings.device), load_tokenizer(checkpoint)
        model = load_reader(checkpoint, device=device, precision=settings.precision)
        general: dict[str, Score] = {}
        if settings.general:  # first, because it may be refused
            tasks, most, include = settings.general, settings.most_questions, settings.general_include
            found = general_ability(model, tokenizer, tasks, limit=most, seed=settings.seed, include=include)
            for task, group in found.items():
                general |= {f"{task} {metric}": score for metric, score in group.items()}
        notes = _notes(exam.sets, tokenizer, settings.against)
        if forget := exam.sets.get(FORGET):  # known far better where they are asked otherwise?
            style, length = forget.style or PromptStyle(), forget.asking.max_length
            checked = check_prompts(model, tokenizer, forget.examples, style=style, max_length=length)
            if checked and (note := checked.note("model")):
                notes.append(note)
        for note in notes:
            (listener or NullListener()).say(note)
        return _ask_live(model, tokenizer, exam.sets, "model", listener), general, notes


def _notes(
    sets: Mapping[str, QuestionSet], tokenizer: PreTrainedTokenizerBase, against: str | None
) -> list[str]:
    """Return what is to be known of rows and prompts, each thing once."""
    notes = reading_notes(*(questions.examples for questions in sets.values()))
    from_log = against is not None and Path(against).expanduser().is_file()
    for questions in sets.values():
        examples, style = questions.examples, questions.style or PromptStyle()
        notes += prompt_notes(examples, tokenizer, style)
        ours, theirs = (
            [row.ids for row in tokenize(examples[:1], tokenizer, max_length=sys.maxsize, style=kind)]
            for kind in (style, replace(style, whole_ending=True))
        )
        if from_log and ours != theirs:
            notes.append(
                "open-unlearning also scores what this model's chat template writes after the end of a turn, "
                f"so the figures in {against} are not quite of the same tokens as these; "
                "--open-unlearning-prompts scores as it does."
            )
    return list(dict.fromkeys(notes))


def _ask_live(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, QuestionSet],
    label: str,
    listener: Listener | None,
) -> dict[str, list[Outcome]]:
    outcomes = {}
    for name, questions in sets.items():
        asked, asking, style = cut_answers(questions, tokenizer), questions.asking, questions.style
        here = f"{label}, {name}"
        outcomes[name] = ask(model, tokenizer, asked, asking, style=style, label=here, listener=listener)
    return outcomes


def cut_answers(questions: QuestionSet, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """Return the questions with right answers cut to the set's number of tokens, BOS counted."""
    limit = questions.answer_tokens
    if limit is None:
        return list(questions.questions)
    cut = []
    for question in questions.questions:
        ids = tokenizer(question.example.answer)["input_ids"]
        if len(ids) > limit:
            text = str(tokenizer.decode(ids[:limit], skip_special_tokens=True))
            question = replace(question, example=replace(question.example, answer=text))
        cut.append(question)
    return cut


# A judge


def judged(judge: Judge | None, measured: Measured, listener: Listener | None) -> Measured:
    """Return what was measured with a verdict on each answer of the sets that a cell wants judged."""
    if judge is None:
        return measured
    wanted = dict.fromkeys(cell.set for cell in measured.exam.cells if cell.judge)
    verdicts: dict[str, list[Verdict]] = {}
    for name in (name for name in wanted if name in measured.outcomes):
        shown = measured.exam.sets[name].shown  # the question alone, where the prompt holds examples too
        answers, theirs = (
            [
                replace(outcome, prompt=shown[place] if shown else outcome.prompt)
                for place, outcome in enumerate(outcomes or ())
            ]
            for outcomes in (measured.of(name), measured.of_reference(name))
        )
        silent = any(outcome.generated is None for outcome in theirs)
        accepted = any(outcome.accepted for outcome in answers)  # where the data has them, no ideal is needed
        ideals = None if not theirs or silent or accepted else theirs
        runs = [run for outcome in answers for run in runs_of(outcome) or [outcome]]
        verdicts[name] = judge_answers(judge, runs, ideals, seed=measured.seed, listener=listener)
    return replace(measured, verdicts=verdicts)


# The retrained model


def _open_reference(settings: EvaluationSettings, benchmark: Benchmark) -> Checkpoint | Path | None:
    """Return the retrained model to be asked, or the path of the log that stands for it."""
    against = settings.against
    if against is None:
        return None
    path = Path(against).expanduser()
    if not path.is_file():
        return _opened(against, settings)
    if not any(cell.reference for cell in benchmark.cells):
        raise RecipeError(f"{benchmark.name} has no metric that a log serves; leave out --against {against}")
    return path


def _reference(
    against: Checkpoint | Path | None,
    exam: Exam,
    settings: EvaluationSettings,
    listener: Listener | None,
    *,
    judged: bool,
) -> Reference | None:
    """Return what the retrained model, or its log, says on the sets on which it is compared with.

    Raises DataError for another split's log.
    """
    if against is None:
        return None
    name = str(settings.against)
    if isinstance(against, Path):
        log = read_log(against, forget_rows=exam.sizes.get(FORGET))
        rows = {example.row for example in exam.sets[FORGET].examples} if FORGET in exam.sets else set()
        forget = [outcome for outcome in log.forget if outcome.row in rows]
        return Reference(name, {FORGET: forget} if forget else {}, log.aucs.get("min_k"), log.missing)
    names = {name for cell in exam.cells if cell.reference for name in cell.sets}
    wanted = {cell.set for cell in exam.cells if judged and cell.judge}
    sets = {
        name: questions
        for name, questions in exam.sets.items()
        if name in names
        or (name in wanted and not any(question.accepted for question in questions.questions))
    }
    if not sets:
        (listener or NullListener()).say("No metric compares with the retrained model; it is not asked.")
        return Reference(name)
    outcomes = ask_sets(against, sets, device=settings.device, label="retrained model", listener=listener)
    return Reference(name, outcomes)


# What is written


def _exam_facts(exam: Exam) -> dict[str, Any]:
    """Return what the record says of the questions."""
    return {
        "tables": [asdict(table) for table in exam.tables],
        "sets": {
            name: {
                "questions": len(questions.questions),
                "asking": asdict(questions.asking) | {"stop_texts": list(questions.asking.stop_texts)},
                "prompts": asdict(questions.style or PromptStyle()),
            }
            for name, questions in exam.sets.items()
        },
        "missing": dict(exam.missing),
    }


def _model_facts(model: Checkpoint | Path | None) -> dict[str, Any] | None:
    """Return what tells a model, or the log that stands for one, from all others."""
    if isinstance(model, Path):
        return {"location": str(model), "sha256": hashlib.sha256(read_bytes(model)).hexdigest()}
    return None if model is None else {"location": str(model.folder), "fingerprint": model.fingerprint()}


@private()
def _write(found: BenchmarkEvaluated, measured: Measured, settings: EvaluationSettings) -> None:
    """Write scores.json last, so that a folder with scores has everything; all for its owner alone."""
    folder = settings.output
    if folder is not None:
        folder.mkdir(exist_ok=True)
        if not any(folder.iterdir()):  # else it is not ours alone, and the files are closed
            close_to_others(folder)
        theirs = measured.reference.outcomes if measured.reference else {}
        for prefix, sets in {"outcomes": measured.outcomes, "against": theirs}.items():
            for name, outcomes in sets.items():
                write_outcomes(folder / f"{prefix}-{name}.jsonl", outcomes)
        if measured.verdicts:
            verdicts = {name: [asdict(one) for one in given] for name, given in measured.verdicts.items()}
            write_json(folder / "verdicts.json", verdicts)
        write_json(folder / "scores.json", found.record)
    if settings.open_unlearning is not None:
        write_log(settings.open_unlearning, measured.outcomes, log_scores(found.scores))
