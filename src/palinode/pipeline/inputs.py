"""Open and check everything a run needs, before any long work: models, rows, places.

What can be wrong is found here, in the first seconds, and said in one sentence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from palinode.data.examples import (
    Example,
    at_most,
    fingerprint_examples,
    read_examples,
    read_questions,
    reading_notes,
    shared_rows,
)
from palinode.data.tokenize import PromptStyle, prompt_notes, tokenize
from palinode.data.world import neutral_examples
from palinode.errors import DataError, MismatchError, OutputError, RecipeError, meant
from palinode.evaluation.self_check import PromptCheck, check_prompts, rows_with_style
from palinode.evaluation.yardstick import BASE_ALONE
from palinode.methods import METHODS
from palinode.methods.method import Given, Method, MethodSettings, read_refusals
from palinode.methods.transforms import check_transforms
from palinode.models.inplace import check_live
from palinode.models.loading import (
    check_positions,
    load_config,
    load_reader,
    load_tokenizer,
    outline,
    pick_device,
    tokenizer_fingerprint,
)
from palinode.pipeline.recipe import Recipe
from palinode.pipeline.tracking import check_trackers
from palinode.pipeline.workspace import Workspace, folder_size
from palinode.progress import Listener
from palinode.records import workspace_beside
from palinode.weights import Checkpoint, Direction, Point, Saved, save
from palinode.weights.atomic import check_output, check_room
from palinode.weights.folders import require_causal_lm
from palinode.weights.preflight import check_sum, check_tokenizers

CUT = "Answers cut to fit max_length"
"""How a note on cut answers begins."""


@dataclass(frozen=True, slots=True)
class InputRows:
    """The rows of a run, and which of them serve for what."""

    forget: Sequence[Example] = ()
    """Empty where nobody has them any more."""
    retain: Sequence[Example] = ()
    """Empty in forget-only runs."""
    retain_sample: Sequence[Example] = ()
    """What θ_2 is fine-tuned on: as many rows as the forget set has, unless the method says otherwise."""
    forget_probe: Sequence[Example] = ()
    """Rows on which scales are tried."""
    retain_probe: Sequence[Example] = ()
    """Rows on which scales are tried; no vector has seen them, where there are enough."""
    spared: Sequence[Example] = ()
    """Rows whose inputs filters spare: retain rows that scales are not tried on, where there are enough."""
    forget_test: Sequence[Example] = ()
    retain_test: Sequence[Example] = ()
    unseen: Sequence[Example] = ()
    """Rows by which the yardstick is set: neither base nor target has seen them."""
    unseen_source: str = BASE_ALONE
    """What they are: a key of the yardstick's ASSUMES."""


def present(**models: Checkpoint | None) -> dict[str, Checkpoint]:
    """Return the models that are there, by name."""
    return {name: model for name, model in models.items() if model is not None}


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything a run starts from, opened and checked."""

    recipe: Recipe
    base: Checkpoint | None
    """None where the method does without."""
    target: Checkpoint | None
    """None where the recipe's [prepare] makes it."""
    retrained: Checkpoint | None
    rows: InputRows
    notes: tuple[str, ...]
    """What the reader of the record should know about the rows."""
    refusals: tuple[str, ...] = ()
    """Answers that refuse, where the method teaches them."""
    unlearned: Checkpoint | None = None
    """A model that has unlearned already, whose change is taken as the vector."""

    @property
    def models(self) -> dict[str, Checkpoint]:
        """The models that are there, by role."""
        return present(target=self.target, base=self.base, retrained=self.retrained, given=self.unlearned)

    @property
    def method(self) -> Method:
        """The recipe's method."""
        return METHODS[self.recipe.method]

    @property
    def settings(self) -> MethodSettings:
        """Its settings, with its defaults filled in."""
        return self.method.check_settings(self.recipe.method_settings)

    @property
    def given(self) -> Given:
        """What it has to work with."""
        return given_to(self.recipe, self.rows, self.refusals)

    @property
    def reader(self) -> Checkpoint:
        """The checkpoint whose tokenizer and chat template every model of the run is asked with."""
        return self.target or self.earlier

    @property
    def earlier(self) -> Checkpoint:
        """The base, which the recipe was checked to have where it is needed."""
        if self.base is None:
            raise RecipeError("this needs an earlier checkpoint of the target; name models.base (--base)")
        return self.base


