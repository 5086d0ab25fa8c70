"""What a model did on examples: one outcome each, in order, whatever their form."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pydantic import ValidationError

from palinode import EvaluationSettings, ask, evaluate, read_examples
from palinode.data.examples import Example, Message, Question
from palinode.errors import DataError
from palinode.metrics.table import DEFAULT_METRICS
from palinode.models import load_model, load_tokenizer
from palinode.records import Outcome, read_outcomes, write_outcomes

SETTINGS = EvaluationSettings(max_new_tokens=3, max_length=64, device="cpu")


@pytest.fixture
def live(tiny):
    return load_model(tiny.target, device=torch.device("cpu")), load_tokenizer(tiny.target)


@pytest.fixture
def retain(tiny):
    return read_examples(tiny.retain)


def document(row: int, text: str) -> Example:
    return Example(row, "book.txt", "document", (), text)


def completion(row: int, prompt: str, answer: str) -> Example:
    return Example(row, "facts.jsonl", "completion", (Message("prompt", prompt),), answer)


def observe(model, tokenizer, examples, settings, **options):
    return ask(model, tokenizer, [*map(Question, examples)], settings.asking, **options)


class Notebook:
    """A listener that writes down the tasks it hears of."""

    def __init__(self):
        self.tasks = []

    def say(self, text):
        raise AssertionError(text)

    def task(self, label, total, unit):
        import contextlib

        self.tasks.append((label, total, unit))
        return contextlib.nullcontext(lambda amount: None)


def test_outcomes_come_in_the_order_of_the_examples(live, retain):
    examples = [retain[place] for place in (100, 3, 250, 7)]
    outcomes = observe(*live, examples, SETTINGS)
    assert [outcome.row for outcome in outcomes] == [100, 3, 250, 7]
    assert [outcome.prompt for outcome in outcomes] == [example.prompt for example in examples]
    assert [outcome.expected for outcome in outcomes] == [example.answer for example in examples]


def test_model_that_has_learned_its_facts_says_them(live, retain):
    outcomes = observe(*live, retain[:40], SETTINGS)
    assert sum(outcome.generated == outcome.expected for outcome in outcomes) >= 38
    assert all(len(outcome.logprobs) == len(outcome.hits) == 2 for outcome in outcomes)  # a word and the end


def test_what_is_hit_is_what_is_said(live, retain):
    """Answers have one word here: it is generated exactly when it is the likeliest."""
    for outcome in observe(*live, retain[:40], SETTINGS):
        assert outcome.hits[0] == (outcome.generated.split()[:1] == [outcome.expected])


def test_document_is_scored_from_its_second_token_to_the_end_token_and_nothing_is_generated(live, retain):
    text = " ".join(f"{example.prompt} {example.answer}" for example in retain[:4])
    (outcome,) = observe(*live, [document(0, text)], SETTINGS)
    assert outcome.generated is None
    assert outcome.prompt == ""
    assert outcome.expected == text
    assert len(outcome.logprobs) == len(outcome.hits) == len(text.split())  # less the first, and the end


def test_pieces_of_a_long_document_are_put_together_again(live, retain):
    text = " ".join(f"{example.prompt} {example.answer}" for example in retain[:10])
    (whole,) = observe(*live, [document(0, text)], SETTINGS)
    short = EvaluationSettings(max_length=8)
    before, pieces, after = observe(
        *live, [completion(0, "the", "river"), document(1, text), completion(2, "the", "pet")], short
    )
    assert len(pieces.logprobs) == len(whole.logprobs) == len(text.split())
    assert pieces.logprobs[:7] == pytest.approx(whole.logprobs[:7], abs=1e-4)  # the first piece sees the same
    assert len(before.logprobs) == len(after.logprobs) == 2


def test_documents_among_questions_have_no_answer_and_the_others_do(live):
    examples = [completion(0, "the home of", "x"), document(1, "the river of"), completion(2, "the pet", "y")]
    generated = [outcome.generated for outcome in observe(*live, examples, SETTINGS)]
    assert [answer is None for answer in generated] == [False, True, False]


def test_progress_has_a_task_for_likelihoods_and_one_for_answers(live, retain):
    notebook = Notebook()
    observe(*live, retain[:5], SETTINGS, label="target", listener=notebook)
    assert notebook.tasks == [("target: likelihoods", 5, "rows"), ("target: answers", 5, "rows")]
    notebook = Notebook()
    observe(*live, [document(0, "the river of")], SETTINGS, listener=notebook)
    assert notebook.tasks == [("evaluating: likelihoods", 1, "rows")]


def test_no_examples_give_no_outcomes(live):
    assert observe(*live, [], SETTINGS) == []


def test_batches_do_not_change_outcomes(live, retain):
    many = observe(*live, retain[:20], SETTINGS)
    one = observe(*live, retain[:20], SETTINGS.model_copy(update={"batch_rows": 1}))
    assert [outcome.generated for outcome in one] == [outcome.generated for outcome in many]


def test_prompt_too_long_for_the_limit_is_named(live):
    with pytest.raises(DataError, match=r"row 1 of facts\.jsonl: its prompt is 30 tokens"):
        observe(*live, [completion(0, "the " * 30, "x")], EvaluationSettings(max_length=16))


def test_evaluation_loads_the_model_and_scores_every_metric(tiny, retain):
    found = evaluate(tiny.target, retain[:10], SETTINGS)
    outcomes, scores = found.outcomes, found.scores
    assert len(outcomes) == 10
    assert set(scores) == set(DEFAULT_METRICS)
    expected = sum(math.exp(sum(o.logprobs) / len(o.logprobs)) for o in outcomes) / 10
    assert scores["answer_probability"].value == pytest.approx(expected)
    assert scores["answer_probability"].n == 10


def test_same_seed_gives_the_same_intervals(tiny, retain):
    first = evaluate(tiny.base, retain[:10], SETTINGS.model_copy(update={"seed": 4}))
    again = evaluate(tiny.base, retain[:10], SETTINGS.model_copy(update={"seed": 4}))
    other = evaluate(tiny.base, retain[:10], SETTINGS.model_copy(update={"seed": 5}))
    assert first == again
    assert first.scores["answer_probability"].low != other.scores["answer_probability"].low


# On disk


def test_outcomes_come_back_as_they_were_written(tmp_path):
    outcomes = [
        Outcome(3, "Wer war es? 🎩", 'Sie sagte: "Ich."\n', "nobody\u2028", (-0.1, -2.5e-7), (True, False)),
        Outcome(4, "", "a whole document", None, (), ()),
    ]
    write_outcomes(tmp_path / "outcomes.jsonl", outcomes)
    assert list(read_outcomes(tmp_path / "outcomes.jsonl")) == outcomes
    lines = (tmp_path / "outcomes.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["row"] for line in lines[:-1]] == [3, 4]


def test_real_outcomes_come_back_bit_for_bit(live, retain, tmp_path):
    outcomes = observe(*live, retain[:5], SETTINGS)
    write_outcomes(tmp_path / "outcomes.jsonl", outcomes)
    assert list(read_outcomes(tmp_path / "outcomes.jsonl")) == outcomes


# Settings


@pytest.mark.parametrize(
    "wrong", [{"rows": 3}, {"max_rows": 0}, {"max_new_tokens": 0}, {"batch_rows": 1.5}, {"max_length": 7}]
)
def test_settings_refuse_unknown_keys_and_impossible_values(wrong):
    with pytest.raises(ValidationError):
        EvaluationSettings(**wrong)
