"""Is the target asked as it was trained? Some forget rows are put to it in every plausible way.

A model that learned its rows as plain text and is asked in a chat template, or under another system
prompt, looks as if it had forgotten them. Each row's answer is scored under the chosen prompt and, after
a glance at two rows, under those others that look better; ways that give the same ids are asked once.
Another way is far better where

    P' >= max(0.25, 1.5 P)    and    log P' >= log P / 2    and    the gain in log P exceeds twice its error

with P the mean over rows of the answer's probability, and log P that of its mean token log-probability.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from palinode.data.examples import Example, Message, at_most
from palinode.data.rendering import Template
from palinode.data.tokenize import PromptStyle, TokenRow, begun_ids, tokenize
from palinode.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 8
"""Rows that are asked."""
GLANCE = 2
"""Rows that are asked first; ways in which they are no better known are left at that."""
ANSWER_TOKENS = 32
"""Tokens of an answer that are scored; its beginning tells."""
UNKNOWN = 0.05
"""Mean answer probability below which a model does not know rows."""
KNOWN = 0.25
"""Mean answer probability from which a model may be said to know rows."""
HIGHER = 1.5
"""How many times the chosen prompt's probability another way must reach."""
FAR = 0.5
"""Share of the chosen prompt's surprise that another way may leave."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to put the rows to a model."""

    words: str
    """How it is asked, to stand after "asked like this:"."""
    fix: str
    """What has the rows put that way."""
    rows: Sequence[TokenRow]


@dataclass(frozen=True, slots=True)
class PromptCheck:
    """What a model makes of rows as they are asked, and of another way if that is far better."""

    rows: int
    asked: float
    """Mean answer probability under the chosen prompt."""
    best: float
    """That of the better way; of the chosen one where no other is far better."""
    better: Way | None
    """The way that is far better."""

    def sentences(self, name: str = "target") -> tuple[str, str] | None:
        """Return what is better and what to do about it; None where the model is asked rightly."""
        if self.better is None:
            return None
        return (
            f"the {name} knows these rows much better when asked like this: {self.better.words} "
            f"(answer probability {self.best:.2f}, and {self.asked:.2f} as asked now; {self.rows} rows)",
            f"if it was trained that way, {self.better.fix}",
        )

    def note(self, name: str = "target") -> str | None:
        """Return both as a note."""
        said = self.sentences(name)
        return said and f"{said[0][0].upper()}{said[0][1:]}; {said[1]}."


def check_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    style: PromptStyle,
    max_length: int,
) -> PromptCheck | None:
    """Ask a live model some of the rows in every plausible way; None for rows that no style changes.

    At most ROWS rows are asked as chosen, and in the ways that look better at a glance. Raises DataError
    where a row cannot be put as chosen.
    """
    from palinode.models.loading import check_positions, position_limit

    asked = rows_with_style(examples)
    if not asked:
        return None
    limit = min(max_length, position_limit(model.config) or max_length)
    drawn = at_most(asked, ROWS, seed=0)
    chosen, *others = plausible_ways(drawn, tokenizer, style, max_length=limit)
    check_positions(model.config, chosen.rows, tokenizer)
    known = int(model.config.get_text_config().vocab_size)  # it was not trained with tokens beyond
    (own,) = _levels(model, tokenizer, [chosen.rows])
    if HIGHER * _probability(own) > 1:  # no other can be far better
        return decide([chosen], [own])
    others = [way for way in others if all(max(row.ids) < known for row in way.rows)]
    glances = _levels(model, tokenizer, [way.rows[:GLANCE] for way in others])
    # a few rows do well enough for a way that may be far better over all of them
    least = max(KNOWN / 2, _probability(own[:GLANCE]) * (1 + HIGHER) / 2)
    others = [way for way, glance in zip(others, glances, strict=True) if _probability(glance) >= least]
    return decide([chosen, *others], [own, *_levels(model, tokenizer, [way.rows for way in others])])


def _levels(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ways: Sequence[Sequence[TokenRow]]
) -> list[list[float]]:
    """Return the mean token log-probability of each row's answer, in every way."""
    from palinode.models.likelihoods import score_rows
    from palinode.models.loading import pad_token

    scores = iter(score_rows(model, [row for rows in ways for row in rows], pad_id=pad_token(tokenizer)))
    return [[fmean(next(scores).logprobs) for _ in rows] for rows in ways]


def _probability(level: Sequence[float]) -> float:
    return fmean(map(math.exp, level))


def rows_with_style(examples: Sequence[Example]) -> list[Example]:
    """Return the rows that can be put in several ways; completions and documents have one."""
    return [example for example in examples if example.form in ("question", "chat")]


def decide(ways: Sequence[Way], levels: Sequence[Sequence[float]]) -> PromptCheck:
    """Return what the mean token log-probabilities of each row's answer say; the first way is the chosen."""
    means = [*map(_probability, levels)]
    best = max(range(len(ways)), key=lambda place: fmean(levels[place]))
    better = ways[best] if far_better(levels[best], levels[0]) else None
    return PromptCheck(len(levels[0]), means[0], means[best if better else 0], better)


