"""Prompts and answers become ids one beside the other, with hand-made word-level tokenizers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from palinode.data.examples import Example, Message
from palinode.data.tokenize import PromptStyle, TokenRow, end_id, prompt_ids, tokenize
from palinode.errors import CheckpointError, DataError, RecipeError

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORDS = ["system", "user", "assistant", "be", "kind", "who", "wrote", "it", "sappho", "did", "today"]
WORDS += ["Question:", "Answer:"]
VOCABULARY = {word: number for number, word in enumerate([*SPECIALS, *WORDS])}

CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DATED = "today {{ date_string }}\n" + CHATML
STYLE = PromptStyle(system_prompt="be kind")


def make(
    template: str | None = None, *, before: str = "", after: str = "", eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer that puts `before` and `after` around a text by itself."""
    core = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.add_special_tokens(SPECIALS)
    around = " ".join(part for part in (before, "$A", after) if part)
    core.post_processor = TemplateProcessing(
        single=around, special_tokens=[(token, VOCABULARY[token]) for token in SPECIALS]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token=eos, pad_token=eos
    )
    tokenizer.chat_template = template
    return tokenizer


def ids(text: str) -> tuple[int, ...]:
    return tuple(VOCABULARY[word] for word in text.split())


def question(text: str = "who wrote it", answer: str = "sappho did") -> Example:
    return Example(2, "f.jsonl", "question", (Message("user", text),), answer)


def completion(prompt: str, answer: str) -> Example:
    return Example(2, "f.jsonl", "completion", (Message("prompt", prompt),), answer)


def document(text: str) -> Example:
    return Example(2, "f.jsonl", "document", (), text)


def rows(
    example: Example, tokenizer: PreTrainedTokenizerFast, style: PromptStyle = STYLE, max_length: int = 99
) -> list[TokenRow]:
    return tokenize([example], tokenizer, max_length=max_length, style=style)


CHAT_PROMPT = (
    "<|im_start|> system be kind <|im_end|> <|im_start|> user who wrote it <|im_end|> <|im_start|> assistant"
)


def test_a_question_goes_through_the_chat_template_and_ends_with_its_end_of_turn() -> None:
    (row,) = rows(question(), make(CHATML, before="<s>"))
    assert row.ids == ids(f"{CHAT_PROMPT} sappho did <|im_end|>")
    assert row.ids[row.start :] == ids("sappho did <|im_end|>")
    assert (row.scored, row.example, row.truncated) == (3, 0, False)


def test_a_template_that_refuses_a_system_role_goes_without_one() -> None:
    (row,) = rows(question(), make(NO_SYSTEM))
    assert row.ids == ids(
        "<|im_start|> user who wrote it <|im_end|> <|im_start|> assistant sappho did <|im_end|>"
    )


def test_a_system_message_of_the_conversation_is_never_dropped() -> None:
    turns = (Message("system", "be"), Message("user", "who"))
    example = Example(2, "f.jsonl", "chat", turns, "sappho")
    (row,) = rows(example, make(CHATML))
    assert row.ids[: row.start] == ids(
        "<|im_start|> system be <|im_end|> <|im_start|> user who <|im_end|> <|im_start|> assistant"
    )
    with pytest.raises(DataError, match=r"cannot show row 3 of f\.jsonl \(no system role\)"):
        rows(example, make(NO_SYSTEM))


def test_the_date_in_the_template_is_pinned() -> None:
    tokenizer = make(DATED)
    first = prompt_ids(question(), tokenizer, PromptStyle(date="who"))
    second = prompt_ids(question(), tokenizer, PromptStyle(date="did"))
    assert tuple(first[:2]) == ids("today who")
    assert tuple(second[:2]) == ids("today did")


def test_a_question_without_a_template_is_labelled() -> None:
    (row,) = rows(question(), make(before="<s>", after="</s>"))
    assert row.ids == ids("<s> Question: who wrote it Answer: sappho did </s>")
    assert row.ids[row.start :] == ids("sappho did </s>")


