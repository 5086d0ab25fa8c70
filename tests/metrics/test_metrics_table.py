"""The contract that every entry of METRICS keeps, and score_outcomes over all of them."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palinode.metrics import METRICS, score_outcomes
from palinode.records import Outcome

PERFECT = Outcome(0, "Who?", "Hsiao Yun-Hwa", "Hsiao Yun-Hwa", (0.0, 0.0, 0.0), (True, True, True))
LOST = Outcome(1, "Who?", "Hsiao Yun-Hwa", "no idea", (-9.0, -9.0, -9.0), (False, False, False))
DOCUMENT = Outcome(2, "", "A long text", None, (-0.5, -0.5), (True, False))


@st.composite
def outcomes(draw):
    tokens = draw(st.lists(st.tuples(st.floats(-20, 0), st.booleans()), max_size=5))
    logprobs, hits = zip(*tokens, strict=True) if tokens else ((), ())
    words = st.sampled_from(["", "red", "red green", "green red blue"])
    return Outcome(0, "?", draw(words), draw(st.none() | words), logprobs, hits)


def test_the_issues_four_metrics_are_there():
    assert list(METRICS) == [
        "answer_probability",
        "rouge_l_recall",
        "exact_memorization",
        "extraction_strength",
    ]


@pytest.mark.parametrize("name", METRICS)
def test_contract(name):
    metric = METRICS[name]
    assert metric.name == name
    assert metric.description
    assert "\n" not in metric.description
    assert metric.per_example([]) == []
    assert metric.per_example([PERFECT]) == [1.0]
    assert metric.per_example([LOST])[0] <= 0.5
    assert metric.per_example([LOST, PERFECT]) == metric.per_example([LOST]) + metric.per_example([PERFECT])


@pytest.mark.parametrize("name", METRICS)
def test_only_metrics_that_need_generation_lose_their_value_without_it(name):
    unwritten = dataclasses.replace(PERFECT, generated=None)
    assert (METRICS[name].per_example([unwritten]) == [None]) == METRICS[name].needs_generation


def test_scores_carry_n_interval_and_reason():
    scores = score_outcomes([PERFECT, LOST, DOCUMENT])
    assert scores["exact_memorization"].value == pytest.approx(2 / 3)  # 1, 0, 1
    assert scores["exact_memorization"].n == 3
    assert scores["exact_memorization"].reason is None
    assert scores["rouge_l_recall"].value == 0.5
    assert scores["rouge_l_recall"].n == 2
    assert scores["rouge_l_recall"].reason.startswith("1 of 3 examples left out: nothing was generated")


def test_documents_have_no_rouge_and_say_why():
    score = score_outcomes([DOCUMENT, DOCUMENT])["rouge_l_recall"]
    assert score.value is None
    assert score.reason.startswith("none of 2 examples: nothing was generated")


def test_no_outcomes_give_no_values():
    assert {score.value for score in score_outcomes([]).values()} == {None}


@settings(deadline=None, max_examples=25)
@given(st.lists(outcomes(), max_size=8), st.randoms(use_true_random=False))
def test_order_of_outcomes_changes_no_score(rows, random):
    assert score_outcomes(random.sample(rows, len(rows))) == score_outcomes(rows)
