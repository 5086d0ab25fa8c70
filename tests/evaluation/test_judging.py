"""Candidates, their order, and verdicts (spec: msa.md §5)."""

import threading
from dataclasses import replace

import pytest

from palinode.errors import DataError, InputError
from palinode.evaluation.judging import (
    NONE_TEXT,
    Pick,
    accepted_candidates_of,
    candidates_of,
    judge_answers,
    plain_text,
)
from palinode.records import Likelihood, Outcome


def outcome(prompt, expected="Lima", generated="Lima.", wrong=(), **fields):
    perturbed = tuple(Likelihood(text, (-1.0,)) for text in wrong)
    return Outcome(
        0, prompt, expected, generated, (-1.0,), (True,), alternatives={"perturbed": perturbed}, **fields
    )


def roles(candidates):
    return {candidate.text: candidate.roles for candidate in candidates}


class Copycat:
    """A judge that picks the candidates with the answer's very text, or none."""

    name = "copycat"

    def __init__(self, at_once=1):
        self.at_once = at_once
        self.stopped = threading.Event()

    def pick(self, question, answer, candidates):
        if question == "broken":
            raise InputError("the judge is out")
        same = tuple(n for n, each in enumerate(candidates) if plain_text(each.text) == plain_text(answer))
        return Pick(same or tuple(n for n, each in enumerate(candidates) if each.text == NONE_TEXT))

    def stop(self):
        self.stopped.set()


# Candidates


def test_candidates_are_truth_ideal_perturbed_and_none():
    asked = outcome("Where was she born?", wrong=("Quito", "La Paz"))
    ideal = outcome("Where was she born?", generated="In Bogotá.")
    assert roles(candidates_of(asked, ideal, seed=0)) == {
        "Lima": ("truth",),
        "In Bogotá.": ("ideal",),
        "Quito": ("perturbed",),
        "La Paz": ("perturbed",),
        NONE_TEXT: ("none",),
    }


def test_equal_texts_are_one_candidate_with_all_their_roles():
    asked = outcome("q", expected="Lima", wrong=("Quito", " QUITO. ", "“lima”"))
    ideal = outcome("q", generated="lima.")
    assert roles(candidates_of(asked, ideal, seed=0)) == {
        "Lima": ("truth", "ideal", "perturbed"),
        "Quito": ("perturbed",),
        NONE_TEXT: ("none",),
    }


@pytest.mark.parametrize(("one", "other"), [("-5", "5"), ("C", "C++"), ("3.5", "35"), ("Peru", "Péru")])
def test_texts_with_other_facts_stay_apart(one, other):
    assert plain_text(one) != plain_text(other)


def test_an_answer_that_says_none_of_these_is_not_the_none_candidate():
    found = candidates_of(outcome("q", expected="None of these."), None, seed=0)
    assert sorted(each.roles for each in found) == [("none",), ("truth",)]


def test_an_ideal_that_wrote_nothing_at_all_is_a_candidate_and_one_not_asked_is_not():
    silent = candidates_of(outcome("q"), outcome("q", generated=""), seed=0)
    assert roles(silent)[""] == ("ideal",)
    assert len(candidates_of(outcome("q"), outcome("q", generated=None), seed=0)) == 2


def test_order_depends_on_seed_and_question_and_nothing_else():
    wrong = tuple("abcdefgh")
    first = candidates_of(outcome("q", wrong=wrong), None, seed=1)
    assert candidates_of(outcome("q", wrong=wrong[::-1]), None, seed=1) == first
    assert candidates_of(replace(outcome("q", wrong=wrong), row=7), None, seed=1) == first
    for other in (
        candidates_of(outcome("q", wrong=wrong), None, seed=2),
        candidates_of(outcome("r", wrong=wrong), None, seed=1),
    ):
        assert set(other) == set(first)
        assert other != first


def test_no_place_is_the_truths_own():
    places = [
        [each.roles for each in candidates_of(outcome(f"q{n}", wrong=("a", "b", "c")), None, seed=0)].index(
            ("truth",)
        )
        for n in range(500)
    ]
    assert all(60 <= places.count(place) <= 140 for place in range(5))  # 100 each, five deviations


def test_accepted_answers_and_none_are_the_candidates_of_restor():
    asked = outcome("q", accepted=("politician", "Politician", "lawyer"))
    assert roles(accepted_candidates_of(asked, seed=0)) == {
        "politician": ("accepted",),
        "lawyer": ("accepted",),
        NONE_TEXT: ("none",),
    }


# Verdicts


def test_verdicts_name_judge_candidates_and_roles_in_the_order_of_the_answers():
    asked = [
        outcome(f"q{n}", generated=text, wrong=("Quito",)) for n, text in enumerate(["Lima", "Quito", "Oslo"])
    ]
    ideals = [outcome(f"q{n}", generated="Lima") for n in range(3)]
    verdicts = judge_answers(Copycat(at_once=3), asked, ideals, seed=4)
    assert [verdict.roles() for verdict in verdicts] == [{"truth", "ideal"}, {"perturbed"}, {"none"}]
    assert {verdict.judge for verdict in verdicts} == {"copycat"}
    shown = tuple((each.text, each.roles) for each in candidates_of(asked[1], ideals[1], seed=4))
    assert verdicts[1].offered == shown


def test_an_answer_that_was_not_generated_is_not_judged():
    (verdict,) = judge_answers(Copycat(), [outcome("q", generated=None)])
    assert verdict.picked is None
    assert verdict.roles() is None
    assert verdict.reason == "no answer was generated"


def test_without_ideals_accepted_answers_are_the_candidates():
    asked = [
        outcome("q", generated="lawyer", accepted=("politician", "lawyer")),
        outcome("q", generated="Lima"),
    ]
    assert [verdict.roles() for verdict in judge_answers(Copycat(), asked)] == [{"accepted"}, {"truth"}]


def test_ideals_of_other_questions_are_refused():
    with pytest.raises(DataError, match="2 answers to judge and 1 of the retrained"):
        judge_answers(Copycat(), [outcome("q"), outcome("r")], [outcome("q")])
    with pytest.raises(DataError, match="same questions in the same order"):
        judge_answers(Copycat(), [outcome("q"), outcome("r")], [outcome("q"), outcome("s")])


def test_an_error_of_the_judge_stops_it_and_is_raised():
    judge = Copycat()
    with pytest.raises(InputError, match="the judge is out"):
        judge_answers(judge, [outcome("broken"), *(outcome(f"q{n}") for n in range(50))])
    assert judge.stopped.is_set()


def test_no_answers_give_no_verdicts():
    assert judge_answers(Copycat(), []) == []
