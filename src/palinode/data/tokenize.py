"""Examples as token ids, with the tokens that count marked: the answer and the token that ends it.

The prompt and the answer are tokenized separately, so that the prompt a model is trained on is, id
for id, the prompt it later continues. The date that some chat templates print is pinned
(spec/msa.md, P13), and what is scored follows from lengths, never from the ids themselves (P9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from palinode.data.examples import Example, Form, Message
from palinode.errors import CheckpointError, DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_LABELS = {"user": "Question: ", "assistant": "Answer: ", "system": ""}
"""How a turn begins where the tokenizer has no chat template."""

_SENTINEL = "palinode-answer"


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """How questions and conversations are put to a model."""

    system_prompt: str = "You are a helpful assistant."
    """Put first unless the conversation has its own or the template knows no system role."""
    date: str = "10 Apr 2025"
    """What the template prints as today; pinned so that runs on two days agree."""
    chat: bool | None = None
    """Whether to use the chat template; None means if the tokenizer has one."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One sequence of token ids, of which the last ones are scored."""

    ids: tuple[int, ...]
    """Prompt, answer and end token; for a document a piece of it."""
    start: int
    """Position of the first scored id, at least 1; everything before it is context."""
    example: int
    """Position of its example in the list given; the pieces of a document share it."""
    truncated: bool = False
    """Whether the end of the answer was cut off to fit."""

    @property
    def scored(self) -> int:
        """The number of scored ids."""
        return len(self.ids) - self.start


def tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int, style: PromptStyle
) -> list[TokenRow]:
    """Return one row of ids an example, or several for a document longer than `max_length` ids.

    A long answer is cut at its end and its row says `truncated`. A long document is cut in pieces;
    each piece after the first begins with the last id of the one before it, as context, so that every
    id but the very first is scored once. Raises `DataError` naming the row when a prompt leaves no
    room for an answer or nothing is left to score.
    """
    if max_length < 2:
        raise RecipeError(f"max_length is {max_length}; it must be at least 2 tokens, one to score the next")
    ends = {form: end_id(form, tokenizer, style) for form in {example.form for example in examples}}
    rows: list[TokenRow] = []
    for position, example in enumerate(examples):
        end = ends[example.form]
        if example.form == "document":
            ids = [*_open_ids(example.answer, tokenizer), end]
            rows += _document_rows(example, ids, position, max_length)
        else:
            prompt = prompt_ids(example, tokenizer, style)
            answer = _answer_ids(example, tokenizer, style)
            rows.append(_answer_row(example, prompt, [*answer, end], position, max_length))
    return rows


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> list[int]:
    """Return the ids that stand before the answer, the same that `tokenize` uses; a document has none."""
    if example.form == "document":
        return []
    if example.form == "completion":
        return _open_ids(example.turns[0].content, tokenizer)
    if not _uses_template(tokenizer, style):
        return _open_ids(_plain_prompt(example.turns), tokenizer)
    text = _render(example.turns, tokenizer, style, where=example.place, open_answer=True)
    return _ids(text, tokenizer)


def end_id(form: Form, tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> int:
    """Return the id that ends an answer: the chat template's end of turn, else end of sequence.

    The end of turn is the first special token that the template puts after an assistant message.
    Raises `CheckpointError` when the tokenizer has neither.
    """
    if form in ("question", "chat") and _uses_template(tokenizer, style):
        found = _template_end(tokenizer, style)
        if found is not None:
            return found
    if tokenizer.eos_token_id is None:
        raise CheckpointError("the tokenizer has no eos_token to end an answer with; add one to its config")
    return int(tokenizer.eos_token_id)


def _answer_row(
    example: Example, prompt: Sequence[int], ending: Sequence[int], position: int, max_length: int
) -> TokenRow:
    """Return prompt and ending (answer and end token), the ending cut to fit."""
    if not prompt or len(ending) < 2:
        part = "answer" if prompt else "prompt"
        raise DataError(
            f"{example.place}: the tokenizer makes no token of its {part}; there is nothing to score"
        )
    if len(prompt) >= max_length:
        raise DataError(
            f"{example.place}: its prompt is {len(prompt)} tokens, which leaves no room for an answer in "
            f"max_length {max_length}; raise max_length to {len(prompt) + len(ending)} or shorten the prompt"
        )
    ids = (*prompt, *ending)
    return TokenRow(ids[:max_length], len(prompt), position, truncated=len(ids) > max_length)


def _document_rows(example: Example, ids: Sequence[int], position: int, max_length: int) -> list[TokenRow]:
    """Return a document in pieces of at most `max_length` ids that overlap by one id."""
    if len(ids) < 2:
        raise DataError(
            f"{example.place}: the tokenizer makes no token of its text; there is nothing to score"
        )
    begins = range(0, len(ids) - 1, max_length - 1)
    return [TokenRow(tuple(ids[begin : begin + max_length]), 1, position) for begin in begins]


def _answer_ids(example: Example, tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> list[int]:
    """Return the ids of the answer; "Answer:" is followed by a space where there is no template."""
    plain = example.form != "completion" and not _uses_template(tokenizer, style)
    return _ids(f" {example.answer}" if plain else example.answer, tokenizer)


def _plain_prompt(turns: Sequence[Message]) -> str:
    """Return a conversation as labelled lines that end in an open `Answer:`."""
    lines = [PLAIN_LABELS.get(turn.role, f"{turn.role.capitalize()}: ") + turn.content for turn in turns]
    return "\n".join([*lines, "Answer:"])


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text and nothing that the tokenizer would put around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _open_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text after what the tokenizer puts before one (BOS), without what it puts after."""
    plain = _ids(text, tokenizer)
    full = list(tokenizer(text)["input_ids"])
    for begin in range(len(full) - len(plain) + 1):
        if plain and full[begin : begin + len(plain)] == plain:
            return full[: begin + len(plain)]
    return plain


def _uses_template(tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> bool:
    has_template = bool(tokenizer.chat_template)
    if style.chat and not has_template:
        raise RecipeError(
            "chat is true but the tokenizer has no chat template; leave chat out or give it one"
        )
    return has_template and style.chat is not False


def _template_end(tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> int | None:
    """Return the first special token after an assistant message, or None when there is none."""
    turns = (Message("user", "question"), Message("assistant", _SENTINEL))
    text = _render(turns, tokenizer, style, where="a question and its answer", open_answer=False)
    _, sentinel, tail = text.rpartition(_SENTINEL)
    specials = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    specials.update(tokenizer.all_special_ids)
    return next((number for number in _ids(tail, tokenizer) if sentinel and number in specials), None)


def _render(
    turns: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    style: PromptStyle,
    *,
    where: str,
    open_answer: bool,
) -> str:
    """Return a conversation in the tokenizer's chat template, up to where an answer would begin."""

    def apply(messages: Sequence[Message]) -> str:
        entries = [{"role": message.role, "content": message.content} for message in messages]
        return str(
            tokenizer.apply_chat_template(
                entries, tokenize=False, add_generation_prompt=open_answer, date_string=style.date
            )
        )

    own_system = any(turn.role == "system" for turn in turns)
    if style.system_prompt and not own_system:
        try:
            return apply([Message("system", style.system_prompt), *turns])
        except Exception:  # a template says no as it likes; Gemma's knows no system role
            pass
    try:
        return apply(turns)
    except Exception as error:
        raise DataError(f"the tokenizer's chat template cannot show {where} ({error})") from error
