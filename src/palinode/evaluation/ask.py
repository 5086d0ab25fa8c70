"""Ask a live model: the likelihood of every given answer, and its own answers, greedy and drawn.

One forward pass over a question's answers serves probability, truth ratio, extraction strength, exact
memorisation and the membership attacks alike. It also tells how far the greedy answer follows the right
one, so that generation begins where the two part. No torch until a model is asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING

from palinode.data.examples import Example, Question
from palinode.data.tokenize import PromptStyle, TokenRow, begun_ids, tokenize
from palinode.progress import Advance, Listener, NullListener
from palinode.records import Likelihood, Outcome
from palinode.settings import Asking

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from palinode.models.generation import Sampling
    from palinode.models.likelihoods import TokenScores


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    asking: Asking | None = None,
    *,
    style: PromptStyle | None = None,
    label: str = "evaluating",
    listener: Listener | None = None,
) -> list[Outcome]:
    """Return what a live model does on each question, in the order given.

    Answers follow `asking.answer_prefix`, which is no part of them. The answers of a question do not
    depend on the others asked with it. Raises DataError for a row that cannot be tokenized.
    """
    from palinode.models.loading import check_positions, pad_token

    asking, style, listener = asking or Asking(), style or PromptStyle(), listener or NullListener()
    respondent = _Respondent(model, tokenizer, pad_token(tokenizer), asking, style, label, listener)
    rows = respondent.read(questions)
    check_positions(model.config, [row for entry in rows for row in entry.rows], tokenizer)
    return respondent.answer(rows)


@dataclass(slots=True)
class _Asked:
    """A question with its rows of tokens."""

    question: Question
    own: list[TokenRow] = field(default_factory=list)
    """The right answer; of a long document the pieces."""
    others: dict[str, list[TokenRow]] = field(default_factory=dict)
    """The other answers by kind."""
    prefix: tuple[int, ...] = ()
    """What the model's own answers begin with."""

    @property
    def rows(self) -> list[TokenRow]:
        """All rows that are scored."""
        return [*self.own, *(row for rows in self.others.values() for row in rows)]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids that the model's own answers follow; none for a document."""
        row = self.own[0]
        return () if self.question.example.form == "document" else (*row.ids[: row.start], *self.prefix)


