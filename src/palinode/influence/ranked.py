"""Rank the rows behind answers: their scores with intervals, and the tokens that carry them.

Gradients of rows are found in the workspace, or computed there once for each checkpoint; what is asked
of them (`ranking.py`) is cheap. Only the rows that are shown go through the models again, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from palinode.data.examples import Example, at_most, fingerprint_examples
from palinode.data.sources import Form
from palinode.data.tokenize import PromptStyle, TokenRow, tokenize
from palinode.errors import DataError
from palinode.history.locating import open_log, open_order, read_salt
from palinode.history.series import CheckpointSeries, learning_rates
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
from palinode.influence.sets import AskedAnswer
from palinode.models.loading import (
    load_model,
    load_tokenizer,
    pad_token,
    pick_device,
    tokenizer_fingerprint,
)
from palinode.models.sums import Projection
from palinode.pipeline.record import model_facts
from palinode.pipeline.workspace import Workspace
from palinode.progress import Advance, Listener
from palinode.settings import InfluenceSettings
from palinode.weights import Checkpoint, Direction

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
        rungs = [(0, asker.base or asker.target)]
        if self.series is not None:
            steps = [found.step for found in self.series.checkpoints]
            rungs = [(step, self.series.open(place)) for place, step in enumerate(steps)]
        weights, weighed = self._weights([step for step, _ in rungs])
        answers = [one.rows for one in asked]
        held = [
            (checkpoint, self._at(checkpoint, answers), own[:, None])
            for (_, checkpoint), own in zip(rungs, weights.T, strict=True)
            if own.any()
        ]
        scores = np.sum([own * rung.scores() for _, rung, own in held], axis=0)
        order = np.argsort(-scores, axis=0, kind="stable")[: settings.top]
        top = [
            self._told(order[:, number].tolist(), scores[:, number], held, number)
            for number in range(len(asked))
        ]
        if settings.tokens:
            self._add_tokens(top, held)
        return {
            "rows": len(self.rows),
            "measure": settings.measure,
            "preconditioner": settings.preconditioner,
            "at": settings.at,
            "width": settings.width,
            "weighed": weighed,
            "checkpoints": [{"step": step, **model_facts(str(one.folder), one)} for step, one in rungs],
            "answers": [[one.example.prompt, one.example.answer] for one in asked],
            "top": top,
        }

    def _told(
        self, places: list[int], scores: Floats, held: Sequence[Held], question: int
    ) -> list[dict[str, Any]]:
        """Return ranked rows of a question with their scores, and the intervals of these."""
        spread = np.sum([own[places] * rung.spread(places, question) for _, rung, own in held], axis=0)
        errors = NORMAL * spread.std(axis=1) * spread.shape[1] ** 0.5
        ranked = []
        for place, error in zip(places, errors.tolist(), strict=True):
            row, score = self.rows[place], float(scores[place])
            told = {"row": place, "place": row.place, "prompt": row.prompt, "answer": row.answer}
            ranked.append({**told, "score": score, "interval": [score - error, score + error]})
        return ranked

    def _add_tokens(self, top: Sequence[Sequence[dict[str, Any]]], held: Sequence[Held]) -> None:
        """Add to each ranked row its tokens with their parts of its score."""
        tokenizer = load_tokenizer(self.asker.target)
        ranked = sorted({one["row"] for found in top for one in found})
        groups = [self._groups[row] for row in ranked]
        wanted = [
            (question, one, ranked.index(one["row"])) for question, found in enumerate(top) for one in found
        ]
        for _, one, number in wanted:
            words = [tokenizer.decode([token]) for row in groups[number] for token in row.ids[row.start :]]
            one["tokens"] = [[str(word), 0.0] for word in words]
        for checkpoint, rung, weights in held:
            with self.listener.task(f"tokens in {checkpoint.folder.name}", len(ranked), "rows") as advance:

                def add(
                    number: int,
                    tokens: Gradients,
                    rung: Rung = rung,
                    weights: Floats = weights,
                    advance: Advance = advance,
                ) -> None:
                    advance(1)
                    for question, one, at in wanted:
                        if at == number:
                            parts = weights[one["row"]] * rung.parts(one["row"], question, tokens)
                            for entry, part in zip(one["tokens"], parts.tolist(), strict=True):
                                entry[1] += part

                model, made = self._projecting(checkpoint)
                made(model, groups, take=add, by_token=True)

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
        step = self.asker.workspace.step(
            "gradients",
            model=checkpoint.fingerprint(),
            rows=fingerprint_examples(self.rows),
            tokenizer=tokenizer_fingerprint(self.asker.target),
            prompts=asdict(self.asker.style),
            settings=settings.model_dump(include={"width", "seed", "preconditioner", "max_length"}),
            device=device.type,
        )
        groups = self._groups
        model, made = self._projecting(checkpoint)
        with self.listener.task(f"gradients in {checkpoint.folder.name}", len(groups), "rows") as advance:
            rows = index_rows(step, len(groups), settings.width, partial(made, model, groups), advance)
        questions = np.empty((len(asked), settings.width), np.float32)
        if settings.at == "target":  # with the signs and the preconditioner of the rows
            model = load_model(self.asker.target, device=device)
        made(model, asked, take=questions.__setitem__)
        return relate(rows, questions, settings.measure)

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
