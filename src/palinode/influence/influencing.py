"""Ask what a set of rows, or each row, had to do with an answer: from a finished run, or from a recipe.

A finished run is asked as it lies there: its vector and its α are found, nothing is trained. A recipe's
forget vector is made by the steps that `unlearn` takes, or found where they were taken before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palinode.data.examples import Example, Message, read_examples
from palinode.data.sources import Form
from palinode.data.tokenize import PromptStyle, end_id, prompt_ids, tokenize
from palinode.errors import DataError, RecipeError
from palinode.history.series import CheckpointSeries
from palinode.influence.ranked import Asker, Ranking
from palinode.influence.sets import AskedAnswer, influence_of_set
from palinode.methods.method import Vectors
from palinode.models.generation import stream_answer
from palinode.models.loading import (
    load_model,
    load_tokenizer,
    pad_token,
    pick_device,
)
from palinode.pipeline.chatting import form_like, form_of
from palinode.pipeline.costs import make_plan
from palinode.pipeline.inputs import ask_as_trained, check_workspace, open_inputs, workspace_folder
from palinode.pipeline.recipe import Recipe, build_recipe
from palinode.pipeline.record import environment, model_facts
from palinode.pipeline.reporting import find_workspace
from palinode.pipeline.run import Making, find_model, find_vectors, hash_models, read_record
from palinode.pipeline.workspace import Workspace, folder_size
from palinode.progress import Listener
from palinode.records import workspace_beside
from palinode.settings import InfluenceSettings
from palinode.weights import Checkpoint

VERSION = 1
"""Version of the layout of what is found, described in docs/influence.md."""


@contextmanager
def open_run(folder: Path, listener: Listener) -> Iterator[Asker]:
    """Open the output of a finished run, and keep other runs out of its workspace meanwhile.

    Raises InputError that says what is missing where the run cannot be asked any more.
    """
    out = Checkpoint.open(folder)
    record = read_record(out.folder)
    place = find_workspace(out.folder, record) or workspace_beside(out.folder)
    target, base = (find_model(record, role, place) for role in ("target", "base"))
    vectors = find_vectors(record, place, target, base)
    assert target is not None  # or there would be no vectors
    recipe = build_recipe(record["recipe"])
    scales, rows = record["scales"], record["data"]["forget"]["rows"]
    workspace = Workspace(place)
    with workspace.locked(listener):
        yield Asker(
            target,
            base,
            form_of(record),
            recipe.prompts.style(),
            workspace,
            [place for place in (recipe.data.forget, recipe.data.retain) if place],
            vectors.forget,
            scales["forget"],
            "the run's",
            rows,
        )


@contextmanager
def open_recipe(recipe: Recipe, listener: Listener, alpha: float | None) -> Iterator[Asker]:
    """Make a recipe's forget vector, or find it in the workspace; α is the one given, or chosen."""
    recipe = with_alpha(recipe, alpha)
    inputs = open_inputs(recipe)
    if not recipe.has_scales or recipe.scales.groups > 1:
        raise RecipeError("influence takes a method that adds vectors, with one α (scales.groups = 1)")
    hash_models(inputs, listener)
    workspace = Workspace(workspace_folder(recipe))
    models, there = [model.folder for model in inputs.models.values()], folder_size(workspace.folder)
    check_workspace(workspace.folder, models, needs=max(0, make_plan(inputs).disk - there))
    with workspace.locked(listener):
        making = Making(ask_as_trained(inputs, workspace, listener), workspace, listener)
        target, _ = making.given_or_prepared()
        trained, chosen = making.ready(target)
        assert isinstance(trained.result, Vectors)
        assert chosen is not None
        yield Asker(
            target,
            inputs.base,
            form_like(inputs.rows.forget),
            recipe.prompts.style(),
            workspace,
            [place for place in (recipe.data.forget, recipe.data.retain) if place],
            trained.vectors.forget,
            chosen.forget,
            "given" if chosen.chosen_by == "given" else "chosen by the yardstick",
            len(inputs.rows.forget),
        )


def with_alpha(recipe: Recipe, alpha: float | None) -> Recipe:
    """Return a recipe with this α given, and β none where it says nothing of it."""
    if alpha is None or not recipe.has_scales:
        return recipe
    scales = recipe.scales.model_copy(update={"forget": alpha, "retain": recipe.scales.retain or 0.0})
    return recipe.model_copy(update={"scales": scales})


