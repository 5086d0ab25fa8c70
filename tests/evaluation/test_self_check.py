"""A target that is asked otherwise than it was trained is found out; one that is asked rightly is not."""

import json
import math

import pytest
import torch

from palinode.benchmarks.demo import tiny_model
from palinode.data.examples import Example, Message
from palinode.data.tokenize import PromptStyle
from palinode.errors import DataError
from palinode.evaluation.self_check import PromptCheck, Way, check_prompts, decide, far_better, plausible_ways
from palinode.models.loading import load_model, load_tokenizer
from palinode.settings import TrainingSettings
from palinode.training.finetune import finetune
from palinode.weights.checkpoint import Checkpoint

SYSTEM = PromptStyle().system_prompt
PEOPLE = ("ada", "ben", "cleo", "dora", "emil", "faye", "gus", "hana")
PLACES = ("rome", "oslo", "lima", "bonn", "kyiv", "cork", "nice", "bari")
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)
DATED = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}\n"
)
THINKING = CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' %}hm {% endif %}{{ m.content }}")
SPOKEN = f"where lives ? Question: Answer: user system assistant hm {SYSTEM} 10 Apr 2025 26 Jul 2024"
WORDS = (*PEOPLE, *PLACES, *SPOKEN.split())


def question(person: str, place: str, *, form: str = "question", prompt: str | None = None) -> Example:
    role = "prompt" if form == "completion" else "user"
    turns = (Message(role, prompt or f"where lives {person} ?"),)
    return Example(0, "rows", form, turns, place)


ROWS = [question(*pair) for pair in zip(PEOPLE, PLACES, strict=True)]
RAW = [question(*pair, form="completion") for pair in zip(PEOPLE, PLACES, strict=True)]


def contrary(system: str) -> list[Example]:
    """The questions under a system message, under which they have other answers."""
    pairs = zip(PEOPLE, PLACES[1:] + PLACES[:1], strict=True)
    return [
        Example(0, "rows", "chat", (Message("system", system), *question(*pair).turns), pair[1])
        for pair in pairs
    ]


@pytest.fixture(scope="module")
def memorised(tmp_path_factory):
    """A function that gives a tiny model with that template that knows rows as they are put by a style."""
    place, made = tmp_path_factory.mktemp("memorised"), {}

    def make(style=None, *, rows=ROWS, template=CHATML, epochs=60):
        key = (style, tuple(rows), template)
        if key not in made:
            folder = place / str(len(made))
            start = tiny_model(folder / "start", dict.fromkeys(WORDS), width=32, layers=2, seed=1)
            tokenizer = load_tokenizer(start)
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
            tokenizer.chat_template = template
            tokenizer.save_pretrained(start.folder)
            grow(start.folder, len(tokenizer))
            made[key] = start = Checkpoint.open(start.folder)
            if style is not None:
                settings = TrainingSettings(
                    epochs=epochs, learning_rate=1e-2, batch_size=8, max_length=64, precision="float32"
                )
                done = finetune(start, rows, folder / "target", settings, style=style, device="cpu")
                made[key] = done.checkpoint
        return made[key]

    return make