@dataclass
class Work:
    """What the steps of a run work with: opened inputs, the folder of results, and who listens."""

    inputs: Inputs
    workspace: Workspace
    listener: Listener

    @property
    def recipe(self) -> Recipe:
        """The recipe of the inputs."""
        return self.inputs.recipe

    @property
    def device(self) -> torch.device:
        """Where models run."""
        return pick_device(self.recipe.device)

    def write(self, point: Point, folder: Path, along: Mapping[str, Direction], what: str) -> Saved:
        """Write a sum as the recipe has its output, its dose measured along some directions."""
        output = self.recipe.output
        with self.listener.task(
            f"writing the {what} model", self.inputs.reader.parameters, "weights"
        ) as advance:
            return save(
                point,
                folder,
                dtype=output.dtype,
                rounding=output.rounding,
                seed=self.recipe.seed,
                along=along,
                on_progress=advance,
            )


def given_to(recipe: Recipe, rows: InputRows, refusals: Sequence[str] = ()) -> Given:
    """Return what a recipe's method has to work with."""
    beta = recipe.scales.retain
    if beta is None:
        method = METHODS[recipe.method]
        spared = any("inputs" in one.transform.needs for one in check_transforms(recipe.changes))
        open_beta = method.has_scales and not spared  # such a filter spares the retain rows already
        beta = method.check_settings(recipe.method_settings).retain_scale if open_beta else 0.0
    return Given(
        forget=rows.forget,
        retain=rows.retain,
        sample=rows.retain_sample,
        refusals=refusals,
        retain_scale=beta if rows.retain else 0.0,
        seed=recipe.seed,
    )


def open_inputs(recipe: Recipe) -> Inputs:
    """Open models and rows of a recipe; raises an InputError that says what to change."""
    _check_method(recipe)
    pick_device(recipe.device)
    check_trackers(recipe.tracker)
    base, target, retrained, unlearned = _models(recipe, lambda place: _open(place, recipe))
    reader = target or base
    if target is not None and base is not None:  # states of one model, as the last step will ask too
        for check in pair_checks(target, base, recipe.method, recipe.method_settings).values():
            check()
    elif reader is not None:
        check_sum(reader, [])
    if retrained is not None and retrained == target:
        raise MismatchError(
            f"target and retrained model are the same folder {retrained.folder}; the retrained model must "
            "never have seen the forget set"
        )
    if reader is not None and retrained is not None:
        check_tokenizers(reader, [retrained])
    scales = recipe.scales
    given = scales.forget is not None and (scales.retain is not None or not recipe.data.retain)
    if reader is not None and recipe.has_scales and not given:  # pairs are tried on a live model
        check_live(reader)
    if target is not None and unlearned is not None:
        check_unlearned(target, unlearned)
    (rows, notes), refusals = _open_rows(recipe), read_refusals(recipe.data.refusals)
    inputs = Inputs(recipe, base, target, retrained, rows, tuple(notes), tuple(refusals), unlearned)
    return replace(inputs, notes=(*notes, *_check_rows_fit(inputs)))


def _check_method(recipe: Recipe) -> None:
    if recipe.method not in METHODS:
        known, near = ", ".join(sorted(METHODS)), meant(recipe.method, METHODS)
        raise RecipeError(f"there is no method {recipe.method!r}; choose one of {known}{near}")
    if METHODS[recipe.method].kind == "inference":
        raise RecipeError(
            f"the method {recipe.method} reads two models together and makes none that could be saved; "
            "use the method whp for one on disk, or palinode.models.CombinedLogits from Python"
        )


def outline_inputs(recipe: Recipe) -> Inputs:
    """Return the rows of a recipe, and its model as an outline: all that a plan for other machines takes.

    Other models are taken to be like the target, and need not be there.
    """
    _check_method(recipe)
    model, (rows, notes) = outline(recipe.models.target or recipe.models.base or ""), _open_rows(recipe)
    base, target, retrained, unlearned = _models(recipe, lambda _: model)
    refusals = tuple(read_refusals(recipe.data.refusals))
    return Inputs(recipe, base, target, retrained, rows, tuple(notes), refusals, unlearned)


def _models(recipe: Recipe, opened: Callable[[str], Checkpoint]) -> Iterator[Checkpoint | None]:
    """Yield base, target, retrained and given model of a recipe, opened; None for one that is not named."""
    models = recipe.models
    for place in (models.base, models.target, models.retrained, models.given):
        yield opened(place) if place else None


