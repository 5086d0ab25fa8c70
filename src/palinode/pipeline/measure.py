"""Run a benchmark on a model folder: ask every set, score every cell, and write what was found.

The retrained model, where one is given, is asked the same questions by the same code. Both models are
never in memory together.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from palinode.data.tokenize import PromptStyle, prompt_notes, tokenize
from palinode.errors import OutputError, RecipeError
from palinode.evaluation.ask import Asking, ask
from palinode.evaluation.benchmark import (
    Benchmark,
    Cell,
    LoadedBenchmark,
    Measured,
    Places,
    QuestionSet,
    Reference,
    score_cell,
    trim_asking,
)
from palinode.evaluation.general import general_ability
from palinode.evaluation.judges import open_judge
from palinode.evaluation.judging import Judge, judge_answers
from palinode.evaluation.openunlearning import (
    AUTHORS,
    FACTS,
    FORGET,
    HOLDOUT,
    MIA_KEYS,
    RETAIN,
    read_log,
    write_log,
)
from palinode.evaluation.self_check import check_prompts
from palinode.models.loading import load_model, load_tokenizer, pick_device
from palinode.progress import Listener, NullListener
from palinode.records import (
    Outcome,
    Score,
    Verdict,
    close_to_others,
    private,
    read_bytes,
    write_json,
    write_outcomes,
)
from palinode.version import __version__
from palinode.weights import Checkpoint
from palinode.weights.fingerprints import check_same

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOG_SETS = frozenset({FORGET, RETAIN, AUTHORS, FACTS, HOLDOUT})
"""Sets that open-unlearning's form of a log has a place for."""

Yardstick = Checkpoint | Path
"""The retrained model, or the log that stands for it."""

SCORES_VERSION = 1
"""Version of the layout of `scores.json`, described in docs/benchmarks.md."""


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """What is wanted of a benchmark run; everything has a default."""

    split: str | None = None
    """None means the benchmark's first."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The benchmark's own options."""
    metrics: tuple[str, ...] = ()
    """Which metrics; none means all but the expensive ones, and "every" means all."""
    against: str | None = None
    """The retrained model: a folder, a hub id, or an open-unlearning log (.json)."""
    judge: str | None = None
    """A judge: overlap, offline:FOLDER or URL#model."""
    key_variable: str | None = None
    """The environment variable with the key of a judge at a URL, where it is not OpenAI's own."""
    general: tuple[str, ...] = ()
    """Tasks of lm-eval, run on the model in memory."""
    general_include: Path | None = None
    """Folder with lm-eval tasks of one's own, or the YAML file of one."""
    max_rows: int | None = None
    """Questions of each set; a larger set is sampled with the seed. None asks all."""
    max_new_tokens: int | None = None
    """Length limit of answers, where it should not be the benchmark's own."""
    max_length: int | None = None
    """Tokens of a row, where it should not be the benchmark's own."""
    style: PromptStyle | None = None
    """How questions are put, where it should not be the benchmark's own way."""
    output: Path | None = None
    """Folder for scores.json and the outcomes."""
    open_unlearning: Path | None = None
    """File for the results in open-unlearning's form."""
    allow_pickle: bool = False
    """Read files of torch.save too; none of their code is run."""
    open_unlearning_prompts: bool = False
    """Score all that a chat template writes after an answer, as open-unlearning does."""
    device: str = "auto"
    seed: int = 0
    """Seeds the sampling of questions, intervals and the judge's order of candidates."""


@dataclass(frozen=True, slots=True)
class ModelMeasurement:
    """What a benchmark run found."""

    scores: Mapping[str, Mapping[str, Score]]
    """Set → metric → score, in the order of the benchmark's cells."""
    outcomes: Mapping[str, Sequence[Outcome]]
    """Set → what the model did on each question."""
    record: Mapping[str, Any]
    """The content of scores.json: the scores, and everything that decides them."""


