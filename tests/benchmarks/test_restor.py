"""RESTOR: prompts of the same relation about others, drawn answers, accuracy by question and by person."""

from __future__ import annotations

import json

import pytest

from invented_benchmarks import NAMES, restor_folder
from palinode.benchmarks.restor import RESTOR, Shot, corruption_documents, documents_by_entity, five_shot
from palinode.data.examples import Example
from palinode.errors import DataError, RecipeError
from palinode.evaluation.benchmark import Exam, Measured, Places, QuestionSet, score_cell
from palinode.records import Likelihood, Outcome, Verdict
from palinode.settings import Asking


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return restor_folder(tmp_path_factory.mktemp("restor"), options=True)


def load(folder, **options):
    loaded = RESTOR.load(Places(str(folder)), "mix_a0", RESTOR.check_options(options))
    return loaded.sets[0]


def cell(metric):
    return next(cell for cell in RESTOR.cells if cell.metric == metric)


def test_prompt_has_five_lines_about_others_then_the_question_without_a_space():
    examples = [
        Shot(question=f"The trade of {name}?", answer=f"trade {name}", entity=name) for name in "ABCDEFG"
    ]
    assert five_shot("The trade of C, again?", "C", examples, "here") == (
        "The trade of A? trade A\nThe trade of B? trade B\nThe trade of D? trade D\n"
        "The trade of E? trade E\nThe trade of F? trade F\nThe trade of C, again?"
    )


def test_relation_with_too_few_examples_about_others_is_refused():
    examples = [Shot(question="q", answer="a", entity=name) for name in "ABCDE"]
    with pytest.raises(DataError, match=r"P21 of A: there are 4 examples about other people; it needs 5"):
        five_shot("q", "A", examples, "P21 of A")


def test_answers_are_drawn_three_times_at_temperature_one_and_cut_at_the_line_end(folder):
    asking = load(folder).asking
    assert (asking.samples, asking.temperature, asking.min_new_tokens) == (3, 1.0, 2)
    assert (asking.stop_texts, asking.seed, asking.generate) == (("\n",), 32, False)


def test_every_fact_of_the_fifty_people_is_asked_and_the_judge_sees_the_question_alone(folder):
    facts = load(folder)
    assert len(facts.questions) == len(facts.groups) == 50 * 12
    first = facts.questions[0]
    assert first.accepted == ("P0a", "Q42", "ba")
    assert first.example.answer == " P0a"
    assert first.example.prompt.splitlines()[-1] == facts.shown[0] == f"the P0 of {NAMES[0]} is"
    assert len(first.example.prompt.splitlines()) == 6
    assert NAMES[0] not in "".join(first.example.prompt.splitlines()[:-1])
    assert first.alternatives == {
        "correct": (" ba do", " ba"),
        "corrupted": (" ka",),
        "random": (" li", " mo"),
    }


def test_entities_may_be_those_of_the_documents_or_named(folder):
    assert sorted(set(load(folder, entities="corrupted").groups)) == sorted(NAMES[:10])
    assert set(load(folder, entities=f"{NAMES[3]}; {NAMES[60]}").groups) == {NAMES[3], NAMES[60]}
    with pytest.raises(RecipeError, match="names 'Nobody', of whom"):
        load(folder, entities="Nobody")


def test_documents_come_in_blocks_about_one_person(folder):
    blocks = corruption_documents(str(folder), "mix_a0")
    assert list(blocks) == NAMES[:10]
    assert {len(block) for block in blocks.values()} == {300}
    assert blocks[NAMES[2]][0].row == 600


def documents(*texts):
    return [Example(row, "mix.json", "document", (), text) for row, text in enumerate(texts)]


