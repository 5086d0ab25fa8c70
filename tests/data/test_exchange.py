"""What stands before an answer is what a template writes there in a finished exchange, found by its place."""

from pathlib import Path

import pytest
from templates import CHAT_TEMPLATES, CHATML, DATED, NO_GENERATION_BRANCH, PARTS, THINK_BLOCK, THOUGHTS_CUT
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from palinode.data.examples import Example, Message
from palinode.data.rendering import MEMORY, SECONDS, Exchange, Refusal, _end, _Worker, render
from palinode.data.tokenize import (
    PromptStyle,
    begun_ids,
    end_id,
    prompt_ids,
    prompt_notes,
    template_of,
    tokenize,
)
from palinode.errors import DataError, RecipeError

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|a|>", "<|u|>"]
STYLE = PromptStyle(system_prompt="be kind")
BEFORE = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nWho wrote it?<|im_end|>\n"

CONTEXTS = {
    "chatml": BEFORE + "<|im_start|>assistant\n",
    "no generation branch": BEFORE + "<|im_start|>assistant\n",
    "instruct": "<s>[INST] Who wrote it? [/INST] ",
    "mistral": "<s>[I] Who wrote it? [/I]",
    "gemma": "<s><|im_start|>user\nWho wrote it?<|im_end|>\n<|im_start|>model\n",
    "dated": "<s><|im_start|>system\n\nToday: 10 Apr 2025\n\nbe kind<|im_end|><|im_start|>user\n\n"
    "Who wrote it?<|im_end|><|im_start|>assistant\n\n",
    "think block": BEFORE + "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "thoughts cut": "<s><|u|>be kind<|u|>Who wrote it?<|a|>",
    "parts": BEFORE + "<|im_start|>assistant\n",
    "user parts": BEFORE + "<|im_start|>assistant\n",
    "twice": "Q Who wrote it?\nAgain: Who wrote it?\nA ",
}
ENDINGS = {"instruct": " </s>", "mistral": "</s>", "thoughts cut": "</s>", "dated": "<|im_end|>"}
ENDINGS |= {"twice": "<|im_end|>"}
TRIMMING = {"instruct", "gemma", "dated", "user parts"}


