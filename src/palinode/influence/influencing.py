"""Ask what a set of rows, or each row, had to do with an answer: from a finished run, or from a recipe.

A finished run is asked as it lies there: its vector and its α are found, nothing is trained. A recipe's
forget vector is made by the steps that `unlearn` takes, or found where they were taken before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palinode.data.examples import Example, Message, at_most, fingerprint_examples, read_examples
from palinode.data.sources import Form
from palinode.data.tokenize import PromptStyle, TokenRow, prompt_ids, tokenize
from palinode.errors import DataError, RecipeError
from palinode.history.locating import open_log, open_order, read_salt
from palinode.history.series import CheckpointSeries, learning_rates
from palinode.influence.curvature import ekfac_scores
from palinode.influence.ranking import (
    MOMENT_ROWS,
    Floats,
    Gradients,
    Rung,
    adam_scales,
    exposure_weights,
    index_rows,
    projected,
    relate,
    seen_in_log,
    seen_in_order,
)
from palinode.influence.sets import AskedAnswer, influence_of_set
from palinode.methods.method import Vectors
from palinode.models.generation import stops_of, stream_answer
from palinode.models.loading import load_model, load_tokenizer, pad_token, pick_device, tokenizer_fingerprint
from palinode.models.reading import Projection
from palinode.pipeline.chatting import form_like, form_of
from palinode.pipeline.costs import make_plan
from palinode.pipeline.inputs import ask_as_trained, check_workspace, open_inputs, workspace_folder
from palinode.pipeline.recipe import Recipe, build_recipe
from palinode.pipeline.reporting import environment, find_model, find_workspace, model_facts, read_record
from palinode.pipeline.run import Making, find_vectors, hash_models
from palinode.pipeline.workspace import Step, Workspace, folder_size
from palinode.progress import Listener
from palinode.records import workspace_beside
from palinode.settings import InfluenceSettings
from palinode.weights import Checkpoint, Direction

VERSION = 1
"""Version of the layout of what is found, described in docs/influence.md."""


NORMAL = 1.96
"""Standard errors to each side in which a normal figure lies 95 times in 100."""


@dataclass(frozen=True, slots=True)
class Asker:
    """The models and rows that an answer is traced in."""

    target: Checkpoint
    base: Checkpoint | None
    form: Form
    style: PromptStyle
    workspace: Workspace
    data: Sequence[str] = ()
    """Files of the rows that are ranked where no others are named."""
    vector: Direction | None = None
    """Of a set of rows; None where only single rows are asked for."""
    alpha: float = 1.0
    chosen_by: str = "given"
    forget: int = 0
    """Rows that the vector is of."""


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


Held = tuple[Checkpoint, Rung, Floats]
"""A checkpoint, the gradients there, and how much each row counts there, [rows, 1]."""


@dataclass(frozen=True)
class Ranking:
    """What rows are ranked with."""

    asker: Asker
    rows: Sequence[Example]
    series: CheckpointSeries | None
    settings: InfluenceSettings
    listener: Listener

    def of(self, asked: Sequence[AskedAnswer]) -> dict[str, Any]:
        """Return the highest rows of each answer, and how they were ranked, as plain values."""
        settings, asker = self.settings, self.asker
        if not self.rows:
            raise DataError("there are no rows to rank; name a set that has some (--rows)")
        curved = settings.engine == "bergson"
        unread = {"measure", "preconditioner", "at", "tokens", "width"} & settings.model_fields_set
        if curved and unread:
            raise RecipeError(f"--{min(unread)} is for Palinode's scores; leave it out with --engine bergson")
        rungs = [(0, asker.base or asker.target)]
        if self.series is not None:
            steps = [found.step for found in self.series.checkpoints]
            rungs = [(step, self.series.open(place)) for place, step in enumerate(steps)]
        weights, weighed = self._weights([step for step, _ in rungs])
        answers = [one.rows for one in asked]
        found = self._curved if curved else self._at
        held: Sequence[tuple[Checkpoint, Any, Floats]] = [
            (checkpoint, found(checkpoint, answers), own[:, None])
            for (_, checkpoint), own in zip(rungs, weights.T, strict=True)
            if own.any()
        ]
        scores = np.sum([own * (one if curved else one.scores()) for _, one, own in held], axis=0)
        order = np.argsort(-scores, axis=0, kind="stable")[: settings.top]
        top = [
            self._told(order[:, number].tolist(), scores[:, number], () if curved else held, number)
            for number in range(len(asked))
        ]
        if settings.tokens:
            self._add_tokens(top, held)
        return {
            "rows": len(self.rows),
            "engine": settings.engine,
            "measure": "ek-fac" if curved else settings.measure,
            **({} if curved else settings.model_dump(include={"preconditioner", "at", "width"})),
            "weighed": weighed,
            "checkpoints": [{"step": step, **model_facts(str(one.folder), one)} for step, one in rungs],
            "answers": [[one.example.prompt, one.example.answer] for one in asked],
            "top": top,
        }

    def _told(
        self, places: list[int], scores: Floats, held: Sequence[Held], question: int
    ) -> list[dict[str, Any]]:
        """Return ranked rows of a question with their scores, and the intervals of these."""
        ranked = [
            {"row": place, "place": row.place, "prompt": row.prompt, "answer": row.answer, "score": score}
            for place, row, score in ((place, self.rows[place], float(scores[place])) for place in places)
        ]
        if held:
            spread = np.sum([own[places] * rung.spread(places, question) for _, rung, own in held], axis=0)
            errors = NORMAL * spread.std(axis=1) * spread.shape[1] ** 0.5
            for one, error in zip(ranked, errors.tolist(), strict=True):
                one["interval"] = [one["score"] - error, one["score"] + error]
        return ranked

    def _add_tokens(self, top: Sequence[Sequence[dict[str, Any]]], held: Sequence[Held]) -> None:
        """Add to each ranked row its tokens with their parts of its score."""
        tokenizer, kept = load_tokenizer(self.asker.target), dict[int, Gradients]()
        ranked = [(question, one) for question, found in enumerate(top) for one in found]
        for _, one in ranked:
            ids = (token for row in self._groups[one["row"]] for token in row.ids[row.start :])
            one["tokens"] = [[str(tokenizer.decode([token])), 0.0] for token in ids]
        places = sorted({one["row"] for _, one in ranked})
        for checkpoint, rung, weights in held:
            model, made = self._projecting(checkpoint)
            with self.listener.task(f"tokens in {checkpoint.folder.name}", len(places), "rows") as advance:
                for place in places:
                    made(model, [self._groups[place]], take=kept.__setitem__, by_token=True)
                    for question, one in ranked:
                        if one["row"] == place:
                            parts = weights[place] * rung.parts(place, question, kept[0])
                            one["tokens"] = [
                                [word, own + part]
                                for (word, own), part in zip(one["tokens"], parts.tolist(), strict=True)
                            ]
                    advance(1)

    @cached_property
    def _groups(self) -> list[list[TokenRow]]:
        """The tokens of each row; several pieces for a long document."""
        tokenizer, style = load_tokenizer(self.asker.target), self.asker.style
        tokens = tokenize(self.rows, tokenizer, max_length=self.settings.max_length, style=style)
        return [list(own) for _, own in groupby(tokens, key=lambda row: row.example)]

    def _projecting(self, checkpoint: Checkpoint) -> tuple[PreTrainedModel, Callable[..., None]]:
        """Return a checkpoint's model, and `projected` for it: it takes token rows, hands on gradients."""
        settings, pad_id = self.settings, pad_token(load_tokenizer(self.asker.target))
        model, scales = load_model(checkpoint, device=pick_device(settings.device)), None
        if settings.preconditioner == "adam":
            tokens = [row for group in self._groups for row in group]
            scales = adam_scales(model, at_most(tokens, MOMENT_ROWS, seed=settings.seed), pad_id=pad_id)
        projection = Projection(model, seed=settings.seed, width=settings.width)
        return model, partial(projected, projection=projection, pad_id=pad_id, scales=scales)

    def _at(self, checkpoint: Checkpoint, asked: Sequence[Sequence[TokenRow]]) -> Rung:
        """Hold rows and answers together in one checkpoint, the gradients of rows found or computed."""
        settings, device = self.settings, pick_device(self.settings.device)
        step = self._step("gradients", checkpoint, {"width", "seed", "preconditioner", "max_length"})
        groups = self._groups
        model, made = self._projecting(checkpoint)
        with self.listener.task(f"gradients in {checkpoint.folder.name}", len(groups), "rows") as advance:
            rows = index_rows(step, len(groups), settings.width, partial(made, model, groups), advance)
        questions = np.empty((len(asked), settings.width), np.float32)
        if settings.at == "target":  # with the signs and the preconditioner of the rows
            model = load_model(self.asker.target, device=device)
        made(model, asked, take=questions.__setitem__)
        return relate(rows, questions, settings.measure)

    def _curved(self, checkpoint: Checkpoint, asked: Sequence[Sequence[TokenRow]]) -> Floats:
        """Return the scores of rows by curvature in one checkpoint."""
        settings, device = self.settings, pick_device(self.settings.device)
        step = self._step("curvature", checkpoint, {"seed", "max_length"})
        model = load_model(checkpoint, device=device)
        with self.listener.task(f"curvature of {checkpoint.folder.name}", 1, "pass") as advance:
            found = ekfac_scores(model, self._groups, asked, step, seed=settings.seed)
            advance(1)
        return found

    def _step(self, name: str, checkpoint: Checkpoint, decide: set[str]) -> Step:
        """Return the step that keeps what rows are to one checkpoint; `decide` are settings."""
        return self.asker.workspace.step(
            name,
            model=checkpoint.fingerprint(),
            rows=fingerprint_examples(self.rows),
            tokenizer=tokenizer_fingerprint(self.asker.target),
            prompts=asdict(self.asker.style),
            settings=self.settings.model_dump(include=decide),
            device=pick_device(self.settings.device).type,
        )

    def _weights(self, steps: Sequence[int]) -> tuple[Floats, str]:
        """Return the weight of each row in each checkpoint, and what it rests on, in words."""
        settings = self.settings
        if settings.log is None and settings.order is None:
            return np.full((len(self.rows), len(steps)), 1 / len(steps)), "all rows and checkpoints alike"
        assert self.series is not None  # or the caller has refused it
        known, order, data = learning_rates(self.series), None, None
        if settings.order is not None:
            order, data = open_order(settings.order)
            known = known or dict(enumerate(getattr(order, "rates", ()), start=1))

        def rate(step: int) -> float:
            return float(np.interp(step, list(known), list(known.values()))) if known else 1.0

        told = "at the learning rates of these steps" if known else "all steps alike"
        if settings.log is not None:
            salt = read_salt(settings.salt)
            seen = seen_in_log(open_log(settings.log, salt=salt), self.rows, rate, salt=salt)
        else:
            assert order is not None
            seen = seen_in_order(order, data or self.rows, self.rows, rate)
        if not seen:
            raise DataError("none of the rows to rank is in the log or order; are they of this training?")
        return exposure_weights(steps, seen, len(self.rows)), f"steps in which rows were really seen, {told}"


def as_examples(questions: Questions, form: Form) -> list[Example]:
    """Return questions as rows; one without an answer has an empty one."""
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
                stop_ids=stops_of(model, tokenizer, [example.form], style),
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