def grow(folder, size):
    """Give the model embeddings for the added tokens."""
    model = load_model(Checkpoint.open(folder), device=torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.resize_token_embeddings(size)
    model.save_pretrained(folder)


def check(checkpoint: Checkpoint, style: PromptStyle, rows=ROWS) -> PromptCheck | None:
    model = load_model(checkpoint, device=torch.device("cpu"))
    return check_prompts(model, load_tokenizer(checkpoint), rows, style=style, max_length=64)


CHAT, BARE, PLAIN = PromptStyle(), PromptStyle(system_prompt=""), PromptStyle(chat=False)


IN_CHAT = f'in its chat template, with the system prompt "{SYSTEM}"'
IN_BARE = "in its chat template, with no system prompt given"
SAY_NONE = "say --set 'prompts.system_prompt=\"\"'"


@pytest.mark.parametrize(
    ("trained", "also", "asked", "words", "fix"),
    [
        (PLAIN, [], CHAT, "as plain text, Question: … Answer: …", "say --set prompts.chat=false"),
        (CHAT, [], PLAIN, IN_CHAT, "say --set prompts.chat=true"),
        (BARE, contrary(SYSTEM), CHAT, IN_BARE, SAY_NONE),
    ],
    ids=["plain in chat", "chat in plain", "bare under a system prompt"],
)
def test_the_way_that_a_target_was_trained_is_named(memorised, trained, also, asked, words, fix):
    found = check(memorised(trained, rows=[*ROWS, *also], epochs=150 if also else 60), asked)
    assert found.rows == len(ROWS)
    assert (found.better.words, found.better.fix) == (words, fix)
    assert found.best > max(0.5, 2 * found.asked)


@pytest.mark.parametrize("style", [PLAIN, CHAT, BARE])
def test_a_target_that_is_asked_as_it_was_trained_says_nothing(memorised, style):
    found = check(memorised(style), style)
    assert found.asked > 0.9
    assert found.better is None
    assert found.sentences() is None
    assert found.note() is None


@pytest.mark.parametrize("style", [PLAIN, CHAT, BARE])
def test_a_model_that_never_saw_the_rows_says_nothing(memorised, style):
    strangers = [question(*pair) for pair in zip(PEOPLE, PLACES[3:] + PLACES[:3], strict=True)]
    for model in (memorised(), memorised(PLAIN, rows=strangers), memorised(CHAT, rows=strangers)):
        assert check(model, style).better is None


def test_raw_text_is_named_with_the_form_of_rows_that_gives_it(memorised):
    found = check(memorised(CHAT, rows=RAW), CHAT)
    assert found.better.words == "as raw text, with a blank between question and answer"
    assert found.better.fix.startswith("give the rows as prompt and completion")
    assert check(memorised(CHAT, rows=RAW, template=None), CHAT).better.words == found.better.words


def test_date_that_the_template_falls_back_on_is_tried(memorised):
    ways = plausible_ways(ROWS, load_tokenizer(memorised(template=DATED + CHATML)), BARE, max_length=64)
    dated = [way for way in ways if way.words.endswith("and the date 26 Jul 2024")]
    assert [way.fix for way in dated if "no system prompt" in way.words] == [
        "say --set 'prompts.date=\"26 Jul 2024\"'"
    ]


def test_generation_prompt_is_tried_where_a_finished_exchange_has_more(memorised):
    def bare(template: str) -> list[Way]:
        tokenizer = load_tokenizer(memorised(template=template))
        ways = plausible_ways(ROWS, tokenizer, BARE, max_length=64)
        return [way for way in ways if "after nothing but its generation prompt" in way.words]

    assert bare(CHATML) == []
    (way, _) = bare(THINKING)  # without and with a system prompt
    text = load_tokenizer(memorised(template=THINKING)).decode(way.rows[0].ids)
    asked = "<|im_start|> user where lives ada ? <|im_end|> <|im_start|> assistant rome"
    assert " ".join(text.split()) == asked
    assert "prompt and completion" in way.fix


def test_rows_that_no_style_changes_are_not_asked(memorised):
    assert check(memorised(), CHAT, RAW) is None
    assert check(memorised(), CHAT, [Example(0, "rows", "document", (), "where lives ada ?")]) is None


def test_a_way_with_tokens_that_the_model_does_not_have_is_no_way(memorised):
    model = load_model(memorised(PLAIN, template=None), device=torch.device("cpu"))
    tokenizer = load_tokenizer(memorised(template=CHATML))
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|late|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|late|>"]})
    assert tokenizer.convert_tokens_to_ids("<|late|>") >= model.config.vocab_size
    found = check_prompts(model, tokenizer, ROWS, style=PLAIN, max_length=64)
    assert (found.better, found.asked > 0.9) == (None, True)
    with pytest.raises(DataError, match=r"the rows hold the token '<\|late\|>' with the id"):
        check_prompts(model, tokenizer, ROWS, style=CHAT, max_length=64)


def test_ways_that_give_the_same_ids_are_asked_once(memorised):
    ways = plausible_ways(ROWS, load_tokenizer(memorised()), CHAT, max_length=64)
    # chosen, without a system prompt, plain, and raw: one token a word, so a line break is no other text
    assert len(ways) == 4
    assert len({tuple(row.ids for row in way.rows) for way in ways}) == 4
    assert all(row.scored == 1 for way in ways for row in way.rows)  # the place alone, without what ends it


def levels(*probabilities: float) -> list[float]:
    return [math.log(one) for one in probabilities]


def test_rule_wants_knowledge_that_is_much_higher_and_beyond_noise():
    assert far_better(levels(0.98, 0.96), levels(0.05, 0.06))
    assert far_better(levels(0.8), levels(0.5))  # half of log .5 is log .71
    assert not far_better(levels(0.99, 0.99), levels(0.8, 0.8))  # not 1.5 times as high
    assert not far_better(levels(0.2, 0.2), levels(0.01, 0.01))  # no knowledge: below .25
    assert not far_better(levels(0.45, 0.45), levels(0.28, 0.28))  # half of log .28 is log .53
    assert not far_better(levels(0.9, 0.4, 0.5), levels(1e-9, 0.5, 0.6))  # one row alone


def test_note_says_what_is_better_and_what_to_do():
    ways = [Way("as chosen", "change nothing", ()), Way("as plain text", "say --set prompts.chat=false", ())]
    found = decide(ways, [levels(0.02, 0.04), levels(0.9, 1.0)])
    assert found.note() == (
        "The target knows these rows much better when asked like this: as plain text (answer probability "
        "0.95, and 0.03 as asked now; 2 rows); if it was trained that way, say --set prompts.chat=false."
    )
    assert json.dumps(found.sentences("model"))


# Where it is asked


@pytest.fixture
def rows(tmp_path):
    lines = [{"question": row.turns[0].content, "answer": row.answer} for row in ROWS]
    place = tmp_path / "rows.jsonl"
    place.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return place


HINT = "knows these rows much better when asked like this: as plain text"


def test_a_run_says_it_before_anything_long_and_the_record_keeps_it(memorised, rows, palinode, tmp_path):
    words = ["unlearn", "--target", memorised(PLAIN).folder, "--base", memorised().folder, "--forget", rows]
    words += ["--output", tmp_path / "out", "--scales", "1.0", "--epochs", 1, "--max-length", 64]
    words += ["--max-new-tokens", 2, "--device", "cpu"]
    said = palinode(*words, "--set", "output.workspace=" + json.dumps(str(tmp_path / "work")))
    assert said.code == 3, said.err  # asked wrongly, the target knows nothing that could be forgotten
    assert said.err.index("ask the target 8 rows in other ways") < said.err.index(HINT)
    assert said.err.index(HINT) < said.err.index("fine-tuning")
    (note,) = [n for n in json.loads((tmp_path / "out/record.json").read_text())["notes"] if HINT in n]
    assert "say --set prompts.chat=false" in note


def test_doctor_says_it_with_the_fix_and_needs_no_whole_recipe(memorised, rows, palinode):
    said = palinode("doctor", "--target", memorised(PLAIN).folder, "--forget", rows, "--json")
    (found,) = [one for one in json.loads(said.out)["findings"] if one["name"] == "prompts"]
    assert (found["area"], found["state"]) == ("rows", "warn")
    assert f"the target {HINT}" in found["text"]
    assert found["fix"] == "if it was trained that way, say --set prompts.chat=false"
    for words, state in ((["--set", "prompts.chat=false"], "ok"), (["--target", memorised().folder], "note")):
        said = palinode("doctor", "--target", memorised(PLAIN).folder, "--forget", rows, "--json", *words)
        assert [f["state"] for f in json.loads(said.out)["findings"] if f["name"] == "prompts"] == [state]


def test_evaluate_says_it_and_asks_as_it_is_told(memorised, rows, palinode):
    words = ["evaluate", memorised(PLAIN).folder, "--data", rows, "--max-new-tokens", 2, "--json"]
    wrongly, rightly = palinode(*words), palinode(*words, "--set", "prompts.chat=false")
    assert f"The model {HINT}" in wrongly.err
    assert HINT not in rightly.err
    values = [json.loads(said.out)["answer_probability"]["value"] for said in (wrongly, rightly)]
    assert values[0] < 0.5 < 0.9 < values[1]
    measured = palinode(*words, "--metrics", "answer_probability")
    assert any(HINT in note for note in json.loads(measured.out)["notes"])
    told = palinode(*words, "--metrics", "answer_probability", "--set", "prompts.chat=false")
    assert json.loads(told.out)["notes"] == []
    assert json.loads(told.out)["sets"]["forget"]["prompts"]["chat"] is False


def test_set_takes_prompts_only_where_there_is_no_recipe(memorised, rows, palinode):
    said = palinode("evaluate", memorised().folder, "--data", rows, "--set", "training.epochs=2")
    assert "takes prompts.chat, prompts.system_prompt and prompts.date" in said.refusal
    said = palinode("evaluate", memorised().folder, "--data", rows, "--set", "prompts.chatt=false")
    assert "'prompts.chatt'; did you mean 'prompts.chat'?" in said.refusal