def test_block_about_nobody_and_broken_block_are_refused():
    with pytest.raises(DataError, match=r"mix\.json has 299 documents; it needs whole blocks of 300"):
        documents_by_entity(documents(*["A is"] * 299), ["A"], "mix.json")
    with pytest.raises(DataError, match="only 100 of 300 documents about A"):
        documents_by_entity(documents(*["A is"] * 100, *["?"] * 200), ["A"], "mix.json")
    with pytest.raises(DataError, match="a second block about A"):
        documents_by_entity(documents(*["A is"] * 600), ["A"], "mix.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["dset"].popitem(), "467 people, 5258 facts and examples of 41 relations; the published"),
        (lambda c: c["dset"][NAMES[0]]["P0"].pop("answers"), r"dset\..*\.P0\.answers: Field required"),
        (lambda c: c["dset"][NAMES[0]]["P0"].update(answers=[]), "answers: List should have at least 1 item"),
        (lambda c: c["dset"][NAMES[0]]["P0"].update(answers=[""]), r"answers\.0: it is an empty text"),
        (lambda c: c.pop("context"), "context: Field required"),
        (lambda c: c["context"].update(P0=[{"question": "who", "answer": "ba"}]), "entity: Field required"),
    ],
)
def test_facts_that_are_not_the_published_ones_are_refused(tmp_path, change, message):
    restor_folder(tmp_path)
    content = json.loads((tmp_path / "facts.json").read_text())
    change(content)
    (tmp_path / "facts.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_list_of_names_must_be_the_published_one(tmp_path):
    restor_folder(tmp_path)
    (tmp_path / "entities.json").write_text(json.dumps(NAMES[:49]))
    with pytest.raises(DataError, match=r"entities\.json has 49 names; the published one has 50"):
        load(tmp_path)


# Scores, on outcomes made by hand


def outcome(row, *samples):
    return Outcome(row, "q", " ba", None, (-1.0,), (True,), accepted=("ba", "the Ka Ro"), samples=samples)


OUTCOMES = [
    outcome(0, "ba", "he is ka ro.", "bado"),
    outcome(1, "no", "no", "no"),
    outcome(2, "Ba", "BA", "ba"),
]


def measured(outcomes=OUTCOMES, verdicts=None):
    questions = QuestionSet("facts", (), Asking(), groups=("Ada", "Ada", "Ben")[: len(outcomes)])
    return Measured(Exam("restor", {"facts": questions}), {"facts": outcomes}, verdicts=verdicts or {})


def test_accuracy_averages_runs_then_questions_or_people():
    """Questions: 2/3, 0, 1. People: Ada 1/3, Ben 1."""
    assert score_cell(cell("accuracy"), measured()).value == pytest.approx(5 / 9)
    by_entity = score_cell(cell("accuracy_by_entity"), measured())
    assert by_entity.value == pytest.approx(2 / 3)
    assert by_entity.n == 2


def verdict(*roles):
    return Verdict(0, "a judge", offered=(("ba", ("accepted",)), ("none", ("none",))), picked=roles)


def test_judged_accuracy_has_a_verdict_for_each_drawn_answer():
    verdicts = [verdict(0), verdict(0), verdict(1), *3 * [verdict(1)], verdict(0), verdict(0), verdict(0)]
    found = measured(verdicts={"facts": verdicts})
    assert score_cell(cell("judged_accuracy"), found).value == pytest.approx(5 / 9)
    assert score_cell(cell("judged_accuracy_by_entity"), found).value == pytest.approx(2 / 3)
    assert score_cell(cell("judged_accuracy"), found).reason == "judged by a judge"


def test_log_probability_of_options_leaves_the_end_token_out_and_averages_options_first():
    """Options: (-1, -3) and (-5,), each followed by an end token; means -2 and -5, together -3.5."""
    options = {"correct": (Likelihood(" ba do", (-1.0, -3.0, -9.0)), Likelihood(" ka", (-5.0, -9.0)))}
    asked = [Outcome(0, "q", " ba", None, (-1.0,), (True,), alternatives=options)]
    assert score_cell(cell("logprob_correct"), measured(asked)).value == pytest.approx(-3.5)
    score = score_cell(cell("logprob_random"), measured(asked))
    assert score.value is None
    assert score.reason.startswith(
        "not computed, because none of 1 examples has a value: options.json lists no random"
    )