def open_retain_only(recipe: Recipe) -> tuple[Inputs, Checkpoint, Checkpoint]:
    """Open retain rows, target and given model of a recipe whose forget rows nobody has.

    Raises an InputError that says what to change.
    """
    pick_device(recipe.device)
    models, data, notes = recipe.models, recipe.data, list[str]()
    if not (models.target and models.given and data.retain):
        raise RecipeError("without forget rows it takes models.target, models.given and data.retain")
    target, unlearned = (_open(place, recipe) for place in (models.target, models.given))
    check_unlearned(target, unlearned)
    retain = read_examples(data.retain, columns=data.columns)
    rows = InputRows(retain=retain, retain_sample=retain, spared=spared_rows(recipe, (), retain, notes))
    inputs = Inputs(recipe, None, target, None, rows, (), (), unlearned)
    return replace(inputs, notes=(*notes, *_check_rows_fit(inputs))), target, unlearned


def ask_as_trained(inputs: Inputs, workspace: Workspace, listener: Listener) -> Inputs:
    """Return the inputs, with a note where the target knows the forget rows far better asked otherwise.

    A target that [prepare] makes is trained with the recipe's own prompts, and not asked.
    """
    recipe = inputs.recipe
    notes = notes_on_prompts(
        inputs.target,
        inputs.rows.forget,
        recipe.prompts.style(),
        max_length=recipe.evaluation.max_length,
        device=recipe.device,
        workspace=workspace,
        listener=listener,
    )
    return replace(inputs, notes=(*inputs.notes, *notes))


def notes_on_prompts(
    target: Checkpoint | None,
    rows: Sequence[Example],
    style: PromptStyle,
    *,
    max_length: int,
    device: str,
    workspace: Workspace,
    listener: Listener,
) -> list[str]:
    """Return, and say, where a target knows the rows far better asked otherwise; the workspace keeps it."""
    if target is None or not rows_with_style(rows):
        return []
    step = workspace.step(
        "prompts",
        target=target.fingerprint(),
        tokenizer=tokenizer_fingerprint(target),
        rows=fingerprint_examples(rows),
        prompts=asdict(style),
        max_length=max_length,
    )

    def asked() -> Mapping[str, Any]:
        with listener.task("asking the target in other ways", 1, "pass") as advance:
            found = check_target(target, rows, style, max_length=max_length, device=device)
            advance(1)
        return {"note": found and found.note()}

    notes = [note] if (note := step.once(asked).get("note")) else []
    for note in notes:
        listener.say(note)
    return notes


def check_target(
    target: Checkpoint, rows: Sequence[Example], style: PromptStyle, *, max_length: int, device: str
) -> PromptCheck | None:
    """Load a target and ask it some forget rows as it would be asked, and in every other plausible way."""
    model, tokenizer = load_reader(target, device=pick_device(device)), load_tokenizer(target)
    return check_prompts(model, tokenizer, rows, style=style, max_length=max_length)


def check_places(recipe: Recipe, inputs: Inputs, needs: int) -> None:
    """Raise OutputError unless output and workspace are apart from the inputs and have room.

    `needs` is what the whole run writes, in bytes; what the workspace holds already is taken off.
    """
    models = [model.folder for model in inputs.models.values()]
    data = recipe.data
    named = (data.forget, data.retain, data.holdout, data.refusals)
    files = [Path(name) for name in named if name and Path(name).exists()]
    output, workspace = Path(recipe.output.folder), workspace_folder(recipe)
    left = max(0, needs - folder_size(workspace))
    if output.resolve() == Path.cwd():
        raise OutputError(f"the output {output} is the current folder; name one that does not exist yet")
    check_output(output, [*models, *files], needs=min(left, inputs.reader.nbytes))
    check_workspace(workspace, [output, *models, *files], needs=left)


def workspace_folder(recipe: Recipe) -> Path:
    """Return the folder where the steps of a run keep their results."""
    if recipe.output.workspace:
        return Path(recipe.output.workspace)
    output = Path(recipe.output.folder)
    named = output if output.name not in ("", "..") else output.resolve()
    return workspace_beside(named)