def measure(
    model: str,
    benchmark: Benchmark,
    places: Places,
    settings: MeasureSettings | None = None,
    *,
    listener: Listener | None = None,
) -> ModelMeasurement:
    """Run a benchmark on a model and return its scores; they are also written if `settings` says where.

    Everything that can be refused is refused before a model is loaded. Raises PalinodeError.
    """
    settings = settings or MeasureSettings()
    started = datetime.now(UTC)
    split, options = benchmark.check_split(settings.split), benchmark.check_options(settings.options)
    cells = benchmark.check_metrics(settings.metrics)
    _check_places(settings)
    if settings.style is not None and "prompt" in settings.options:
        raise RecipeError("the prompt is named twice; say it with --set or with --option prompt, not both")
    judge = _open_judge(settings)
    checkpoint = Checkpoint.open(model, allow_pickle=settings.allow_pickle)
    yardstick = _open_reference(settings, benchmark)
    whole = benchmark.load(places, split, options)
    loaded = sample_sets(whole, settings)
    asked = asked_sets(loaded, cells, settings)
    if settings.open_unlearning_prompts:
        asked = {name: _whole_endings(questions) for name, questions in asked.items()}
    _check_log(settings, asked)
    from_log = _reference_of_log(yardstick, whole, asked) if isinstance(yardstick, Path) else None

    compared = _compared_sets(cells, asked, judged=judge is not None)
    reference = from_log or _reference(yardstick, compared, settings, listener)
    before = checkpoint.fingerprint()
    outcomes, general, notes = _ask_model(checkpoint, asked, settings, listener)
    measured = Measured(
        split=split,
        sets=asked,
        outcomes=outcomes,
        reference=reference,
        verdicts=judge_sets(judge, cells, asked, outcomes, reference, settings.seed, listener),
        missing=loaded.missing,
        options=options,
        seed=settings.seed,
    )
    scores = score_cells(cells, measured)
    if general:
        scores["general"] = general
    record = _record(benchmark, checkpoint, yardstick, loaded, measured, settings, scores, judge, started)
    check_same(checkpoint, before)
    record["notes"] = notes
    measurement = ModelMeasurement(scores, outcomes, record)
    if first_process():
        _write(measurement, measured, settings)
    return measurement


def score_cells(cells: Sequence[Cell], measured: Measured) -> dict[str, dict[str, Score]]:
    """Return the score of each cell by set and metric."""
    scores: dict[str, dict[str, Score]] = {}
    for cell in cells:
        scores.setdefault(cell.set, {})[cell.metric] = score_cell(cell, measured)
    return scores


def ask_sets(
    checkpoint: Checkpoint,
    sets: Mapping[str, QuestionSet],
    *,
    device: str = "auto",
    label: str = "model",
    listener: Listener | None = None,
) -> dict[str, list[Outcome]]:
    """Load a model, ask it every set, and return its outcomes by set."""
    model, tokenizer = load_model(checkpoint, device=pick_device(device)), load_tokenizer(checkpoint)
    return _ask_live(model, tokenizer, sets, label, listener)


# Before a model is loaded


def _check_places(settings: MeasureSettings) -> None:
    """Refuse limits and places to write to that cannot be used."""
    if settings.max_rows is not None and settings.max_rows < 1:
        raise RecipeError(f"max_rows cannot be used: it is {settings.max_rows} and must be at least 1")
    if settings.general_include is not None and not settings.general:
        raise RecipeError(
            f"{settings.general_include} holds tasks for lm-eval and none is to be run; name some (--lm-eval)"
        )
    folder, log = settings.output, settings.open_unlearning
    if folder is not None and (folder / "scores.json").exists():
        raise OutputError(f"{folder} holds the scores of another run already; name another folder")
    if folder is not None and (not folder.parent.is_dir() or (folder.exists() and not folder.is_dir())):
        raise OutputError(f"{folder} is a file, or the folder above it is missing; name another folder")
    if log is not None and (log.exists() or not log.parent.is_dir()):
        raise OutputError(f"{log} exists already, or its folder does not; name another file for the log")


def _check_log(settings: MeasureSettings, sets: Mapping[str, QuestionSet]) -> None:
    """Refuse a log of sets that open-unlearning's form does not know."""
    if settings.open_unlearning is not None and (unknown := sorted(set(sets) - LOG_SETS)):
        raise RecipeError(
            f"a log in open-unlearning's form has no place for the set {unknown[0]}; "
            "it is for tofu and own data"
        )


def _open_judge(settings: MeasureSettings) -> Judge | None:
    """Return the judge that `overlap`, `offline:FOLDER` or `URL#model` names."""
    if settings.key_variable and not (settings.judge or "").startswith(("http://", "https://")):
        raise RecipeError(
            "--key-variable names the key of a judge at an address; name that too, as --judge URL#MODEL"
        )
    if settings.judge is None:
        return None
    name, _, model = settings.judge.partition("#")
    return open_judge(name, model=model or None, key_variable=settings.key_variable, device=settings.device)