def test_chat_false_leaves_the_template_alone() -> None:
    (row,) = rows(question(), make(CHATML), PromptStyle(chat=False))
    assert row.ids == ids("Question: who wrote it Answer: sappho did </s>")


def test_chat_true_needs_a_template() -> None:
    with pytest.raises(RecipeError, match="the tokenizer has no chat template"):
        rows(question(), make(), PromptStyle(chat=True))


def test_a_conversation_without_a_template_is_labelled_turn_by_turn() -> None:
    turns = (
        Message("system", "be kind"),
        Message("user", "who"),
        Message("assistant", "sappho"),
        Message("user", "did it"),
    )
    (row,) = rows(Example(0, "f", "chat", turns, "it did"), make())
    assert row.ids == ids("be kind Question: who Answer: sappho Question: did it Answer: it did </s>")
    assert row.scored == 3


def test_a_completion_is_raw_text_even_with_a_template() -> None:
    (row,) = rows(completion("who wrote", "it"), make(CHATML, before="<s>", after="</s>"))
    assert row.ids == ids("<s> who wrote it </s>")
    assert row.start == 3


def test_only_an_added_end_token_is_stripped_from_a_prompt() -> None:
    tokenizer = make(before="<s>", after="</s>")
    assert tuple(prompt_ids(completion("who </s>", "it"), tokenizer, STYLE)) == ids("<s> who </s>")
    same_token = make(before="</s>", after="</s>")
    assert tuple(prompt_ids(completion("who", "it"), same_token, STYLE)) == ids("</s> who")


@pytest.mark.parametrize("template", [None, CHATML, NO_SYSTEM])
@given(
    asked=st.lists(st.sampled_from(WORDS), min_size=1), answer=st.lists(st.sampled_from(WORDS), min_size=1)
)
def test_the_prompt_generated_from_is_the_prompt_trained_on(
    template: str | None, asked: list[str], answer: list[str]
) -> None:
    tokenizer = make(template, before="<s>", after="</s>")
    text = " ".join(asked)
    for example in (question(text, " ".join(answer)), completion(text, " ".join(answer))):
        (row,) = rows(example, tokenizer, max_length=500)
        assert list(row.ids[: row.start]) == prompt_ids(example, tokenizer, STYLE)
        assert row.ids[row.start : -1] == ids(" ".join(answer))


def test_a_short_document_is_scored_from_its_second_token() -> None:
    (row,) = rows(document("who wrote it"), make(CHATML, before="<s>"))
    assert row == TokenRow(ids("<s> who wrote it </s>"), 1, 0, truncated=False)
    assert prompt_ids(document("who"), make(), STYLE) == []


def test_pieces_of_a_document_overlap_by_one_token() -> None:
    # <s> a b c d e </s> in pieces of three: each begins with the last of the one before.
    pieces = rows(document("who wrote it sappho did"), make(before="<s>"), max_length=3)
    assert [piece.ids for piece in pieces] == [
        ids("<s> who wrote"),
        ids("wrote it sappho"),
        ids("sappho did </s>"),
    ]
    assert {(piece.start, piece.example, piece.truncated) for piece in pieces} == {(1, 0, False)}


@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=40), max_length=st.integers(2, 12))
def test_every_token_of_a_document_but_the_first_is_scored_once(words: list[str], max_length: int) -> None:
    pieces = rows(document(" ".join(words)), make(), max_length=max_length)
    scored = [number for piece in pieces for number in piece.ids[piece.start :]]
    assert (pieces[0].ids[0], *scored) == ids(" ".join([*words, "</s>"]))
    assert all(len(piece.ids) <= max_length for piece in pieces)