def check_folder(output: Path, names: Sequence[str], what: str) -> None:
    """Raise OutputError for a folder that holds other files than these."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; name a folder for the {what}")
    home = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise OutputError(f"{home} cannot be written to; name another folder for the {what}")
    ours = {name for file in names for name in (file, f".{file}.partial")}
    strange = sorted({path.name for path in output.iterdir()} - ours) if output.exists() else []
    if strange:
        article = "an" if what[0] in "aeiou" else "a"
        raise OutputError(
            f"{output} holds {strange[0]}, which is no part of {article} {what}; name another folder, or an "
            "empty one"
        )


def check_workspace(workspace: Path, others: Sequence[Path], needs: int) -> None:
    """Raise OutputError when the workspace lies inside the output or an input, or lacks room."""
    place = workspace.resolve()
    for path in others:
        if path.resolve() in (place, *place.parents):
            raise OutputError(f"the workspace {workspace} lies inside {path}; name another --workspace")
    if place.exists() and not place.is_dir():
        raise OutputError(f"the workspace {workspace} is a file; name another --workspace")
    check_room(place, needs, "make room, or name a --workspace elsewhere")


def _open(location: str, recipe: Recipe) -> Checkpoint:
    checkpoint = Checkpoint.open(location, allow_pickle=recipe.models.allow_pickle)
    require_causal_lm(checkpoint)
    return checkpoint


def check_unlearned(target: Checkpoint, unlearned: Checkpoint) -> None:
    """Raise MismatchError unless a model may be what some tool made of the target."""
    if target == unlearned:
        raise MismatchError(
            f"the target and the unlearned model are the same folder {target.folder}; name the model from "
            "before unlearning and the one from after it"
        )
    check_sum(target, [unlearned])


def pair_checks(
    target: Checkpoint, base: Checkpoint, method: str, settings: Mapping[str, Any]
) -> dict[str, Callable[[], Any]]:
    """Return all that is asked of target and base, by what it is about; each raises a MismatchError."""

    def two_models() -> None:
        if target == base and METHODS[method].check_settings(settings).starts_at == "base":
            raise MismatchError(
                f"target and base are the same folder {target.folder}; the base must be an earlier "
                "checkpoint that had not seen the forget set"
            )

    def architecture() -> None:
        kinds = [checkpoint.config.get("model_type") for checkpoint in (target, base)]
        if kinds[0] != kinds[1]:
            raise MismatchError(
                f"the target is a {kinds[0]} model and the base a {kinds[1]} model; "
                "the base must be an earlier checkpoint of the target"
            )

    return {
        "two models": two_models,
        "architecture": architecture,
        "tokens": partial(_check_vocabulary, target, base),
        "shapes": partial(check_sum, target, [base]),
    }


def _check_vocabulary(target: Checkpoint, base: Checkpoint) -> None:
    """Raise MismatchError when the two tokenizers give ordinary tokens other numbers.

    Added tokens may get another name along the way.
    """
    ours, theirs = (
        {number: token for token, number in tokenizer.get_vocab().items() if number not in added}
        for tokenizer in map(load_tokenizer, (target, base))
        for added in [tokenizer.added_tokens_decoder]
    )
    other = sorted(number for number in ours.keys() & theirs.keys() if ours[number] != theirs[number])
    if other:
        raise MismatchError(
            f"the tokenizers of target and base disagree on {len(other)} tokens (number {other[0]} is "
            f"{ours[other[0]]!r} in the one and {theirs[other[0]]!r} in the other); "
            "the base must be an earlier checkpoint of the target, with the same vocabulary"
        )


# Rows


def _open_rows(recipe: Recipe) -> tuple[InputRows, list[str]]:
    notes: list[str] = []
    data, seed = recipe.data, recipe.seed
    forget = read_examples(data.forget, columns=data.columns)
    retain = read_examples(data.retain, columns=data.columns, beside=True) if data.retain else []
    retain = _without_shared(forget, retain, recipe, notes)
    everything = retain
    if recipe.prepare:
        if len(retain) < (wanted := recipe.prepare.retain_rows):
            raise DataError(f"{data.retain} has {len(retain)} rows; set prepare.retain_rows ({wanted}) lower")
        retain = at_most(retain, wanted, seed=seed)
    settings = METHODS[recipe.method].check_settings(recipe.method_settings)
    wanted = settings.sample_size(len(forget))  # most methods take as many as there are forget rows
    if retain and len(retain) < wanted:
        asked = f"the forget set's {wanted}" if wanted == len(forget) else f"the {wanted} asked for"
        notes.append(
            f"The retain set has {len(retain)} rows, fewer than {asked}; all of them were used for "
            f"{settings.sample_use}."
        )
    sample = at_most(retain, wanted, seed=seed)
    trials, most = recipe.scales.probe_rows, recipe.evaluation.max_rows
    unseen, source = _unseen(recipe, forget, retain, everything)
    used = {example.key for example in sample}
    held_back = [example for example in retain if example.key not in used]
    if retain and not held_back:
        notes.append("No retain rows were left over for choosing the scales; the retain vector's own served.")
    probe = at_most(held_back or retain, trials, seed=seed + 1)
    tried = {example.key for example in probe}
    rows = InputRows(
        forget=forget,
        retain=retain,
        retain_sample=sample,
        forget_probe=at_most(forget, trials, seed=seed + 1),
        retain_probe=probe,
        spared=spared_rows(recipe, forget, [one for one in retain if one.key not in tried] or retain, notes),
        forget_test=at_most(forget, most, seed=seed + 1),
        retain_test=at_most(retain, most, seed=seed + 1),
        unseen=at_most(unseen, 2 * trials, seed=seed + 3),
        unseen_source=source,
    )
    return rows, notes


def spared_rows(
    recipe: Recipe, forget: Sequence[Example], retain: Sequence[Example], notes: list[str]
) -> Sequence[Example]:
    """Return the rows whose inputs filters spare: of the retain set, and what else is given or shipped.

    `notes` hears what the reader of the record should know of them.
    """
    data, text = recipe.data, list[Example]()
    if data.background:
        text = read_examples(data.background, columns=data.columns, beside=True)
        shared = {second for _, second in shared_rows(forget, text)}
        text = [example for place, example in enumerate(text) if place not in shared]
        if shared:
            notes.append(f"{len(shared)} background rows that also stand in the forget set were left out.")
        if not text and not retain:
            raise DataError("every background row also stands in the forget set; name rows that shall stay")
    elif not retain and recipe.changes:
        text = neutral_examples()
        notes.append("There are no retain rows, so a filter spares the inputs of neutral text alone.")
    return [*retain, *text]


def _unseen(
    recipe: Recipe, forget: Sequence[Example], retain: Sequence[Example], everything: Sequence[Example]
) -> tuple[Sequence[Example], str]:
    """Return the rows to set the yardstick by, and what they are.

    The best there are: holdout rows; what [prepare] left of the retain rows; paraphrases beside the forget
    rows. Wrong answers are no help (docs/scales.md). Without any the base stands alone. Raises DataError for
    holdout rows that were trained on.
    """
    data = recipe.data
    if data.holdout:
        holdout = read_examples(data.holdout, columns=data.columns, beside=True)
        for name, seen in {"forget": forget, "retain": retain}.items():
            if shared := shared_rows(holdout, seen):
                raise DataError(
                    f"{len(shared)} rows of the holdout set also stand in the {name} set (first: "
                    f"{holdout[shared[0][0]].place}); holdout rows must be ones that no model has seen"
                )
        return holdout, "holdout"
    used = {example.key for example in retain}
    if recipe.prepare and (left := [example for example in everything if example.key not in used]):
        return left, "prepared"
    others = [
        replace(question.example, answer=answer)
        for question in read_questions(data.forget, columns=data.columns)
        for answer in question.alternatives.get("paraphrased", ())
    ]
    return (others, "paraphrases") if others else ([], BASE_ALONE)


def _without_shared(
    forget: Sequence[Example], retain: Sequence[Example], recipe: Recipe, notes: list[str]
) -> list[Example]:
    """Return the retain rows that are not forget rows; refuse when there are such rows, unless told."""
    shared = {second for _, second in shared_rows(forget, retain)}
    if shared and not recipe.data.allow_overlap:
        raise DataError(
            f"{len(shared)} rows of the retain set also stand in the forget set (first: row "
            f"{retain[min(shared)].row + 1} of {recipe.data.retain}); remove them, or say --allow-overlap "
            "to have them left out"
        )
    if shared:
        notes.append(f"{len(shared)} retain rows that also stand in the forget set were left out.")
    kept = [example for place, example in enumerate(retain) if place not in shared]
    if retain and not kept:
        raise DataError("every row of the retain set also stands in the forget set; none is left to retain")
    return kept


def _check_rows_fit(inputs: Inputs) -> list[str]:
    """Tokenize everything once, so that a row that cannot be used is named now; return what is cut."""
    rows, recipe = inputs.rows, inputs.recipe
    tokenizer, style = load_tokenizer(inputs.reader), recipe.prompts.style()
    notes = reading_notes(rows.forget, rows.retain, rows.unseen, rows.spared)
    notes += prompt_notes(rows.forget, tokenizer, style)
    whole = recipe.prepare or not inputs.method.has_scales
    trained = [*rows.forget, *(rows.retain if whole else rows.retain_sample)]
    asked = [*rows.forget, *rows.retain_probe, *rows.retain_test, *rows.unseen]
    uses = {
        "training": (trained, recipe.training.max_length),
        "evaluation": (asked, recipe.evaluation.max_length),
    }
    for use, (examples, max_length) in uses.items():
        tokens = tokenize(examples, tokenizer, max_length=max_length, style=style)
        for model in inputs.models.values():
            check_positions(load_config(model), tokens, tokenizer)
        if count := sum(row.truncated for row in tokens):
            notes.append(f"{CUT} {max_length} in {use}: {count}.")
    return notes
