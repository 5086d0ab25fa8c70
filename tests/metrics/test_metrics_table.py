"""The contract that every entry of the tables keeps, and score_outcomes over all of them."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_outcomes import answers

from palinode.errors import DataError
from palinode.metrics.table import ATTACKS, COMPARISONS, DEFAULT_METRICS, METRICS, score_outcomes
from palinode.records import Outcome

ISSUES_FOUR = ["answer_probability", "rouge_l_recall", "exact_memorization", "extraction_strength"]
KNOWN = {"paraphrased": answers([0.0]), "perturbed": answers([0.5, 1e4])}
PERFECT = Outcome(
    0, "Who?", "Hsiao Yun-Hwa", "Hsiao Yun-Hwa", (0.0, 0.0, 0.0), (True, True, True), alternatives=KNOWN
)
UNKNOWN = {"paraphrased": answers([9.0]), "perturbed": answers([9.0, 9.0])}
LOST = Outcome(
    1, "Who?", "Hsiao Yun-Hwa", "no idea", (-9.0, -9.0, -9.0), (False, False, False), alternatives=UNKNOWN
)
DOCUMENT = Outcome(2, "", "A long text", None, (-0.5, -0.5), (True, False))
LESS_IS_MORE = {"forget_truth_ratio", "perturbed_probability"}  # higher where less is known


@st.composite
def outcomes(draw):
    tokens = draw(st.lists(st.tuples(st.floats(-20, 0), st.booleans()), max_size=5))
    logprobs, hits = zip(*tokens, strict=True) if tokens else ((), ())
    words = st.sampled_from(["", "red", "red green", "green red blue"])
    losses = st.lists(st.floats(0, 20), max_size=2)
    alternatives = {kind: answers(draw(losses)) for kind in ("paraphrased", "perturbed")}
    return Outcome(0, "?", draw(words), draw(st.none() | words), logprobs, hits, alternatives=alternatives)


def test_a_run_reports_the_four_metrics_that_need_no_more_than_its_answers():
    assert list(DEFAULT_METRICS) == ISSUES_FOUR
    assert list(score_outcomes([PERFECT])) == ISSUES_FOUR
    assert set().union(*(METRICS[name].needs for name in DEFAULT_METRICS)) == {"generated"}


@pytest.mark.parametrize("name", METRICS)
def test_contract(name):
    metric = METRICS[name]
    assert metric.name == name
    assert metric.description
    assert metric.missing
    assert "\n" not in metric.description
    assert metric.per_example([]) == []
    (known,), (unknown,) = metric.per_example([PERFECT]), metric.per_example([LOST])
    if name not in LESS_IS_MORE:
        assert 0 <= unknown <= 0.5 < known <= 1
    assert metric.per_example([LOST, PERFECT]) == [unknown, known]


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("need", ["generated", "paraphrased", "perturbed"])
def test_a_metric_loses_its_value_exactly_without_what_it_needs(name, need):
    others = {kind: texts for kind, texts in KNOWN.items() if kind != need}
    generated = None if need == "generated" else PERFECT.generated
    without = dataclasses.replace(PERFECT, alternatives=others, generated=generated)
    assert (METRICS[name].per_example([without]) == [None]) == (need in METRICS[name].needs)


def test_strict_strength_is_zero_where_the_other_is_not():
    names = ["extraction_strength", "extraction_strength_strict"]
    assert [score.value for score in score_outcomes([LOST], names=names).values()] == [0.5, 0.0]


@pytest.mark.parametrize("name", COMPARISONS)
def test_contract_of_comparisons(name):
    assert COMPARISONS[name]
    assert "\n" not in COMPARISONS[name]


def test_names_are_unique_over_all_tables():
    names = [*METRICS, *ATTACKS, *COMPARISONS]
    assert len(names) == len(set(names))


def test_an_unknown_metric_is_refused_by_name():
    with pytest.raises(DataError, match="no metric blue; the metrics are answer_probability"):
        score_outcomes([PERFECT], names=["answer_probability", "blue"])


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
    assert score.reason.startswith("none of 2 examples has a value: nothing was generated")


def test_no_outcomes_give_no_values():
    assert {score.value for score in score_outcomes([], names=METRICS).values()} == {None}


@settings(deadline=None, max_examples=10)
@given(st.lists(outcomes(), max_size=8), st.randoms(use_true_random=False))
def test_order_of_outcomes_changes_no_score(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert score_outcomes(shuffled, names=METRICS) == score_outcomes(rows, names=METRICS)