def test_a_long_answer_is_cut_and_says_so() -> None:
    tokenizer = make()
    (whole,) = rows(completion("who wrote", "sappho did it"), tokenizer, max_length=6)
    (cut,) = rows(completion("who wrote", "sappho did it"), tokenizer, max_length=4)
    assert (whole.ids, whole.truncated) == (ids("who wrote sappho did it </s>"), False)
    assert (cut.ids, cut.truncated) == (ids("who wrote sappho did"), True)


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(DataError, match=r"^row 3 of f\.jsonl: its prompt is 3 tokens.*raise max_length to 5"):
        rows(completion("who wrote it", "sappho"), make(), max_length=3)


def test_max_length_must_hold_a_token_and_the_next() -> None:
    with pytest.raises(RecipeError, match="max_length is 1"):
        rows(document("who"), make(), max_length=1)


@pytest.mark.parametrize(
    ("example", "part"),
    [
        (completion("who", "\u200b"), "answer"),
        (completion("\u200b", "who"), "prompt"),
        (document("\u200b"), "text"),
    ],
)
def test_text_without_tokens_is_refused(example: Example, part: str) -> None:
    tokenizer = make(before="<s>", after="</s>")
    tokenizer.backend_tokenizer.normalizer = Replace("\u200b", "")
    with pytest.raises(DataError, match=rf"^row 3 of f\.jsonl: the tokenizer makes no token of its {part}"):
        rows(example, tokenizer)


def test_the_end_is_the_templates_own_else_end_of_sequence() -> None:
    assert end_id("chat", make(CHATML), STYLE) == VOCABULARY["<|im_end|>"]
    assert end_id("document", make(CHATML), STYLE) == VOCABULARY["</s>"]
    open_ended = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    assert end_id("question", make(open_ended), STYLE) == VOCABULARY["</s>"]
    next_turn = "{% for m in messages %}<|im_end|> {{ m.role }} {{ m.content }} {% endfor %}"  # GLM-4's way
    assert end_id("chat", make(next_turn), STYLE) == VOCABULARY["<|im_end|>"]
    (row,) = rows(question("who", "did"), make(next_turn))
    assert row.ids[-2:] == (VOCABULARY["did"], VOCABULARY["<|im_end|>"])
    begins = next_turn.replace("<|im_end|>", "{% if m.role == 'user' %}<s>{% endif %}")
    assert end_id("chat", make(begins), STYLE) == VOCABULARY["</s>"]  # no model ends by beginning a text
    swallows_answers = "{{ messages[-2].content }} <s>"
    with pytest.raises(DataError, match="leaves out its answer"):
        end_id("question", make(swallows_answers), STYLE)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no eos_token"):
        rows(completion("who", "did"), make(eos=None))


def test_rows_point_back_at_their_examples() -> None:
    examples = [document("who wrote it"), question(), completion("who", "did")]
    made = tokenize(examples, make(), max_length=7, style=STYLE)
    assert [row.example for row in made] == [0, 1, 2]
    made = tokenize(examples[::2], make(), max_length=3, style=STYLE)
    assert [row.example for row in made] == [0, 0, 1]


@pytest.mark.parametrize(
    ("prompt", "answer", "pieces"),
    [
        ("sap", "pho", ["▁sap", "p", "h", "o"]),  # "▁sap" and "▁sapp" are words; a blank would be "▁", "p"
        ("sap", " pho", ["▁sap", "▁p", "h", "o"]),
        ("who: ", "am", ["▁", "w", "h", "o", ":▁", "a", "m"]),  # ":▁" and "▁a" both want the blank
    ],
)
def test_an_answer_that_goes_on_within_a_word_gets_no_blank_of_the_tokenizers(
    prompt: str, answer: str, pieces: list[str]
) -> None:
    merges = [("▁", "a"), ("▁", "p"), (":", "▁"), ("▁", "s"), ("▁s", "a"), ("▁sa", "p"), ("▁sap", "p")]
    letters = ["<unk>", "</s>", "▁", ":", "\n", *"ahmopsw"]
    vocabulary = {token: number for number, token in enumerate([*letters, *("".join(two) for two in merges)])}
    core = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>"))
    core.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>"
    )
    (row,) = rows(completion(prompt, answer), tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(row.ids)) == [*pieces, "</s>"]