def far_better(other: Sequence[float], chosen: Sequence[float]) -> bool:
    """Tell whether rows are known under another way, much better than as chosen and beyond noise."""
    gains = [one - two for one, two in zip(other, chosen, strict=True)]
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    before, after = _probability(chosen), _probability(other)
    higher = after >= max(KNOWN, HIGHER * before)
    return higher and fmean(other) >= FAR * fmean(chosen) and fmean(gains) > 2 * error


def plausible_ways(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, style: PromptStyle, *, max_length: int
) -> list[Way]:
    """Return the chosen way to put these rows, then every other that gives other ids."""
    chosen = Way("as chosen", "change nothing", _rows(examples, tokenizer, style, max_length))
    ways = {tuple(row.ids for row in chosen.rows): chosen}
    for words, fix, other, own in _others(examples, tokenizer, style):
        try:
            rows = _rows(other, tokenizer, own, max_length)
        except InputError:  # no way at all: its prompts are too long, or the template cannot show them
            continue
        ways.setdefault(tuple(row.ids for row in rows), Way(words, fix, rows))
    return list(ways.values())


Other = tuple[str, str, Sequence[Example], PromptStyle]
"""Another way in words, what brings it about, and the rows and the style that it is made of."""


def _others(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, style: PromptStyle
) -> Iterator[Other]:
    """Yield the other ways; some of them may be the chosen one."""
    if tokenizer.chat_template:
        yield from _in_template(examples, tokenizer, style)
        plain = replace(style, chat=False)
        yield "as plain text, Question: … Answer: …", _settings(plain, style), examples, plain
    for gap, name in {" ": "a blank", "\n": "a line break"}.items():
        end = "completion begin with" if gap == " " else "prompt end with"
        fix = f"give the rows as prompt and completion, and let each {end} {name}"
        raw = [_raw(example, gap) for example in examples]
        if all(raw):
            yield f"as raw text, with {name} between question and answer", fix, [*filter(None, raw)], style


def _in_template(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, style: PromptStyle
) -> Iterator[Other]:
    """Yield the ways of the chat template: system prompts, dates it falls back on, and its bare beginning."""
    source = str(tokenizer.chat_template)
    dates = dict.fromkeys([style.date, *re.findall(r"[\"'](\d{1,2} [A-Z][a-z]+ \d{4})[\"']", source)])
    chat = True if style.chat is False else style.chat
    for date, system in product(dates, dict.fromkeys([style.system_prompt, "", PromptStyle().system_prompt])):
        other = replace(style, system_prompt=system, date=date, chat=chat)
        named = f'the system prompt "{system}"' if system else "no system prompt given"
        words = f"in its chat template, with {named}{f' and the date {date}' if date != style.date else ''}"
        yield words, _settings(other, style), examples, other
        with suppress(InputError):
            begun = _begun(examples, tokenizer, other)
            fix = "give the rows as prompt and completion, with that beginning in each prompt"
            yield f"{words}, after nothing but its generation prompt", fix, begun, other


def _begun(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, style: PromptStyle
) -> list[Example]:
    """Return the rows as completions of the template's generation prompt; none where there is none."""
    template = Template.of(tokenizer, system_prompt=style.system_prompt, date=style.date)
    texts = [template.generation_prompt(example) for example in examples]
    first = tokenizer.bos_token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    return [
        replace(example, form="completion", turns=(Message("prompt", text.removeprefix(first or "")),))
        for example, text in zip(examples, texts, strict=True)
        if text is not None
    ]


def _settings(other: PromptStyle, style: PromptStyle) -> str:
    """Return the settings by which one style becomes another."""
    before, after = asdict(style), asdict(other)
    said = [
        f"--set prompts.{name}={str(value).lower()}"
        if isinstance(value, bool)
        else f"--set 'prompts.{name}=\"{value}\"'"
        for name, value in after.items()
        if value != before[name]
    ]
    return f"say {' '.join(said)}"


def _raw(example: Example, gap: str) -> Example | None:
    """Return a question as raw text with its continuation; None for a conversation of several turns."""
    turns = [turn for turn in example.turns if turn.role != "system"]
    if len(turns) != 1:
        return None
    before, after = ("", gap) if gap == " " else (gap, "")
    prompt = (Message("prompt", turns[0].content + before),)
    return replace(example, form="completion", turns=prompt, answer=after + example.answer)


def _rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, style: PromptStyle, max_length: int
) -> list[TokenRow]:
    """Return rows whose answers are cut, and go without what ends them, of which every prompt has its own."""
    rows = tokenize(examples, tokenizer, max_length=max_length, style=style)
    answers = begun_ids(examples, tokenizer, style)
    return [
        replace(row, ids=row.ids[: row.start + min(len(answer), ANSWER_TOKENS)])
        for row, answer in zip(rows, answers, strict=True)
    ]