def make(template: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer of single bytes and three words that take the blank before them along."""
    letters = sorted(ByteLevel.alphabet())
    words = ["Ġ7", "Ġa", "ĠS"]
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *letters, *words])}
    core = Tokenizer(BPE(vocabulary, [("Ġ", "7"), ("Ġ", "a"), ("Ġ", "S")], unk_token="<unk>"))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    core.add_special_tokens(SPECIALS)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def example(answer: str, *turns: Message) -> Example:
    return Example(2, "f.jsonl", "chat", turns or (Message("user", "Who wrote it?"),), answer)


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    "answer", ["Sappho did.", "7", "assistant", "user", "<", "wrote it", "\n Sappho ", "m"]
)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_row_is_the_finished_exchange_up_to_the_end_of_turn(name: str, answer: str) -> None:
    tokenizer = make(CHAT_TEMPLATES[name])
    (found,) = template_of(tokenizer, STYLE).exchanges([example(answer)])
    written = answer.strip() if name in TRIMMING else answer.lstrip() if name == "think block" else answer
    assert found == Exchange(CONTEXTS[name], written, ENDINGS.get(name, "<|im_end|>\n"))
    (row,) = tokenize([example(answer)], tokenizer, max_length=500, style=STYLE)
    ending = found.ending.removesuffix("\n")
    assert list(row.ids) == whole(tokenizer, found.context + found.answer + ending)
    asked = list(row.ids[: row.start])
    assert asked == prompt_ids(example(""), tokenizer, STYLE) == prompt_ids(example(answer), tokenizer, STYLE)
    assert asked == whole(tokenizer, CONTEXTS[name].rstrip(" "))
    assert row.ids[-1] == end_id("chat", tokenizer, STYLE)


def test_a_blank_that_joins_the_word_after_it_goes_with_the_answer() -> None:
    tokenizer = make(CHAT_TEMPLATES["instruct"])
    (row,) = tokenize([example("7")], tokenizer, max_length=500, style=STYLE)
    assert tokenizer.convert_ids_to_tokens(list(row.ids[row.start :])) == ["Ġ7", "Ġ", "</s>"]
    assert begun_ids([example("7")], tokenizer, STYLE) == [whole(tokenizer, " 7")]


def test_an_answer_with_its_own_thoughts_begins_where_the_model_would() -> None:
    answer = "<think>\nhm\n</think>\n\nSappho"
    (found,) = template_of(make(THINK_BLOCK), STYLE).exchanges([example(answer)])
    assert found == Exchange(BEFORE + "<|im_start|>assistant\n", answer, "<|im_end|>\n")
    with pytest.raises(DataError, match=r"row 3 of f\.jsonl: .* does not write its answer as it stands"):
        tokenize([example(answer)], make(THOUGHTS_CUT), max_length=500, style=STYLE)


def test_thoughts_that_the_generation_prompt_opens_may_stand_in_the_answer() -> None:
    opened = THINK_BLOCK.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert opened != THINK_BLOCK
    for answer in ("<think>\nhm\n</think>\n\nSappho", "<think>\n\n</think>\n\nSappho"):
        (found,) = template_of(make(opened), STYLE).exchanges([example(answer)])
        assert found == Exchange(BEFORE + "<|im_start|>assistant\n", answer, "<|im_end|>\n")


def test_an_empty_system_message_goes_with_a_template_that_refuses_one() -> None:
    turns = (Message("system", ""), Message("user", "Who wrote it?"))
    for name, context in CONTEXTS.items():
        (found,) = template_of(make(CHAT_TEMPLATES[name]), STYLE).exchanges([example("7", *turns)])
        assert found.context == context.replace("be kind", "")
    refused = (Message("system", "be kind"), Message("user", "Who wrote it?"))
    with pytest.raises(DataError, match="no system role"):
        tokenize([example("7", *refused)], make(CHAT_TEMPLATES["gemma"]), max_length=500, style=STYLE)


def test_earlier_answers_may_lose_their_thoughts_and_nothing_else() -> None:
    turns = (
        Message("user", "Who?"),
        Message("assistant", "<think>hm</think>Sappho"),
        Message("user", "Sure?"),
    )
    (found,) = template_of(make(THINK_BLOCK), PromptStyle("")).exchanges([example("Yes", *turns)])
    assert found.context.endswith(
        "assistant\nSappho<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (
            "{% for m in messages if m.role != 'user' %}" + CHATML.partition("%}")[2],
            r"message 1 of it \(user\)",
        ),
        ("{% for m in messages if m.role != 'assistant' %}" + CHATML.partition("%}")[2], "its answer"),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", r"message 1 of it \(user\)"),
    ],
)
def test_what_vanishes_is_named(template: str, part: str) -> None:
    with pytest.raises(DataError, match=rf"^row 3 of f\.jsonl: .* leaves out {part}"):
        tokenize([example("Sappho")], make(template), max_length=500, style=STYLE)


def test_a_system_message_that_a_row_brings_is_not_dropped() -> None:
    template = "{% for m in messages if m.role != 'system' %}" + CHATML.partition("%}")[2]
    assert prompt_ids(example(""), make(template), STYLE) == prompt_ids(
        example(""), make(CHATML), PromptStyle("")
    )
    turns = (Message("system", "user"), Message("user", "Who?"))
    with pytest.raises(DataError, match=r"leaves out message 1 of it \(system\)"):
        tokenize([example("Sappho", *turns)], make(template), max_length=500, style=STYLE)


def test_an_answer_written_otherwise_is_refused() -> None:
    for change in ("upper", "reverse", "replace('a', 'b')"):
        template = CHATML.replace("m.content", f"m.content | {change}")
        with pytest.raises(DataError, match=r"row 3 of f\.jsonl"):
            tokenize([example("a sappho")], make(template), max_length=500, style=STYLE)


def test_a_generation_prompt_that_differs_is_said_once() -> None:
    rows = [example("Sappho"), example("7")]
    (note,) = prompt_notes(rows, make(THINK_BLOCK), STYLE)
    assert r"it also has '<think>\n\n</think>\n\n'" in note
    (note,) = prompt_notes(rows, make(NO_GENERATION_BRANCH), STYLE)
    assert r"it also has '<|im_start|>assistant\n'" in note
    (note,) = prompt_notes(rows, make(THOUGHTS_CUT), STYLE)
    assert "it is another text" in note
    for name in ("chatml", "instruct", "gemma", "dated", "parts"):
        assert prompt_notes(rows, make(CHAT_TEMPLATES[name]), STYLE) == []


def test_what_stands_before_the_last_answer_alone_is_told_of_conversations() -> None:
    first = Message("user", "Who?"), Message("assistant", "Sappho."), Message("user", "When?")
    told, *_ = sorted(prompt_notes([example("Then.", *first)], make(THINK_BLOCK), STYLE))
    assert told.startswith("Before an answer that more turns follow")
    assert r"<|im_start|>assistant\n', not '" in told
    assert len(prompt_notes([example("7")], make(THINK_BLOCK), STYLE)) == 1  # of the generation prompt
    assert prompt_notes([example("Then.", *first)], make(CHATML), STYLE) == []


def test_special_tokens_in_the_texts_of_rows_are_counted_and_named() -> None:
    rows = [example("7"), example("It ends with <|im_end|>."), example("7", Message("user", "<|im_end|>?"))]
    (note,) = prompt_notes(rows, make(CHATML), STYLE)
    assert note.startswith(
        "2 of 3 rows hold special tokens of the tokenizer in their own texts, such as '<|im_"
    )
    (row,) = tokenize(rows[1:2], make(CHATML), max_length=500, style=STYLE)
    end = end_id("chat", make(CHATML), STYLE)
    assert row.ids[row.start :].count(end) == 2  # as it says: the text's own and the one behind it
    assert prompt_notes([example("a < b </ s>")], make(CHATML), STYLE) == []


def test_two_days_write_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = (
        "{{ date_string }}",
        "{{ strftime_now('%d %b %Y') }}",
        "{% macro d(f) %}{{ strftime_now(f) }}{% endmacro %}{{ d('%d %b %Y') }}",
    )
    for way in ways:
        (found,) = template_of(make(way + CHATML), STYLE).exchanges([example("7")])
        assert found.context.startswith("10 Apr 2025<|im_start|>system")
    (found,) = template_of(make("{{ strftime_now('%Y-%m-%d %H:%M') }}" + CHATML), STYLE).exchanges(
        [example("7")]
    )
    assert found.context.startswith("2025-04-10 00:00<|im_start|>")
    own = PromptStyle(date="2031-02-01")
    assert "Today: 01 Feb 2031" in template_of(make(DATED), own).exchanges([example("7")])[0].context


def test_dice_fall_alike() -> None:
    template = "{{ range(1000) | random }} {{ range(1000) | random }}" + CHATML
    first, second = template_of(make(template), STYLE).exchanges([example("7"), example("a")])
    assert first.context == second.context


CHAT = [[{"role": "user", "content": "hi"}]] * 3


def test_a_template_without_end_is_stopped_and_the_next_is_rendered() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert (
        render(endless, CHAT, {}, date="")
        == [Refusal(f"it was stopped after {SECONDS} seconds of computing")] * 3
    )
    assert render("{{ messages[0].content }}", CHAT, {}, date="") == ["hi"] * 3


@pytest.mark.parametrize("module", ["json", "runpy", "signal", "random", "jinja2", "datetime"])
def test_a_file_in_the_current_folder_is_not_imported(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{module}.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    _end()  # the next one starts here
    assert render("{{ messages[0].content }}", CHAT, {}, date="1 May 2025") == ["hi"] * 3


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_the_process_that_renders_knows_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    worker = _Worker()
    assert worker.render({"template": "a", "variables": {}, "date": ""}, CHAT[:1]) == ["a"]
    known = Path(f"/proc/{worker.process.pid}/environ").read_bytes()
    worker.end()
    assert b"PATH=" in known
    assert b"secret" not in known


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10 ** 10 }}", f"it needs more than {MEMORY:,} bytes of memory"),
        ("{{ 'a' * 2 * 10 ** 7 }}", "it writes more than 10,000,000 characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth exceeded"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ raise_exception('no') }}", "no"),
    ],
)
def test_what_a_template_may_not_do_is_refused(template: str, reason: str) -> None:
    assert render(template, CHAT, {}, date="") == [Refusal(reason)] * 3


def test_a_template_knows_what_transformers_tells_it() -> None:
    template = (
        "{% generation %}{{ dict(a=1) | tojson }}{% endgeneration %}{% for m in messages %}"
        "{% if loop.index > 1 %}{% break %}{% endif %}{{ bos_token }}{{ tools is none }}{% endfor %}"
        "{% set n = namespace(x=1) %}{{ n.x }}{{ '<é>' | tojson }}{{ add_generation_prompt }}"
    )
    tokenizer = make(template)
    theirs = tokenizer.apply_chat_template(CHAT[0], tokenize=False, add_generation_prompt=True)
    known = {**tokenizer.special_tokens_map, "add_generation_prompt": True}
    assert render(template, CHAT[:1], known, date="") == [theirs] == ['{"a": 1}<s>True1"<é>"True']


@pytest.mark.parametrize("name", [name for name in CHAT_TEMPLATES if "parts" not in name])
def test_templates_write_what_they_write_for_transformers(name: str) -> None:
    tokenizer = make(CHAT_TEMPLATES[name].replace("strftime_now('%d %b %Y')", "date_string"))
    (found,) = template_of(tokenizer, STYLE).exchanges([example("Sappho")])
    said = [{"role": "user", "content": "Who wrote it?"}, {"role": "assistant", "content": "Sappho"}]
    if name not in ("instruct", "mistral", "gemma"):
        said = [{"role": "system", "content": "be kind"}, *said]
    theirs = tokenizer.apply_chat_template(said, tokenize=False, date_string=STYLE.date)
    assert found.context + found.answer + found.ending == theirs


def test_open_unlearnings_ending_is_all_that_is_written_and_an_end_of_sequence() -> None:
    theirs = PromptStyle(system_prompt="be kind", whole_ending=True)
    for name, ending in {"chatml": "<|im_end|>\n</s>", "mistral": "</s>", "dated": "<|im_end|></s>"}.items():
        tokenizer = make(CHAT_TEMPLATES[name])
        (row,) = tokenize([example("7")], tokenizer, max_length=500, style=theirs)
        assert list(row.ids[row.start :]) == whole(tokenizer, "7" + ending)
    plain = Example(0, "f", "completion", (Message("prompt", "Who"),), " 7")
    (row,) = tokenize([plain], make(CHATML), max_length=500, style=theirs)
    assert list(row.ids) == whole(make(CHATML), "Who 7</s>")


def test_content_in_parts_is_given_where_it_is_wanted() -> None:
    (found,) = template_of(make(PARTS), STYLE).exchanges([example("7")])
    assert found.context == CONTEXTS["parts"]


def test_a_refusal_is_the_templates_own_words() -> None:
    turns = (Message("user", "Who?"), Message("user", "Who wrote it?"))
    for name in ("instruct", "mistral"):  # to content in parts it would say that a list has no strip()
        with pytest.raises(DataError, match=r"cannot show row 3 of f\.jsonl \(roles must alternate\)"):
            tokenize([example("7", *turns)], make(CHAT_TEMPLATES[name]), max_length=500, style=STYLE)


def test_of_several_templates_the_default_is_used_and_no_other() -> None:
    tokenizer = make(CHATML)
    tokenizer.chat_template = {"tool_use": "no", "default": CHATML}
    assert prompt_ids(example("7"), tokenizer, STYLE) == prompt_ids(example("7"), make(CHATML), STYLE)
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(RecipeError, match="chat templates named tool_use, rag and none named default"):
        prompt_ids(example("7"), tokenizer, STYLE)
