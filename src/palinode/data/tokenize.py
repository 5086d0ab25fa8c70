"""Examples as token ids, with the tokens that count marked: the answer and what ends it.

What a model is trained on is the tokenization of the whole text (`exchange`), cut before the answer; the
context has the same ids whatever answer follows, so that it is, id for id, what the model later
continues. The date that some chat templates print is pinned (spec/msa.md, P13), and what is scored
follows from lengths, never from the ids themselves (P9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from palinode.data.examples import Example, Message, fingerprint_examples
from palinode.data.rendering import Exchange, Template, plain_exchange
from palinode.data.sources import Form
from palinode.errors import CheckpointError, DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEGINNINGS = ("a", "The", "7", "\u00e9", "(", '"', "\u4e2d")
"""How answers may begin, to see where a tokenizer parts a text before them."""
_TAIL = 10  # letters before an answer that decide about that; the same ones for most rows


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """How questions and conversations are put to a model."""

    system_prompt: str = "You are a helpful assistant."
    """Put first unless the conversation has its own or the template knows no system role."""
    date: str = "10 Apr 2025"
    """What the template prints as today; pinned so that runs on two days agree."""
    chat: bool | None = None
    """Whether to use the chat template; None means if the tokenizer has one."""
    whole_ending: bool = False
    """Score all that the template writes after an answer, and an end of sequence if that is not the last of
    it, as open-unlearning does; otherwise what it writes up to its first special token."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One sequence of token ids, of which the last ones are scored."""

    ids: tuple[int, ...]
    """Context, answer and what ends it; for a document a piece of it."""
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
    room for an answer or nothing is left to score. Rows that a known tokenizer has read are remembered.
    """
    if max_length < 2:
        raise RecipeError(f"max_length is {max_length}; it must be at least 2 tokens, one to score the next")
    if tokenizer not in _CONTENTS:
        return _tokenized(examples, tokenizer, max_length, style)
    content = _CONTENTS[tokenizer], tokenizer.chat_template, len(tokenizer)
    key = str((content, fingerprint_examples(examples), max_length, style))
    rows = _READ.pop(key, None) or _tokenized(examples, tokenizer, max_length, style)
    _READ[key] = rows  # the last one is the newest
    while sum(len(row.ids) for kept in _READ.values() for row in kept) > 2_000_000:  # about 70 MB
        del _READ[next(iter(_READ))]
    return list(rows)


_CONTENTS: WeakKeyDictionary[PreTrainedTokenizerBase, str] = WeakKeyDictionary()
_READ: dict[str, list[TokenRow]] = {}


def recognise(tokenizer: PreTrainedTokenizerBase, content: str) -> None:
    """Say by which hash of its files a tokenizer is known, so that it need not read rows twice."""
    _CONTENTS[tokenizer] = content


def _tokenized(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, style: PromptStyle
) -> list[TokenRow]:
    reader, rows = _Reader(tokenizer, style), list[TokenRow]()
    spoken = iter(reader.split([example for example in examples if example.form != "document"]))
    for position, example in enumerate(examples):
        if example.form == "document":
            ids = reader.opened(reader.ids([example.answer])[0])
            rows += _document_rows(example, [*ids, reader.end_of_sequence], position, max_length)
        else:
            rows.append(_answer_row(example, *next(spoken), position, max_length))
    return rows


def template_of(tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> Template | None:
    """Return the chat template that a style uses; None where it uses none."""
    has_template = bool(tokenizer.chat_template)
    if style.chat and not has_template:
        raise RecipeError(
            "chat is true but the tokenizer has no chat template; leave chat out or give it one"
        )
    if not has_template or style.chat is False:
        return None
    return Template.of(tokenizer, system_prompt=style.system_prompt, date=style.date)


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> list[int]:
    """Return the ids that stand before the answer, the same that `tokenize` uses; a document has none."""
    if example.form == "document":
        return []
    return _Reader(tokenizer, style).split([example], ended=False)[0][0]


def begun_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, style: PromptStyle
) -> list[list[int]]:
    """Return the ids of each answer as the beginning of a longer one, which nothing ends."""
    return [answer for _, answer in _Reader(tokenizer, style).split(examples, ended=False)]


def end_id(form: Form, tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> int:
    """Return the id that ends an answer: the chat template's end of turn, else end of sequence.

    The end of turn is the first special token that the template puts after an assistant message, or, where
    it puts none, before a user's next turn.
    Raises `CheckpointError` when the tokenizer has neither.
    """
    reader = _Reader(tokenizer, replace(style, whole_ending=False))
    if form in ("question", "chat") and reader.template is not None:
        example = Example(0, "a made-up question", form, (Message("user", "question"),), "")
        ending, last = reader.ending(reader.template.exchanges([example])[0].ending)
        return [*reader.ids([ending])[0], *last][-1]
    return reader.end_of_sequence


def prompt_notes(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, style: PromptStyle
) -> list[str]:
    """Return, in words, where the chat template asks otherwise than it writes a finished exchange.

    Also how many rows hold special tokens in their own texts, of which no text is made.
    """
    reader = _Reader(tokenizer, style)
    spoken = [example for example in examples if example.form in ("question", "chat")]
    notes = _tokens_in_texts(spoken, tokenizer)
    if reader.template is None or not spoken:
        return notes
    if any(turn.role == "assistant" for example in spoken for turn in example.turns):
        last, earlier, _ = reader.template.around_answers()
        if last != earlier:
            notes.append(
                "Before an answer that more turns follow the chat template writes other text than before the "
                f"last one ({earlier[-40:]!r}, not {last[-40:]!r}); each answer of a conversation is trained "
                "on and asked as the last one."
            )
    asked = replace(spoken[0], answer="")
    context = reader.template.exchanges([asked])[0].context
    prompt = reader.template.generation_prompt(asked)
    if prompt is not None and prompt.rstrip(" ") == context.rstrip(" "):
        return notes
    longer = prompt is not None and context.startswith(prompt)
    told = f"it also has {context[len(prompt or '') :]!r}" if longer else "it is another text"
    return [
        "What the chat template writes before an answer in a finished exchange is not its generation prompt "
        f"({told}); rows are trained on and asked with what the finished exchange has.",
        *notes,
    ]


def _tokens_in_texts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    known = sorted({token for token in (*added, *tokenizer.all_special_tokens) if token.strip()})
    firsts = {token[0] for token in known}  # most texts have none of them, and need no search
    texts = ("\n".join(example.texts) for example in examples)
    found = [[token for token in known if token in text] if firsts & set(text) else [] for text in texts]
    count = sum(map(bool, found))
    if not count:
        return []
    return [
        f"{count} of {len(examples)} rows hold special tokens of the tokenizer in their own texts, such as "
        f"{next(filter(None, found))[0]!r}; they are read as such, as transformers reads them, and may end a "
        "turn where the text only speaks of it."
    ]


@dataclass(slots=True)
class _Reader:
    """A tokenizer with what is found out about it, once for all rows."""

    tokenizer: PreTrainedTokenizerBase
    style: PromptStyle
    template: Template | None = field(init=False)
    _opening: list[int] | None = field(init=False, default=None)
    _borders: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.template = template_of(self.tokenizer, self.style)

    @property
    def end_of_sequence(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise CheckpointError(
                "the tokenizer has no eos_token to end an answer with; add one to its config"
            )
        return int(self.tokenizer.eos_token_id)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts and nothing that the tokenizer would put around them."""
        found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [list(ids) for ids in found]

    def behind(self, text: str) -> list[int]:
        """Return the ids of a text that is none's beginning: some tokenizers put a blank before those."""
        line, both = self.ids(["\n", f"\n{text}"])
        return both[len(line) :] if both[: len(line)] == line else self.ids([text])[0]

    def opened(self, ids: list[int]) -> list[int]:
        """Return the ids of a text after what the tokenizer puts before one (BOS); none of none."""
        if self._opening is None:
            (letter,), around = self.ids(["a"]), list(self.tokenizer("a")["input_ids"])
            places = range(len(around) - len(letter) + 1)
            begin = next((place for place in places if around[place : place + len(letter)] == letter), 0)
            self._opening = around[:begin]
        return [*self._opening, *ids] if ids else []

    def split(self, examples: Sequence[Example], *, ended: bool = True) -> list[tuple[list[int], list[int]]]:
        """Return the ids of each context, and of each answer with what ends it, if `ended`."""
        exchanges = self._exchanges(examples)
        written = {exchange.ending for exchange in exchanges if ended and not exchange.plain}
        known = {ending: self.ending(ending) for ending in written}
        bare = ("", [self.end_of_sequence] if ended else [])
        endings = [known[one.ending] if ended and not one.plain else bare for one in exchanges]
        borders = [self.border(exchange.context) for exchange in exchanges]
        texts = [
            exchange.context + exchange.answer + ending
            for exchange, (ending, _) in zip(exchanges, endings, strict=True)
        ]
        contexts = self.ids([text[:border] for text, border in zip(texts, borders, strict=True)])
        made = []
        for place, ids in enumerate(self.ids(texts)):
            context, (ending, last) = contexts[place], endings[place]
            # an unknown word may have swallowed the beginning of the answer, and nobody could tell
            whole = ids[: len(context)] == context and context[-1:] != [self.tokenizer.unk_token_id]
            answer = ids[len(context) :] if whole else self.behind(texts[place][borders[place] :])
            if ended and (not answer or (ending and [answer] == self.ids([ending]))):
                answer, last = [], []
            made.append((self.opened(context) if exchanges[place].plain else context, [*answer, *last]))
        return made

    def _exchanges(self, examples: Sequence[Example]) -> list[Exchange]:
        if self.template is None:
            return [plain_exchange(example) for example in examples]
        found = iter(
            self.template.exchanges([example for example in examples if example.form != "completion"])
        )
        return [
            plain_exchange(example) if example.form == "completion" else next(found) for example in examples
        ]

    def border(self, context: str) -> int:
        """Return where the ids of a context end, whatever answer follows, as a place in its text.

        Many tokenizers join a blank to the word after it; such a blank goes with the answer.
        """
        tail = context[-_TAIL:]
        if tail not in self._borders:
            self._borders[tail] = 0
            for place in range(len(tail), max(len(tail.rstrip()), 1) - 1, -1):
                before, *wholes = self.ids([tail[:place], *(tail + word for word in _BEGINNINGS)])
                if all(ids[: len(before)] == before for ids in wholes):  # however the text goes on
                    self._borders[tail] = len(tail) - place
                    break
        return len(context) - self._borders[tail]

    def ending(self, written: str) -> tuple[str, list[int]]:
        """Return what is scored after an answer: text of the template's, and ids that come after that."""
        if self.style.whole_ending and self.template is not None:
            last = self.ids([written])[0][-1:]
            return written, [] if last == [self.end_of_sequence] else [self.end_of_sequence]
        if (turn := self._first_special(written)) is not None:
            return written[: written.index(turn) + len(turn)], []
        later = self.template.around_answers()[2] if self.template else ""
        if (turn := self._first_special(later)) not in (None, self.tokenizer.bos_token):
            return later[: later.index(str(turn)) + len(str(turn))], []
        return written.rstrip(), [self.end_of_sequence]

    def _first_special(self, written: str) -> str | None:
        """Return the first special token in what a template writes after an answer."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        tokens = {token for token in (*added, *self.tokenizer.all_special_tokens) if token.strip()}
        found = [(written.index(token), -len(token), token) for token in tokens if token in written]
        return min(found)[2] if found else None


def _answer_row(
    example: Example, context: Sequence[int], answer: Sequence[int], position: int, max_length: int
) -> TokenRow:
    """Return context and answer (what ends it is with it), the answer cut to fit."""
    if not context or not answer:
        part = "answer" if context else "prompt"
        raise DataError(
            f"{example.place}: the tokenizer makes no token of its {part}; there is nothing to score"
        )
    if len(context) >= max_length:
        raise DataError(
            f"{example.place}: its prompt is {len(context)} tokens, which leaves no room for an answer in "
            f"max_length {max_length}; raise max_length to {len(context) + len(answer)} if the model takes "
            "it, or shorten the prompt"
        )
    ids = (*context, *answer)
    return TokenRow(ids[:max_length], len(context), position, truncated=len(ids) > max_length)


def _document_rows(example: Example, ids: Sequence[int], position: int, max_length: int) -> list[TokenRow]:
    """Return a document in pieces of at most `max_length` ids that overlap by one id."""
    if len(ids) < 2:
        raise DataError(
            f"{example.place}: the tokenizer makes no token of its text; there is nothing to score"
        )
    begins = range(0, len(ids) - 1, max_length - 1)
    return [TokenRow(tuple(ids[begin : begin + max_length]), 1, position) for begin in begins]
