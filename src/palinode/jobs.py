"""What the command line can do, as functions with typed arguments; each returns one object.

A job opens what it is given by name, runs, and leaves what the verb of the same name leaves. The verbs
of the command line call these functions; the runs themselves are in pipeline/, compare/ and history/.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from palinode.audit.material import read_material
from palinode.audit.policy import load_policy
from palinode.benchmarks import BENCHMARKS
from palinode.data.examples import Example, fingerprint_examples, read_examples, reading_notes
from palinode.data.tokenize import PromptStyle, prompt_notes
from palinode.errors import CheckpointError, DataError, RecipeError, meant
from palinode.evaluation.benchmark import Places
from palinode.evaluation.evaluate import BenchmarkEvaluated
from palinode.evaluation.evaluate import evaluate_benchmark as run_benchmark
from palinode.history.locating import Location, open_log, open_order, read_salt
from palinode.history.locating import locate as locate_rows
from palinode.history.series import open_series, step_of
from palinode.influence.influencing import (
    Influence,
    Questions,
    open_models,
    open_recipe,
    open_run,
    trace,
    with_alpha,
)
from palinode.influence.sets import rows_of, tell, write_sets
from palinode.methods.transforms import TRANSFORMS, LowRankSettings, ProjectionSettings, TransformSettings
from palinode.models.loading import load_tokenizer, pick_device
from palinode.pipeline.audit_run import AuditPlan
from palinode.pipeline.audit_run import audit as run_audit
from palinode.pipeline.filter_run import FilteredModel, filter_by_retain_rows, filter_recipe
from palinode.pipeline.inputs import workspace_folder
from palinode.pipeline.recipe import Recipe, build_recipe, checked_settings, laid_over, named
from palinode.pipeline.reporting import read_record
from palinode.pipeline.run import Unlearned
from palinode.pipeline.run import unlearn as run_recipe
from palinode.pipeline.tracking import check_trackers, tracked
from palinode.pipeline.workspace import Workspace, fingerprint
from palinode.progress import Listener, NullListener
from palinode.records import COMMAND, Outcome, beside, fitting, holding, private
from palinode.settings import (
    AuditSettings,
    EvaluationSettings,
    InfluenceSettings,
    LocateSettings,
    TrainingSettings,
)
from palinode.training.finetune import Finetuned, finetune
from palinode.weights import Checkpoint
from palinode.weights.atomic import check_output

Place = str | Path
"""A folder or file, or the name of something on the hub."""

Projection, LowRank = ProjectionSettings, LowRankSettings


def unlearn(
    recipe: Recipe | None = None,
    *,
    target: Place | None = None,
    base: Place | Location | None = None,
    forget: Place | None = None,
    retain: Place | None = None,
    output: Place | None = None,
    method: str = "msa",
    transforms: Sequence[TransformSettings] = (),
    scales: tuple[float, float] | Literal["auto", "grid"] = "auto",
    training: TrainingSettings | None = None,
    settings: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
) -> Unlearned:
    """Take the forget rows back out of `target`, and write the unlearned model to the folder `output`.

    `base` may be what `locate` found. `scales` are α and β, or how they are chosen. `settings` are other keys
    of a recipe, dotted or as sections: {"seed": 1, "evaluation.max_rows": 100}. A whole `recipe` comes
    instead of all of them, but for a base that was located: it names that base, the record says how it was
    found. The same call after an interruption goes on where it was. Raises PalinodeError.
    """
    start, located = chosen_base(base) if isinstance(base, Location) else (base, None)
    if recipe is not None:
        if any((target, start and not located, forget, retain, output, transforms, training, settings)):
            raise RecipeError("a recipe says all that decides a run; leave the other arguments out")
        return run_recipe(recipe, listener=listener, located=located)
    chosen = {"choose": scales} if isinstance(scales, str) else {"forget": scales[0], "retain": scales[1]}
    names = {entry.settings: name for name, entry in TRANSFORMS.items()}
    content = {
        "method": method,
        "transforms": [
            {"name": names[type(one)], **one.model_dump(exclude_unset=True)} for one in transforms
        ],
        "models": named(target=target, base=start),
        "data": named(forget=forget, retain=retain),
        "output": named(folder=output),
        "scales": chosen,
        "training": training.model_dump(exclude_unset=True) if training else {},
    }
    return run_recipe(build_recipe(laid_over(content, settings or {})), listener=listener, located=located)


def filter_change(
    target: Place,
    *,
    unlearned: Place,
    retain: Place,
    output: Place,
    forget: Place | None = None,
    base: Place | None = None,
    mu: float | None = None,
    epsilon: float | None = None,
    alpha: float | None = None,
    settings: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
) -> Unlearned | FilteredModel:
    """Filter what some tool changed in `target` to make `unlearned` of it, so that the retain rows keep more.

    With forget rows α is searched, and μ with it, unless they are given; the result is that of `unlearn`.
    Else the change keeps its effect along itself, times `alpha`. `settings` are other keys of a recipe,
    dotted or as sections. Raises PalinodeError.
    """
    content = {
        "models": named(target=target, given=unlearned, base=base),
        "data": named(forget=forget, retain=retain),
        "output": named(folder=output),
        "scales": {} if alpha is None else {"forget": alpha},
    }
    recipe = build_recipe(filter_recipe(laid_over(content, settings or {}), mu=mu, epsilon=epsilon))
    run = filter_by_retain_rows if forget is None else run_recipe
    return run(recipe, listener=listener)


@dataclass(frozen=True, slots=True)
class Audited:
    """What an audit found."""

    output: Path
    """Folder of audit.json, audit.md and report.html."""
    record: Mapping[str, Any]
    """The content of audit.json."""

    @property
    def passed(self) -> bool:
        """Whether nothing was found that the policy forbids."""
        return bool(self.record["answer"]["passed"])


def audit(
    model: Place,
    *,
    against: Place,
    forget: Place,
    output: Place,
    kind: Literal["retrained", "base"] = "retrained",
    target: Place | None = None,
    retain: Place | None = None,
    holdout: Place | None = None,
    settings: AuditSettings | None = None,
    listener: Listener | None = None,
) -> Audited:
    """Attack a model and the model `against` it alike, and write what the attacks find to `output`.

    `kind` says what `against` is: a model retrained without the forget set, or the base checkpoint; `target`
    is the model before unlearning. Raises PalinodeError.
    """
    models = named(audited=model, reference=against, target=target)
    rows = named(forget=forget, retain=retain, holdout=holdout)
    plan = plan_audit(models, rows, kind, settings or AuditSettings())
    return Audited(Path(output), run_audit(plan, Path(output), listener=listener))


def plan_audit(
    models: Mapping[str, str], rows: Mapping[str, str], kind: Any, settings: AuditSettings
) -> AuditPlan:
    """Read the rows of an audit and say what would be run; no model is opened. Raises PalinodeError."""
    if kind not in ("retrained", "base"):
        raise RecipeError(
            f"--reference is {kind!r}; say retrained or base{meant(kind, ('retrained', 'base'))}"
        )
    seen = {Path(models[name]).expanduser().resolve() for name in ("audited", "target") if name in models}
    if Path(models["reference"]).expanduser().resolve() in seen:
        raise RecipeError(
            f"{models['reference']} cannot be held against itself; name a model that never saw the "
            "forget set with --against"
        )
    rules = load_policy(settings.policy, preset=settings.budget, kind=kind)
    material = read_material(
        rows["forget"],
        retain=rows.get("retain"),
        holdout=rows.get("holdout"),
        settings=settings,
        max_rows=rules.budget.max_rows,
    )
    return AuditPlan(
        models=models,
        kind=kind,
        material=material,
        locations={
            "forget": rows["forget"],
            **{name: rows.get(name) for name in ("retain", "holdout")},
            "near": rows.get("retain"),
            **dict.fromkeys(("alias", "two_hop"), rows["forget"]),
            "given": settings.indirect,
            "paraphrased": settings.paraphrases or rows["forget"],
            "lookalikes": settings.lookalikes or rows["forget"],
        },
        policy=rules,
        settings=settings,
    )


def locate(
    forget: Place,
    checkpoints: str,
    *,
    control: Place | None = None,
    log: Path | None = None,
    order: Path | None = None,
    corpus: Place | None = None,
    target: Place | None = None,
    settings: LocateSettings | None = None,
    listener: Listener | None = None,
) -> Location:
    """Return when the forget rows were seen in training, and the last checkpoint before that.

    `checkpoints` is a folder of them, a list a,b,c, or a hub id as in ID@step*. At least one kind of evidence
    is needed: `control` rows that were never trained on, an exposure `log`, or a data `order` with its
    `corpus`. Raises PalinodeError.
    """
    settings = settings or LocateSettings()
    series = open_series(
        checkpoints,
        steps=settings.steps,
        pattern=settings.pattern,
        tokens_per_step=settings.tokens_per_step,
        allow_pickle=settings.allow_pickle,
    )
    read = partial(read_examples, columns=settings.columns)
    rows, others = read(forget), read(control, beside=True) if control else None
    rebuilt, data = open_order(order) if order else (None, None)
    trained = read(corpus, beside=True) if corpus else data
    salt = read_salt(settings.salt)
    for note in reading_notes(rows, others or (), trained or ()):
        (listener or NullListener()).say(note)
    step = settings.target_step
    if step is None and target is not None:
        step = step_of(str(target), series)
    return locate_rows(
        rows,
        series,
        log=open_log(log, corpus=trained, series=series, salt=salt) if log else None,
        salt=salt,
        order=rebuilt,
        corpus=trained,
        control=others,
        target_step=step,
        settings=settings,
        listener=listener,
    )


def influence(
    questions: Questions | Place,
    *,
    run: Place | None = None,
    recipe: Recipe | None = None,
    target: Place | None = None,
    base: Place | None = None,
    rows: Sequence[Example] | Place | None = None,
    checkpoints: str | None = None,
    workspace: Path | None = None,
    settings: InfluenceSettings | None = None,
    listener: Listener | None = None,
) -> Influence:
    """Return what a set of rows has to do with answers, {"question": "answer" or None}, and which rows have.

    The set is the forget set of a finished `run`, a folder of which nothing is trained, or of a `recipe`,
    whose vector is made in its workspace, or found there. Without an answer it is the target's own. With
    `top` in the settings `rows` are ranked (default: those of the run) by `checkpoints`, named as in
    `locate` (default: the base); a `target`, its `base` or a series, and a workspace may stand for a run.
    Raises PalinodeError.
    """
    settings, listener = settings or InfluenceSettings(), listener or NullListener()
    if isinstance(questions, str | Path):
        questions = read_examples(questions, columns=settings.columns)
    if not questions:
        raise DataError("no question was asked; name one (--ask), or a file of them (--questions)")
    if isinstance(rows, str | Path):
        rows = read_examples(rows, columns=settings.columns)
    series = None
    if checkpoints is not None:
        series = open_series(checkpoints, steps=settings.steps, allow_pickle=settings.allow_pickle)
    if series is None and (settings.log or settings.order):
        raise RecipeError("a log or an order says when rows were seen; name --checkpoints of that training")
    models = [Checkpoint.open(place, allow_pickle=settings.allow_pickle) for place in (target, base) if place]
    if not models and series is not None:
        models = [series.open(len(series) - 1)]
    if recipe is not None and run is None:
        opened = open_recipe(recipe, listener, settings.alpha)
    elif run is not None and recipe is None:
        opened = open_run(Path(run), listener)
    elif models and rows and workspace and settings.top:
        model, earlier = models[0], models[1] if len(models) > 1 else None
        opened = open_models(model, earlier, rows, workspace, settings.style or PromptStyle(), listener)
    else:
        raise RecipeError(
            "name a finished run, or a recipe (one of the two), or a --target or --checkpoints with --rows, "
            "--workspace and --top"
        )
    with opened as asker:
        return trace(asker, questions, settings, listener, rows=rows, series=series)


@dataclass(frozen=True, slots=True)
class TakenBack:
    """What became of the rows behind answers."""

    found: Influence
    """Which rows, of all that were ranked."""
    unlearned: Unlearned
    """The run without them; its record tells of rows and answers under `influence`."""
    audited: Audited | None
    """None where no model was written, or there is none to hold it against."""
    outcomes: Sequence[Outcome] = ()
    """What the unlearned model makes of each question."""


def influence_then_unlearn(
    questions: Questions | Place,
    ways: Mapping[str, Any],
    *,
    output: Place,
    rows: Sequence[Example] | Place | None = None,
    checkpoints: str | None = None,
    settings: InfluenceSettings | None = None,
    budget: str | None = None,
    listener: Listener | None = None,
) -> TakenBack:
    """From answers to the rows behind them, to a model without them in the folder `output`, to its audit.

    The `top` rows of each answer are the forget set, all others the retain set. `ways` are keys of a recipe,
    dotted or as sections, that name the models and how rows are taken back; `rows` are ranked (default: those
    of its data). The audit, of that `budget`, lies in `<output>-audit`. The same call after an interruption
    goes on where it was. Raises PalinodeError.
    """
    settings, listener = settings or InfluenceSettings(top=20), listener or NullListener()
    content = laid_over(ways, {"output.folder": str(output)})
    if isinstance(rows, str | Path):
        rows = read_examples(rows, columns=settings.columns)
    rows = rows or rows_of(content.get("data") or {})

    def recipe_with(data: Mapping[str, Any]) -> Recipe:
        return with_alpha(build_recipe(laid_over(content, {"data": {**data, "columns": {}}})), settings.alpha)

    recipe = recipe_with({"forget": "the chosen rows", "retain": "the others"})
    if not (Path(output) / "record.json").exists():  # else it may be that of this very run
        check_output(Path(output), [])
    models, style, workspace = recipe.models, recipe.prompts.style(), Workspace(workspace_folder(recipe))
    found = influence(
        questions,
        target=models.target,
        base=models.base,
        rows=rows,
        checkpoints=checkpoints,
        workspace=workspace.folder,
        settings=settings.model_copy(update={"style": style}),
        listener=listener,
    )
    with workspace.locked(listener):
        data = write_sets(workspace, rows, found.record)
    texts = {text for one in found.asked for text in (one.prompt, one.answer) if text}
    parts = shlex.split(COMMAND.get("palinode influence"))
    told = [("", "", part) if part in texts else part.partition("=") for part in parts]
    command = shlex.join(f"{name}{sign}{'…' if value in texts else value}" for name, sign, value in told)
    with holding(COMMAND, command):  # no record holds a text
        result = run_recipe(recipe_with(data), listener=listener)
        if result.output is None:
            return TakenBack(found, result, None)
        known = settings.model_dump(include={"allow_pickle", "device", "seed"})
        audited = _audit_of(
            result.output, models, data, AuditSettings(**known, budget=budget, style=style), listener
        )
    place = audited.output if audited else None
    outcomes = tell(found.record, found.asked, result.output, place, settings, style, listener)
    return TakenBack(found, replace(result, record=read_record(result.output)), audited, outcomes)


def _audit_of(
    output: Path, models: Any, data: Mapping[str, Any], settings: AuditSettings, listener: Listener
) -> Audited | None:
    """Audit an unlearned model beside its folder, against the retrained model or the base."""
    kind: Literal["retrained", "base"] = "retrained" if models.retrained else "base"
    if getattr(models, kind) is None:
        return None
    return audit(
        output,
        against=getattr(models, kind),
        forget=data["forget"],
        output=output.with_name(f"{output.name}-audit"),
        kind=kind,
        target=models.target,
        retain=data["retain"],
        settings=settings,
        listener=listener,
    )


def chosen_base(found: Location) -> tuple[str, dict[str, Any]]:
    """Return the base that a location recommends, and what a record says of the choice.

    Raises CheckpointError where no checkpoint is clean.
    """
    choice = found.recommended
    if choice is None:
        least = found.next_best
        told = f"; the least contaminated is {least.location} ({least.reason})" if least else ""
        raise CheckpointError(
            f"no checkpoint of the ladder is known to be clean of the forget rows{told}: name it with --base "
            "if it shall serve all the same, or look at the alternatives that palinode locate names"
        )
    facts = {
        "base": choice.location,
        "step": choice.step,
        "reason": choice.reason,
        "evidence": list(choice.evidence),
        "certainty": choice.certainty,
        "first_exposure": found.first,
        "next_best": found.next_best.location if found.next_best else None,
        "warnings": list(found.warnings),
    }
    return choice.location, facts


def evaluate_benchmark(
    model: Checkpoint | Place,
    benchmark: str = "own",
    data: Place | None = None,
    *,
    retain: Place | None = None,
    holdout: Place | None = None,
    settings: EvaluationSettings | None = None,
    listener: Listener | None = None,
) -> BenchmarkEvaluated:
    """Run a benchmark on a model, with every metric that its data allows; `scores` are by set and metric.

    `data` is the folder of its files, or for "own" the forget rows, beside which `retain` and `holdout` rows
    may be given. The folder `output` of the settings gets scores.json. Raises PalinodeError.
    """
    settings = settings or EvaluationSettings()
    if benchmark not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise RecipeError(
            f"there is no benchmark {benchmark!r}; there are {known}{meant(benchmark, BENCHMARKS)}"
        )
    chosen = BENCHMARKS[benchmark]
    if data is None and chosen.hub is None:
        raise RecipeError(f"{benchmark} needs --data: a file of rows, or the folder of the benchmark's files")
    places = named(data=data or chosen.hub, retain=retain, holdout=holdout)
    for name in ("retain", "holdout"):
        if name in places and benchmark != "own":
            raise RecipeError(f"--{name} is for rows of your own; {benchmark} has its own sets")
    return run_benchmark(
        model if isinstance(model, Checkpoint) else str(model),
        chosen,
        Places(**places, columns=settings.columns),
        settings,
        listener=listener,
    )


@private()
def finetune_file(
    base: str,
    data: str,
    output: Path,
    settings: Mapping[str, Any],
    *,
    columns: Mapping[str, str] | None = None,
    allow_pickle: bool = False,
    style: PromptStyle | None = None,
    device: str = "auto",
    seed: int = 0,
    tracker: str | None = None,
    listener: Listener | None = None,
) -> Finetuned:
    """Fine-tune a model folder on a file of rows; an interrupted call goes on when it is repeated.

    Trackers put their files into `<output>.tracking`, beside the output.
    """
    checked = checked_settings(TrainingSettings, settings)
    check_trackers(tracker)
    start = Checkpoint.open(base, allow_pickle=allow_pickle)
    examples = read_examples(data, columns=columns)
    asked = prompt_notes(examples, load_tokenizer(start), style or PromptStyle())
    for note in [*reading_notes(examples), *asked]:
        (listener or NullListener()).say(note)
    key = fingerprint(
        start=start.fingerprint(),
        rows=fingerprint_examples(examples),
        training=checked.key(),
        seed=seed,
        prompts=asdict(style or PromptStyle()),
    )
    place = output.resolve()
    state = beside(place, f".state-{key[:12]}")  # other inputs never find it
    with tracked(
        listener or NullListener(),
        tracker,
        folder=place.parent / fitting(place.name, ".tracking"),
        run=place.name,
        settings={"seed": seed, "training": checked.model_dump(mode="json", exclude_none=True)},
        cpu=pick_device(device).type == "cpu",
    ) as listening:
        return finetune(
            start,
            examples,
            output,
            checked,
            style=style,
            seed=seed,
            device=device,
            state=state,
            listener=listening,
        )