@contextmanager
def open_models(
    target: Checkpoint,
    base: Checkpoint | None,
    rows: Sequence[Example],
    workspace: Path,
    style: PromptStyle,
    listener: Listener,
) -> Iterator[Asker]:
    """Open models alone, without a set of rows that was taken out: their rows can be ranked."""
    place = Workspace(workspace)
    check_workspace(workspace, [model.folder for model in (target, base) if model], needs=0)
    with place.locked(listener):
        yield Asker(target, base, form_like(rows), style, place)


Questions = Mapping[str, str | None] | Sequence[Example]
"""Each question with the answer that is asked about, None for the target's own; or rows."""


@dataclass(frozen=True, slots=True)
class Influence:
    """What a set of rows had to do with answers."""

    record: Mapping[str, Any]
    """All of it as plain values (docs/influence.md)."""
    asked: Sequence[Example] = ()
    """The questions, with the answers that were asked about."""

    @property
    def answers(self) -> Sequence[Mapping[str, Any]]:
        """What the model without the set makes of each answer, in the order of the questions."""
        return list(self.record["set"]["answers"] if self.record["set"] else ())


def trace(
    asker: Asker,
    questions: Questions,
    settings: InfluenceSettings,
    listener: Listener,
    *,
    rows: Sequence[Example] | None = None,
    series: CheckpointSeries | None = None,
) -> Influence:
    """Return what the model without the set makes of each answer, and the rows behind it.

    `rows` are ranked by their gradients in the checkpoints of a series, or in the base. Raises PalinodeError.
    """
    asker, device = replace(asker, style=settings.style or asker.style), pick_device(settings.device)
    model, tokenizer = load_model(asker.target, device=device), load_tokenizer(asker.target)
    asked = asked_answers(model, tokenizer, as_examples(questions, asker.form), asker.style, settings)
    alpha = asker.alpha if settings.alpha is None else settings.alpha
    chosen_by = asker.chosen_by if settings.alpha is None else "given"
    told = ranking = None
    if asker.vector is not None:
        with listener.task("asking without the set", 1, "pass") as advance:
            pad_id = pad_token(tokenizer)
            found = influence_of_set(model, asker.target, asker.vector, alpha, asked, pad_id=pad_id)
            advance(1)
        answers = [one.as_record() for one in found]
        told = {"rows": asker.forget, "alpha": alpha, "chosen_by": chosen_by, "answers": answers}
    del model
    if settings.top:
        if rows is None:
            columns = settings.columns
            rows = [row for place in asker.data for row in read_examples(place, columns=columns, beside=True)]
        ranking = Ranking(asker, rows, series, settings, listener).of(asked)
    record = {
        "version": VERSION,
        "models": {"target": model_facts(str(asker.target.folder), asker.target)},
        "set": told,
        "ranking": ranking,
        "environment": environment(device),
    }
    return Influence(record, [one.example for one in asked])


def as_examples(questions: Questions, form: Form) -> list[Example]:
    """Return questions as rows; one without an answer has an empty one. Raises DataError for none."""
    if not questions:
        raise DataError("no question was asked; name one (--ask), or a file of them (--questions)")
    if not isinstance(questions, Mapping):
        return [*questions]
    role = "prompt" if form == "completion" else "user"
    return [
        Example(row, "the questions", form, (Message(role, question),), answer or "")
        for row, (question, answer) in enumerate(questions.items())
    ]


def asked_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    style: PromptStyle,
    settings: InfluenceSettings,
) -> list[AskedAnswer]:
    """Return the answers with their tokens; where none is given the model is asked for its own.

    Raises DataError for a question to which it says nothing.
    """
    said = []
    for example in examples:
        text = example.answer
        if not text:
            text = stream_answer(
                model,
                tokenizer,
                prompt_ids(example, tokenizer, style),
                stop_ids=[end_id(example.form, tokenizer, style)],
                max_new_tokens=settings.max_new_tokens,
                on_text=lambda _: None,
            )
            text = text if example.form == "completion" else text.strip()
            if not text.strip():
                raise DataError(
                    f"the target gives no answer to {example.prompt!r}: it ends at once; say with --answer "
                    "which answer is asked about"
                )
        said.append(replace(example, answer=text))
    rows = tokenize(said, tokenizer, max_length=settings.max_length, style=style)
    found = []
    for place, (example, before) in enumerate(zip(said, examples, strict=True)):
        own = tuple(row for row in rows if row.example == place)
        words = tuple(str(tokenizer.decode([token])) for row in own for token in row.ids[row.start :])
        found.append(AskedAnswer(example, own, not before.answer, words))
    return found