def sample_sets(
    loaded: LoadedBenchmark, settings: MeasureSettings, own: Mapping[str, int] | None = None
) -> LoadedBenchmark:
    """Return the sets with at most `max_rows` questions each, drawn with the seed, in their own order.

    `own` has other limits for single sets. Raises RecipeError where there is no such set.
    """
    limits, names = own or {}, [questions.name for questions in loaded.sets]
    if strange := sorted(set(limits) - set(names)):
        raise RecipeError(f"there is no set {strange[0]!r} to limit; the sets are {', '.join(names)}")
    drawn = (
        _drawn(questions, limits.get(questions.name, settings.max_rows), settings.seed)
        for questions in loaded.sets
    )
    return replace(loaded, sets=tuple(drawn))


def _drawn(questions: QuestionSet, most: int | None, seed: int) -> QuestionSet:
    total = len(questions.questions)
    if most is None or total <= most:
        return questions
    drawn = np.random.Generator(np.random.PCG64(seed + 1)).choice(total, most, replace=False)
    return questions.only(sorted(drawn.tolist()))


def asked_sets(
    loaded: LoadedBenchmark, cells: Sequence[Cell], settings: MeasureSettings
) -> dict[str, QuestionSet]:
    """Return the sets that some cell needs, each asked for no more than the cells need."""
    needed = {name for cell in cells for name in cell.sets}
    asked = {}
    for questions in loaded.sets:
        if questions.name in needed:
            asking = _limited(trim_asking(questions, cells), settings)
            style = settings.style or questions.style or PromptStyle()
            asked[questions.name] = replace(questions, asking=asking, style=style)
    return asked


def _limited(asking: Asking, settings: MeasureSettings) -> Asking:
    if settings.max_new_tokens is not None:
        shortest = min(asking.min_new_tokens, settings.max_new_tokens)
        asking = replace(asking, max_new_tokens=settings.max_new_tokens, min_new_tokens=shortest)
    return asking if settings.max_length is None else replace(asking, max_length=settings.max_length)


# Asking


def _ask_model(
    checkpoint: Checkpoint,
    sets: Mapping[str, QuestionSet],
    settings: MeasureSettings,
    listener: Listener | None,
) -> tuple[dict[str, list[Outcome]], dict[str, Score], list[str]]:
    """Return the model's outcomes by set, its general ability if that was asked for, and notes."""
    model = load_model(checkpoint, device=pick_device(settings.device))
    tokenizer = load_tokenizer(checkpoint)
    general: dict[str, Score] = {}
    if settings.general:  # first, because it may be refused
        found = general_ability(
            model,
            tokenizer,
            settings.general,
            limit=settings.max_rows,
            seed=settings.seed,
            include=settings.general_include,
        )
        general = {
            f"{task} {metric}": score for task, group in found.items() for metric, score in group.items()
        }
    notes = [
        *_notes(sets, tokenizer, settings),
        *_check_prompts(model, tokenizer, sets.get(FORGET)),
    ]
    for note in notes:
        (listener or NullListener()).say(note)
    return _ask_live(model, tokenizer, sets, "model", listener), general, notes


def _check_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, forget: QuestionSet | None
) -> list[str]:
    """Return a note where the model knows the forget rows far better asked otherwise."""
    if forget is None or forget.style is None:
        return []
    examples = [question.example for question in forget.questions]
    found = check_prompts(model, tokenizer, examples, style=forget.style, max_length=forget.asking.max_length)
    note = found and found.note("model")
    return [note] if note else []


def _notes(
    sets: Mapping[str, QuestionSet], tokenizer: PreTrainedTokenizerBase, settings: MeasureSettings
) -> list[str]:
    """Return what is to be known of the prompts, each thing once."""
    notes = []
    from_log = settings.against is not None and Path(settings.against).expanduser().is_file()
    for questions in sets.values():
        examples = [question.example for question in questions.questions[:1]]
        style = questions.style or PromptStyle()
        notes += prompt_notes(examples, tokenizer, style)
        ours, theirs = (
            [row.ids for row in tokenize(examples, tokenizer, max_length=sys.maxsize, style=kind)]
            for kind in (style, replace(style, whole_ending=True))
        )
        if from_log and ours != theirs:
            notes.append(
                "open-unlearning also scores what this model's chat template writes after the end of a turn, "
                f"so the figures in {settings.against} are not quite of the same tokens as these; "
                "--open-unlearning-prompts scores as it does."
            )
    return list(dict.fromkeys(notes))