@dataclass(frozen=True, slots=True)
class _Respondent:
    """A live model with everything that stays the same from question to question."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    """What rows of a batch are filled up with."""
    asking: Asking
    style: PromptStyle
    label: str
    listener: Listener

    def read(self, questions: Sequence[Question]) -> list[_Asked]:
        """Return questions with all their answers tokenized."""
        asked = [_Asked(question) for question in questions]
        homes: list[list[TokenRow]] = []  # where the rows of each answer go
        examples: list[Example] = []
        for entry in asked:
            homes.append(entry.own)
            examples.append(entry.question.example)
            for kind, texts in entry.question.alternatives.items():
                entry.others[kind] = []
                homes += [entry.others[kind]] * len(texts)
                examples += [replace(entry.question.example, answer=text) for text in texts]
        rows = tokenize(examples, self.tokenizer, max_length=self.asking.max_length, style=self.style)
        for row in rows:
            homes[row.example].append(row)
        if self.asking.answer_prefix:  # tokenized as the beginning of an answer to each question
            spoken = [entry for entry in asked if entry.question.example.form != "document"]
            forced = [replace(entry.question.example, answer=self.asking.answer_prefix) for entry in spoken]
            for entry, ids in zip(spoken, begun_ids(forced, self.tokenizer, self.style), strict=True):
                entry.prefix = tuple(ids)
        return asked

    def answer(self, asked: list[_Asked]) -> list[Outcome]:
        """Return the outcome of each question."""
        scores = self._scores([row for entry in asked for row in entry.rows])
        spoken = [place for place, entry in enumerate(asked) if entry.prompt]
        own: list[TokenScores] = []
        alternatives: list[dict[str, tuple[Likelihood, ...]]] = []
        for entry in asked:
            own.append(_joined([next(scores) for _ in entry.own]))
            texts = entry.question.alternatives
            alternatives.append(
                {
                    kind: tuple(Likelihood(text, next(scores).logprobs) for text in texts[kind])
                    for kind in entry.others
                }
            )
        norms = self._gradient_norms(asked)
        greedy = self._greedy([asked[place] for place in spoken], [own[place] for place in spoken])
        samples = self._samples([asked[place] for place in spoken])
        said = dict(zip(spoken, zip(greedy, samples, strict=True), strict=True))
        return [
            Outcome(
                row=entry.question.example.row,
                prompt=entry.question.example.prompt,
                expected=entry.question.example.answer,
                generated=said[place][0] if place in said else None,
                logprobs=own[place].logprobs,
                hits=own[place].hits,
                standardised=own[place].standardised,
                alternatives=alternatives[place],
                accepted=entry.question.accepted,
                samples=said[place][1] if place in said else (),
                gradient_norm=norms[place],
            )
            for place, entry in enumerate(asked)
        ]

    def _scores(self, rows: Sequence[TokenRow]) -> Iterator[TokenScores]:
        """Yield what the model makes of each row."""
        from palinode.models.likelihoods import score_rows

        with self.listener.task(f"{self.label}: likelihoods", len(rows), "rows") as advance:
            return iter(
                score_rows(
                    self.model,
                    rows,
                    pad_id=self.pad_id,
                    standardise=self.asking.standardise,
                    on_progress=advance,
                    say=self.listener.say,
                )
            )

    def _gradient_norms(self, asked: Sequence[_Asked]) -> list[float | None]:
        """Return GradNorm of each right answer without its last token, the end, as in open-unlearning.

        None where it is not asked for, for a cut document, and where there is no other token.
        """
        from palinode.models.reading import gradient_norms

        places = [
            place for place, entry in enumerate(asked) if len(entry.own) == 1 and entry.own[0].scored > 1
        ]
        if not self.asking.gradient_norms or not places:
            return [None] * len(asked)
        with self.listener.task(f"{self.label}: gradients", len(places), "rows") as advance:
            found = gradient_norms(
                self.model,
                [replace(row, ids=row.ids[:-1]) for (row,) in (asked[place].own for place in places)],
                pad_id=self.pad_id,
                on_progress=advance,
            )
        by_place = dict(zip(places, found, strict=True))
        return [by_place.get(place) for place in range(len(asked))]

    def _greedy(self, asked: Sequence[_Asked], scores: Sequence[TokenScores]) -> list[str | None]:
        """Return the greedy answer to each question, begun where the model is known to say the right one."""
        if not self.asking.generate or not asked:
            return [None] * len(asked)
        from palinode.models.likelihoods import score_rows, tolerance

        # Is what it says after a prompt the same with the answer behind it? Rotary frequencies may follow a
        # row's length, so it is tried on the longest.
        begun, longest = None, max(range(len(asked)), key=lambda place: len(asked[place].own[0].ids))
        row = asked[longest].own[0]
        (alone,) = score_rows(self.model, [replace(row, ids=row.ids[: row.start + 1])], pad_id=self.pad_id)
        if abs(alone.logprobs[0] - scores[longest].logprobs[0]) <= tolerance(self.model):
            begun = [
                () if entry.prefix else said_right(entry.own[0], own)
                for entry, own in zip(asked, scores, strict=True)
            ]
        with self.listener.task(f"{self.label}: answers", len(asked), "rows") as advance:
            texts = self._generate(asked, [entry.prompt for entry in asked], advance, begun=begun)
        return [*texts]

    def _samples(self, asked: Sequence[_Asked]) -> list[tuple[str, ...]]:
        """Return the answers drawn for each question."""
        from palinode.models.generation import Sampling

        count = self.asking.samples
        if not count or not asked:
            return [()] * len(asked)
        prompts = [entry.prompt for entry in asked for _ in range(count)]
        seeds = [sample_seed(self.asking.seed, entry.prompt, n) for entry in asked for n in range(count)]
        sampling = Sampling(self.asking.temperature, self.asking.top_p, seeds)
        with self.listener.task(f"{self.label}: samples", len(prompts), "answers") as advance:
            texts = self._generate(asked, prompts, advance, sampling=sampling)
        return [tuple(texts[begin : begin + count]) for begin in range(0, len(texts), count)]

    def _generate(
        self,
        asked: Sequence[_Asked],
        prompts: Sequence[Sequence[int]],
        advance: Advance,
        *,
        begun: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Return the text that the model gives after each prompt."""
        from palinode.models.generation import generate, stops_of

        forms = {entry.question.example.form for entry in asked}
        texts = self.asking.stop_texts
        longest = max((len(text.encode()) for text in texts), default=0)

        def ended(tokens: Sequence[int]) -> bool:
            """Tell whether the end of an answer holds a stop text; a miss only makes it longer."""
            end = str(self.tokenizer.decode(list(tokens[-longest - 4 :]), skip_special_tokens=True))
            return any(text in end for text in texts)

        answers = generate(
            self.model,
            prompts,
            pad_id=self.pad_id,
            stop_ids=stops_of(self.model, self.tokenizer, forms, self.style),
            max_new_tokens=self.asking.max_new_tokens,
            min_new_tokens=self.asking.min_new_tokens,
            batch_rows=self.asking.batch_rows,
            begun=begun,
            sampling=sampling,
            ended=ended if texts else None,
            on_progress=advance,
            say=self.listener.say,
        )
        return [self._text(answer) for answer in answers]

    def _text(self, tokens: Sequence[int]) -> str:
        """Return an answer as text, cut before the first stop text."""
        text = str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        places = [text.find(stop) for stop in self.asking.stop_texts]
        return text[: min((place for place in places if place >= 0), default=len(text))].strip()


def said_right(row: TokenRow, scores: TokenScores) -> tuple[int, ...]:
    """Return the ids, end token included, that the model's greedy answer has in common with the right one.

    As far as every scored token is the most likely one, it is what the model would have said.
    """
    agreed = sum(1 for _ in takewhile(bool, scores.hits))
    return row.ids[row.start : row.start + agreed]


def sample_seed(seed: int, prompt: Sequence[int], number: int) -> int:
    """Return the seed of a question's sample: a hash of seed, prompt and the sample's number."""
    text = repr((seed, tuple(prompt), number)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _joined(pieces: Sequence[TokenScores]) -> TokenScores:
    """Return the scores of the pieces of a document as those of the whole."""
    if len(pieces) == 1:
        return pieces[0]
    return replace(
        pieces[0],
        logprobs=tuple(value for piece in pieces for value in piece.logprobs),
        hits=tuple(hit for piece in pieces for hit in piece.hits),
        standardised=tuple(value for piece in pieces for value in piece.standardised),
    )
