"""Asking a live model: every figure from one pass, whatever shares a batch or a process with what."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from palinode import read_examples
from palinode.data.examples import Example, Message, Question
from palinode.data.tokenize import PromptStyle, TokenRow, prompt_ids, tokenize
from palinode.errors import DataError, RecipeError
from palinode.evaluation.ask import ask, said_right, sample_seed
from palinode.models import load_model, load_tokenizer
from palinode.models.likelihoods import TokenScores, token_scores
from palinode.models.reading import gradient_norms
from palinode.records import Outcome
from palinode.settings import Asking

ASKING = Asking(max_new_tokens=4, max_length=64, standardise=True, gradient_norms=True, samples=2, seed=3)


@pytest.fixture(scope="module")
def live(tiny):
    return load_model(tiny.target, device=torch.device("cpu")), load_tokenizer(tiny.target)


@pytest.fixture(scope="module")
def questions(tiny):
    """Twelve questions, each with a paraphrase and wrong answers of one to three words."""
    examples = read_examples(tiny.retain)[:60:5]
    answers = [example.answer for example in examples]
    return [
        Question(
            example,
            {
                "paraphrased": (f"the {example.answer}",),
                "perturbed": (answers[place - 1], f"the {answers[place - 2]} of", example.answer),
            },
            accepted=(example.answer, "x"),
        )
        for place, example in enumerate(examples)
    ]


def document(row: int, text: str) -> Question:
    return Question(Example(row, "book.txt", "document", (), text))


def same(first: list[Outcome], second: list[Outcome], *, tolerance: float = 1e-4) -> None:
    """Assert that outcomes are the same, numbers within the tolerance."""
    for one, other in zip(first, second, strict=True):
        numbers = [(one.logprobs, other.logprobs), (one.standardised, other.standardised)]
        assert one.alternatives.keys() == other.alternatives.keys()
        for kind, likelihoods in one.alternatives.items():
            for a, b in zip(likelihoods, other.alternatives[kind], strict=True):
                assert a.text == b.text
                numbers.append((a.logprobs, b.logprobs))
        for a, b in numbers:
            assert a == pytest.approx(b, rel=1e-5, abs=tolerance)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)
        bare = {"logprobs": (), "standardised": (), "alternatives": {}, "gradient_norm": None}
        assert replace(one, **bare) == replace(other, **bare)


@pytest.fixture(scope="module")
def outcomes(live, questions):
    return ask(*live, questions, ASKING)


# What is in an outcome


@torch.no_grad()
def test_every_answer_has_the_likelihood_of_a_plain_row(live, questions, outcomes):
    model, tokenizer = live
    for question, outcome in zip(questions, outcomes, strict=True):
        likelihoods = [(outcome.expected, outcome.logprobs)]
        likelihoods += [(one.text, one.logprobs) for kind in outcome.alternatives.values() for one in kind]
        assert [text for text, _ in likelihoods[1:]] == [
            text for texts in question.alternatives.values() for text in texts
        ]
        for text, found in likelihoods:
            example = replace(question.example, answer=text)
            (row,) = tokenize([example], tokenizer, max_length=64, style=PromptStyle())
            logprobs = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(dim=-1)
            plain = [logprobs[place - 1, row.ids[place]].item() for place in range(row.start, len(row.ids))]
            assert found == pytest.approx(plain, abs=1e-5)


def test_an_answer_given_again_has_the_same_likelihood(outcomes):
    for outcome in outcomes:
        assert outcome.alternatives["perturbed"][-1].logprobs == outcome.logprobs


def test_outcome_carries_the_example_and_its_accepted_answers(questions, outcomes):
    for question, outcome in zip(questions, outcomes, strict=True):
        example = question.example
        assert (outcome.row, outcome.prompt, outcome.expected) == (
            example.row,
            example.prompt,
            example.answer,
        )
        assert outcome.accepted == (example.answer, "x")
        assert len(outcome.samples) == 2


def test_what_is_not_asked_for_is_left_out(live, questions):
    (outcome,) = ask(*live, questions[:1], Asking(generate=False, max_length=64))
    assert outcome.generated is None
    assert outcome.standardised == outcome.samples == ()
    assert outcome.gradient_norm is None
    assert len(outcome.logprobs) == len(outcome.hits)


def test_standardised_logprobs_are_those_of_the_specification():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.5, 0.5], [0.0, 3.0, -1.0], [1.0, -1.0, 0.5]])
    at, targets = torch.arange(4), torch.tensor([0, 2, 0, 1])
    logprobs, hits, standardised = token_scores(logits, at, targets, standardise=True)
    assert logprobs.tolist() == pytest.approx([-0.407606, -1.098612, -3.065884, -2.554957], abs=1e-6)
    assert standardised.tolist() == pytest.approx([0.652055, 0, -3.461357, -3.105976], abs=1e-5)
    assert hits.tolist() == [True, False, False, False]


def test_standardised_logprob_of_a_near_certain_token_is_not_lost_to_rounding():
    """Two tokens, the other 17 nats behind: p = 4e-8, σ² = p · 17² = 1.2e-5, in double precision."""
    logits = torch.tensor([[30.0, 13.0]])
    p = math.exp(-17) / (1 + math.exp(-17))
    expected = p * 17 / math.sqrt(p * (1 - p) * 17**2)
    _, _, standardised = token_scores(logits, torch.tensor([0]), torch.tensor([0]), standardise=True)
    assert standardised.item() == pytest.approx(expected, rel=1e-4)


# What does not change them


def test_batches_do_not_change_outcomes(live, questions, outcomes):
    same(ask(*live, questions, replace(ASKING, batch_rows=1)), outcomes)
    same(ask(*live, questions, replace(ASKING, batch_rows=5)), outcomes)


def test_order_does_not_change_outcomes(live, questions, outcomes):
    same(ask(*live, questions[::-1], ASKING)[::-1], outcomes)


def test_question_asked_alone_has_the_same_outcome(live, questions, outcomes):
    for question, outcome in list(zip(questions, outcomes, strict=True))[::4]:
        same(ask(*live, [question], ASKING), [outcome])


def test_pad_token_does_not_change_outcomes(tiny, live, questions, outcomes):
    tokenizer = load_tokenizer(tiny.target)
    tokenizer.pad_token_id = 7
    same(ask(live[0], tokenizer, questions, ASKING), outcomes)


def test_greedy_answers_are_those_of_transformers(live, questions):
    model, tokenizer = live
    for asking in (Asking(max_new_tokens=6, max_length=64), Asking(max_new_tokens=1, max_length=64)):
        for question, outcome in zip(questions, ask(model, tokenizer, questions, asking), strict=True):
            ids = torch.tensor([prompt_ids(question.example, tokenizer, PromptStyle())])
            said = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=asking.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )[0, ids.shape[1] :]
            assert outcome.generated == tokenizer.decode(said, skip_special_tokens=True).strip()


# The model's own answers


def test_answer_is_begun_as_far_as_the_model_says_the_right_one():
    row = TokenRow((5, 6, 7, 8, 9, 1), 2, 0)
    assert said_right(row, TokenScores((0.0,) * 4, (True, True, False, True))) == (7, 8)
    assert said_right(row, TokenScores((0.0,) * 4, (False, True, True, True))) == ()
    assert said_right(row, TokenScores((0.0,) * 4, (True, True, True, True))) == (7, 8, 9, 1)


def test_answer_is_cut_before_the_first_stop_text(live, questions):
    free = Asking(max_new_tokens=6, min_new_tokens=6, max_length=64)
    for question, outcome in zip(questions, ask(*live, questions, free), strict=True):
        words = outcome.generated.split()
        stops = (f" {words[3]}", f" {words[2]}")
        (stopped,) = ask(*live, [question], replace(free, min_new_tokens=0, stop_texts=stops))
        places = [outcome.generated.find(stop) for stop in stops]
        cut = stopped.generated
        assert outcome.generated.startswith(cut)
        assert len(cut) <= min(place for place in places if place >= 0)


def test_answers_have_at_least_so_many_tokens(live, questions):
    for outcome in ask(*live, questions, Asking(max_new_tokens=6, min_new_tokens=3, max_length=64)):
        assert len(outcome.generated.split()) >= 3


def test_answer_follows_its_prefix(live, questions):
    """The prefix goes where an answer would begin, and is no part of what is said."""
    model, tokenizer = live
    prefix = questions[1].example.answer
    for outcome, question in zip(
        ask(model, tokenizer, questions, Asking(max_new_tokens=3, max_length=64, answer_prefix=prefix)),
        questions,
        strict=True,
    ):
        forced = replace(question.example, answer=prefix)
        (row,) = tokenize([forced], tokenizer, max_length=64, style=PromptStyle())
        ids = torch.tensor([row.ids[:-1]])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )[0, ids.shape[1] :]  # fmt: skip
        assert outcome.generated == tokenizer.decode(said, skip_special_tokens=True).strip()


def test_samples_differ_by_number_and_by_seed(live, questions):
    hot = replace(ASKING, temperature=5.0, samples=3, gradient_norms=False)
    first, again = ask(*live, questions, hot), ask(*live, questions[::-1], hot)[::-1]
    other = ask(*live, questions, replace(hot, seed=4))
    assert [outcome.samples for outcome in first] == [outcome.samples for outcome in again]
    assert [outcome.samples for outcome in first] != [outcome.samples for outcome in other]
    assert all(len(set(outcome.samples)) > 1 for outcome in first)
    more = ask(*live, questions, replace(hot, samples=5))  # more samples are the same ones, and others
    assert [outcome.samples[:3] for outcome in more] == [outcome.samples for outcome in first]


def test_seed_of_a_sample_is_a_64_bit_number_of_its_own():
    seeds = {sample_seed(s, p, n) for s in (0, 1) for p in ((5, 6), (5, 7)) for n in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)


# Documents


def test_documents_among_questions_say_nothing(live, questions):
    text = " ".join(question.example.prompt for question in questions)
    mixed = [questions[0], document(1, text), questions[1]]
    first, whole, last = ask(*live, mixed, replace(ASKING, answer_prefix="the"))
    assert (whole.generated, whole.samples) == (None, ())
    assert len(whole.logprobs) == len(whole.standardised) == len(text.split())
    assert first.generated is not None
    assert last.generated is not None


def test_cut_document_has_no_gradient_norm_and_all_its_tokens(live, questions):
    text = " ".join(question.example.prompt for question in questions)
    (cut,) = ask(*live, [document(0, text)], replace(ASKING, max_length=8))
    assert cut.gradient_norm is None
    assert len(cut.logprobs) == len(cut.standardised) == len(text.split())


def test_no_questions_give_no_outcomes(live):
    assert ask(*live, [], ASKING) == []


def test_prompt_too_long_is_named(live):
    long = Example(4, "facts.jsonl", "completion", (Message("prompt", "the " * 30),), "x")
    with pytest.raises(DataError, match=r"row 5 of facts\.jsonl: its prompt is 30 tokens"):
        ask(*live, [*map(Question, [long])], Asking(max_length=16))


# Gradients


def test_gradient_norm_is_the_mean_over_tensors_of_the_norm_of_the_mean_loss(live, questions, outcomes):
    model, tokenizer = live
    (row,) = tokenize([questions[0].example], tokenizer, max_length=64, style=PromptStyle())
    ids = row.ids[:-1]  # the end token is no part of it, as in open-unlearning
    logits = model(input_ids=torch.tensor([ids])).logits[0, row.start - 1 : -1]
    torch.nn.functional.cross_entropy(logits, torch.tensor(ids[row.start :])).backward()
    norms = [float(parameter.grad.norm()) for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    assert outcomes[0].gradient_norm == pytest.approx(sum(norms) / len(norms), rel=1e-4)


def test_gradients_leave_the_model_as_it_was(live, questions):
    model, tokenizer = live
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = tokenize([question.example for question in questions[:2]], tokenizer, max_length=64,
                    style=PromptStyle())  # fmt: skip
    assert len(gradient_norms(model, rows, pad_id=0)) == 2
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Settings


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"samples": -1}, "samples is -1"),
        ({"batch_rows": 0}, "batch_rows is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"stop_texts": ("\n", "")}, "stop_texts holds an empty text"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "an answer cannot be longer than its limit"),
    ],
)
def test_impossible_settings_are_refused(wrong, sentence):
    with pytest.raises(RecipeError, match=sentence):
        Asking(**wrong)