def _whole_endings(questions: QuestionSet) -> QuestionSet:
    return replace(questions, style=replace(questions.style or PromptStyle(), whole_ending=True))


def _ask_live(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, QuestionSet],
    label: str,
    listener: Listener | None,
) -> dict[str, list[Outcome]]:
    return {
        name: ask(
            model,
            tokenizer,
            _cut_answers(questions, tokenizer),
            questions.asking,
            style=questions.style,
            label=f"{label}, {name}",
            listener=listener,
        )
        for name, questions in sets.items()
    }


def _cut_answers(questions: QuestionSet, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
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


def judge_sets(
    judge: Judge | None,
    cells: Sequence[Cell],
    sets: Mapping[str, QuestionSet],
    outcomes: Mapping[str, Sequence[Outcome]],
    reference: Reference | None,
    seed: int,
    listener: Listener | None,
) -> dict[str, list[Verdict]]:
    """Return a verdict on each answer of the sets that a cell wants judged; drawn answers one by one."""
    if judge is None or not first_process():
        return {}
    verdicts = {}
    for name in dict.fromkeys(cell.set for cell in cells if cell.judge and cell.set in outcomes):
        answers = _as_shown(sets[name], outcomes[name])
        ideals = _ideals(sets[name], answers, reference)
        runs = [run for outcome in answers for run in _runs(outcome)]
        verdicts[name] = judge_answers(judge, runs, ideals, seed=seed, listener=listener)
    return verdicts


def _as_shown(questions: QuestionSet, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return outcomes with the question alone as their prompt, where the prompt holds examples too."""
    if not questions.shown:
        return list(outcomes)
    return [replace(outcome, prompt=shown) for outcome, shown in zip(outcomes, questions.shown, strict=True)]


def _runs(outcome: Outcome) -> list[Outcome]:
    """Return an outcome once for each answer it gave: the drawn ones, or else the greedy one."""
    return [replace(outcome, generated=sample, samples=()) for sample in outcome.samples] or [outcome]


def _ideals(
    questions: QuestionSet, answers: Sequence[Outcome], reference: Reference | None
) -> list[Outcome] | None:
    """Return the retrained model's outcomes for the judge; none where the data lists accepted answers."""
    theirs = reference.outcomes.get(questions.name) if reference else None
    if not theirs or any(outcome.accepted for outcome in answers):
        return None
    shown = _as_shown(questions, theirs)
    return None if any(outcome.generated is None for outcome in shown) else shown


# The retrained model


def _open_reference(settings: MeasureSettings, benchmark: Benchmark) -> Yardstick | None:
    """Return the retrained model to be asked, or the path of the log that stands for it."""
    against = settings.against
    if against is None:
        return None
    path = Path(against).expanduser()
    if not path.is_file():
        return Checkpoint.open(against, allow_pickle=settings.allow_pickle)
    if not any(cell.reference for cell in benchmark.cells):
        raise RecipeError(f"{benchmark.name} has no metric that a log serves; leave out --against {against}")
    return path


def _reference_of_log(path: Path, whole: LoadedBenchmark, sets: Mapping[str, QuestionSet]) -> Reference:
    """Return what a log says of the forget rows that are asked. Raises DataError for another split's log."""
    forget = next((questions for questions in whole.sets if questions.name == FORGET), None)
    log = read_log(path, forget_rows=len(forget.questions) if forget else None)
    asked = {question.example.row for question in sets[FORGET].questions} if FORGET in sets else set()
    rows = [outcome for outcome in log.forget if outcome.row in asked]
    return Reference(str(path), {FORGET: rows} if rows else {}, log.aucs.get("min_k"), log.missing)


def _compared_sets(
    cells: Sequence[Cell], sets: Mapping[str, QuestionSet], *, judged: bool
) -> dict[str, QuestionSet]:
    """Return the sets on which some metric, or the judge, compares with the retrained model."""
    names = {name for cell in cells if cell.reference for name in cell.sets}
    if judged:
        names |= {cell.set for cell in cells if cell.judge and not _lists_accepted(sets.get(cell.set))}
    return {name: questions for name, questions in sets.items() if name in names}


def _lists_accepted(questions: QuestionSet | None) -> bool:
    """Tell whether the data says which answers are right, so that the judge needs no other model's."""
    return questions is not None and any(question.accepted for question in questions.questions)


def _reference(
    yardstick: Yardstick | None,
    sets: Mapping[str, QuestionSet],
    settings: MeasureSettings,
    listener: Listener | None,
) -> Reference | None:
    if not isinstance(yardstick, Checkpoint):
        return None
    if not sets:
        (listener or NullListener()).say("No metric compares with the retrained model; it is not asked.")
        return Reference(str(settings.against))
    outcomes = ask_sets(yardstick, sets, device=settings.device, label="retrained model", listener=listener)
    return Reference(str(settings.against), outcomes)


# What is written


def first_process() -> bool:
    """Return whether this process writes and prints, where `accelerate launch` started several."""
    return os.environ.get("RANK", "0") == "0"


def _record(
    benchmark: Benchmark,
    checkpoint: Checkpoint,
    yardstick: Yardstick | None,
    loaded: LoadedBenchmark,
    measured: Measured,
    settings: MeasureSettings,
    scores: Mapping[str, Mapping[str, Score]],
    judge: Judge | None,
    started: datetime,
) -> dict[str, Any]:
    """Return the content of scores.json."""
    return {
        "version": SCORES_VERSION,
        "palinode": __version__,
        "created": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "benchmark": benchmark.name,
        "split": measured.split,
        "options": dict(measured.options),
        "seed": settings.seed,
        "max_rows": settings.max_rows,
        "model": _model_facts(checkpoint),
        "against": _yardstick_facts(yardstick),
        "judge": judge.name if judge else None,
        "tables": [asdict(table) for table in loaded.tables],
        "sets": {
            name: {
                "questions": len(questions.questions),
                "asking": _asking_facts(questions.asking),
                "prompts": asdict(questions.style or PromptStyle()),
            }
            for name, questions in measured.sets.items()
        },
        "missing": dict(loaded.missing),
        "scores": {
            name: {metric: asdict(score) for metric, score in group.items()} for name, group in scores.items()
        },
    }


def _asking_facts(asking: Asking) -> dict[str, Any]:
    return {**asdict(asking), "stop_texts": list(asking.stop_texts)}


def _model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"location": str(checkpoint.folder), "fingerprint": checkpoint.fingerprint()}


def _yardstick_facts(yardstick: Yardstick | None) -> dict[str, Any] | None:
    if isinstance(yardstick, Path):
        return {"location": str(yardstick), "sha256": hashlib.sha256(read_bytes(yardstick)).hexdigest()}
    return None if yardstick is None else _model_facts(yardstick)


@private()
def _write(measurement: ModelMeasurement, measured: Measured, settings: MeasureSettings) -> None:
    """Write scores.json last, so that a folder with scores has everything; all for its owner alone."""
    if settings.output is not None:
        settings.output.mkdir(exist_ok=True)
        if not any(settings.output.iterdir()):  # else it is not ours alone, and the files are closed
            close_to_others(settings.output)
        theirs = measured.reference.outcomes if measured.reference else {}
        for prefix, sets in {"outcomes": measured.outcomes, "against": theirs}.items():
            for name, outcomes in sets.items():
                write_outcomes(settings.output / f"{prefix}-{name}.jsonl", outcomes)
        if measured.verdicts:
            verdicts = {name: [asdict(one) for one in given] for name, given in measured.verdicts.items()}
            write_json(settings.output / "verdicts.json", verdicts)
        write_json(settings.output / "scores.json", measurement.record)
    if settings.open_unlearning is not None:
        write_log(settings.open_unlearning, measured.outcomes, _log_scores(measurement.scores))


def _log_scores(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, Score]:
    """Return the scores that a log has a place for, by their names there."""
    keys = {f"auc_{name}": key for key, name in MIA_KEYS.items()}
    keys |= {name: name for name in ("forget_quality", "model_utility", "privleak")}
    return {
        keys[metric]: score for group in scores.values() for metric, score in group.items() if metric in keys
    }
