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

from palinode.data.examples import Example, Message
from palinode.data.sources import Form
from palinode.data.tokenize import PromptStyle, end_id, prompt_ids, tokenize
from palinode.errors import DataError, RecipeError
from palinode.influence.sets import AskedAnswer, influence_of_set, set_record
from palinode.methods.method import Vectors
from palinode.models.generation import stream_answer
from palinode.models.loading import load_model, load_tokenizer, pad_token, pick_device
from palinode.pipeline.chatting import form_of
from palinode.pipeline.inputs import check_workspace, open_inputs, workspace_folder
from palinode.pipeline.recipe import Recipe, build_recipe
from palinode.pipeline.record import environment, model_facts
from palinode.pipeline.reporting import find_workspace
from palinode.pipeline.run import Making, find_model, find_vectors, hash_models, read_record
from palinode.pipeline.workspace import Workspace
from palinode.progress import Listener
from palinode.records import workspace_beside
from palinode.settings import InfluenceSettings
from palinode.weights import Checkpoint, Direction

VERSION = 1
"""Version of the layout of what is found, described in docs/influence.md."""


@dataclass(frozen=True, slots=True)
class Asker:
    """The models and rows that an answer is traced in."""

    target: Checkpoint
    base: Checkpoint | None
    vector: Direction
    alpha: float
    chosen_by: str
    forget: int
    """Rows that the vector is of."""
    form: Form
    style: PromptStyle
    workspace: Workspace


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
            vectors.forget,
            scales["forget"],
            "the run's",
            rows,
            form_of(record),
            recipe.prompts.style(),
            workspace,
        )


@contextmanager
def open_recipe(recipe: Recipe, listener: Listener, alpha: float | None) -> Iterator[Asker]:
    """Make a recipe's forget vector, or find it in the workspace; α is the one given, or chosen."""
    if alpha is not None and recipe.has_scales:
        scales = recipe.scales.model_copy(update={"forget": alpha, "retain": recipe.scales.retain or 0.0})
        recipe = recipe.model_copy(update={"scales": scales})
    inputs = open_inputs(recipe)
    if not recipe.has_scales or recipe.scales.groups > 1:
        raise RecipeError("influence takes a method that adds vectors, with one α (scales.groups = 1)")
    hash_models(inputs, listener)
    workspace = Workspace(workspace_folder(recipe))
    check_workspace(workspace.folder, [model.folder for model in inputs.models.values()], needs=0)
    with workspace.locked(listener):
        making = Making(inputs, workspace, listener)
        target, _ = making.given_or_prepared()
        trained, chosen = making.ready(target)
        assert isinstance(trained.result, Vectors)
        assert chosen is not None
        yield Asker(
            target,
            inputs.base,
            trained.vectors.forget,
            chosen.forget,
            "given" if chosen.chosen_by == "given" else "chosen by the yardstick",
            len(inputs.rows.forget),
            "completion" if inputs.rows.forget[0].form in ("completion", "document") else "question",
            recipe.prompts.style(),
            workspace,
        )


Questions = Mapping[str, str | None] | Sequence[Example]
"""Each question with the answer that is asked about, None for the target's own; or rows."""


@dataclass(frozen=True, slots=True)
class Influence:
    """What a set of rows had to do with answers."""

    record: Mapping[str, Any]
    """All of it as plain values (docs/influence.md)."""

    @property
    def answers(self) -> Sequence[Mapping[str, Any]]:
        """What the model without the set makes of each answer, in the order of the questions."""
        return list(self.record["set"]["answers"])


def trace(asker: Asker, questions: Questions, settings: InfluenceSettings, listener: Listener) -> Influence:
    """Return what the model without the set makes of each answer. Raises PalinodeError."""
    device = pick_device(settings.device)
    model, tokenizer = load_model(asker.target, device=device), load_tokenizer(asker.target)
    asked = asked_answers(model, tokenizer, as_examples(questions, asker.form), asker.style, settings)
    alpha = asker.alpha if settings.alpha is None else settings.alpha
    chosen_by = asker.chosen_by if settings.alpha is None else "given"
    with listener.task("asking without the set", 1, "pass") as advance:
        found = influence_of_set(model, asker.target, asker.vector, alpha, asked, pad_id=pad_token(tokenizer))
        advance(1)
    record = {
        "version": VERSION,
        "models": {"target": model_facts(str(asker.target.folder), asker.target)},
        "set": set_record(found, rows=asker.forget, alpha=alpha, chosen_by=chosen_by),
        "environment": environment(device),
    }
    return Influence(record)


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
